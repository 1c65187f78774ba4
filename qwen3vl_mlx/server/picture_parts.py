"""Which pictures messages ask for, and how large each is to be shown. Reads none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen3vl_mlx.asking import Look
from qwen3vl_mlx.errors import InputError, PromptError
from qwen3vl_mlx.processing.image import PixelBudget, VisualInput
from qwen3vl_mlx.processing.processor import Messages, Processor
from qwen3vl_mlx.processing.template import part_kind
from qwen3vl_mlx.processing.video import DEFAULT_FPS, Video

LOW_DETAIL_PIXELS = 256 * 32 * 32
"""What `detail: low` shows of a picture: 256 tokens."""

_DETAILS = (None, "auto", "low", "high", "original")


@dataclass(frozen=True)
class Wanted:
    """An image, or a video of frames, to be read and cut. Equal ones are cut to equal pixels."""

    kind: Literal["image", "video"]
    sources: tuple[str, ...]  # as clients sent them
    budget: PixelBudget
    fps: float = DEFAULT_FPS
    place: str = field(default="", compare=False)  # in the request, for messages

    def __hash__(self) -> int:  # not of the texts: a picture's may be of 60 MB
        return hash((self.kind, tuple(map(len, self.sources)), self.budget, self.fps))

    def place_of(self, frame: int) -> str:
        return self.place if self.kind == "image" else f"{self.place}[{frame}]"


def find_wanted(
    messages: Messages, processor: Processor, look: Look, most: int | None
) -> Iterator[tuple[int, int, Wanted | VisualInput]]:
    """Message and part numbers of all pictures, each as what is to be read or was cut before.

    most: pixels that no picture and no frame of a video is shown with more of.
    Raises InputError that begins with the place of what is wrong. Messages must be normal ones.
    """
    for number, message in enumerate(messages):
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        for index, part in enumerate(content):
            if (kind := part_kind(part)) != "text":
                place = f"messages[{number}].content[{index}]"
                key = f"{kind}" if part.get(f"{kind}") is not None else f"{kind}_url"
                try:
                    yield number, index, _wanted(part, key, place, processor, look, most)
                except InputError as error:
                    raise type(error)(f"{place}.{key}: {error}") from error


def _wanted(
    part: Mapping[str, Any],
    key: str,
    place: str,
    processor: Processor,
    look: Look,
    most: int | None,
) -> Wanted | VisualInput:
    source = part.get(key)
    detail = part.get("detail")
    if isinstance(source, Mapping):
        detail = source.get("detail", detail)
        within = {name: source.get(name) for name in ("min_pixels", "max_pixels")}
        part = {**part, **{name: value for name, value in within.items() if value is not None}}
        source = source.get("url")
    if isinstance(source, VisualInput):
        return source
    place = f"{place}.{key}"
    if key.startswith("image"):
        limits = _image_budget(part, detail, processor, look, most)
        return Wanted("image", (_text(source),), limits, place=place)
    if isinstance(source, str) or not isinstance(source, list | tuple):
        raise PromptError("a video is a list of its frames; video files cannot be decoded yet")
    frames = tuple(
        _text(frame.get("url") if isinstance(frame, Mapping) else frame) for frame in source
    )
    fps = part.get("fps")
    video = Video(frames, DEFAULT_FPS if fps is None else fps)
    limits = processor.settings.video.limited(part.get("min_pixels"), part.get("max_pixels"))
    return Wanted("video", frames, _capped(limits, most and most * len(frames)), video.fps, place)


def _text(source: object) -> str:
    if not isinstance(source, str) or not source.strip():
        found = "missing or empty" if not source else f"of type {type(source).__name__}"
        raise InputError(f"the picture is {found}; expected a URL, a data: URI, base64 or a path")
    return source


def _image_budget(
    part: Mapping[str, Any], detail: object, processor: Processor, look: Look, most: int | None
) -> PixelBudget:
    """A picture's own limits win over its detail, and the request's max_pixels bounds that."""
    if detail not in _DETAILS:
        raise InputError(f"detail is {detail!r}; expected one of auto, low and high")
    asked = look.max_pixels
    if detail == "low":
        default = processor.image_budget().max_pixels
        asked = min(LOW_DETAIL_PIXELS, asked if isinstance(asked, int) else default)
    elif detail in ("high", "original") and asked is None:
        asked = "full"
    budget = processor.image_budget(look.min_pixels, asked)
    least = part.get("min_pixels")
    budget = budget.limited(least, part.get("max_pixels"))
    for asked_least in (look.min_pixels, least):
        if most is not None and asked_least is not None and asked_least > most:
            raise InputError(f"min_pixels may be at most {most} here, got {asked_least}")
    return _capped(budget, most)


def _capped(budget: PixelBudget, most: int | None) -> PixelBudget:
    if most is None:
        return budget
    return PixelBudget(min(budget.min_pixels, most), min(budget.max_pixels, most))
