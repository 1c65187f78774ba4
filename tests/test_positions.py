"""Sizes, positions and rope against recorded HF values, and against HF's definitions as loops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.errors import ImageError, PromptError
from qwen3vl_mlx.models.config import RopeConfig, VisionConfig, parse_config
from qwen3vl_mlx.models.positions import Grid, RopeIndex, Span, find_spans, rope_index
from qwen3vl_mlx.models.rope import MRope, mrope_axes, rotate
from qwen3vl_mlx.models.vision import VisionTables, vision_tables
from qwen3vl_mlx.processing.image import PixelBudget, smart_resize, smart_resize_video

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "goldens.json").read_text())
IMAGE, VIDEO, START, END = 151655, 151656, 151652, 151653
RELEASED_IMAGE = PixelBudget(65536, 16777216)
RELEASED_VIDEO = PixelBudget(4096, 25165824)


def vision_config(num_position_embeddings: int = 2304) -> VisionConfig:
    config = tiny.tiny_config("dense64")
    config["vision_config"]["num_position_embeddings"] = num_position_embeddings
    return parse_config(config).vision


def index_of(token_ids: Sequence[int], images: Sequence[Grid], videos: Sequence[Grid]) -> RopeIndex:
    return rope_index(
        np.array(token_ids, np.int32),
        images,
        videos,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        spatial_merge_size=2,
    )


# Sizes


@pytest.mark.parametrize(
    ("height", "width", "rows", "cols"),
    GOLDENS["smart_resize_image_min65536_max16777216_factor32"],
)
def test_image_sizes(height: int, width: int, rows: int, cols: int) -> None:
    assert smart_resize(height, width, 32, RELEASED_IMAGE) == (rows, cols)
    assert smart_resize(width, height, 32, RELEASED_IMAGE) == (cols, rows)


@pytest.mark.parametrize(
    ("frames", "height", "width", "rows", "cols"),
    GOLDENS["smart_resize_video_uncapped_min4096_max25165824"],
)
def test_video_sizes(frames: int, height: int, width: int, rows: int, cols: int) -> None:
    assert smart_resize_video(frames, height, width, 32, 2, RELEASED_VIDEO) == (rows, cols)


@pytest.mark.parametrize(("frames", "counted"), [(2, 2), (3, 4), (5, 4), (6, 6), (7, 8)])
def test_frames_are_rounded_half_to_even_pairs(frames: int, counted: int) -> None:
    """As many frames as count against the budget: not those there are, nor those padded to."""
    area = counted * 64 * 96
    assert smart_resize_video(frames, 64, 96, 32, 2, PixelBudget(area, area)) == (64, 96)


@settings(deadline=None)
@given(
    short=st.integers(1, 2000),
    aspect=st.floats(1, 200),
    least=st.integers(1, 2**20),
    room=st.integers(4, 64),
)
def test_resized_images_fit(short: int, aspect: float, least: int, room: int) -> None:
    """Whole tiles, at least one, within a budget that leaves room for rounding."""
    budget = PixelBudget(least, least * room)
    rows, cols = smart_resize(short, int(short * aspect), 32, budget)
    assert rows % 32 == cols % 32 == 0
    assert least <= rows * cols
    assert rows * cols <= budget.max_pixels or min(rows, cols) == 32


@pytest.mark.parametrize(("height", "width"), [(1, 201), (2001, 10)])
def test_narrow_pictures_are_refused(height: int, width: int) -> None:
    with pytest.raises(ImageError, match="at most 200"):
        smart_resize(height, width, 32, RELEASED_IMAGE)
    with pytest.raises(ImageError, match="at most 200"):  # each side a whole tile
        smart_resize_video(2, height * 32, width * 32, 32, 2, RELEASED_VIDEO)


# The tower's tables


def taps_of(tables: VisionTables) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Indexes and weights (N, 4)."""
    weights = mx.concatenate(tables.weights, axis=1)
    return np.array(mx.stack(tables.taps, axis=1)), np.array(weights)


def coordinates_of(tables: VisionTables) -> npt.NDArray[np.int64]:
    """(row, col) of every patch (N, 2), from the slowest angles of each axis."""
    quarter = tables.cos.shape[-1] // 2
    slowest = 10000 ** (-(quarter - 1) / quarter)
    angles = np.arctan2(np.array(tables.sin), np.array(tables.cos))[:, 0]
    return np.rint(angles[:, [quarter - 1, 2 * quarter - 1]] / slowest).astype(np.int64)


