"""Images and videos through the vision tower, equal grids together, within a memory bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.models.vision import (
    VisionFeatures,
    VisionModel,
    VisionPass,
    normalize_patches,
    vision_tables,
)
from qwen3vl_mlx.processing.image import VisualInput

# Patches encoded in one pass, unless one image alone has more.
MAX_PATCHES = 16384


def encode(tower: VisionModel, media: Sequence[VisualInput]) -> VisionFeatures:
    """Features of all visual tokens, in the order of `media`, which may repeat. Not awaited.

    Media of one grid share a pass, and each image or frame attends to itself alone.
    """
    encoding = Encoding(tower, media)
    encoding.step(encoding.tokens_left)
    return VisionFeatures.concatenate([encoding.features[medium.identity] for medium in media])


class Encoding:
    """Images and videos on their way through the tower, a bounded amount of work at a time.

    Media of one identity are encoded once. What shares a pass is settled at the start, so features
    are the same, bit by bit, however the work is divided. Nothing outside holds what is under way:
    dropping an Encoding frees it.
    """

    def __init__(self, tower: VisionModel, media: Sequence[VisualInput]):
        self.features: dict[str, VisionFeatures] = {}  # by identity, as each is complete
        self._tower = tower
        distinct = {medium.identity: medium for medium in media}
        parts = [part for identity in distinct for part in _parts(identity, distinct[identity])]
        self._batches = deque(_batches(parts))
        self._running: VisionPass | None = None  # of the first batch
        self._pieces: dict[str, dict[int, VisionFeatures]] = {identity: {} for identity in distinct}

    @property
    def tokens_left(self) -> int:
        """Work that is not queued yet: visual tokens through the whole tower, rounded up."""
        depth = self._tower.config.depth
        work = sum(map(_num_tokens, self._batches)) * depth
        if self._running is not None:
            work -= _num_tokens(self._batches[0]) * (depth - self._running.blocks_left)
        return -(-work // depth)

    def step(self, tokens: int) -> bool:
        """Queue at most `tokens` visual tokens' worth of work; returns whether all is queued.

        One block over a pass of M tokens is M / depth tokens' worth, and a step is one block at
        least. The host waits only where attention has no fused kernel (see `full_attention`).
        """
        budget = tokens * self._tower.config.depth
        started = False
        while self._batches:
            size = _num_tokens(self._batches[0])
            blocks = budget // size
            if blocks < 1 and started:
                break
            budget -= size * self._advance(max(1, blocks))
            started = True
        return not self._batches

    def _advance(self, blocks: int) -> int:
        """Queue up to `blocks` blocks of the first batch; returns how many that were."""
        batch = self._batches[0]
        if self._running is None:
            self._running = _start(self._tower, [part.visual for part in batch])
        before = self._running.blocks_left
        self._running.advance(blocks)
        left = self._running.blocks_left
        if left:
            mx.async_eval(*self._running.arrays)
        else:
            features = self._running.features()
            self._running = None
            self._batches.popleft()
            self._collect(batch, features)
        return before - left

    def _collect(self, batch: Sequence[_Part], features: VisionFeatures) -> None:
        start = 0
        arrays: list[mx.array] = []
        for part in batch:
            stop = start + part.visual.num_tokens
            piece = features[start:stop].compact() if len(batch) > 1 else features
            start = stop
            pieces = self._pieces[part.identity]
            pieces[part.index] = piece
            if len(pieces) == part.count:
                del self._pieces[part.identity]
                piece = VisionFeatures.concatenate([pieces[i] for i in range(part.count)])
                self.features[part.identity] = piece
            arrays += piece.arrays
        mx.async_eval(*arrays)


@dataclass(frozen=True)
class _Part:
    """A piece of a medium, or all of it, that stays within one pass."""

    identity: str  # of the medium
    index: int
    count: int  # parts of the medium
    visual: VisualInput


def _parts(identity: str, medium: VisualInput) -> list[_Part]:
    """A video in runs of whole frames that hold at most MAX_PATCHES patches; an image as it is."""
    t, h, w = medium.grid_thw
    step = max(1, MAX_PATCHES // (h * w))
    if t <= step:
        return [_Part(identity, 0, 1, medium)]
    count = -(-t // step)
    return [
        _Part(
            identity,
            first // step,
            count,
            replace(
                medium,
                patches=medium.patches[first * h * w : (first + step) * h * w],
                grid_thw=(min(step, t - first), h, w),
            ),
        )
        for first in range(0, t, step)
    ]


def _batches(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Runs of one kind that hold at most MAX_PATCHES patches, or one part."""
    batches: list[list[_Part]] = []
    size = 0
    for part in sorted(parts, key=lambda part: (part.visual.kind, part.visual.grid_thw)):
        count = len(part.visual.patches)
        if (
            batches
            and batches[-1][0].visual.kind == part.visual.kind
            and size + count <= MAX_PATCHES
        ):
            batches[-1].append(part)
            size += count
        else:
            batches.append([part])
            size = count
    return batches


def _num_tokens(batch: Sequence[_Part]) -> int:
    return sum(part.visual.num_tokens for part in batch)


def _start(tower: VisionModel, media: Sequence[VisualInput]) -> VisionPass:
    settings = media[0].settings
    raw = mx.array(
        np.concatenate([m.patches for m in media]) if len(media) > 1 else media[0].patches
    )
    dtype = tower.patch_embed.proj.weight.dtype
    patches = normalize_patches(raw, settings.mean, settings.std, dtype)
    return VisionPass(tower, patches, vision_tables([m.grid_thw for m in media], tower.config))
