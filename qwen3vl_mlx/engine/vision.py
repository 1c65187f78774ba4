"""Images and videos through the vision tower, equal grids together, within a memory bound."""

from __future__ import annotations

from collections.abc import Sequence

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
    order = sorted(range(len(media)), key=lambda i: (media[i].kind, media[i].grid_thw))
    encoded: dict[int, VisionFeatures] = {}
    for batch in _batches(media, order):
        features = _encode_batch(tower, [media[i] for i in batch])
        start = 0
        for i in batch:
            encoded[i] = features[start : start + media[i].num_tokens]
            start += media[i].num_tokens
        if len(order) > len(batch):
            mx.async_eval(features.embeds, *features.deepstack)
    return VisionFeatures.concatenate([encoded[i] for i in range(len(media))])


def _batches(media: Sequence[VisualInput], order: Sequence[int]) -> list[list[int]]:
    """Runs of one kind that hold at most MAX_PATCHES patches, or one medium."""
    batches: list[list[int]] = []
    size = 0
    for i in order:
        count = len(media[i].patches)
        if batches and media[batches[-1][0]].kind == media[i].kind and size + count <= MAX_PATCHES:
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
