"""Pictures like those the demo checkpoint was trained on.

A scene is coloured shapes on a 3 x 3 grid of places, or one line of bold text, on a plain
background. Everything follows from the seed with the standard library's generator, so a seed gives
the same scene on every platform. Plain scenes are easy to look at; wide ones have all the sizes,
long and narrow ones too, and `retouch` does to a picture what happens to pictures on their way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from qwen3vl_mlx.errors import InputError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]

COLORS = MappingProxyType({
    "red": (220, 25, 28), "green": (30, 155, 50), "blue": (35, 75, 215),
    "yellow": (245, 225, 40), "orange": (248, 135, 20), "purple": (142, 40, 172),
    "black": (15, 15, 15), "white": (245, 245, 245), "gray": (125, 128, 130),
})  # fmt: skip
SHAPE_COLORS = tuple(color for color in COLORS if color != "gray")  # gray is a background only
SHAPES = ("circle", "square", "triangle", "star", "diamond")
PLACES = (
    "top left", "top", "top right", "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
WORDS = ("SUN", "CAT", "DOG", "RED", "BOX", "ONE", "TEN", "YES", "STOP", "OPEN", "EXIT", "SALE")

_MAX_AREA = 320 * 192
_COLOR_JITTER = 18
_LEAST_CONTRAST = 100  # of text with its background, in levels of luma
_STAR_WAIST = 0.42  # inner over outer radius
_FONT = Path(__file__).with_name("DejaVuSans-Bold-subset.ttf")
PILLOW_FONT = "pillow"  # the name of the font that is part of Pillow
_LONG = 0.3  # a picture whose sides have a smaller ratio has one row (or column) of places only


@dataclass(frozen=True)
class Shape:
    """One shape. `bbox` is x0, y0, x1, y1 in pixels, half-open; a star's is its circle's."""

    shape: str
    color: str
    bbox: Box
    position: str
    rgb: RGB

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Label:
    """One line of text. `bbox` is in pixels: the advance width wide, the ink high."""

    string: str
    color: str
    bbox: Box
    rgb: RGB
    font_size: int
    font: str | None = None  # a file's path or `PILLOW_FONT`; None is the bundled font


@dataclass(frozen=True)
class Noise:
    """Gaussian noise: standard deviation in levels of 255, one value a pixel or one a channel."""

    sigma: float
    per_channel: bool


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `scale` 2 draws at twice the size and averages: softened edges."""

    size: tuple[int, int]
    background: str
    background_rgb: RGB
    shapes: tuple[Shape, ...]
    label: Label | None
    noise: Noise | None
    scale: int
    seed: int

    @property
    def text(self) -> str | None:
        return self.label.string if self.label else None

    def draw(self) -> Image.Image:
        """Draw the scene as an RGB picture of `size` (width, height)."""
        from PIL import Image, ImageDraw

        width, height = self.size
        image = Image.new("RGB", (width * self.scale, height * self.scale), self.background_rgb)
        pen = ImageDraw.Draw(image)
        for shape in self.shapes:
            _draw_shape(pen, shape, self.scale)
        if self.label:
            _draw_label(pen, self.label, self.scale)
        if self.scale > 1:
            image = image.reduce(self.scale)
        return _add_noise(image, self.noise, self.seed) if self.noise else image


# -- drawing -----------------------------------------------------------------------------------


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, scale: int) -> None:
    x0, y0, x1, y1 = (int(v * scale) for v in shape.bbox)
    x1, y1 = x1 - 1, y1 - 1  # Pillow's coordinates include the last pixel
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    if shape.shape == "circle":
        pen.ellipse((x0, y0, x1, y1), fill=shape.rgb)
    elif shape.shape == "square":
        pen.rectangle((x0, y0, x1, y1), fill=shape.rgb)
    elif shape.shape == "triangle":
        pen.polygon([(cx, y0), (x1, y1), (x0, y1)], fill=shape.rgb)
    elif shape.shape == "diamond":
        pen.polygon([(cx, y0), (x1, cy), (cx, y1), (x0, cy)], fill=shape.rgb)
    elif shape.shape == "star":
        pen.polygon(_star(cx, cy, min(x1 - x0, y1 - y0) / 2), fill=shape.rgb)
    else:
        raise InputError(f"shape {shape.shape!r} is unknown; use one of {', '.join(SHAPES)}")


