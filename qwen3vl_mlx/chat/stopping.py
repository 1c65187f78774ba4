"""Ctrl-C while an answer comes, and a terminal that keeps quiet meanwhile."""

from __future__ import annotations

import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3vl_mlx.engine.output import Chunk


class Stoppable:
    """An answer's chunks until its end or Ctrl-C, which acts between two of them only.

    So that no line is left half drawn. rest: called when Ctrl-C has ended the answer; pressing it
    again changes nothing meanwhile. For the main thread.
    """

    def __init__(self, chunks: Iterator[Chunk], rest: Callable[[], None]):
        self.stopped = False
        self._chunks = chunks
        self._rest = rest
        self._waits = False

    def __iter__(self) -> Iterator[Chunk]:
        before = signal.signal(signal.SIGINT, self._pressed)
        try:
            while (chunk := self._next()) is not None:
                yield chunk
        finally:
            if self.stopped:
                self._rest()
            signal.signal(signal.SIGINT, before)

    def _next(self) -> Chunk | None:
        if not self.stopped:
            with suppress(KeyboardInterrupt):  # our own, below
                self._waits = True
                chunk = next(self._chunks, None)
                self._waits = False
                return chunk
        self._waits = False
        self._chunks.close()  # type: ignore[attr-defined]
        return None

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        first, self.stopped = not self.stopped, True
        if first and self._waits:
            raise KeyboardInterrupt


@contextmanager
def no_echo() -> Iterator[None]:
    """What is typed meanwhile is not shown, and waits for the next prompt."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
