"""Pictures through the vision tower together give what each gives alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.engine import vision
from qwen3vl_mlx.engine.vision import encode
from qwen3vl_mlx.models.attention import full_attention, has_fused_kernel
from qwen3vl_mlx.models.config import VisionConfig
from qwen3vl_mlx.models.positions import Grid
from qwen3vl_mlx.models.vision import VisionModel, VisionTables
from qwen3vl_mlx.processing.image import VisualInput
from qwen3vl_mlx.processing.video import Video


def noise(seed: int, width: int, height: int) -> Image.Image:
    draws = np.random.RandomState(seed).randint(0, 256, (height, width, 3))
    return Image.fromarray(draws.astype(np.uint8))


@pytest.fixture(scope="module")
def media(tiny_model: Callable[[str], Qwen3VL]) -> list[VisualInput]:
    """Two pictures of one grid with another between them, and a video."""
    processor = tiny_model("dense72").processor
    sources = [
        noise(1, 96, 64),
        noise(2, 64, 128),
        Video([noise(seed, 96, 64) for seed in (3, 4, 5)]),
        noise(6, 96, 64),
    ]
    return [processor.visual_input(source, processor.image_budget()) for source in sources]


def flat(tower: VisionModel, media: Sequence[VisualInput]) -> list[np.ndarray]:
    features = encode(tower, media)
    return [np.array(x) for x in (features.embeds, *features.deepstack)]


@pytest.mark.parametrize("max_patches", [1, 40, 10**6])
def test_together_equals_alone(
    max_patches: int,
    tiny_model: Callable[[str], Qwen3VL],
    media: list[VisualInput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tower = tiny_model("dense72").model.vision_tower
    alone = zip(*(flat(tower, [medium]) for medium in media), strict=True)
    monkeypatch.setattr(vision, "MAX_PATCHES", max_patches)
    for got, parts in zip(flat(tower, media), alone, strict=True):
        expected = np.concatenate(parts)
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("order", [(0, 0), (3, 1, 0, 1), (2, 0, 2)])
def test_media_may_repeat_and_come_in_any_order(
    order: tuple[int, ...], tiny_model: Callable[[str], Qwen3VL], media: list[VisualInput]
) -> None:
    tower = tiny_model("dense72").model.vision_tower
    alone = zip(*(flat(tower, [media[i]]) for i in order), strict=True)
    for got, parts in zip(flat(tower, [media[i] for i in order]), alone, strict=True):
        expected = np.concatenate(parts)
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_equal_grids_share_a_pass_and_one_attention_call(
    tiny_model: Callable[[str], Qwen3VL], media: list[VisualInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tiny_model("dense72").model.vision_tower
    passes: list[tuple[tuple[int, int], ...]] = []
    build = vision.vision_tables

    def recorded(grids: Sequence[Grid], config: VisionConfig) -> VisionTables:
        tables = build(grids, config)
        passes.append(tables.segments)
        return tables

    monkeypatch.setattr(vision, "vision_tables", recorded)
    encode(tower, media)
    # Stills: two of 4 x 6 patches together and one of 8 x 4; video: two frames of 4 x 6.
    assert passes == [((2, 24), (1, 32)), ((2, 24),)]
    passes.clear()
    encode(tower, [media[0], media[1], media[0], media[0]])
    assert passes == [((1, 24), (1, 32))]  # what repeats is encoded once


def test_identity_follows_pixels_grid_kind_and_nothing_else(
    tiny_model: Callable[[str], Qwen3VL], media: list[VisualInput]
) -> None:
    processor = tiny_model("dense72").processor
    again = processor.visual_input(noise(1, 96, 64), processor.image_budget(None, 200_000))
    assert again.identity == media[0].identity
    assert len({medium.identity for medium in media}) == len(media)
    still = Video([noise(1, 96, 64)] * 2)
    assert processor.visual_input(still, processor.image_budget()).identity != again.identity


def test_scores_are_held_one_chunk_at_a_time() -> None:
    """Lazily chained chunks would all be in memory at once."""
    q, k, v = (mx.random.normal((1, 2, 2048, 32), key=mx.random.key(i)) for i in range(3))
    mx.eval(q, k, v)
    limit = 2**20

    def peak(score_bytes: int) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(full_attention(q, k, v, 1.0, score_bytes))
        return mx.get_peak_memory() - before

    if not has_fused_kernel(32, mx.float32):
        assert peak(2**40) > 2 * 2048 * 2048 * 4  # all scores
    assert peak(limit) < 4 * limit + 3 * q.nbytes
