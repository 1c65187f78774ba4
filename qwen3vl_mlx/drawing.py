"""Boxes and points drawn on a picture, with labels that can be read at any size."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.media import ImageSource, load_image
from qwen3vl_mlx.tasks_parsing import Box, Point

if TYPE_CHECKING:
    import PIL.Image
    import PIL.ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

RGB: TypeAlias = tuple[int, int, int]
_Rectangle: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom, all inside

_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
# Colours that no common colour blindness mixes up: Okabe and Ito's but for black, then Paul Tol's
# that are unlike them.
_COLORS: tuple[RGB, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (51, 34, 136), (136, 34, 85), (17, 119, 51), (221, 204, 119), (153, 153, 51),
)  # fmt: skip
_GOLDEN = (math.sqrt(5) - 1) / 2  # of a turn: hues that many steps apart never meet
_OTHERS = 0.4  # how strongly the rest is drawn beside a highlight
_LONGEST_LABEL = 40  # characters
_CROWD = 200  # of the last labels, those that a new one keeps clear of
# For labels outside of Latin; the first that the system has. Pillow's own font knows Latin only.
_FONTS = (
    "Arial Unicode.ttf", "Hiragino Sans GB.ttc", "STHeiti Light.ttc", "PingFang.ttc",
    "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf",
)  # fmt: skip


def draw(
    image: ImageSource, found: Sequence[Box | Point], *, highlight: int | None = None
) -> PIL.Image.Image:
    """A new upright RGB picture with what was found on it; `image` stays as it is.

    image: what `detect` or `point` was asked about. Each label has a colour of its own. highlight:
    which of `found` stands out, counted from 0; the rest is dimmed. Raises InputError for what is
    no Box or Point, and for a highlight that is not there.
    """
    from PIL import Image

    picture = load_image(image)
    _check(found, highlight)
    found = [_clipped(each, picture.size) for each in found]
    colors = label_colors(found)
    rest = [each for index, each in enumerate(found) if index != highlight]
    sketch = _Sketch(picture.copy(), _font_for(picture.size, found))
    sketch.add(rest, colors, line=_line(picture.size))
    if highlight is None:
        return sketch.picture
    sketch.picture = Image.blend(picture, sketch.picture, _OTHERS)
    sketch.add([found[highlight]], colors, line=2 * _line(picture.size))
    return sketch.picture


def label_colors(found: Sequence[Box | Point]) -> dict[str, RGB]:
    """The colour `draw` gives to each label, in order of their first appearance."""
    labels = dict.fromkeys(each.label for each in found)
    return {label: _color(index) for index, label in enumerate(labels)}


def _color(index: int) -> RGB:
    if index < len(_COLORS):
        return _COLORS[index]
    red, green, blue = colorsys.hsv_to_rgb(
        index * _GOLDEN % 1, (0.9, 0.6)[index % 2], (0.95, 0.65, 0.8)[index % 3]
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def _ink(color: RGB) -> RGB:
    """Black or white, whichever has more contrast with a colour, as WCAG measures it."""
    red, green, blue = (
        level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4
        for level in (value / 255 for value in color)
    )
    return _BLACK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else _WHITE


def _check(found: Sequence[Box | Point], highlight: int | None) -> None:
    for each in found:
        if not isinstance(each, (Box, Point)):
            raise InputError(f"only Box and Point can be drawn, got {type(each).__name__}")
        if not all(map(math.isfinite, _edges(each))):
            raise InputError(f"coordinates must be finite numbers, got {each}")
    if highlight is not None and not (type(highlight) is int and 0 <= highlight < len(found)):
        raise InputError(
            f"highlight must be None or the number of one of {len(found)} things, counted from 0, "
            f"got {highlight!r}"
        )


def _edges(each: Box | Point) -> tuple[float, float, float, float]:
    if isinstance(each, Box):
        return each.x0, each.y0, each.x1, each.y1
    return each.x, each.y, each.x, each.y


def _clipped(each: Box | Point, size: tuple[int, int]) -> Box | Point:
    if isinstance(each, Point):
        return Point(_clip(each.x, size[0]), _clip(each.y, size[1]), each.label)
    width, height = size
    x0, y0, x1, y1 = _edges(each)
    return Box(_clip(x0, width), _clip(y0, height), _clip(x1, width), _clip(y1, height), each.label)


def _clip(value: float, side: int) -> float:
    return min(max(value, 0.0), float(side))


def _line(size: tuple[int, int]) -> int:
    """How wide lines are, in pixels: what shows when the picture fills a window."""
    return max(2, round(max(size) / 320))


def _font_for(size: tuple[int, int], found: Sequence[Box | Point]) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    height = max(10, round(math.sqrt(size[0] * size[1]) / 36))
    if not all(each.label.isascii() for each in found):
        latin = all(ord(char) < 0x250 for each in found for char in each.label)
        for name in () if latin else _FONTS:
            with suppress(OSError):
                return ImageFont.truetype(name, height)
    return ImageFont.load_default(height)


@dataclass
class _Sketch:
    """A picture that is drawn on, and where its labels are."""

    picture: PIL.Image.Image
    font: FreeTypeFont | ImageFont
    tags: list[_Rectangle] = field(default_factory=list)

    def add(self, found: Sequence[Box | Point], colors: dict[str, RGB], *, line: int) -> None:
        """Draw outlines and dots, then the labels over all of them."""
        from PIL import ImageDraw

        pen = ImageDraw.Draw(self.picture)
        for each in found:
            if isinstance(each, Box):
                _outline(pen, _pixels(each, self.picture.size), colors[each.label], line)
            else:
                _dot(pen, each, colors[each.label], line)
        for each in found:
            self._tag(pen, each, colors[each.label], line)

    def _tag(self, pen: PIL.ImageDraw.ImageDraw, each: Box | Point, color: RGB, line: int) -> None:
        width, height = self.picture.size
        pad = max(1, line)
        text, text_width = self._fitted(_plain(each.label), width - 2 * pad)
        _, top, _, bottom = self.font.getbbox("Ag|")
        tag = text_width + 2 * pad, math.ceil(bottom - top) + 2 * pad
        if not text or tag[1] > height:
            return
        place = self._place(each, tag, line)
        pen.rectangle(place, fill=color)
        pen.text((place[0] + pad, place[1] + pad - top), text, fill=_ink(color), font=self.font)
        self.tags.append(place)

    def _fitted(self, text: str, room: int) -> tuple[str, int]:
        """As much of a text as fits a width, and how wide that is."""

        def width(length: int) -> int:
            shown = text if length == len(text) else text[:length] + "..."
            return math.ceil(self.font.getlength(shown))

        if width(len(text)) <= room:
            return text, width(len(text))
        low, high = 0, len(text) - 1  # letters that fit, that may fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if width(middle) <= room else (low, middle - 1)
        return (text[:low] + "...", width(low)) if low else ("", 0)

    def _place(self, each: Box | Point, tag: tuple[int, int], line: int) -> _Rectangle:
        """Where a label stands: beside its thing if it can, clear of other labels."""
        width, height = self.picture.size
        taken = self.tags[-_CROWD:]
        thing = _pixels(each, self.picture.size)
        if isinstance(each, Point):
            thing = _grown(thing, 3 * line)
        inside = _spots_inside(thing, tag) if isinstance(each, Box) else ()
        places = []
        for keep_clear, spots in (([thing, *taken], _spots_beside(thing, tag)), (taken, inside)):
            for x, y in spots:
                left, top = min(max(x, 0), width - tag[0]), min(max(y, 0), height - tag[1])
                place = (left, top, left + tag[0] - 1, top + tag[1] - 1)
                if not any(_meet(place, other) for other in keep_clear):
                    return place
                places.append(place)
        return places[-1]


def _spots_beside(thing: _Rectangle, tag: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Left and top of a label that touches its thing from outside, the best first."""
    (left, top, right, bottom), (width, height) = thing, tag
    for y in (top - height, bottom + 1):
        yield left, y
        yield right + 1 - width, y
    for x in (right + 1, left - width):
        yield x, top
        yield x, bottom + 1 - height


