"""Boxes and points on a picture: where they belong, nowhere else, and legible."""

from __future__ import annotations

import io
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode, exif
from PIL import Image

from qwen3vl_mlx import Box, Point, draw
from qwen3vl_mlx.drawing import label_colors
from qwen3vl_mlx.errors import ImageError, InputError

GROUND = (131, 127, 119)  # no colour that is drawn


def ground(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GROUND)


def changed(picture: Image.Image) -> np.ndarray:
    """(height, width): where it is not the ground."""
    return (np.asarray(picture) != GROUND).any(axis=-1)


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is set, half-open."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def band(size: tuple[int, int], box: Box, width: int) -> np.ndarray:
    """Where the frame of a box may be: the pixels it covers, without those further inside."""
    left, top, right, bottom = pixels_of(box)
    mask = np.zeros(size[::-1], bool)
    mask[top:bottom, left:right] = True
    mask[top + width : bottom - width, left + width : right - width] = False
    return mask


def pixels_of(box: Box) -> tuple[int, int, int, int]:
    return math.floor(box.x0), math.floor(box.y0), math.ceil(box.x1), math.ceil(box.y1)


@st.composite
def boxes(draw: st.DrawFn, width: int, height: int) -> Box:
    x0, x1 = sorted(draw(st.tuples(*[st.floats(0, width)] * 2).filter(lambda x: x[0] < x[1])))
    y0, y1 = sorted(draw(st.tuples(*[st.floats(0, height)] * 2).filter(lambda y: y[0] < y[1])))
    return Box(x0, y0, x1, y1, "")


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([(300, 200), (64, 320), (700, 60)]))
def test_a_frame_is_on_its_box_and_nowhere_else(data: st.DataObject, size: tuple[int, int]) -> None:
    found = [data.draw(boxes(*size)) for _ in range(data.draw(st.integers(0, 3)))]
    mask = changed(draw(ground(*size), found))
    allowed = np.zeros_like(mask)
    for box in found:
        allowed |= band(size, box, width=6)
        left, top, right, bottom = pixels_of(box)
        assert mask[top, left:right].all()
        assert mask[bottom - 1, left:right].all()
        assert mask[top:bottom, left].all()
        assert mask[top:bottom, right - 1].all()
    assert not (mask & ~allowed).any()


def test_swapped_axes_would_be_seen() -> None:
    box = Box(40, 30, 160, 60, "")
    mask = changed(draw(ground(200, 200), [Box(box.y0, box.x0, box.y1, box.x1, "")]))
    assert (mask & ~band((200, 200), box, width=6)).any()


@pytest.mark.parametrize("size", [(200, 150), (1000, 750), (4000, 3000), (3000, 200), (120, 1600)])
def test_a_dot_is_on_its_point(size: tuple[int, int]) -> None:
    point = Point(size[0] * 0.25, size[1] * 0.75, "")
    left, top, right, bottom = bounds(changed(draw(ground(*size), [point])))
    assert abs((left + right) / 2 - point.x) <= 1
    assert abs((top + bottom) / 2 - point.y) <= 1
    assert max(size) / 200 <= right - left <= max(size) / 10


def tag(size: tuple[int, int], each: Box | Point, label: str = "red cat") -> Any:
    """Bounds of a label: what the picture has with it and not without it."""
    kind = type(each)
    values = {**each.to_dict(), "label": ""}
    bare = np.asarray(draw(ground(*size), [kind(**values)]))
    named = np.asarray(draw(ground(*size), [kind(**{**values, "label": label})]))
    return bounds((bare != named).any(axis=-1))


CORNERS = [
    Box(0, 0, 60, 50, ""), Box(240, 0, 300, 50, ""), Box(0, 150, 60, 200, ""),
    Box(240, 150, 300, 200, ""), Box(0, 0, 300, 200, ""), Box(0, 0, 300, 6, ""),
    Box(296, 190, 300, 200, ""), Point(0, 0, ""), Point(300, 200, ""), Point(0, 100, ""),
    Point(300, 0, ""), Point(150, 0, ""), Point(150, 200, ""),
]  # fmt: skip


@pytest.mark.parametrize("each", CORNERS)
def test_a_label_is_whole_and_beside_its_thing(each: Box | Point) -> None:
    left, top, right, bottom = tag((300, 200), Box(100, 80, 200, 160, ""))
    whole = (right - left, bottom - top)
    left, top, right, bottom = tag((300, 200), each)
    # A frame of the label's own colour may hide its rim.
    assert whole[0] - 8 <= right - left <= whole[0]
    assert whole[1] - 8 <= bottom - top <= whole[1]
    x0, y0, x1, y1 = pixels_of(each) if isinstance(each, Box) else (each.x, each.y, each.x, each.y)
    assert left - 12 <= x1
    assert x0 <= right + 12
    assert top - 12 <= y1
    assert y0 <= bottom + 12


