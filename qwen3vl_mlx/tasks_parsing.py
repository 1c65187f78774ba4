"""A model's answer to boxes, points and documents.

Qwen3-VL gives places as numbers from 0 to 1000 across the width and the height of the picture,
whatever its size: [{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}, ...] and
[{"point_2d": [x, y], "label": "cat"}, ...].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.tasks_json import Cut, fragments

DocumentForm: TypeAlias = Literal["markdown", "html"]

_SCALE = 1000
_BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box", "bounding_box")
_POINT_KEYS = ("point_2d", "point", "points_2d", "points")
_LABEL_KEYS = ("label", "text_content", "text", "name", "category", "class", "object")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"\s*(```+|~~~+)\s*([\w+-]*)\s*")
_FORM_NAMES = MappingProxyType({"markdown": ("markdown", "md"), "html": ("html",)})
_PAGE_START = re.compile(r"<!doctype|<html", re.I)
_PAGE_END = re.compile(r"</html\s*>", re.I)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the upright picture: x0 < x1, y0 < y1, inside the picture."""

    x0: float
    y0: float
    x1: float
    y1: float
    label: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and a string, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Point:
    """A place in pixels of the upright picture."""

    x: float
    y: float
    label: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and a string, ready for JSON."""
        return asdict(self)


def parse_boxes(answer: str, size: tuple[int, int]) -> list[Box]:
    """The boxes in an answer, in its order; none where it holds none.

    size: width and height of the picture in pixels. Coordinates outside it are clipped, corners
    put in order. What has no area is dropped, as are repetitions. An answer that is cut off gives
    the boxes before the cut. Raises InputError for an impossible size only.
    """
    width, height = _checked(size)
    boxes = (_box(group, width, height, label) for group, label in _places(answer, _BOX_KEYS, (4,)))
    return list(dict.fromkeys(box for box in boxes if box is not None))


def parse_points(answer: str, size: tuple[int, int]) -> list[Point]:
    """The points in an answer; where it has a box instead, the middle of it.

    The rest is as in `parse_boxes`.
    """
    width, height = _checked(size)
    points = (
        _point(group, width, height, label)
        for group, label in _places(answer, (*_POINT_KEYS, *_BOX_KEYS), (2, 4))
    )
    return list(dict.fromkeys(point for point in points if point is not None))


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    try:
        width, height = size
        good = 0 < width < math.inf and 0 < height < math.inf
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InputError(f"size must be (width, height) in pixels, got {size!r}")
    return width, height


def _box(group: Sequence[float], width: int, height: int, label: str) -> Box | None:
    x0, x1 = sorted(_pixels(value, width) for value in group[0::2])
    y0, y1 = sorted(_pixels(value, height) for value in group[1::2])
    return Box(x0, y0, x1, y1, label) if x0 < x1 and y0 < y1 else None


def _point(group: Sequence[float], width: int, height: int, label: str) -> Point | None:
    if len(group) == 2:
        return Point(_pixels(group[0], width), _pixels(group[1], height), label)
    box = _box(group, width, height, label)
    return Point((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2, label) if box else None


def _pixels(value: float, side: int) -> float:
    return min(max(value, 0.0), float(_SCALE)) * side / _SCALE


# ---- numbers with their labels


def _places(
    answer: str, keys: Sequence[str], counts: Sequence[int]
) -> Iterator[tuple[tuple[float, ...], str]]:
    """Groups of as many numbers as `counts` allows, with labels.

    Lists of numbers alone count only where no object names a place.
    """
    values = [part.value for part in fragments(answer)]
    entries = [(entry, _first(entry, keys)) for value in values for entry in _entries(value)]
    named = [(entry, place) for entry, place in entries if place is not None]
    for entry, place in named:
        label = _label(entry)
        yield from ((group, label) for group in _groups(place, counts))
    if not named:
        yield from ((group, "") for value in values for group in _bare(value, counts))


def _entries(value: Any) -> Iterator[dict[str, Any]]:
    """All whole objects in a value, outer ones first."""
    if isinstance(value, dict):
        if not isinstance(value, Cut):
            yield value
        for inner in value.values():
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _first(entry: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _label(entry: dict[str, Any]) -> str:
    """What an entry is called: by the usual keys, else its first text."""
    named = [entry.get(key) for key in _LABEL_KEYS]
    texts = (value for value in (*named, *_others(entry)) if isinstance(value, str))
    return next((text.strip() for text in texts if text.strip()), "")


def _others(entry: dict[str, Any]) -> Iterator[Any]:
    places = (*_BOX_KEYS, *_POINT_KEYS)
    return (value for key, value in entry.items() if key not in places)


def _groups(place: Any, counts: Sequence[int]) -> Iterator[tuple[float, ...]]:
    """The numbers under one key: a group, a list of groups, two corners, or any as text."""
    if isinstance(place, str):
        place = _NUMBER.findall(place)
    if not isinstance(place, list):
        return
    if not any(isinstance(inner, list) for inner in place):
        group = _numbers(place)
        if len(group) in counts:
            yield group
        return
    inside = [_numbers(inner) if isinstance(inner, list) else () for inner in place]
    if 2 not in counts and [len(group) for group in inside] == [2, 2]:
        yield inside[0] + inside[1]
        return
    yield from (group for group in inside if len(group) in counts)


def _bare(value: Any, counts: Sequence[int]) -> Iterator[tuple[float, ...]]:
    """Groups in lists that stand in no object."""
    if not isinstance(value, list):
        return
    group = _numbers(value)
    if len(group) in counts:
        yield group
        return
    for inner in value:
        yield from _bare(inner, counts)


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    """Finite numbers, of numbers or of texts; empty where one is neither."""
    numbers: list[float] = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return ()
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return ()
        if not math.isfinite(number):
            return ()
        numbers.append(number)
    return tuple(numbers)


# ---- documents


def parse_document(answer: str, form: DocumentForm) -> str:
    """The document in an answer, without the fence around it and what is said outside of it.

    Fences that belong to the document stay. Raises InputError for an unknown form.
    """
    if form not in _FORM_NAMES:
        raise InputError(f"form {form!r} is unknown; use 'markdown' or 'html'")
    text = answer.strip()
    blocks = _fenced(text, form)
    if blocks:
        return "\n\n".join(blocks).strip()
    return _html(text) if form == "html" else text


def _fenced(text: str, form: DocumentForm) -> list[str]:
    """The blocks fenced as `form`; or the one fenced without a name, where that is all there is."""
    blocks: list[str] = []
    outside: list[str] = []
    body: list[str] | None = None
    inner = False  # a fence of the document's own is open
    nameless = False
    for number, line in enumerate(text.split("\n")):
        fence = _FENCE.fullmatch(line)
        name = fence[2].lower() if fence else ""
        if body is None:
            if fence and (name in _FORM_NAMES[form] or (not name and number == 0)):
                body, nameless = [], nameless or not name
            elif line.strip():
                outside.append(line)
        elif fence and not name and not inner:
            blocks.append("\n".join(body).strip("\n"))
            body = None
        else:
            if fence:
                inner = bool(name)
            body.append(line)
    if body is not None:  # cut off before the fence was closed
        blocks.append("\n".join(body).strip("\n"))
    return [] if nameless and outside else blocks


def _html(text: str) -> str:
    """From the beginning of a page to its end, where it has these."""
    start = _PAGE_START.search(text)
    ends = [match.end() for match in _PAGE_END.finditer(text)]
    return text[start.start() if start else 0 : ends[-1] if ends else None]
