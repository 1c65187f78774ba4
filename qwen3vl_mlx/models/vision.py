"""The vision tower: patches in, visual tokens and DeepStack features out.

Knows patches and grids; nothing of images, prompts or requests. Attributes carry the checkpoint's
names. Source: HF `Qwen3VLVisionModel` (transformers 5) and the Qwen3-VL report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn

from qwen3vl_mlx.models.attention import full_attention
from qwen3vl_mlx.models.config import VisionConfig
from qwen3vl_mlx.models.positions import Grid
from qwen3vl_mlx.models.rope import inverse_frequencies, rotate

_ROPE_THETA = 10000.0
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class VisionFeatures:
    """What the decoder sees of M visual tokens."""

    embeds: mx.array  # (M, hidden_size)
    deepstack: tuple[mx.array, ...]  # one (M, hidden_size) per DeepStack index

    def __getitem__(self, rows: slice) -> VisionFeatures:
        return VisionFeatures(self.embeds[rows], tuple(x[rows] for x in self.deepstack))

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.embeds, *self.deepstack)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays)

    def compact(self) -> VisionFeatures:
        """The same in buffers of their own size: a slice would keep all it was cut from."""
        embeds, *deepstack = map(mx.contiguous, self.arrays)
        return VisionFeatures(embeds, tuple(deepstack))

    @staticmethod
    def concatenate(parts: Sequence[VisionFeatures]) -> VisionFeatures:
        levels = zip(*(part.deepstack for part in parts), strict=True)
        return VisionFeatures(
            mx.concatenate([part.embeds for part in parts]),
            tuple(mx.concatenate([*level]) for level in levels),
        )


@dataclass(frozen=True)
class VisionTables:
    """All that depends on the grids alone, for N patches in merge order. Cacheable by grid."""

    taps: tuple[mx.array, mx.array, mx.array, mx.array]  # (N,) int32 each, into pos_embed
    weights: tuple[mx.array, mx.array, mx.array, mx.array]  # (N, 1) float32 each
    cos: mx.array  # (N, 1, head_dim // 2) float32
    sin: mx.array
    segments: tuple[tuple[int, int], ...]  # (count, length) runs of equal attention segments


def vision_tables(grid_thw: Sequence[Grid], config: VisionConfig) -> VisionTables:
    """Build the tables for images and videos laid one after another.

    Positions are bilinear with aligned corners over the square table, like HF
    `get_vision_interpolation_indices_and_weights`.
    """
    coords = [_merge_order(t, h, w, config.spatial_merge_size) for t, h, w in grid_thw]
    row = mx.concatenate([rows for rows, _ in coords])  # (N,)
    col = mx.concatenate([cols for _, cols in coords])
    sizes = mx.array([(t * h * w, h, w) for t, h, w in grid_thw])
    owner = mx.concatenate([mx.full((t * h * w,), i) for i, (t, h, w) in enumerate(grid_thw)])
    side = math.isqrt(config.num_position_embeddings)
    top, bottom, down = _axis_taps(row, sizes[owner, 1], side)
    left, right, across = _axis_taps(col, sizes[owner, 2], side)
    up, back = 1 - down, 1 - across
    inv_freq = inverse_frequencies(_ROPE_THETA, config.head_dim // 2)  # (head_dim // 4,)
    angles = mx.concatenate([row[:, None] * inv_freq, col[:, None] * inv_freq], axis=-1)
    frames = [h * w for t, h, w in grid_thw for _ in range(t)]
    return VisionTables(
        taps=(
            top * side + left,
            top * side + right,
            bottom * side + left,
            bottom * side + right,
        ),
        weights=(
            (up * back)[:, None],
            (up * across)[:, None],
            (down * back)[:, None],
            (down * across)[:, None],
        ),
        cos=mx.cos(angles)[:, None],
        sin=mx.sin(angles)[:, None],
        segments=tuple((len(list(run)), length) for length, run in groupby(frames)),
    )


def _merge_order(t: int, h: int, w: int, merge: int) -> tuple[mx.array, mx.array]:
    """Row and column of every patch of a grid, merge block by merge block: (t * h * w,) each."""
    blocks = (h // merge, merge, w // merge, merge)
    row = mx.broadcast_to(mx.arange(h).reshape(h // merge, merge, 1, 1), blocks)
    col = mx.broadcast_to(mx.arange(w).reshape(1, 1, w // merge, merge), blocks)
    flat = [mx.tile(x.transpose(0, 2, 1, 3).reshape(-1), t) for x in (row, col)]
    return flat[0], flat[1]


def _axis_taps(index: mx.array, size: mx.array, side: int) -> tuple[mx.array, mx.array, mx.array]:
    """The two table rows around each target index, and the weight of the second."""
    source = index.astype(mx.float32) * (side - 1) / mx.maximum(size - 1, 1)
    low = mx.floor(source)
    first = low.astype(mx.int32)
    return first, mx.minimum(first + 1, side - 1), source - low


def normalize_patches(
    patches: mx.array, mean: Sequence[float], std: Sequence[float], dtype: mx.Dtype
) -> mx.array:
    """uint8 patches (N, ... * channels), channels last, to (x / 255 - mean) / std in `dtype`."""
    repeats = patches.shape[1] // len(mean)
    low = mx.array([255 * m for m in mean] * repeats, mx.float32)
    scale = mx.array([255 * s for s in std] * repeats, mx.float32)
    return _normalize(patches, low, scale, mx.zeros((1,), dtype))


@partial(mx.compile, shapeless=True)
def _normalize(patches: mx.array, low: mx.array, scale: mx.array, like: mx.array) -> mx.array:
    return ((patches.astype(mx.float32) - low) / scale).astype(like.dtype)


@partial(mx.compile, shapeless=True)
def _blend(
    a: mx.array,
    b: mx.array,
    c: mx.array,
    d: mx.array,
    wa: mx.array,
    wb: mx.array,
    wc: mx.array,
    wd: mx.array,
) -> mx.array:
    return (a * wa + b * wb + c * wc + d * wd).astype(a.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        # Holds the weight (D, T, P, P, C); stride equals kernel, so the product is one matmul.
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, size, stride=size)

    def __call__(self, patches: mx.array) -> mx.array:
        """Patches (N, T * P * P * C), or (N, P * P * C) for stills, whose T slices are equal."""
        weight = self.proj.weight
        still = patches.shape[1] * weight.shape[1] == weight.size // weight.shape[0]
        if still:
            weight = weight.astype(mx.float32).sum(axis=1).astype(weight.dtype)
        # A contiguous right-hand side, for the same reason as in loading.column_major.
        matrix = mx.contiguous(weight.reshape(weight.shape[0], -1).T)
        return mx.addmm(self.proj.bias, patches, matrix)  # (N, D)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.scale = config.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array, tables: VisionTables) -> mx.array:
        count, hidden = x.shape
        qkv = self.qkv(x).reshape(count, 3, self.num_heads, -1)
        q = rotate(qkv[:, 0], tables.cos, tables.sin)  # (N, heads, head_dim)
        k = rotate(qkv[:, 1], tables.cos, tables.sin)
        v = qkv[:, 2]
        outputs, start = [], 0
        for segments, length in tables.segments:
            stop = start + segments * length
            split = (segments, length, self.num_heads, -1)
            parts = [y[start:stop].reshape(split).swapaxes(1, 2) for y in (q, k, v)]
            attended = full_attention(parts[0], parts[1], parts[2], self.scale)
            outputs.append(attended.swapaxes(1, 2).reshape(segments * length, hidden))
            start = stop
        return self.proj(outputs[0] if len(outputs) == 1 else mx.concatenate(outputs))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_fc2(nn.gelu_approx(self.linear_fc1(x)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, tables: VisionTables) -> mx.array:
        x = x + self.attn(self.norm1(x), tables)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """2 x 2 patches to one token. DeepStack mergers normalise after joining the four patches."""

    def __init__(self, config: VisionConfig, use_postshuffle_norm: bool):
        super().__init__()
        merged = config.hidden_size * config.spatial_merge_size**2
        self.use_postshuffle_norm = use_postshuffle_norm
        self.norm = nn.LayerNorm(merged if use_postshuffle_norm else config.hidden_size, _NORM_EPS)
        self.linear_fc1 = nn.Linear(merged, merged)
        self.linear_fc2 = nn.Linear(merged, config.out_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        merged = self.linear_fc1.weight.shape[0]
        if self.use_postshuffle_norm:
            x = self.norm(x.reshape(-1, merged))
        else:
            x = self.norm(x).reshape(-1, merged)  # (N / 4, 4 D): merge order makes blocks adjacent
        return self.linear_fc2(nn.gelu(self.linear_fc1(x)))


class VisionModel(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = [Block(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config, use_postshuffle_norm=False)
        self.deepstack_merger_list = [
            PatchMerger(config, use_postshuffle_norm=True) for _ in config.deepstack_visual_indexes
        ]

    def position_embeds(self, tables: VisionTables, dtype: mx.Dtype) -> mx.array:
        """Bilinear position embeddings, summed in float32: (N, hidden_size)."""
        a, b, c, d = (self.pos_embed(tap) for tap in tables.taps)
        wa, wb, wc, wd = tables.weights
        return _blend(a, b, c, d, wa, wb, wc, wd).astype(dtype)

    def __call__(self, patches: mx.array, tables: VisionTables) -> VisionFeatures:
        """Encode N normalised patches in merge order, all stills or all video.

        patches: (N, T * P * P * C), or (N, P * P * C) for stills. Returns N / 4 visual tokens.
        """
        run = VisionPass(self, patches, tables)
        run.advance(self.config.depth)
        return run.features()


class VisionPass:
    """N patches on their way through the tower, some blocks at a time. Lazy.

    However the blocks are divided, the features are those of `VisionModel.__call__`, which takes
    them in one go. `tower`, `patches` and `tables` as there.
    """

    def __init__(self, tower: VisionModel, patches: mx.array, tables: VisionTables):
        self.tower = tower
        self.tables = tables
        self.blocks_left = tower.config.depth
        hidden = tower.patch_embed(patches)  # (N, D)
        self._hidden = hidden + tower.position_embeds(tables, hidden.dtype)
        self._deepstack: list[mx.array] = []

    @property
    def arrays(self) -> list[mx.array]:
        """All that is under way. Evaluated between calls of `advance`, it frees the rest."""
        return [self._hidden, *self._deepstack]

    def advance(self, blocks: int) -> None:
        """Go through up to `blocks` more blocks, as far as there are any."""
        tower = self.tower
        first = tower.config.depth - self.blocks_left
        for index in range(first, min(first + blocks, tower.config.depth)):
            # Nothing else may name the old value, or MLX could not write over its buffer.
            self._hidden = tower.blocks[index](self._hidden, self.tables)
            if index in tower.config.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[len(self._deepstack)]
                self._deepstack.append(merger(self._hidden))
            self.blocks_left -= 1

    def features(self) -> VisionFeatures:
        """The visual tokens, once no blocks are left."""
        assert not self.blocks_left
        return VisionFeatures(self.tower.merger(self._hidden), tuple(self._deepstack))
