"""The prompt of a terminal: line editing, history, completion, several lines, dragged paths."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, ThreadedCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.color_depth import ColorDepth
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import is_dumb_terminal

from qwen3vl_mlx.chat import completion

if TYPE_CHECKING:
    from qwen3vl_mlx.chat.session import Session

TWICE_SEC = 2.0  # between the two Ctrl-C that leave
_REFRESH_SEC = 0.5
_STYLE = Style.from_dict({"mark": "ansicyan bold", "quiet": "ansibrightblack", "placeholder": ""})
_HINT = "ask something, with paths of pictures in it; /help"
_LEAVING = "Ctrl-C again leaves"


class ModelFailedError(Exception):
    """The model could not be loaded while the prompt was open; the loader has the reason."""


class Console:
    """Reads what is typed. plain: no colours."""

    def __init__(self, session: Session, history: Path | None, plain: bool):
        self.session = session
        self._hint = _HINT
        self._pressed_at = float("-inf")  # when Ctrl-C was, last
        kept: History = InMemoryHistory() if history is None else FileHistory(history)
        self._prompt: PromptSession[str] = PromptSession(
            self._message,
            multiline=True,
            prompt_continuation=lambda width, number, wraps: " " * width,
            history=kept,
            completer=ThreadedCompleter(_Completions()),
            complete_while_typing=Condition(self._names_a_command),
            key_bindings=_keys(self._interrupted),
            style=_STYLE,
            rprompt=self._progress,
            placeholder=lambda: [("class:quiet", self._hint)],
            color_depth=ColorDepth.DEPTH_1_BIT if plain else None,
            enable_open_in_editor=False,
            reserve_space_for_menu=6,
        )

    def read(self, text: str = "") -> str | None:
        """The next message or command; None to leave. text: what stands there to be edited.

        Raises KeyboardInterrupt for Ctrl-C while the model is loading, ModelFailedError.
        """
        if is_dumb_terminal():
            text = ""  # it would stand there unseen
        while True:
            # Only while something moves: an idle prompt must not keep the machine awake.
            self._prompt.refresh_interval = 0 if self.session.loader.done else _REFRESH_SEC
            try:
                line = self._prompt.prompt(default=text, pre_run=self._watch)
            except EOFError:
                return None
            except KeyboardInterrupt:  # a signal, or a key between two prompts
                if not self.session.loader.done:
                    raise
                if self._pressed_again():
                    return None
                text, self._hint = "", _LEAVING
                continue
            self._hint, self._pressed_at = "", float("-inf")
            if line.strip() or self.session.waiting:
                return line
            text = ""

    def _interrupted(self, event: KeyPressEvent) -> None:
        """Ctrl-C drops what is typed; the second one leaves, as does the first while loading."""
        buffer = event.current_buffer
        if buffer.text:
            self._pressed_again()
            buffer.reset()
        elif not self.session.loader.done:
            event.app.exit(exception=KeyboardInterrupt())
        elif self._pressed_again():
            event.app.exit(exception=EOFError())
        self._hint = _LEAVING

    def _pressed_again(self) -> bool:
        now = time.monotonic()
        again = now - self._pressed_at < TWICE_SEC
        self._pressed_at = now
        return again

    def _watch(self) -> None:
        """The prompt ends when the model fails to load."""
        application = self._prompt.app
        loop = application.loop
        if loop is None:
            return

        def fail() -> None:
            if application.is_running:
                application.exit(exception=ModelFailedError())

        def failed() -> None:
            loop.call_soon_threadsafe(fail)

        self.session.loader.on_failure = failed
        if self.session.loader.failed:
            loop.call_soon(fail)

    def _names_a_command(self) -> bool:
        return completion.is_command_name(self._prompt.default_buffer.document.text_before_cursor)

    def _message(self) -> StyleAndTextTuples:
        waiting = self.session.waiting
        shown: StyleAndTextTuples = []
        if waiting:
            first = waiting[0].picture.name
            what = first if len(waiting) == 1 else f"{len(waiting)} pictures"
            shown.append(("class:quiet", f"[{what[-30:]}] "))
        return [*shown, ("class:mark", "> ")]

    def _progress(self) -> StyleAndTextTuples:
        loader = self.session.loader
        if loader.done or self._prompt.app.is_done:  # what was sent stays without it
            return []
        return [("class:quiet", f"loading {loader.choice.name} {loader.seconds:.0f} s")]


class _Completions(Completer):
    def get_completions(self, document: Document, event: object) -> Iterator[Completion]:
        """What may stand at the cursor."""
        for each in completion.complete(document.text_before_cursor):
            yield Completion(
                each.text,
                start_position=-each.replaces,
                display=each.shown,
                display_meta=each.hint,
            )


def _keys(interrupted: Callable[[KeyPressEvent], None]) -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # searching the history has keys of its own
    keys.add("c-c", filter=typing)(interrupted)

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        """Send, or go to a new line after a backslash."""
        buffer = event.current_buffer
        state = buffer.complete_state
        if state is not None and state.current_completion is not None:
            buffer.complete_state = None  # it stands there already
            return
        before = buffer.document.current_line_before_cursor
        if before.endswith("\\") and not before.endswith("\\\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
            return
        buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        """A new line."""
        event.current_buffer.insert_text("\n")

    @keys.add("c-d", filter=typing)
    def _(event: KeyPressEvent) -> None:
        """Leave, unless something is typed."""
        buffer = event.current_buffer
        if buffer.text:
            buffer.delete()
        else:
            event.app.exit(exception=EOFError())

    return keys


def is_simple(environment: dict[str, str] | os._Environ[str]) -> bool:
    """Whether this terminal is to get neither colours nor anything drawn."""
    simple = environment.get("TERM", "") in ("dumb", "unknown", "")
    return simple or bool(environment.get("NO_COLOR"))