@pytest.mark.parametrize("size", [(160, 120), (800, 600), (4000, 3000), (4000, 300), (300, 4000)])
def test_labels_grow_with_the_picture(size: tuple[int, int]) -> None:
    _, top, _, bottom = tag(size, Box(size[0] * 0.4, size[1] * 0.4, size[0] / 2, size[1] / 2, ""))
    assert bottom - top >= 12
    share = (bottom - top) / math.sqrt(size[0] * size[1])
    assert 1 / 40 <= share <= 1 / 8


def test_labels_keep_clear_of_each_other() -> None:
    found = [Box(50, 80, 250, 180, name) for name in ("a cat", "a dog", "a hen", "a cow")]
    colors = label_colors(found)
    array = np.asarray(draw(ground(300, 260), found))
    areas = [(array == colors[box.label]).all(axis=-1).sum() for box in found]
    assert min(areas) > 200  # of each label its ground is seen


@pytest.mark.parametrize("count", [12, 100])
def test_each_label_has_its_own_colour(count: int) -> None:
    names = [f"thing {i}" for i in range(count)]
    colors = label_colors([Box(0, 0, 1, 1, name) for name in names for _ in range(2)])
    assert list(colors) == names
    assert len(set(colors.values())) == count


def test_colours_are_told_apart_by_the_colour_blind() -> None:
    colors = label_colors([Point(0, 0, str(i)) for i in range(12)]).values()
    linear = [(np.array(color) / 255) ** 2.2 for color in colors]
    deuteranope = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    protanope = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    for sight in (np.eye(3), deuteranope, protanope):  # Viénot, Brettel and Mollon 1999
        seen = [np.clip(sight @ color, 0, 1) ** (1 / 2.2) * 255 for color in linear]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 20


def test_a_highlight_stands_out_and_the_rest_is_dimmed() -> None:
    found = [Box(20, 20, 120, 90, ""), Box(170, 110, 280, 190, ""), Point(60, 150, "")]
    size = (300, 200)
    alike = np.asarray(draw(ground(*size), found)).astype(int)
    lit = np.asarray(draw(ground(*size), found, highlight=1)).astype(int)
    frames = [band(size, box, width=10) for box in found[:2]]  # type: ignore[arg-type]
    contrast = [abs(array - GROUND).sum(axis=-1) for array in (alike, lit)]
    assert (contrast[1][frames[1]] > 0).sum() > 1.4 * (contrast[0][frames[1]] > 0).sum()
    assert 0 < contrast[1][frames[0]].sum() < 0.6 * contrast[0][frames[0]].sum()
    assert ((contrast[0] > 0) == (contrast[1] > 0))[~frames[1]].all()


@pytest.mark.parametrize(
    "label",
    [
        "猫と犬", "🙂👩‍👩‍👧", "\ud800", "a\x00b\x1b[31m", "two\nlines\tand tabs", "x" * 10_000,
        "שלום", "\u202ereversed", " ", "W" * 30,
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (3000, 20), (320, 200)])
def test_any_label_at_any_size(label: str, size: tuple[int, int]) -> None:
    for found in (
        [Box(0, 0, size[0] / 2, size[1] / 2, label)],
        [Point(size[0] / 3, size[1], label), Box(0, 0, *size, label)],
    ):
        assert draw(ground(*size), found, highlight=0).size == size


def test_what_lies_outside_is_drawn_at_the_edge() -> None:
    found = [Box(-1e300, 10, 1e300, 50, "wide"), Point(1e300, -5, "far"), Box(400, 9, 500, 20, "")]
    assert draw(ground(100, 80), found).size == (100, 80)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_the_source_stays_as_it_is(mode: str) -> None:
    picture = ground(200, 100).convert(mode)
    before = picture.tobytes()
    drawn = draw(picture, [Box(20, 20, 90, 80, "cat")])
    assert picture.tobytes() == before
    assert drawn is not picture
    assert drawn.mode == "RGB"
    assert draw(picture, []).tobytes() == picture.convert("RGB").tobytes()


def test_any_source_is_drawn_on_upright() -> None:
    stored = encode(ground(200, 100), "PNG", exif=exif(6))
    box = Box(20, 40, 80, 180, "")
    for source in (stored, Image.open(io.BytesIO(stored))):
        drawn = draw(source, [box])
        assert drawn.size == (100, 200)
        assert bounds(changed(drawn)) == pixels_of(box)
    with pytest.raises(ImageError, match="no such file"):
        draw("nowhere.png", [])


@pytest.mark.parametrize("highlight", [2, -1, 1.0, True, "0"])
def test_a_highlight_that_is_not_there(highlight: Any) -> None:
    with pytest.raises(InputError, match="highlight must be None or the number of one of 2 things"):
        draw(ground(9, 9), [Point(1, 1, ""), Point(2, 2, "")], highlight=highlight)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([(1, 2, 3, 4)], "only Box and Point can be drawn, got tuple"),
        ([Box(math.nan, 0, 1, 1, "")], "must be finite numbers, got Box"),
        ([Point(0, math.inf, "")], "must be finite numbers, got Point"),
    ],
)
def test_what_cannot_be_drawn(found: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(ground(9, 9), found)