def _star(cx: float, cy: float, radius: float) -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        angle = math.pi * i / 5
        r = radius * (_STAR_WAIST if i % 2 else 1)
        # whole pixels, with a nudge, so that the last bit of sin and cos cannot matter
        x, y = cx + r * math.sin(angle), cy - r * math.cos(angle)
        points.append((float(int(x + 1e-6)), float(int(y + 1e-6))))
    return points


def font_of(size: int, font: str | None = None) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    if font == PILLOW_FONT:
        built_in = ImageFont.load_default(size)
        assert isinstance(built_in, ImageFont.FreeTypeFont)
        return built_in
    # the basic layout is in every build of Pillow; Raqm is not
    return ImageFont.truetype(font or str(_FONT), size, layout_engine=ImageFont.Layout.BASIC)


def _draw_label(pen: ImageDraw.ImageDraw, label: Label, scale: int) -> None:
    font = font_of(label.font_size * scale, label.font)
    left, top, _, _ = font.getbbox(label.string)
    origin = (label.bbox[0] * scale - left, label.bbox[1] * scale - top)
    pen.text(origin, label.string, fill=label.rgb, font=font)


def _add_noise(image: Image.Image, noise: Noise, seed: int) -> Image.Image:
    from PIL import Image, ImageChops

    normal = NormalDist(128, noise.sigma)
    levels = bytes(min(255, max(0, round(normal.inv_cdf((i + 0.5) / 256)))) for i in range(256))
    mode = "RGB" if noise.per_channel else "L"
    values = Random(f"noise {seed}").randbytes(image.width * image.height * len(mode))
    grain = Image.frombytes(mode, image.size, values.translate(levels))
    return ImageChops.add(image, grain.convert("RGB"), offset=-128)


def retouch(image: Image.Image, seed: int) -> Image.Image:
    """Resize a picture by 0.8 to 1.25, or write it as a JPEG of quality 40 to 95, or both."""
    from io import BytesIO

    from PIL import Image

    rng = Random(f"retouch {seed}")
    resized, written = rng.choice(((True, False), (False, True), (True, True)))
    if resized:
        factor = 0.8 * (1.25 / 0.8) ** rng.random()
        width, height = (max(1, round(side * factor)) for side in image.size)
        ways = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
        image = image.resize((width, height), rng.choice(ways))
    if written:
        file = BytesIO()
        image.save(file, "JPEG", quality=rng.randint(40, 95))
        image = Image.open(file).convert("RGB")
    return image


# -- making ------------------------------------------------------------------------------------


def make_scene(
    seed: int,
    *,
    kind: Literal["shapes", "text"] | None = None,
    wide: bool = False,
    font: str | None = None,
) -> Scene:
    """Make the scene of a seed; `kind` None is one text scene in four.

    Sides are multiples of 32 from 96 to 320 px, the area at most 320 x 192; with `wide` they are
    anything from 64 to 640 px. font: that of a text, a file's path or `PILLOW_FONT`; None is the
    bundled one.
    """
    if kind not in (None, "shapes", "text"):
        raise InputError(f"kind {kind!r} is unknown; use 'shapes', 'text' or None")
    rng = Random(f"wide {seed}" if wide else f"scene {seed}")
    one_in_four = rng.random() < 0.25  # drawn whatever `kind` is, so that the rest stays the same
    text = kind == "text" if kind else one_in_four
    size = _wide_size(rng) if wide else _plain_size(rng)
    background = rng.choice(tuple(COLORS))
    scale = rng.choice((1, 1, 1, 2, 2))
    noise = Noise(rng.uniform(2, 7), rng.random() < 0.5) if rng.random() < 1 / 7 else None
    return Scene(
        size=size,
        background=background,
        background_rgb=_tint(background, rng),
        shapes=() if text else _make_shapes(size, background, scale, rng),
        label=_make_label(size, background, scale, rng, font) if text else None,
        noise=noise,
        scale=scale,
        seed=seed,
    )


