"""Questions whose answers have a form: where things are, what is written, what a document says.

from qwen3vl_mlx import draw, load
boxes = load("demo").detect("scene.png", "red circle")
draw("scene.png", boxes).save("found.png")
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qwen3vl_mlx.engine.output import Completion, collect
from qwen3vl_mlx.engine.request import Stream
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.media import ImageSource, load_image
from qwen3vl_mlx.processing.processor import MaxPixels
from qwen3vl_mlx.tasks_json import TaskError, parse_json
from qwen3vl_mlx.tasks_parsing import (
    Box,
    DocumentForm,
    Point,
    parse_boxes,
    parse_document,
    parse_points,
)
from qwen3vl_mlx.tasks_wording import TaskName, Wording, read_wording, subjects

if TYPE_CHECKING:
    import PIL.Image

__all__ = [
    "Box",
    "DocumentForm",
    "PictureTasks",
    "Point",
    "TaskError",
    "TaskName",
    "Wording",
    "parse_boxes",
    "parse_document",
    "parse_json",
    "parse_points",
    "read_wording",
]

_Found = TypeVar("_Found", Box, Point)
_REASONS = MappingProxyType(
    {
        "length": "raise max_tokens; where it is unset, the picture leaves too little context",
        "timeout": "raise timeout",
        "repetition": "it repeated itself without end",
        "constraint": "it could not follow the schema any more",
        "cancelled": "the model was closed",
    }
)


class _Model(Protocol):
    """What the tasks need of a loaded model."""

    @property
    def wording(self) -> Wording: ...

    def stream(
        self,
        messages: str,
        *,
        images: Sequence[ImageSource] = ...,
        response_format: Mapping[str, Any] | None = ...,
        sampling: Mapping[str, Any] | None = ...,
        max_tokens: int | None = ...,
        temperature: float | None = ...,
        timeout: float | None = ...,
        min_pixels: int | None = ...,
        max_pixels: MaxPixels = ...,
    ) -> Stream: ...


@dataclass(frozen=True)
class _Limits:
    """How the tasks of one call are run."""

    max_tokens: int | None
    temperature: float | None
    min_pixels: int | None
    max_pixels: MaxPixels
    timeout: float | None


class PictureTasks:
    """What a loaded model can be asked about one picture in one call.

    A picture is any `ImageSource`; places are in pixels of it as it is seen, EXIF rotation applied.
    Answers are greedy unless `temperature` says otherwise: None is the checkpoint's own. The other
    arguments are those of `generate`. An answer that repeats itself without end is cut off.
    All raise InputError as `generate` does, and TaskError where a thought has no end.
    """

    def detect(
        self: _Model,
        image: ImageSource,
        what: str | Sequence[str] | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float | None = 0.0,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        timeout: float | None = None,
    ) -> list[Box]:
        """Find things: their boxes, none where there is no such thing.

        what: one thing, several with commas between or in a list; None is everything. An answer
        that is cut off gives the boxes before the cut.
        """
        limits = _Limits(max_tokens, temperature, min_pixels, max_pixels, timeout)
        picture, wanted = load_image(image), subjects("" if what is None else what)
        answers = _ask(self, picture, self.wording.prompts("detect", wanted or ""), limits)
        return _labelled([parse_boxes(each.text, picture.size) for each in answers], wanted)

    def point(
        self: _Model,
        image: ImageSource,
        what: str | Sequence[str] | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float | None = 0.0,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        timeout: float | None = None,
    ) -> list[Point]:
        """`detect` with one point a thing; where the model answers with a box, its middle."""
        limits = _Limits(max_tokens, temperature, min_pixels, max_pixels, timeout)
        picture, wanted = load_image(image), subjects("" if what is None else what)
        answers = _ask(self, picture, self.wording.prompts("point", wanted or ""), limits)
        return _labelled([parse_points(each.text, picture.size) for each in answers], wanted)

    def read_text(
        self: _Model,
        image: ImageSource,
        *,
        max_tokens: int | None = None,
        temperature: float | None = 0.0,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        timeout: float | None = None,
    ) -> str:
        """The text in a picture; of an answer that is cut off, what there is of it."""
        limits = _Limits(max_tokens, temperature, min_pixels, max_pixels, timeout)
        [answer] = _ask(self, load_image(image), [self.wording.prompt("read")], limits)
        return answer.text.strip()

    def parse_document(
        self: _Model,
        image: ImageSource,
        form: DocumentForm = "markdown",
        *,
        max_tokens: int | None = None,
        temperature: float | None = 0.0,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        timeout: float | None = None,
    ) -> str:
        """A page as "markdown" or "html"; of an answer that is cut off, what there is of it.

        It is in the model's own dialect: tables of Markdown in LaTeX, places of pictures and tables
        (0 to 1000) in comments, those of HTML in `data-bbox`. It may hold any markup that stands on
        the page: show it in a sandbox.
        """
        parse_document("", form)  # a wrong form is told of before the work
        limits = _Limits(max_tokens, temperature, min_pixels, max_pixels, timeout)
        [answer] = _ask(self, load_image(image), [self.wording.prompt(form)], limits)
        return parse_document(answer.text, form)

    def extract(
        self: _Model,
        image: ImageSource,
        schema: Mapping[str, Any],
        prompt: str | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float | None = 0.0,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        timeout: float | None = None,
    ) -> Any:
        """A value that follows a JSON schema, to the letter.

        prompt None shows the model the schema and asks for what it describes; else it is the
        question as it stands. Raises TaskError where the answer is cut off before it is whole.
        """
        if not isinstance(schema, Mapping):
            raise InputError(
                f"schema must be a JSON schema as a mapping, got {type(schema).__name__}"
            )
        if prompt is None:
            prompt = self.wording.prompt("extract", json.dumps(schema, ensure_ascii=False))
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        limits = _Limits(max_tokens, temperature, min_pixels, max_pixels, timeout)
        try:
            [answer] = _ask(self, load_image(image), [prompt], limits, form)
        except InputError as error:
            if str(error).startswith("response_format"):  # the caller knows it by another name
                raise InputError(f"schema{str(error).removeprefix('response_format')}") from error
            raise
        if answer.finish_reason != "stop":
            raise _cut_off(answer, "JSON was whole")
        try:
            return json.loads(answer.text)
        except ValueError as error:  # more digits than Python takes for an integer
            raise TaskError(f"the answer cannot be read as JSON: {error}") from error


def _ask(
    model: _Model,
    picture: PIL.Image.Image,
    prompts: Iterable[str],
    limits: _Limits,
    response_format: Mapping[str, Any] | None = None,
) -> list[Completion]:
    """Ask all the prompts about one picture at once. Raises TaskError for a thought cut off."""
    with ExitStack() as stack:
        streams = [
            stack.enter_context(
                model.stream(
                    prompt,
                    images=[picture],
                    response_format=response_format,
                    sampling={"loop_guard": True},
                    max_tokens=limits.max_tokens,
                    temperature=limits.temperature,
                    timeout=limits.timeout,
                    min_pixels=limits.min_pixels,
                    max_pixels=limits.max_pixels,
                )
            )
            for prompt in prompts
        ]
        answers = [collect(stream) for stream in streams]
    for answer in answers:
        if not answer.reasoning_closed:
            raise _cut_off(answer, "model had finished thinking")
    return answers


def _cut_off(answer: Completion, what: str) -> TaskError:
    reason = _REASONS.get(answer.finish_reason, answer.finish_reason)
    return TaskError(f"the answer was cut off before the {what}: {reason}")


def _labelled(found: Sequence[Sequence[_Found]], wanted: Sequence[str]) -> list[_Found]:
    """What the answers hold, once each; without a label it is what its question asked for."""
    names = wanted if len(wanted) == len(found) else [""] * len(found)
    labelled = (
        each if each.label else replace(each, label=name)
        for part, name in zip(found, names, strict=True)
        for each in part
    )
    return list(dict.fromkeys(labelled))
