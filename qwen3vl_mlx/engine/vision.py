"""Images and videos through the vision tower, equal grids together, within a memory bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.models.vision import (
    VisionFeatures,
    VisionModel,
    normalize_patches,
    vision_tables,
)
from qwen3vl_mlx.processing.image import VisualInput

# Patches encoded in one pass, unless one image alone has more.
MAX_PATCHES = 16384


def encode(tower: VisionModel, media: Sequence[VisualInput]) -> VisionFeatures:
    """Features of all visual tokens, in the order of `media`. Lazy.

    Media of one grid share a pass, and each image or frame attends to itself alone.
    """
    parts = [part for medium in media for part in _parts(medium)]
    order = sorted(range(len(parts)), key=lambda i: (parts[i].kind, parts[i].grid_thw))
    encoded: dict[int, VisionFeatures] = {}
    for batch in _batches(parts, order):
        features = _encode_batch(tower, [parts[i] for i in batch])
        start = 0
        for i in batch:
            encoded[i] = features[start : start + parts[i].num_tokens]
            start += parts[i].num_tokens
        if len(order) > len(batch):
            mx.async_eval(features.embeds, *features.deepstack)
    return VisionFeatures.concatenate([encoded[i] for i in range(len(parts))])


def _parts(medium: VisualInput) -> list[VisualInput]:
    """A video in runs of whole frames that hold at most MAX_PATCHES patches; an image as it is."""
    t, h, w = medium.grid_thw
    step = max(1, MAX_PATCHES // (h * w))
    if t <= step:
        return [medium]
    return [
        replace(
            medium,
            patches=medium.patches[first * h * w : (first + step) * h * w],
            grid_thw=(min(step, t - first), h, w),
        )
        for first in range(0, t, step)
    ]


def _batches(parts: Sequence[VisualInput], order: Sequence[int]) -> list[list[int]]:
    """Runs of one kind that hold at most MAX_PATCHES patches, or one part."""
    batches: list[list[int]] = []
    size = 0
    for i in order:
        count = len(parts[i].patches)
        if batches and parts[batches[-1][0]].kind == parts[i].kind and size + count <= MAX_PATCHES:
            batches[-1].append(i)
            size += count
        else:
            batches.append([i])
            size = count
    return batches


def _encode_batch(tower: VisionModel, media: Sequence[VisualInput]) -> VisionFeatures:
    settings = media[0].settings
    raw = mx.array(
        np.concatenate([m.patches for m in media]) if len(media) > 1 else media[0].patches
    )
    dtype = tower.patch_embed.proj.weight.dtype
    patches = normalize_patches(raw, settings.mean, settings.std, dtype)
    return tower(patches, vision_tables([m.grid_thw for m in media], tower.config))
