"""How far a run is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx.album.records import Record
from qwen3vl_mlx.album.template import shown

if TYPE_CHECKING:
    from tqdm import tqdm

_FORMAT = (
    "{percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt}, {remaining} left, {rate_noinv_fmt}{postfix}"
)
_FIRST_LINE, _LINE_EVERY = 10.0, 60.0  # seconds, where there is no terminal
_TICK = 1.0


class Progress:
    """Tells of a run. quiet: of failures only. verbose: of every picture.

    total: pictures to ask about; None where more may come, which leaves out bar and lines.
    """

    def __init__(self, total: int | None, *, quiet: bool, verbose: bool):
        self.total = total
        self.quiet = quiet
        self.verbose = verbose
        self.done = self.failed = 0
        self.started = self._ticked = time.monotonic()
        self._next_line = self.started + _FIRST_LINE
        self._bar: tqdm[Any] | None = None
        if total is not None and not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                file=sys.stderr,
                bar_format=_FORMAT,
                unit=" pictures",
                dynamic_ncols=True,
                smoothing=0.1,
                leave=False,
            )

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        with self.aside():
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line for those who want to know."""
        if not self.quiet:
            self.say(f"note: {text}")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Clear the bar while something else is written to the terminal."""
        if self._bar is None:
            yield
            return
        self._bar.clear()
        try:
            yield
        finally:
            self._bar.refresh()

    def count(self, record: Record, problem: str | None) -> None:
        """One picture more. problem: why it failed."""
        self.done += 1
        self.failed += problem is not None
        name = shown(record.picture.file)
        if problem is not None:
            named = problem if name in problem else f"{name}: {problem}"
            self.say(f"failed: {named}")
        elif self.verbose:
            usage = record.usage
            spent = (
                f": {usage.completion_tokens} tokens, {usage.total_time_sec:.1f} s" if usage else ""
            )
            self.say(f"{name}{spent}")
        if self._bar is not None:
            if self.failed:
                self._bar.set_postfix_str(f"{self.failed} failed", refresh=False)
            self._bar.update()
        self.tick()

    def tick(self) -> None:
        """To be called often: keeps the time that is left going."""
        now = time.monotonic()
        if self._bar is not None:
            if now - self._ticked > _TICK:
                self._ticked = now
                self._bar.refresh()
        elif self.total is not None and not self.quiet and now > self._next_line:
            self._next_line = now + _LINE_EVERY
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        assert self.total is not None
        rate = self.done / (now - self.started)
        left = f", {_clock((self.total - self.done) / rate)} left" if rate else ""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done:,} of {self.total:,} pictures{failed}, {rate:.2f} a second{left}"

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
