"""Where a conversation is shown: on a terminal, or plainly in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from qwen3vl_mlx.chat import preview
from qwen3vl_mlx.chat.commands import described
from qwen3vl_mlx.chat.pictures import Attached
from qwen3vl_mlx.chat.plain import PlainView, View, dim, harmless
from qwen3vl_mlx.chat.session import Session
from qwen3vl_mlx.chat.statistics import turn_line
from qwen3vl_mlx.chat.stopping import Stoppable

if TYPE_CHECKING:
    from qwen3vl_mlx.engine.output import Chunk

_NOTES = {
    "length": "cut off: max_tokens, or the context, is used up",
    "repetition": "cut off: it repeated itself",
    "timeout": "cut off: it took too long",
}
_UNCLOSED = "it had not finished thinking: raise max_tokens"


class Screen(Protocol):
    """What the loop needs of it."""

    def say(self, text: str) -> None:
        """What a command was asked for."""

    def error(self, message: str) -> None:
        """What went wrong."""

    def working(self, text: str) -> None:
        """Something begins that takes long."""

    def loading(self, name: str, seconds: float) -> None:
        """The model is waited for; called again and again."""

    def pictures(self, attached: Sequence[Attached]) -> None:
        """These were read."""

    def answer(self, session: Session, chunks: Iterator[Chunk]) -> bool:
        """Show an answer as it comes; whether it was stopped."""


class Piped:
    """Answers on stdout; errors, and what commands say, on stderr; with -v numbers too."""

    def __init__(self, verbose: bool):
        self.verbose = verbose

    def say(self, text: str) -> None:
        """What a command was asked for."""
        if text:
            print(text, file=sys.stderr, flush=True)

    def error(self, message: str) -> None:
        """One line."""
        print(f"error: {message}", file=sys.stderr, flush=True)

    def working(self, text: str) -> None:
        """Nothing to see."""

    def loading(self, name: str, seconds: float) -> None:
        """Nothing to see."""

    def pictures(self, attached: Sequence[Attached]) -> None:
        """With -v."""
        if self.verbose:
            for each in attached:
                self.say(described(each))

    def answer(self, session: Session, chunks: Iterator[Chunk]) -> bool:
        """The text, and a line end; Ctrl-C is the whole command's."""
        ends_line = True
        for chunk in chunks:
            if chunk.reasoning and self.verbose:
                sys.stderr.write(chunk.reasoning)
            if chunk.text:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                ends_line = chunk.text.endswith("\n")
            if chunk.finish_reason is None:
                continue
            if not ends_line:
                print(flush=True)
            for note in notes(chunk):
                self.say(f"note: {note}")
            if self.verbose and chunk.usage is not None:
                self.say(turn_line(chunk.usage, session.visual_tokens))
        return False


class Terminal:
    """On a terminal: Markdown and colours, unless `plain`."""

    def __init__(self, *, plain: bool, previews: bool):
        self.plain = plain
        self.way = preview.protocol(os.environ) if previews and not plain else None
        self._status = False  # a line stands there that goes away again

    def say(self, text: str) -> None:
        """What a command was asked for."""
        if text:
            apart = "\n" if "\n" in text else ""
            self._write(f"{_folded(text)}\n{apart}")

    def error(self, message: str) -> None:
        """In red."""
        message = _folded(message)
        self._write(f"{message}\n" if self.plain else f"\x1b[31m{message}\x1b[0m\n")

    def working(self, text: str) -> None:
        """A line that stays."""
        self._note(f"{text} ...")

    def loading(self, name: str, seconds: float) -> None:
        """A line that counts the seconds and goes away."""
        if self.plain:
            return
        columns = shutil.get_terminal_size()[0]
        text = harmless(f"loading {name} ... {seconds:.0f} s")[: columns - 1]
        sys.stdout.write(f"\r{dim(text)}\x1b[K")
        sys.stdout.flush()
        self._status = True

    def pictures(self, attached: Sequence[Attached]) -> None:
        """A line each, and the picture where the terminal can show it."""
        for each in attached:
            self._note(described(each))
            if self.way is not None:
                columns = shutil.get_terminal_size()[0]
                self._write(preview.encode(each.image, self.way, columns))

    def answer(self, session: Session, chunks: Iterator[Chunk]) -> bool:
        """Draw the answer, and its numbers below. Ctrl-C ends it alone."""
        view = PlainView(sys.stdout) if self.plain else _markdown_view()
        running = Stoppable(chunks, session.rest)
        last: Chunk | None = None
        said = False
        self._write("\n")
        view.begin()
        try:
            for chunk in running:
                if chunk.reasoning:
                    view.think(chunk.reasoning)
                if chunk.text:
                    view.push(chunk.text)
                said = said or bool(chunk.reasoning or chunk.text)
                last = chunk
        finally:
            view.end()
        if running.stopped:
            self._note("stopped")
        elif last is not None and last.usage is not None:
            if not said:
                self._note("the answer is empty")
            for note in notes(last):
                self._note(note)
            self._write("\n")
            self._note(turn_line(last.usage, session.visual_tokens))
        self._write("\n")
        return running.stopped

    def _note(self, text: str) -> None:
        text = _folded(text)
        self._write(f"{text}\n" if self.plain else f"{dim(text)}\n")

    def _write(self, text: str) -> None:
        if self._status:
            self._status = False
            text = f"\r\x1b[K{text}"
        sys.stdout.write(text)
        sys.stdout.flush()


def _markdown_view() -> View:
    from qwen3vl_mlx.chat.rendering import MarkdownView  # rich, for those who see it

    return MarkdownView(sys.stdout)


def _folded(text: str) -> str:
    """Harmless text, its long lines broken between words."""
    columns = shutil.get_terminal_size()[0]
    lines = []
    for line in harmless(text).split("\n"):
        lines += textwrap.wrap(line, columns, break_long_words=False) or [""]
    return "\n".join(lines)


def notes(last: Chunk) -> list[str]:
    """What is to be known of how an answer ended."""
    found = [] if last.reasoning_closed else [_UNCLOSED]
    if last.finish_reason in _NOTES:
        found.append(_NOTES[last.finish_reason])
    return found