def _plain_size(rng: Random) -> tuple[int, int]:
    sides = range(96, 321, 32)
    sizes = [(w, h) for w in sides for h in sides if w * h <= _MAX_AREA]
    return rng.choices(sizes, [1 / (w * h) for w, h in sizes])[0]  # small ones more often


def _wide_size(rng: Random) -> tuple[int, int]:
    width, height = (round(64 * 10 ** rng.random()) for _ in range(2))
    return width, height


def _tint(color: str, rng: Random) -> RGB:
    def near(level: int) -> int:
        return min(255, max(0, level + rng.randint(-_COLOR_JITTER, _COLOR_JITTER)))

    red, green, blue = COLORS[color]
    return near(red), near(green), near(blue)


def _luma(color: str) -> float:
    return sum(w * v for w, v in zip((0.299, 0.587, 0.114), COLORS[color], strict=True))


def _make_shapes(
    size: tuple[int, int], background: str, scale: int, rng: Random
) -> tuple[Shape, ...]:
    columns, rows = _grid(size)
    places = [
        3 * row + column for row in range(3) for column in range(3) if _is_place(row, column, size)
    ]
    count = rng.randint(1, min(4, columns * rows))
    kinds = [(c, s) for c in SHAPE_COLORS if c != background for s in SHAPES]
    shapes = []
    for place, (color, kind) in zip(
        sorted(rng.sample(places, count)), rng.sample(kinds, count), strict=True
    ):
        bbox = _place_box(size, place, scale, alone=count == 1, rng=rng)
        shapes.append(Shape(kind, color, bbox, PLACES[place], _tint(color, rng)))
    return tuple(shapes)


def _grid(size: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of places; 1 is the middle one alone."""
    width, height = size
    return 1 if width < _LONG * height else 3, 1 if height < _LONG * width else 3


def _is_place(row: int, column: int, size: tuple[int, int]) -> bool:
    columns, rows = _grid(size)
    return (columns == 3 or column == 1) and (rows == 3 or row == 1)


def _place_box(size: tuple[int, int], place: int, scale: int, *, alone: bool, rng: Random) -> Box:
    """Return a square box in its cell of the grid; a shape alone may reach out of its cell."""
    grid = _grid(size)
    cells = tuple(n * scale / parts for n, parts in zip(size, grid, strict=True))  # drawn pixels
    alone = alone and 1 not in grid
    low, high = (0.95, 1.5) if alone else (0.64, 0.98)
    least = min(23.5 * scale, high * min(cells))
    side = int(rng.uniform(max(low * min(cells), least), high * min(cells)))
    start = []
    at = (place % 3, place // 3)
    for cell, parts, index, length in zip(cells, grid, at, size, strict=True):
        reach = 0.3 * cell if alone else (cell - side) / 2
        middle = (index + 0.5 if parts == 3 else 0.5) * cell
        first = int(middle + reach * rng.uniform(-1, 1) - side / 2)
        start.append(min(max(first, 0), length * scale - side))
    x, y = start
    return x / scale, y / scale, (x + side) / scale, (y + side) / scale


def _make_label(
    size: tuple[int, int], background: str, scale: int, rng: Random, font: str | None
) -> Label:
    readable = [c for c in SHAPE_COLORS if abs(_luma(c) - _luma(background)) > _LEAST_CONTRAST]
    color = rng.choice(readable)
    enlarged = max(1.0, math.sqrt(size[0] * size[1] / _MAX_AREA))  # it will be made smaller again
    while True:  # 30 px and one digit fit the smallest picture, so this ends
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 4)))
        string = rng.choice(WORDS) if rng.random() < 0.25 else digits
        font_size = int(rng.triangular(30, 45, 44) * enlarged)  # large ones more often
        left, top, right, bottom = font_of(font_size * scale, font).getbbox(string)
        width, height = math.ceil(right - left), math.ceil(bottom - top)  # in drawn pixels
        if width <= size[0] * scale and height <= size[1] * scale:
            break
    x = rng.randint(0, size[0] * scale - width)
    y = rng.randint(0, size[1] * scale - height)
    bbox = (x / scale, y / scale, (x + width) / scale, (y + height) / scale)
    return Label(string, color, bbox, _tint(color, rng), font_size, font)
