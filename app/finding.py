"""What was found in a picture: drawn, named, and hit by a click."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from qwen3vl_mlx import draw
from qwen3vl_mlx.tasks import Box, Point, parse_boxes, parse_points

if TYPE_CHECKING:
    from PIL.Image import Image

Place: TypeAlias = "Box | Point"

_SHOWN = (1000, 2000)  # pixels of the longer side, least: labels are sharp; most: quick to send
_NEAR = 0.04  # of the longer side: a click so close to a point means it
EVERYTHING = "All"


@dataclass(frozen=True)
class Finding:
    """Places in a picture, in its own pixels. `picture` is a copy of a size that is good to show.

    scale: pixels of the shown picture to one of the picture that was asked about.
    """

    picture: Image
    places: tuple[Place, ...]
    scale: float = 1.0

    @classmethod
    def of(cls, picture: Image, places: Sequence[Place] = ()) -> Finding:
        """With a picture of a size that is good to show."""
        longer = max(picture.size)
        scale = min(max(longer, _SHOWN[0]), _SHOWN[1]) / longer
        size = [max(1, round(side * scale)) for side in picture.size]
        shown = picture if scale == 1 else picture.resize((size[0], size[1]))
        return cls(shown, tuple(places), scale)

    def drawn(self, highlight: int | None = None) -> Image:
        """The shown picture with all places, one of them highlighted."""
        return draw(self.picture, [scaled(p, self.scale) for p in self.places], highlight=highlight)

    def names(self) -> list[str]:
        """One line a place."""
        return [f"{number}. {told(place)}" for number, place in enumerate(self.places, 1)]

    def at(self, x: float, y: float) -> int | None:
        """The smallest box around a pixel of the shown picture, or the nearest point."""
        x, y = x / self.scale, y / self.scale
        boxes = [
            ((p.x1 - p.x0) * (p.y1 - p.y0), number)
            for number, p in enumerate(self.places)
            if isinstance(p, Box) and p.x0 <= x <= p.x1 and p.y0 <= y <= p.y1
        ]
        if boxes:
            return min(boxes)[1]
        reach = _NEAR * max(self.picture.size) / self.scale
        points = [
            (((p.x - x) ** 2 + (p.y - y) ** 2) ** 0.5, number)
            for number, p in enumerate(self.places)
            if isinstance(p, Point)
        ]
        near = [each for each in points if each[0] <= reach]
        return min(near)[1] if near else None


def parse(answers: Sequence[str], size: tuple[int, int], *, points: bool) -> list[Place]:
    """All places in some answers, once each; also in an answer that is not complete yet."""
    read = parse_points if points else parse_boxes
    return list(dict.fromkeys(place for answer in answers for place in read(answer, size)))


def scaled(place: Place, scale: float) -> Place:
    """The same place in a picture that is `scale` times as large."""
    if isinstance(place, Point):
        return replace(place, x=place.x * scale, y=place.y * scale)
    return replace(
        place,
        x0=place.x0 * scale,
        y0=place.y0 * scale,
        x1=place.x1 * scale,
        y1=place.y1 * scale,
    )


def told(place: Place) -> str:
    """A place in words: what, and where in pixels."""
    if isinstance(place, Point):
        return f"{place.label or 'unnamed'} ({place.x:.0f}, {place.y:.0f})"
    ends = f"({place.x0:.0f}, {place.y0:.0f}) to ({place.x1:.0f}, {place.y1:.0f})"
    return f"{place.label or 'unnamed'} {ends}"
