"""FP8 checkpoints in blocks of 128 x 128, written and read back with a table of the 256 values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from layouts import Array, Tensors

BLOCK = 128
CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head", "model.visual"],
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


@dataclass(frozen=True)
class Codes:
    """float8_e4m3fn codes, to be stored as such."""

    bytes: npt.NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bytes.shape


Stored: TypeAlias = "Mapping[str, Array | Codes]"


def _value(code: int) -> float:
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, all ones are no number."""
    sign, exponent, mantissa = (-1.0) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


VALUES = np.array([_value(code) for code in range(256)], np.float32)


def encode(x: npt.NDArray[np.float32]) -> tuple[Codes, npt.NDArray[np.float32]]:
    """Codes of the nearest values, and the scale of every block of (..., rows, cols)."""
    rows, cols = (-(-size // BLOCK) for size in x.shape[-2:])
    scales = np.empty((*x.shape[:-2], rows, cols), np.float32)
    for i in range(rows):
        for j in range(cols):
            block = x[..., i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            scales[..., i, j] = np.abs(block).max((-2, -1)) / 448
    small = x / spread(scales, x.shape)
    codes = np.abs(np.abs(small)[..., None] - VALUES[:127]).argmin(-1)
    return Codes((codes + 128 * (small < 0)).astype(np.uint8)), scales


def decode(codes: Codes, scales: npt.NDArray[np.float32]) -> mx.array:
    """In bfloat16, rounded once."""
    whole = VALUES[codes.bytes] * spread(scales, codes.shape)
    return mx.array(whole).astype(mx.bfloat16)


def spread(scales: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    wide = scales.repeat(BLOCK, axis=-2).repeat(BLOCK, axis=-1)
    return wide[..., : shape[-2], : shape[-1]]


def to_fp8(tensors: Tensors, chosen: Callable[[str], bool]) -> tuple[Stored, Tensors]:
    """The chosen matrices as codes with `*_scale_inv` beside them, and what they stand for."""
    stored: dict[str, Array | Codes] = {}
    whole: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if not chosen(name):
            stored[name] = whole[name] = tensor
            continue
        stored[name], scales = codes, _ = encode(np.array(tensor))
        stored[f"{name}_scale_inv"] = scales
        whole[name] = decode(codes, scales)
    return stored, whole


def in_decoder(name: str) -> bool:
    """What Qwen's FP8 releases store so: every projection of the decoder, in the Hub's names."""
    return "language_model.layers." in name and ("_proj" in name)


def write(folder: Path, config: Mapping[str, Any], *shards: Stored) -> Path:
    """`layouts.write` for shards that may hold `Codes`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        _save(folder / name, tensors)
    weight_map = {key: name for name, part in zip(names, shards, strict=True) for key in part}
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _save(path: Path, tensors: Stored) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    start = 0
    for name, tensor in tensors.items():
        kind, data = _raw(tensor)
        offsets = [start, start := start + len(data)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def _raw(tensor: Array | Codes) -> tuple[str, bytes]:
    if isinstance(tensor, Codes):
        return "F8_E4M3", tensor.bytes.tobytes()
    array = mx.array(tensor)
    kinds = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint32: "U32"}
    words = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return kinds[array.dtype], np.array(words).tobytes()