def naive_tables(
    grids: Sequence[Grid], side: int
) -> tuple[list[tuple[int, int]], npt.NDArray[np.float64]]:
    """Coordinates, and each patch's weights over the whole table (N, side * side), by the book."""
    coordinates: list[tuple[int, int]] = []
    rows: list[npt.NDArray[np.float64]] = []
    for frames, height, width in grids:
        for _ in range(frames):
            for k in range(height * width):
                block, inner = divmod(k, 4)
                block_row, block_col = divmod(block, width // 2)
                row, col = 2 * block_row + inner // 2, 2 * block_col + inner % 2
                coordinates.append((row, col))
                y, x = (
                    at * (side - 1) / max(size - 1, 1) for at, size in ((row, height), (col, width))
                )
                weights = np.zeros((side, side))
                for i in range(side):
                    for j in range(side):
                        weights[i, j] = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
                rows.append(weights.reshape(-1))
    return coordinates, np.stack(rows)


def test_position_interpolation() -> None:
    golden = GOLDENS["pos_embed_interp_grid_1x4x6_and_1x2x2"]
    taps, weights = taps_of(vision_tables([(1, 4, 6), (1, 2, 2)], vision_config()))
    assert np.array_equal(taps, golden["idx"])
    assert np.allclose(weights, golden["w"], rtol=0, atol=2e-6)


def test_patch_order() -> None:
    tables = vision_tables([(1, 4, 6)], vision_config())
    assert coordinates_of(tables).tolist() == GOLDENS["vision_pos_hw_1x4x6"]


GRIDS = st.tuples(
    st.integers(1, 3),
    st.integers(1, 5).map(lambda n: 2 * n),
    st.integers(1, 5).map(lambda n: 2 * n),
)


@settings(deadline=None)
@given(grids=st.lists(GRIDS, min_size=1, max_size=3))
def test_tables_by_the_book(grids: list[Grid]) -> None:
    side = 5
    tables = vision_tables(grids, vision_config(side * side))
    coordinates, expected = naive_tables(grids, side)
    assert [tuple(pair) for pair in coordinates_of(tables).tolist()] == coordinates
    taps, weights = taps_of(tables)
    ours = np.zeros(expected.shape)
    np.add.at(ours, (np.arange(len(taps))[:, None], taps), weights)
    assert np.allclose(ours, expected, rtol=0, atol=1e-5)
    lengths = [length for count, length in tables.segments for _ in range(count)]
    assert lengths == [h * w for t, h, w in grids for _ in range(t)]


# M-RoPE


@pytest.mark.parametrize(
    ("mrope_section", "axes"),
    [
        ((24, 20, 20), "THW" * 20 + "TTTT"),  # every released model
        ((6, 5, 5), "THW" * 5 + "T"),
        ((5, 1, 2), "THWTTWTT"),
        ((8, 0, 0), "T" * 8),
    ],
)
def test_mrope_axes(mrope_section: tuple[int, int, int], axes: str) -> None:
    """The slowest frequencies turn too little to show in a short prompt: so read the layout."""
    assert mrope_axes(mrope_section, len(axes)) == ["THW".index(axis) for axis in axes]


def test_mrope_cosines() -> None:
    rope = MRope(RopeConfig(5e6, (24, 20, 20)), 128)
    cos, sin = rope.table(mx.array([[[3]], [[50]], [[700]]]))
    golden = GOLDENS["mrope_cos_for_t3_h50_w700_head128_theta5e6"]
    assert cos.shape == sin.shape == (1, 1, 1, 64)
    assert np.allclose(np.array(cos)[0, 0, 0], golden, rtol=0, atol=2e-5)
    assert np.allclose(np.array(cos**2 + sin**2), 1)


@settings(deadline=None)
@given(data=st.data())
def test_rows_of_equal_axes_are_plain_rope(data: st.DataObject) -> None:
    """Decode's shortcut: one offset per row turns vectors as the table of three axes does."""
    offsets = data.draw(st.lists(st.integers(0, 1000), min_size=1, max_size=3))
    length = data.draw(st.integers(1, 4))
    rope = MRope(RopeConfig(5e6, (6, 5, 5)), 32)
    random = np.random.RandomState(0)
    shape = (len(offsets), 2, length, 32)
    x = mx.array(random.standard_normal(shape).astype(np.float32))
    at = mx.array(offsets)[:, None] + mx.arange(length)  # (B, L)
    turned = rotate(x, *rope.table(mx.broadcast_to(at, (3, *at.shape))))
    assert np.allclose(np.array(rope.shift(x, mx.array(offsets))), np.array(turned), atol=1e-3)


# Where every token of a prompt stands


def test_rope_index() -> None:
    golden = GOLDENS["rope_index"]
    index = index_of(
        golden["input_ids"],
        [tuple(grid) for grid in golden["image_grid_thw"]],
        [tuple(grid) for grid in golden["video_grid_thw"]],
    )
    assert index.position_ids.tolist() == golden["position_ids"]
    assert index.rope_delta == golden["rope_delta"]
    assert index.spans == (Span(3, 2, 3), Span(13, 2, 2), Span(21, 2, 2))


@dataclass(frozen=True)
class Layout:
    token_ids: tuple[int, ...]
    images: tuple[Grid, ...]
    videos: tuple[Grid, ...]


@st.composite
def layouts(draw: st.DrawFn, wrapped: bool = True) -> Layout:
    """Prompts of text, images and videos; with `wrapped`, as the templates write them."""
    ids: list[int] = []
    images: list[Grid] = []
    videos: list[Grid] = []
    side = st.integers(1, 4).map(lambda n: 2 * n)
    for kind in draw(st.lists(st.sampled_from(["text", "image", "video"]), max_size=6)):
        if kind == "text":
            ids += draw(st.lists(st.integers(0, 1000), max_size=4))
            continue
        frames, height, width = draw(st.integers(1, 3)), draw(side), draw(side)
        token = IMAGE if kind == "image" else VIDEO
        if kind == "image":
            images.append((1, height, width))
            frames = 1
        else:
            videos.append((frames, height, width))
        run = [token] * (height * width // 4)
        for second in range(frames):
            ids += [second, START, *run, END] if wrapped else run
    return Layout(tuple(ids), tuple(images), tuple(videos))


def naive_rope_index(layout: Layout) -> tuple[list[list[int]], int]:
    """HF's `get_rope_index`, token by token: positions by axis, and the delta."""
    grids = {
        IMAGE: list(layout.images),
        VIDEO: [(1, h, w) for t, h, w in layout.videos for _ in range(t)],
    }
    axes: list[list[int]] = [[], [], []]
    current = at = 0
    while at < len(layout.token_ids):
        token = layout.token_ids[at]
        if token not in grids:
            for axis in axes:
                axis.append(current)
            current, at = current + 1, at + 1
            continue
        _, height, width = grids[token].pop(0)
        for row in range(height // 2):
            for col in range(width // 2):
                for axis, step in zip(axes, (0, row, col), strict=True):
                    axis.append(current + step)
                at += 1
        current += max(height, width) // 2
    highest = max(map(max, axes)) if layout.token_ids else -1
    return axes, highest + 1 - len(layout.token_ids)


@settings(deadline=None)
@given(layout=st.one_of(layouts(), layouts(wrapped=False)))
def test_rope_index_by_the_book(layout: Layout) -> None:
    index = index_of(layout.token_ids, layout.images, layout.videos)
    position_ids, rope_delta = naive_rope_index(layout)
    assert index.position_ids.tolist() == position_ids
    assert index.rope_delta == rope_delta
    assert index.position_ids.dtype == np.int32
    covered = [i for span in index.spans for i in range(span.start, span.stop)]
    visual = [i for i, token in enumerate(layout.token_ids) if token in (IMAGE, VIDEO)]
    assert covered == visual


@settings(deadline=None)
@given(layout=layouts(), data=st.data())
def test_counts_that_disagree_are_refused(layout: Layout, data: st.DataObject) -> None:
    """One placeholder too many or too few, one medium too many or too few: an error, always."""
    visual = [i for i, token in enumerate(layout.token_ids) if token in (IMAGE, VIDEO)]
    broken: list[Layout] = [
        Layout(layout.token_ids, (*layout.images, (1, 2, 2)), layout.videos),
        Layout(layout.token_ids, layout.images, (*layout.videos, (1, 2, 2))),
    ]
    if visual:
        at = data.draw(st.sampled_from(visual))
        ids = layout.token_ids
        broken += [
            Layout((*ids[:at], *ids[at + 1 :]), layout.images, layout.videos),
            Layout((*ids[:at], ids[at], *ids[at:]), layout.images, layout.videos),
        ]
    if layout.images:
        broken.append(Layout(layout.token_ids, layout.images[1:], layout.videos))
    if layout.videos:
        broken.append(Layout(layout.token_ids, layout.images, layout.videos[1:]))
    for wrong in broken:
        with pytest.raises(PromptError):
            index_of(wrong.token_ids, wrong.images, wrong.videos)


@pytest.mark.parametrize(
    ("token_ids", "images", "videos", "message"),
    [
        ([1, IMAGE], [], [], "more image placeholders than images given"),
        ([1, VIDEO], [(1, 2, 2)], [], "more video placeholders than videos given"),
        (
            [1, IMAGE, 2],
            [(1, 4, 4)],
            [],
            "grid 4 x 4 needs 4 placeholder tokens, .* has 1 at token 1",
        ),
        ([1, 2], [(1, 4, 4)], [], "1 image frame"),
        ([VIDEO], [], [(3, 2, 2)], "2 video frame"),
    ],
)
def test_errors_name_the_trouble(
    token_ids: list[int], images: list[Grid], videos: list[Grid], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        index_of(token_ids, images, videos)


def test_spans_of_neighbours_without_a_wrapper() -> None:
    ids = np.array([7, *[IMAGE] * 5, *[VIDEO] * 2, IMAGE], np.int32)
    spans = find_spans(
        ids,
        [(1, 4, 4), (1, 2, 2), (1, 2, 2)],
        [(2, 2, 2)],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        spatial_merge_size=2,
    )
    assert [(span.start, span.stop) for span in spans] == [(1, 5), (5, 6), (6, 7), (7, 8), (8, 9)]
