"""Weights to codes, with what is known of a module's inputs: ranges, and errors passed on.

Rows are independent, so a weight may be taken in blocks of rows. Columns are rounded one after the
other, and those still to come take over what each leaves (GPTQ, arXiv:2210.17323).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.models.config import Quantization

_SHRINK = (1.0, 0.94, 0.88, 0.81, 0.73, 0.64)  # of each end of a group's range
_SHRINK_FINE = (1.0, 0.97)  # where there are codes enough, from 5 bits on
_FP4_TOP = 6.0
_FP8_TOP = 448.0
_TINY = 1e-12
_LEAST_SCALE = 1e-7  # of an affine group of equal values, as in mx.quantize
_LEAST_FP8 = 2.0**-9


@dataclass(frozen=True)
class Sensitivity:
    """What rounding errors cost, by column of a weight (out, in), in n blocks of b columns.

    importance: (n, b), cost of a squared error. feedback: (n, b, b), unit upper triangular: what
    column j takes over of the error of column i before it; None rounds each for itself.
    """

    importance: mx.array
    feedback: mx.array | None = None


def sensitivity(moments: npt.NDArray[np.float64], damping: float) -> Sensitivity:
    """From second moments of a module's inputs, (n, b, b): E[x x^T] within each block.

    damping: part of the mean square that is added to each; it bounds what columns take over.
    """
    count, size, _ = moments.shape
    added = damping * np.einsum("nii->", moments) / (count * size) + _TINY
    inverse = np.linalg.inv(moments + added * np.eye(size))
    upper = np.linalg.cholesky(inverse).swapaxes(1, 2)  # inverse = upper^T upper
    diagonal = np.einsum("nii->ni", upper)
    return Sensitivity(
        mx.array((diagonal**-2.0).astype(np.float32)),
        mx.array((upper / diagonal[:, :, None]).astype(np.float32)),
    )


def block_width(width: int, limit: int) -> int:
    """Columns of a block: at most `limit`, dividing `width`, with no group across two blocks."""
    unit = math.gcd(width, 128)
    sizes = [size for size in range(unit, min(width, limit) + 1, unit) if width % size == 0]
    return max(sizes, default=unit)


def round_rows(
    rows: mx.array, settings: Quantization, dtype: mx.Dtype, known: Sensitivity
) -> dict[str, mx.array]:
    """Quantize rows (R, in): `weight`, `scales` and, in affine mode, `biases`, as `apply.pack`.

    dtype: of affine scales and biases. Differs from `mx.quantize` in values, not in format.
    """
    count, size = known.importance.shape
    group, width = settings.group_size, count * size
    left = rows.astype(mx.float32).T.reshape(count, size, -1)  # (n, b, R); then what is to come
    codes: list[mx.array] = []
    stored: list[list[mx.array]] = []
    for start in range(0, size, group):
        stop = start + group
        here, left = left[:, :group], left[:, group:]
        form = _fit(here, known.importance[:, start:stop, None], settings, dtype)
        if known.feedback is None:
            codes.append(form.round(here)[0])
        else:
            found, errors = _round_group(here, form, known.feedback[:, start:stop, start:stop])
            codes.append(found)
            left = left - known.feedback[:, start:stop, stop:].swapaxes(1, 2) @ errors
        stored.append(form.stored())
        mx.eval(left, codes[-1], stored[-1])
    parts = {
        "weight": pack_codes(mx.concatenate(codes, axis=1).reshape(width, -1).T, settings.bits)
    }
    for key, tensors in zip(("scales", "biases"), zip(*stored, strict=True), strict=False):
        joined = mx.concatenate(list(tensors), axis=1)  # (n, b / g, R)
        parts[key] = mx.contiguous(joined.reshape(width // group, -1).T)
    return parts


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes (R, in) as a stream of bits, lowest first, in words: (R, in * bits / 32) uint32."""
    per = 32 // math.gcd(bits, 32)  # codes that fill whole words
    runs = codes.astype(mx.uint32).reshape(codes.shape[0], -1, per)
    words = [mx.zeros(runs.shape[:-1], mx.uint32) for _ in range(per * bits // 32)]
    for index in range(per):
        word, shift = divmod(index * bits, 32)
        words[word] = words[word] | mx.left_shift(runs[..., index], shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | mx.right_shift(runs[..., index], 32 - shift)
    return mx.stack(words, axis=-1).reshape(codes.shape[0], -1)


def _round_group(group: mx.array, form: _Format, feedback: mx.array) -> tuple[mx.array, mx.array]:
    """Codes and errors, both (n, g, R), of a group rounded column by column."""
    codes, errors = [], []
    for index in range(group.shape[1]):
        value = group[:, index : index + 1]  # (n, 1, R)
        code, rounded = form.round(value)
        errors.append(value - rounded)
        codes.append(code)
        group = group - feedback[:, index, :, None] * errors[-1]
    return mx.concatenate(codes, axis=1), mx.concatenate(errors, axis=1)


def _fit(group: mx.array, importance: mx.array, settings: Quantization, dtype: mx.Dtype) -> _Format:
    """Scales that cost least on group (n, g, R), squared errors weighing importance (n, g, 1)."""
    if settings.mode != "affine":
        top = mx.maximum(mx.abs(group).max(axis=1, keepdims=True), _TINY)
        return _cheapest(_BLOCK_SCALES[settings.mode](top), group, importance)
    low, high = group.min(axis=1, keepdims=True), group.max(axis=1, keepdims=True)
    shrink = _SHRINK if settings.bits < 5 else _SHRINK_FINE
    tried = (_affine(low * a, high * b, settings.bits, dtype) for a, b in product(shrink, shrink))
    return _cheapest(tried, group, importance)


def _cheapest(tried: Iterable[_Form], group: mx.array, importance: mx.array) -> _Form:
    best: _Form | None = None
    least = mx.array(math.inf)
    for form in tried:
        cost = _cost(group, form.round(group)[1], importance)  # (n, 1, R)
        best = form if best is None else form.where(cost < least, best)
        least = mx.minimum(cost, least)
    assert best is not None
    return best


@partial(mx.compile, shapeless=True)
def _cost(group: mx.array, rounded: mx.array, importance: mx.array) -> mx.array:
    return (mx.square(group - rounded) * importance).sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class _Affine:
    """value = code * scale + bias, codes up to `top`."""

    scale: mx.array  # (n, 1, R), float32 that the stored type holds
    bias: mx.array
    top: mx.array
    dtype: mx.Dtype

    def round(self, values: mx.array) -> tuple[mx.array, mx.array]:
        return _round_affine(values, self.scale, self.bias, self.top)

    def where(self, chosen: mx.array, other: _Affine) -> _Affine:
        scale = mx.where(chosen, self.scale, other.scale)
        return replace(self, scale=scale, bias=mx.where(chosen, self.bias, other.bias))

    def stored(self) -> list[mx.array]:
        return [self.scale.astype(self.dtype), self.bias.astype(self.dtype)]


def _affine(low: mx.array, high: mx.array, bits: int, dtype: mx.Dtype) -> _Affine:
    top = 2**bits - 1
    scale = mx.maximum((high - low) / top, _LEAST_SCALE).astype(dtype).astype(mx.float32)
    bias = low.astype(dtype).astype(mx.float32)
    return _Affine(scale, bias, mx.array(top, mx.float32), dtype)


@partial(mx.compile, shapeless=True)
def _round_affine(
    values: mx.array, scale: mx.array, bias: mx.array, top: mx.array
) -> tuple[mx.array, mx.array]:
    code = mx.minimum(mx.maximum(mx.round((values - bias) / scale), 0), top)
    return code, code * scale + bias


@dataclass(frozen=True)
class _Blocks:
    """value = small float * scale, the float of 4 (e2m1) or 8 bits (e4m3)."""

    scale: mx.array  # (n, 1, R) float32
    byte: mx.array  # the scale as stored, uint8
    bits: int

    def round(self, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.bits == 4:
            return _round_fp4(values, self.scale)
        code = mx.to_fp8(mx.clip(values / self.scale, -_FP8_TOP, _FP8_TOP))
        return code, mx.from_fp8(code, mx.float32) * self.scale

    def where(self, chosen: mx.array, other: _Blocks) -> _Blocks:
        scale = mx.where(chosen, self.scale, other.scale)
        return replace(self, scale=scale, byte=mx.where(chosen, self.byte, other.byte))

    def stored(self) -> list[mx.array]:
        return [self.byte]


@partial(mx.compile, shapeless=True)
def _round_fp4(values: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
    """Magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 are codes 0 to 7; a sign adds 8."""
    size = mx.abs(values) / scale
    step = mx.where(size < 2, 0.5, mx.where(size < 4, 1.0, 2.0))
    size = mx.minimum(mx.round(size / step) * step, _FP4_TOP)
    code = mx.where(size < 2, 2 * size, mx.where(size < 4, size + 2, size / 2 + 4))
    negative = values < 0
    return mx.where(negative, code + 8, code), mx.where(negative, -size, size) * scale


_Format: TypeAlias = "_Affine | _Blocks"  # how the values of groups (n, g, R) are stored
_Form = TypeVar("_Form", _Affine, _Blocks)


def _power_scales(top: mx.array, bits: int, largest: float, steps: Sequence[int]) -> list[_Blocks]:
    """Powers of two (e8m0: a biased exponent) near top / largest."""
    exponent = mx.round(mx.log2(top / largest))
    exponents = [mx.clip(exponent + step, -126, 127) for step in steps]
    return [_Blocks(mx.power(2.0, e), (e + 127).astype(mx.uint8), bits) for e in exponents]


def _float_scales(top: mx.array) -> list[_Blocks]:
    """Floats of 8 bits (e4m3) near top / 6."""
    wanted = (top / _FP4_TOP * (0.6 + 0.06 * step) for step in range(16))
    bytes_ = [mx.to_fp8(mx.clip(scale, _LEAST_FP8, _FP8_TOP)) for scale in wanted]
    return [_Blocks(mx.from_fp8(byte, mx.float32), byte, 4) for byte in bytes_]


_BLOCK_SCALES: Mapping[str, Callable[[mx.array], list[_Blocks]]] = MappingProxyType(
    {
        "mxfp4": partial(_power_scales, bits=4, largest=_FP4_TOP, steps=(0, -1, 1)),
        "mxfp8": partial(_power_scales, bits=8, largest=_FP8_TOP, steps=(0, 1)),
        "nvfp4": _float_scales,
    }
)
