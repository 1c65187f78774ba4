"""An answer on a terminal as it comes: thought dimmed, Markdown drawn, numbers below.

Finished blocks are written once and never touched again, so what has scrolled away stays right.
The last block is drawn again as it grows, only from its first line that changed; of one that is
taller than the screen the end is shown until it is finished, when all of it is written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import TextIO

from qwen3vl_mlx.chat.markdown import Blocks, render, wrapped
from qwen3vl_mlx.chat.plain import dim, harmless

_REDRAW_SEC = 0.06
_REST = 4  # times as long as drawing took, so that a slow terminal can follow
_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"
# Drawn as a whole by terminals that know this; others ignore it.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"


class Region:
    """Lines at the end of the screen that can be drawn again. Each fits the width."""

    def __init__(self, out: TextIO):
        self.out = out
        self.lines: list[str] = []

    def draw(self, lines: list[str]) -> None:
        """Show these lines in place of the last ones."""
        same = 0
        while same < min(len(lines), len(self.lines)) and lines[same] == self.lines[same]:
            same += 1
        if same == len(lines) == len(self.lines):
            return
        up = len(self.lines) - same
        parts = [_BEGIN, f"\x1b[{up}A" if up else "", "\r"]
        parts += [f"{line}\x1b[K\n" for line in lines[same:]]
        parts += ["\x1b[J" if len(lines) < len(self.lines) else "", _END]
        self.out.write("".join(parts))
        self.out.flush()
        self.lines = list(lines)

    def leave(self) -> None:
        """Let the lines stay as they are; what comes next begins below."""
        self.lines = []


class MarkdownView:
    """Draws an answer's text as Markdown."""

    def __init__(
        self,
        out: TextIO,
        size: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.out = out
        self.size = size
        self.clock = clock
        self.region = Region(out)
        self.blocks = Blocks()
        self.width = size()[0]
        self.any = False  # a block was finished
        self.due = 0.0
        self.thinking = False
        self.thought = ""  # its last line, as far as it goes

    def begin(self) -> None:
        """Before the first piece."""
        self.out.write(_HIDE)

    def think(self, text: str) -> None:
        """A piece of the thought."""
        self.thinking = True
        self._check_size()
        *ended, self.thought = (self.thought + harmless(text)).split("\n")
        for line in ended:
            self._think(wrapped(line, self.width))
        lines = wrapped(self.thought, self.width)
        if len(lines) > 1:  # all but the last stay as they are, whatever follows
            self._think(lines[:-1])
            self.thought = lines[-1] + " " * self.thought.endswith(" ")
        self.region.draw([dim(line) for line in lines[-1:]])

    def _think(self, lines: list[str]) -> None:
        self.region.draw([dim(line) for line in lines])
        self.region.leave()

    def push(self, text: str) -> None:
        """A piece of the answer."""
        if self.thinking:
            self.thinking = False
            self.region.leave()
            self.out.write("\n")
        finished = self.blocks.push(harmless(text))
        self._check_size()
        for block in finished:
            self._finish(block)
        if self.clock() >= self.due or finished:
            self._grow()

    def end(self) -> None:
        """After the last piece, or where it was cut off: all is written."""
        self._check_size()
        rest = self.blocks.flush()
        if rest.strip():
            self._finish(rest)
        self.out.write(_SHOW)
        self.out.flush()

    def _check_size(self) -> None:
        """A terminal that was resized has moved what stood there: the block begins anew below."""
        width, rows = self.size()
        if width != self.width or len(self.region.lines) >= rows:
            self.width = width
            self.region.leave()

    def _drawn(self, block: str) -> list[str]:
        lines = render(block, self.width)
        return ["", *lines] if self.any and lines else lines

    def _finish(self, block: str) -> None:
        lines = self._drawn(block)
        self.region.draw(lines)
        self.region.leave()
        self.any = self.any or bool(lines)

    def _grow(self) -> None:
        started = self.clock()
        lines = self._drawn(self.blocks.text)
        self.region.draw(lines[-max(self.size()[1] - 2, 1) :])
        self.due = self.clock() + max(_REDRAW_SEC, _REST * (self.clock() - started))
