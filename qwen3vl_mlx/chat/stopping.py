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
def own_terminal() -> Iterator[None]:
    """Keys pressed while no prompt is open are not shown, and wait for the next one, Ctrl-C too."""
    descriptor = sys.stdin.fileno()
    before, handler = termios.tcgetattr(descriptor), signal.getsignal(signal.SIGINT)
    ours = list(before)
    ours[0] &= ~termios.ICRNL  # Enter stays Enter
    ours[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    termios.tcsetattr(descriptor, termios.TCSADRAIN, ours)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        signal.signal(signal.SIGINT, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within `own_terminal`: here Ctrl-C acts at once, as KeyboardInterrupt."""
    _let_signals(True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _let_signals(False)


def _let_signals(wanted: bool) -> None:
    descriptor = sys.stdin.fileno()
    now = termios.tcgetattr(descriptor)
    now[3] = now[3] | termios.ISIG if wanted else now[3] & ~termios.ISIG
    termios.tcsetattr(descriptor, termios.TCSADRAIN, now)
