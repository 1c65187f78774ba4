"""Requests driven through a scheduler by hand: no thread, no clock, every step seen."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine import batch
from qwen3vl_mlx.engine.constraints import Grammar
from qwen3vl_mlx.engine.engine import Engine, EngineOptions
from qwen3vl_mlx.engine.request import Handle
from qwen3vl_mlx.engine.sampling import Row, SamplerState, SamplingParams
from qwen3vl_mlx.engine.scheduler import Scheduler
from qwen3vl_mlx.processing.prompt import Prompt

WORDS = 998  # the vocabulary without special tokens: a random model may pick a placeholder

_SEEDS = itertools.count(1)
# By seed, which is a request's name here, and by step: the row its token was drawn from. A row
# that is drawn again, after a guess that was wrong, replaces the one before.
Drawn = dict[int, dict[int, mx.array]]


def record(patch: pytest.MonkeyPatch) -> Drawn:
    """Draw ordinary words only, and keep the logits they are drawn from."""
    seen: Drawn = defaultdict(dict)
    draw = batch.draw
    words = mx.array(np.arange(1024) < WORDS)

    def recorded(logits: mx.array, rows: Sequence[Row]) -> tuple[mx.array, list[SamplerState]]:
        for i, row in enumerate(rows):
            seen[row.sampler.seed][row.state.step] = logits[i]
        return draw(mx.where(words, logits, -mx.inf), rows)

    patch.setattr(batch, "draw", recorded)
    return seen


@contextmanager
def recording() -> Iterator[Drawn]:
    """`record` for a while."""
    with pytest.MonkeyPatch.context() as patch:
        yield record(patch)


class Driver:
    """One model's scheduler in this thread. `drawn`: see `recording`."""

    def __init__(self, model: Qwen3VL, drawn: Drawn, **options: Any):
        self.model = model
        self.drawn = drawn
        engine = Engine(
            model.model, model.processor.tokenizer, model.asking.compiler, EngineOptions(**options)
        )
        self.scheduler: Scheduler = engine.scheduler  # the engine's thread never starts

    def ask(
        self,
        prompt: Prompt,
        max_tokens: int = 16,
        *,
        timeout: float | None = None,
        submitted: float | None = None,
        grammar: Grammar | None = None,
        **params: Any,
    ) -> Handle:
        """Put a request into the queue; it has no end token."""
        wanted = SamplingParams(**{"temperature": 0.0, "seed": next(_SEEDS), **params})
        wanted = replace(wanted, max_tokens=max_tokens)
        request = self.model.asking.request(
            prompt, wanted, tools=False, grammar=grammar, started=time.perf_counter()
        )
        request = replace(request, eos_token_ids=frozenset(), timeout=timeout)
        handle = Handle(request, self.scheduler.cancel)
        self.scheduler.add(handle, time.perf_counter() if submitted is None else submitted)
        return handle

    def step(self) -> None:
        for job in self.scheduler.waiting:
            if job.restoring is not None:
                job.restoring.future.result()  # the disk has a thread of its own
        self.scheduler.step()

    def until(self, done: Callable[[], bool], most: int = 3000) -> int:
        """Step until something holds; returns how many steps that took."""
        for count in range(most):
            if done():
                return count
            self.step()
        raise AssertionError(f"not after {most} steps: {self.scheduler.load}")

    def finish(self, *handles: Handle) -> None:
        """Step until these requests have ended."""
        self.until(lambda: all(handle.phase == "done" for handle in handles))

    def drain(self) -> None:
        """Step until nothing is left to do, and then nothing may be held."""
        self.until(lambda: not self.scheduler.busy)
        self.step()  # tokens of rows that have left may still be on their way
        assert_nothing_held(self.scheduler)

    def logits(self, handle: Handle) -> npt.NDArray[np.float32]:
        """The rows (n, vocab_size) that a request's n tokens were drawn from."""
        steps = self.drawn[handle.request.params.seed or 0]
        rows = [steps[i] for i in range(len(handle.tokens))]
        return np.array(mx.stack(rows).astype(mx.float32))


def assert_nothing_held(scheduler: Scheduler) -> None:
    reader, held = scheduler.reader, scheduler.batch
    assert (list(scheduler.waiting), list(reader.jobs), scheduler.running) == ([], [], {})
    assert (held.rows, held.layers, held.unread) == ([], [], None)
    assert reader._encoding is None
    assert scheduler.load.reserved_bytes == 0
