"""A conversation that remembers its turns, their pictures and their cache."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from qwen3vl_mlx.asking import Form, Look
from qwen3vl_mlx.engine.output import Chunk, Completion, collect
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.engine.sampling import SamplingParams, unbent
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.media import ImageSource
from qwen3vl_mlx.processing.processor import MaxPixels, Messages
from qwen3vl_mlx.processing.video import Video

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL

VideoSource: TypeAlias = "Video | Sequence[ImageSource]"


class Chat:
    """A conversation with one model. Earlier turns are not computed again."""

    def __init__(
        self,
        model: Qwen3VL,
        system: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        params: SamplingParams,
        min_pixels: int | None,
        max_pixels: MaxPixels,
    ):
        self.model = model
        self.tools = tools
        self.params = params
        self.budget = model.processor.image_budget(min_pixels, max_pixels)
        self.number_images = False  # "Picture N:" before each, which may be changed between turns
        self.messages: list[Mapping[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._running: Generator[Chunk, None, None] | None = None

    @property
    def system(self) -> str | None:
        """The system message. May be replaced between turns; None takes it away."""
        first = self.messages[0] if self.messages else {}
        return str(first["content"]) if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        self._close_open_answer()
        self.messages[: int(self.system is not None)] = (
            [] if text is None else [{"role": "system", "content": text}]
        )

    def restore(self, messages: Messages) -> None:
        """Go on from other messages, whose pictures are read now. Raises InputError."""
        self._close_open_answer()
        self.messages = list(self.model.processor.read(messages, self.budget))

    def send(
        self,
        content: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        tool_choice: str | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        truncate: bool = False,
    ) -> Completion:
        """Say something, with pictures if you like, and return the whole answer.

        content None adds no turn: the model goes on after `add_tool_result`. truncate lets the
        model read the newest turns only, where all are too many. The rest is as in `generate`.
        """
        return collect(
            self.stream(
                content,
                images=images,
                videos=videos,
                tool_choice=tool_choice,
                response_format=response_format,
                timeout=timeout,
                truncate=truncate,
            )
        )

    def stream(
        self,
        content: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        tool_choice: str | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        truncate: bool = False,
    ) -> Generator[Chunk, None, None]:
        """`send`, chunk by chunk. Closing the iterator keeps the turn and what was said so far.

        A turn that says nothing before it is cut off leaves no trace. A chat gives one answer at a
        time: asking again closes an answer that is still open.
        """
        started = time.perf_counter()
        self._close_open_answer()
        turn: list[Mapping[str, Any]] = []
        if content is not None:
            if not isinstance(content, str):
                raise InputError(f"send() takes a text, got {type(content).__name__}")
            seen = self.model.processor.read(as_messages(content, images, videos), self.budget)
            turn.extend(seen)
        elif images or videos:
            raise InputError("images and videos need a text: send(content, images=...)")
        request = self.model.asking.prepare(
            [*self.messages, *turn],
            unbent(self.params, self.model.default_params),
            Form(self.tools, tool_choice, response_format=response_format),
            Look(add_vision_id=self.number_images),
            truncate=truncate,
            timeout=timeout,
            started=started,
        )
        self._running = self._record(len(self.messages), turn, request)
        return self._running

    def retry(self, *, timeout: float | None = None) -> Generator[Chunk, None, None]:
        """Answer the last question anew, with `params` as they are now.

        The old answer goes when the new one has said something. Raises InputError where nothing
        was asked yet.
        """
        started = time.perf_counter()
        self._close_open_answer()
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise InputError("there is no question to answer anew: ask one first")
        request = self.model.asking.prepare(
            self.messages[: asked[-1] + 1],
            unbent(self.params, self.model.default_params),
            Form(self.tools),
            Look(add_vision_id=self.number_images),
            truncate=False,
            timeout=timeout,
            started=started,
        )
        self._running = self._record(asked[-1] + 1, [], request)
        return self._running

    def _close_open_answer(self) -> None:
        if self._running is not None:
            self._running.close()

    def add_tool_result(
        self, call_id: str, content: str, *, images: Sequence[ImageSource] = ()
    ) -> None:
        """Note a tool's answer to the call `call_id`; `send()` lets the model read it."""
        if not isinstance(content, str):
            raise InputError(f"a tool's result is a text, got {type(content).__name__}")
        message = as_messages(content, images, ())[0]
        seen = self.model.processor.read([message], self.budget)[0]
        self.messages.append({**seen, "role": "tool", "tool_call_id": call_id})

    def _record(
        self, start: int, turn: Sequence[Mapping[str, Any]], request: Request
    ) -> Generator[Chunk, None, None]:
        chunks: list[Chunk] = []
        answer = self.model.run(request)
        try:
            for chunk in answer:
                chunks.append(chunk)
                yield chunk
        finally:
            answer.close()
            if any(_says_something(chunk) for chunk in chunks):
                self.messages[start:] = [*turn, _assistant_message(chunks)]


def _says_something(chunk: Chunk) -> bool:
    """Whether it is part of an answer, or its own end."""
    said = bool(chunk.text or chunk.reasoning or chunk.tool_calls)
    return said or chunk.finish_reason not in (None, "cancelled", "timeout")


def _assistant_message(chunks: Sequence[Chunk]) -> Mapping[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(chunk.text for chunk in chunks),
    }
    if reasoning := "".join(chunk.reasoning for chunk in chunks):
        message["reasoning_content"] = reasoning
    if calls := [call for chunk in chunks for call in chunk.tool_calls]:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
    return message


def as_messages(
    messages: str | Messages, images: Sequence[ImageSource], videos: Sequence[VideoSource]
) -> Messages:
    """A plain prompt with its pictures as one user message; messages as they are."""
    if not isinstance(messages, str):
        if images or videos:
            raise InputError("images= and videos= go with a plain prompt; put them into messages")
        return messages
    for name, value in (("images", images), ("videos", videos)):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise InputError(f"{name} must be a list, got {type(value).__name__}: {name}=[...]")
    return [
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": image} for image in images),
                *({"type": "video", "video": video} for video in videos),
                {"type": "text", "text": messages},
            ],
        }
    ]
