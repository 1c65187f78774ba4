"""Text as a terminal may show it, and an answer written as it is said."""

from __future__ import annotations

from typing import Protocol, TextIO

# A model may read anything from a picture: what it says must not steer the terminal.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def harmless(text: str) -> str:
    """Text without control characters."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def dim(text: str) -> str:
    """Text that stands back."""
    return f"\x1b[2m{text}\x1b[0m"


class View(Protocol):
    """Draws one answer."""

    def begin(self) -> None:
        """Before the first piece."""

    def think(self, text: str) -> None:
        """A piece of the thought."""

    def push(self, text: str) -> None:
        """A piece of the answer."""

    def end(self) -> None:
        """After the last piece."""


class PlainView:
    """Writes an answer as it is said: for `--plain`, NO_COLOR and simple terminals."""

    def __init__(self, out: TextIO):
        self.out = out
        self.thinking = False
        self.open_line = False

    def begin(self) -> None:
        """Nothing to prepare."""

    def think(self, text: str) -> None:
        """A piece of the thought."""
        if not self.thinking:
            self.thinking = True
            self._write("Thought: ")
        self._write(text)

    def push(self, text: str) -> None:
        """A piece of the answer."""
        if self.thinking:
            self.thinking = False
            self._write("\n\n")
        self._write(text)

    def end(self) -> None:
        """After the last piece, or where it was cut off."""
        if self.open_line:
            self._write("\n")

    def _write(self, text: str) -> None:
        text = harmless(text)
        self.out.write(text)
        self.out.flush()
        if text:
            self.open_line = not text.endswith("\n")
