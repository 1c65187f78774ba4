"""Rotary embeddings: interleaved M-RoPE with YaRN for text, axial rope for the vision tower.

Tables are fp32 and built once per pass; vectors are rotated in fp32 and cast back.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TypeAlias

import mlx.core as mx

from qwen3vl_mlx.models.config import RopeConfig, YarnConfig

Rotation: TypeAlias = "tuple[mx.array, mx.array] | mx.array"  # paired tables, or offsets per row


def inverse_frequencies(theta: float, dim: int) -> mx.array:
    """theta^(-2k/dim) for k in 0 .. dim/2 - 1: shape (dim // 2,), float32."""
    return 1.0 / (theta ** (mx.arange(0, dim, 2, dtype=mx.float32) / dim))


def yarn_inverse_frequencies(theta: float, dim: int, yarn: YarnConfig) -> mx.array:
    """Frequencies stretched by `factor` below a ramp and kept above it (arXiv:2309.00071, 3.2)."""

    def dimension_of(rotations: float) -> float:
        span = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(theta))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high  # the ramp must not divide by zero
    ramp = mx.clip((mx.arange(dim // 2, dtype=mx.float32) - low) / (high - low), 0, 1)
    kept = inverse_frequencies(theta, dim)
    return kept / yarn.factor * ramp + kept * (1 - ramp)


def mrope_axes(mrope_section: tuple[int, int, int], half: int) -> list[int]:
    """Which axis (0 time, 1 height, 2 width) turns each of the `half` frequencies.

    Interleaved: T H W T H W ... until an axis' section is used up, T for the rest.
    """
    axes = [0] * half
    for axis in (1, 2):
        for k in range(axis, 3 * mrope_section[axis], 3):
            axes[k] = axis
    return axes


class MRope:
    """The decoder's rotary embedding. Holds constants only, no state of any request."""

    def __init__(self, config: RopeConfig, head_dim: int):
        self.head_dim = head_dim
        if config.yarn is None:
            self.inv_freq, self.attention_scaling = inverse_frequencies(config.theta, head_dim), 1.0
        else:
            self.inv_freq = yarn_inverse_frequencies(config.theta, head_dim, config.yarn)
            self.attention_scaling = config.yarn.attention_factor
        self.axes = mx.array(mrope_axes(config.mrope_section, head_dim // 2))
        self.wavelengths = 1.0 / self.inv_freq  # what mx.fast.rope calls freqs
        mx.eval(self.inv_freq, self.axes, self.wavelengths)
        # Off the GPU mx.fast.rope is a dozen small operations for each q and k of each layer.
        self.fused = mx.default_device() != mx.Device(mx.cpu)

    def rotation(self, positions: mx.array, length: int) -> Rotation:
        """What a pass of `length` tokens turns its queries and keys by, made once for all layers.

        positions: (3, B, L) three-axis position ids, or (B,) the position of each row's first
        token where all axes count together.
        """
        if positions.ndim == 3:
            return paired(*self.table(positions))
        if self.fused:
            return positions
        counted = positions[:, None] + mx.arange(length)  # (B, L)
        return paired(*self._cos_sin(counted[..., None].astype(mx.float32) * self.inv_freq))

    def table(self, position_ids: mx.array) -> tuple[mx.array, mx.array]:
        """cos and sin of `position_ids` (3, B, L): each (B, 1, L, head_dim // 2), float32."""
        chosen = mx.take(mx.moveaxis(position_ids, 0, -1), self.axes, axis=-1)  # (B, L, half)
        return self._cos_sin(chosen.astype(mx.float32) * self.inv_freq)

    def _cos_sin(self, angles: mx.array) -> tuple[mx.array, mx.array]:
        cos, sin = mx.cos(angles), mx.sin(angles)
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos[:, None], sin[:, None]

    def __call__(self, x: mx.array, rotation: Rotation) -> mx.array:
        """Rotate x (B, heads, L, head_dim) by what `rotation` gave for this pass."""
        if isinstance(rotation, tuple):
            return turn(x, *rotation)
        return self.shift(x, rotation)

    def shift(self, x: mx.array, offset: mx.array) -> mx.array:
        """Rotate x (B, heads, L, head_dim) whose rows start at `offset` (B,), all axes equal."""
        rotated = mx.fast.rope(
            x,
            self.head_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self.wavelengths,
        )
        return rotated if self.attention_scaling == 1.0 else rotated * self.attention_scaling


@partial(mx.compile, shapeless=True)
def _turn(x: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (x.astype(mx.float32) * cos + swapped.astype(mx.float32) * sin).astype(x.dtype)


def paired(cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    """Tables (..., dim // 2) as `turn` takes them: (..., 1, dim // 2) and (..., 2, dim // 2)."""
    return cos[..., None, :], mx.stack([-sin, sin], axis=-2)


def turn(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate the halves of the last axis of x by `paired` tables."""
    halves = mx.unflatten(x, -1, (2, -1))  # (..., 2, dim // 2)
    a, b = mx.split(halves, 2, axis=-2)
    # One fused kernel: the float32 values are never written out.
    return mx.flatten(_turn(halves, mx.concatenate([b, a], axis=-2), cos, sin), -2)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate the halves of the last axis of x by tables that broadcast to (..., dim // 2)."""
    return turn(x, *paired(cos, sin))
