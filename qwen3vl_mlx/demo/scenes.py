"""Pictures like those the demo checkpoint was trained on, with questions whose answers are known.

A scene is coloured shapes on a 3 x 3 grid of places, or one line of bold text, on a plain
background. Everything follows from the seed with the standard library's generator, so a seed gives
the same scene on every platform.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
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
# task -> the wordings the checkpoint learnt; {} is the subject
WORDINGS = MappingProxyType({
    "describe": ("Describe the image.", "Describe this image.", "Describe what you see.",
                 "What do you see?", "What is in the image?"),
    "count": ("How many shapes are there?", "How many shapes are in the image?",
              "Count the shapes."),
    "countx": ("How many {} are there?",),
    "color": ("What color is the {}?", "What is the color of the {}?"),
    "shape": ("What shape is {}?", "Which shape is {}?"),
    "at": ("What is at the {}?", "Which shape is at the {}?"),
    "pos": ("In which part of the image is the {}?",),
    "exist": ("Is there {}?", "Is there {} in the image?"),
    "where": ("Where is the {}?", "Detect the {}.", "Locate the {}."),
    "whereall": ("Detect all shapes.", "Locate all shapes."),
    "read": ("What text is in the image?", "What is written in the image?",
             "What does the text say?", "Read the text."),
    "textcolor": ("What color is the text?", "What is the color of the text?"),
    "bg": ("What color is the background?", "What is the background color?"),
})  # fmt: skip

_MAX_AREA = 320 * 192
_COLOR_JITTER = 18
_LEAST_CONTRAST = 100  # of text with its background, in levels of luma
_STAR_WAIST = 0.42  # inner over outer radius
_FONT = Path(__file__).with_name("DejaVuSans-Bold-subset.ttf")


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


@dataclass(frozen=True)
class Question:
    """A question, the kind it is of (a key of `WORDINGS`) and the exact right answer."""

    task: str
    question: str
    truth: str


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


def _font(size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    # the basic layout is in every build of Pillow; Raqm is not
    return ImageFont.truetype(str(_FONT), size, layout_engine=ImageFont.Layout.BASIC)


def _draw_label(pen: ImageDraw.ImageDraw, label: Label, scale: int) -> None:
    font = _font(label.font_size * scale)
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


# -- making ------------------------------------------------------------------------------------


def make_scene(seed: int, *, kind: Literal["shapes", "text"] | None = None) -> Scene:
    """Make the scene of a seed; `kind` None is one text scene in four.

    Sides are multiples of 32 from 96 to 320 px, the area at most 320 x 192.
    """
    if kind not in (None, "shapes", "text"):
        raise InputError(f"kind {kind!r} is unknown; use 'shapes', 'text' or None")
    rng = Random(f"scene {seed}")
    one_in_four = rng.random() < 0.25  # drawn whatever `kind` is, so that the rest stays the same
    text = kind == "text" if kind else one_in_four
    sides = range(96, 321, 32)
    sizes = [(w, h) for w in sides for h in sides if w * h <= _MAX_AREA]
    size = rng.choices(sizes, [1 / (w * h) for w, h in sizes])[0]  # small ones more often
    background = rng.choice(tuple(COLORS))
    scale = rng.choice((1, 1, 1, 2, 2))
    noise = Noise(rng.uniform(2, 7), rng.random() < 0.5) if rng.random() < 1 / 7 else None
    return Scene(
        size=size,
        background=background,
        background_rgb=_tint(background, rng),
        shapes=() if text else _make_shapes(size, background, scale, rng),
        label=_make_label(size, background, scale, rng) if text else None,
        noise=noise,
        scale=scale,
        seed=seed,
    )


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
    count = rng.randint(1, 4)
    kinds = [(c, s) for c in SHAPE_COLORS if c != background for s in SHAPES]
    shapes = []
    for place, (color, kind) in zip(
        sorted(rng.sample(range(9), count)), rng.sample(kinds, count), strict=True
    ):
        bbox = _place_box(size, place, scale, alone=count == 1, rng=rng)
        shapes.append(Shape(kind, color, bbox, PLACES[place], _tint(color, rng)))
    return tuple(shapes)


def _place_box(size: tuple[int, int], place: int, scale: int, *, alone: bool, rng: Random) -> Box:
    """Return a square box in its cell of the grid; a shape alone may reach out of its cell."""
    cells = (size[0] * scale / 3, size[1] * scale / 3)  # in drawn pixels
    low, high = (0.95, 1.5) if alone else (0.64, 0.98)
    side = int(rng.uniform(max(low * min(cells), 23.5 * scale), high * min(cells)))
    start = []
    for cell, index, length in zip(cells, (place % 3, place // 3), size, strict=True):
        reach = 0.3 * cell if alone else (cell - side) / 2
        first = int((index + 0.5) * cell + reach * rng.uniform(-1, 1) - side / 2)
        start.append(min(max(first, 0), length * scale - side))
    x, y = start
    return x / scale, y / scale, (x + side) / scale, (y + side) / scale


def _make_label(size: tuple[int, int], background: str, scale: int, rng: Random) -> Label:
    readable = [c for c in SHAPE_COLORS if abs(_luma(c) - _luma(background)) > _LEAST_CONTRAST]
    color = rng.choice(readable)
    while True:  # 30 px and one digit fit the smallest picture, so this ends
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 4)))
        string = rng.choice(WORDS) if rng.random() < 0.25 else digits
        font_size = int(rng.triangular(30, 45, 44))  # large ones more often
        left, top, right, bottom = _font(font_size * scale).getbbox(string)
        width, height = math.ceil(right - left), math.ceil(bottom - top)  # in drawn pixels
        if width <= size[0] * scale and height <= size[1] * scale:
            break
    x = rng.randint(0, size[0] * scale - width)
    y = rng.randint(0, size[1] * scale - height)
    bbox = (x / scale, y / scale, (x + width) / scale, (y + height) / scale)
    return Label(string, color, bbox, _tint(color, rng), font_size)


# -- asking ------------------------------------------------------------------------------------


def questions(scene: Scene, *, every: bool = False) -> list[Question]:
    """List unambiguous questions about a scene.

    One question a fact in one of the wordings the checkpoint learnt, with as many absent shapes
    asked for as there are present ones; or with `every`, each fact (absent ones too) in each.
    """
    rng = Random(f"questions {scene.seed}")
    facts = list(_text_facts(scene) if scene.label else _shape_facts(scene))
    if every:
        return [
            Question(task, wording.format(subject), truth)
            for task, subject, truth in facts
            for wording in WORDINGS[task]
        ]
    for task, absent in (("exist", "No"), ("countx", "0")):
        surplus = [fact for fact in facts if fact[0] == task and fact[2] == absent]
        present = sum(fact[0] == task for fact in facts) - len(surplus)
        kept = rng.sample(surplus, min(present, len(surplus)))
        facts = [fact for fact in facts if fact not in surplus or fact in kept]
    return [Question(t, rng.choice(WORDINGS[t]).format(s), truth) for t, s, truth in facts]


def _text_facts(scene: Scene) -> Iterator[tuple[str, str, str]]:
    assert scene.label
    string, color = scene.label.string, scene.label.color
    background = _a(scene.background).capitalize()
    yield "describe", "", f'{background} background with the text "{string}" in {color}.'
    yield "read", "", string
    yield "textcolor", "", color
    yield "bg", "", scene.background


def _shape_facts(scene: Scene) -> Iterator[tuple[str, str, str]]:
    """Yield (task, subject, truth) of a scene with shapes."""
    shapes = scene.shapes
    listed = [f"{_a(s.name)} at the {s.position}" for s in shapes]
    listing = " and ".join(filter(None, (", ".join(listed[:-1]), listed[-1])))
    yield "describe", "", f"{_a(scene.background).capitalize()} background with {listing}."
    yield "count", "", str(len(shapes))
    for kind in SHAPES:
        alike = [s for s in shapes if s.shape == kind]
        yield "countx", f"{kind}s", str(len(alike))
        if len(alike) == 1:
            yield "color", kind, alike[0].color
    for color in SHAPE_COLORS:
        alike = [s for s in shapes if s.color == color]
        yield "countx", f"{color} shapes", str(len(alike))
        if len(alike) == 1:
            yield "shape", color, alike[0].shape
    for s in shapes:
        yield "at", s.position, _a(s.name)
        yield "pos", s.name, s.position
        yield "where", s.name, _boxes([s], scene.size)
    yield "whereall", "", _boxes(shapes, scene.size)
    names = {s.name for s in shapes}
    for color in SHAPE_COLORS:
        for kind in SHAPES:
            yield "exist", _a(f"{color} {kind}"), "Yes" if f"{color} {kind}" in names else "No"


def _a(name: str) -> str:
    return f"an {name}" if name.startswith("o") else f"a {name}"


def _boxes(shapes: Sequence[Shape], size: tuple[int, int]) -> str:
    """Write boxes as the checkpoint does: 0..1000 across the picture's width and height."""
    sides = (*size, *size)
    found = []
    for shape in shapes:
        box = [round(v / n * 1000) for v, n in zip(shape.bbox, sides, strict=True)]
        found.append({"bbox_2d": box, "label": shape.name})
    return json.dumps(found)


# -- judging -----------------------------------------------------------------------------------


def is_correct(question: Question, answer: str) -> bool:
    """Judge an answer: words must be exact; boxes need the labels and an IoU of 0.5 each."""
    if question.task not in ("where", "whereall"):
        return answer.strip() == question.truth
    truth, given = read_boxes(question.truth), read_boxes(answer)
    return [label for label, _ in sorted(truth)] == [label for label, _ in sorted(given)] and all(
        iou(a, b) >= 0.5 for (_, a), (_, b) in zip(sorted(truth), sorted(given), strict=True)
    )


def read_boxes(answer: str) -> list[tuple[str, Box]]:
    """Read (label, box) pairs, 0..1000, from an answer in JSON; one of another form holds none."""
    try:
        pairs = [(str(item["label"]), tuple(item["bbox_2d"])) for item in json.loads(answer)]
        good = all(len(box) == 4 and all(0 <= v <= 1000 for v in box) for _, box in pairs)
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return pairs if good else []


def iou(a: Box, b: Box) -> float:
    """Return the intersection over the union of two x0, y0, x1, y1 boxes."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(0.0, x1 - x0) * max(0.0, y1 - y0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0