def _spots_inside(thing: _Rectangle, tag: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Left and top of a label in the corners of its box; the usual one is last."""
    (left, top, right, bottom), (width, height) = thing, tag
    yield right + 1 - width, top
    yield right + 1 - width, bottom + 1 - height
    yield left, bottom + 1 - height
    yield left, top


def _grown(place: _Rectangle, by: int) -> _Rectangle:
    return place[0] - by, place[1] - by, place[2] + by, place[3] + by


def _meet(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _plain(label: str) -> str:
    """One line of characters that a font can be asked for."""
    line = " ".join(label.encode(errors="replace").decode().split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 3] + "..."


def _pixels(each: Box | Point, size: tuple[int, int]) -> _Rectangle:
    """The pixels that a thing in the picture covers, one at least."""
    x0, y0, x1, y1 = _edges(each)
    left, top = min(math.floor(x0), size[0] - 1), min(math.floor(y0), size[1] - 1)
    return left, top, max(math.ceil(x1) - 1, left), max(math.ceil(y1) - 1, top)


def _outline(pen: PIL.ImageDraw.ImageDraw, place: _Rectangle, color: RGB, line: int) -> None:
    """A coloured frame between two dark lines, which shows on a ground of its own colour too."""
    edge = max(1, line // 3)
    left, top, right, bottom = place
    half = min(right - left, bottom - top) // 2
    for inset, fill, width in ((0, _BLACK, line + 2 * edge), (edge, color, line)):
        inset = min(inset, half)
        reach = min(width - 1, half - inset)
        x0, y0, x1, y1 = left + inset, top + inset, right - inset, bottom - inset
        # Four bars, as Pillow's own outline leaves a rectangle that is thinner than it.
        for bar in (
            (x0, y0, x1, y0 + reach),
            (x0, y1 - reach, x1, y1),
            (x0, y0, x0 + reach, y1),
            (x1 - reach, y0, x1, y1),
        ):
            pen.rectangle(bar, fill=fill)


def _dot(pen: PIL.ImageDraw.ImageDraw, point: Point, color: RGB, line: int) -> None:
    edge = max(1, line // 2)
    for radius, fill in ((2 * line + edge, _BLACK), (2 * line, color)):
        pen.ellipse(
            (point.x - radius, point.y - radius, point.x + radius, point.y + radius), fill=fill
        )
