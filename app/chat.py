"""What happens in the chat: ask, follow up, retry, edit, take back, stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr

from app.models import Models
from app.pictures import read_pictures
from app.session import ONE_AT_A_TIME, Running, Session, Sessions, Turn
from app.settings import Settings
from app.show import messages_of, statistics, turn_of
from qwen3vl_mlx import Qwen3VL, Stream
from qwen3vl_mlx.errors import EngineClosedError, Qwen3VLError

# What every handler gives: the conversation, the box to type in, the line of numbers.
Outputs: TypeAlias = "tuple[Any, Any, Any]"

_PACE_SEC = 0.04  # between two pictures of an answer that grows: quicker is not seen
_LOADING_SEC = 0.5  # a look at how the loading goes

_NOTES = {
    "cancelled": "Stopped.",
    "length": "Cut off: the answer reached its most tokens, or the end of the context.",
    "repetition": "Cut off: the answer repeated itself.",
    "timeout": "Cut off: time was up.",
}


@dataclass(frozen=True)
class Chat:
    """The handlers of the chat. `folder` takes copies of pictures to show.

    examples: questions that a click asks, as Gradio's Chatbot has them.
    """

    models: Models
    sessions: Sessions
    folder: Path
    examples: list[Any]

    def session(self, request: gr.Request) -> Session:
        return self.sessions.of(str(request.session_hash))

    async def ask(
        self, request: gr.Request, box: dict[str, Any] | None, *values: Any
    ) -> AsyncIterator[Outputs]:
        """A new question, with any pictures."""
        text, files = ((box or {}).get("text") or "").strip(), (box or {}).get("files") or []
        session = self.session(request)
        if not text and not files:
            return
        running = session.begin("chat")
        if running is None:
            gr.Info(ONE_AT_A_TIME)
            return
        try:
            read = await asyncio.to_thread(read_pictures, files, self.folder)
            if read.problems:
                for problem in read.problems:
                    gr.Warning(problem, title="This file cannot be used", duration=None)
                # What was typed stays, and so do the pictures that are fine.
                running.end()  # before the box may be sent again
                yield gr.skip(), {"text": text, "files": list(read.good)}, gr.skip()
                return
            turn = Turn(text or _question(len(read.pictures)), read.pictures)
            session.turns.append(turn)
            async for outputs in self._answer(session, turn, running, values, clear=True):
                yield outputs
        finally:
            running.end()

    async def retry(
        self, request: gr.Request, event: gr.RetryData, *values: Any
    ) -> AsyncIterator[Outputs]:
        """The same question again. Later turns go: they followed from the old answer."""
        async for outputs in self._again(self.session(request), _place(event.index), None, values):
            yield outputs

    async def edit(
        self, request: gr.Request, event: gr.EditData, *values: Any
    ) -> AsyncIterator[Outputs]:
        """Another wording of an earlier question, about the same pictures."""
        text = str(event.value).strip()
        async for outputs in self._again(self.session(request), _place(event.index), text, values):
            yield outputs

    async def example(
        self, request: gr.Request, event: gr.SelectData, *values: Any
    ) -> AsyncIterator[Outputs]:
        """Ask what an example asks."""
        # by its number: the event's own text and paths are whatever a client sends
        chosen = self.examples[_place(event.index)]
        box = {"text": chosen["text"], "files": chosen["files"]}
        async for outputs in self.ask(request, box, *values):
            yield outputs

    def undo(self, request: gr.Request, event: gr.UndoData) -> Outputs:
        """Take a question back, into the box."""
        session = self.session(request)
        place = turn_of(session.turns, _place(event.index))
        running = None if place is None else session.begin("chat")
        if place is None or running is None:
            if place is not None:
                gr.Info(ONE_AT_A_TIME)
            return gr.skip(), gr.skip(), gr.skip()
        taken = session.turns[place]
        session.turns = session.turns[:place]
        running.end()
        files = [picture.source for picture in taken.pictures]
        return messages_of(session.turns), {"text": taken.text, "files": files}, ""

    def clear(self, request: gr.Request) -> Outputs:
        """Begin anew. Stops an answer under way."""
        session = self.session(request)
        session.stop("chat")
        session.turns = []
        return [], box_update(busy=False), ""

    def stop(self, request: gr.Request) -> None:
        self.session(request).stop("chat")

    async def _again(
        self, session: Session, place: int, text: str | None, values: tuple[Any, ...]
    ) -> AsyncIterator[Outputs]:
        number = turn_of(session.turns, place)
        running = None if number is None or text == "" else session.begin("chat")
        if number is None or running is None:
            refused = number is not None and text != ""  # another answer is under way
            if refused:
                gr.Info(ONE_AT_A_TIME)
            yield messages_of(session.turns, waiting=refused), gr.skip(), gr.skip()
            return
        try:
            turn = session.turns[number].again(text)
            session.turns = [*session.turns[:number], turn]
            async for outputs in self._answer(session, turn, running, values, clear=False):
                yield outputs
        finally:
            running.end()

    async def _answer(
        self,
        session: Session,
        turn: Turn,
        running: Running,
        values: tuple[Any, ...],
        *,
        clear: bool,
    ) -> AsyncIterator[Outputs]:
        """Let the model answer the last turn."""
        yield messages_of(session.turns, waiting=True), box_update(busy=True, clear=clear), ""
        numbers = ""
        try:
            settings = Settings.of(values)
            async for note in loading(self.models, running):
                turn.note = note
                yield messages_of(session.turns, waiting=True), gr.skip(), gr.skip()
            turn.note = ""
            with self.models.lease() as model:
                stream = await asyncio.to_thread(
                    partial(ask_model, model, session.messages(settings.system), settings)
                )
                with stream:
                    running.attach(stream)
                    async for numbers in follow(stream, turn):
                        yield (
                            messages_of(session.turns, waiting=True),
                            gr.skip(),
                            numbers or gr.skip(),
                        )
        except EngineClosedError:
            turn.note = "Stopped: the app is being closed."
        except Qwen3VLError as error:
            turn.note, turn.failed = str(error), True
        running.end()  # before the page takes the next question
        yield messages_of(session.turns), box_update(busy=False), numbers or gr.skip()


def box_update(*, busy: bool, clear: bool = False) -> Any:
    """The box with the button that fits: send, or stop. What was typed stays unless cleared."""
    update = gr.update(submit_btn=not busy, stop_btn=busy)
    return {**update, "value": {"text": "", "files": []}} if clear else update


async def loading(models: Models, running: Running) -> AsyncIterator[str]:
    """How the loading goes, until there is a model to ask. Raises Qwen3VLError when stopped."""
    while (status := models.status).answers is None and status.state == "loading":
        if running.stopped:
            raise Qwen3VLError("Stopped before the model was loaded.")
        yield f"Waiting for {status.wish.title}: {status.note}"
        await asyncio.sleep(_LOADING_SEC)


def ask_model(
    model: Qwen3VL,
    messages: list[dict[str, Any]],
    settings: Settings,
    sampling: Mapping[str, Any] | None = None,
    response_format: Mapping[str, Any] | None = None,
) -> Stream:
    """Begin an answer. sampling goes before that of the settings. Raises InputError."""
    return model.stream(
        messages,
        sampling={**settings.sampling, **(sampling or {})},
        response_format=response_format,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
    )


async def follow(stream: Stream, turn: Turn) -> AsyncIterator[str]:
    """Write the answer into `turn` as it comes; yields now and then, with numbers at the end."""
    began = shown = time.monotonic()
    async for chunk in stream:
        turn.reasoning += chunk.reasoning
        turn.answer += chunk.text
        thought = turn.answer or (chunk.finish_reason and chunk.reasoning_closed)
        if turn.reasoning and thought and turn.thinking_sec is None:
            turn.thinking_sec = time.monotonic() - began
        if chunk.finish_reason is not None:
            turn.note = _NOTES.get(chunk.finish_reason, "")
            if chunk.usage is not None:
                yield statistics(chunk.usage, len(stream.handle.request.prompt.visual_rows))
        elif (now := time.monotonic()) - shown >= _PACE_SEC:
            shown = now
            yield ""


def _question(pictures: int) -> str:
    return "Describe the image." if pictures == 1 else "Describe the images."


def _place(index: Any) -> int:
    """The number of a message, however the event has it."""
    return int(index[0] if isinstance(index, (list, tuple)) else index)
