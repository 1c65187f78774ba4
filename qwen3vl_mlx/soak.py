"""`python -m qwen3vl_mlx.bench --soak N`: does the engine lose or mix up answers, or leak?

Short questions about drawn pictures come from several threads at random times, and some are
cancelled on the way. Every answer is compared with the one that the same question got alone, with
caches off.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal, TypeAlias

import mlx.core as mx

from qwen3vl_mlx import cli
from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.bench_measure import another_engine, max_rss_bytes
from qwen3vl_mlx.demo.questions import Question, is_correct, questions
from qwen3vl_mlx.demo.scenes import make_scene
from qwen3vl_mlx.engine.engine import EngineOptions
from qwen3vl_mlx.engine.output import collect
from qwen3vl_mlx.engine.request import Stream
from qwen3vl_mlx.processing.processor import Messages

Outcome: TypeAlias = Literal["right", "wrong", "cancelled", "lost"]

STAGES = 4  # the first is the warm-up; between them nothing runs, and memory is read
_SCENES = 48
_ASKED = 3  # questions about each picture
_CANCELLED = 0.2  # share of the requests
_PAUSE_SEC = 0.02  # on average, before a thread asks again
_MAX_TOKENS = 64
_ALONE = EngineOptions(max_batch=1, prefix_cache_bytes=0, feature_cache_bytes=0)
# So small that entries are evicted all the time.
_TOGETHER = EngineOptions(prefix_cache_bytes=8 * 2**20, feature_cache_bytes=2**20)


@dataclass(frozen=True)
class Ask:
    """A question about a picture, and the tokens of its answer when it is asked alone."""

    messages: Messages
    answer: tuple[int, ...]
    true: bool  # whether that answer is what the picture shows


@dataclass(frozen=True)
class Memory:
    """Bytes of a process: MLX's arrays, its free buffers, and the resident ones."""

    active: int
    free: int
    rss: int


@dataclass(frozen=True)
class Report:
    """What became of the requests. `memory` is read after each stage, the warm-up first."""

    requests: int
    at_once: int
    right: int
    wrong: int
    cancelled: int
    lost: int
    problems: tuple[str, ...]  # distinct ones, of what was lost or wrong
    questions: int  # distinct ones
    true: int  # of their answers
    requests_per_sec: float
    evictions: int  # of the prefix cache
    memory: tuple[Memory, ...]

    @property
    def clean(self) -> bool:
        return not self.wrong and not self.lost


def soak(
    model: Qwen3VL, requests: int, at_once: int, *, seed: int = 0, patience_sec: float = 120
) -> Report:
    """Ask `requests` questions from `at_once` threads.

    Where no request ends for `patience_sec`, those that are open count as lost.
    """
    asks = answered_alone(model, min(_SCENES, -(-requests // _ASKED)))
    served = another_engine(model, replace(_TOGETHER, max_queue=at_once))
    found: Counter[Outcome] = Counter()
    problems: list[str] = []
    memory: list[Memory] = []
    seconds = 0.0
    with _bar(requests, "Asking") as advance:
        for stage in range(STAGES):
            count = requests * (stage + 1) // STAGES - requests * stage // STAGES
            clients = _Clients(served, asks, count, Random(f"soak {seed} {stage}"), advance)
            began = time.perf_counter()
            all_ended = clients.run(at_once, patience_sec)
            seconds += time.perf_counter() - began
            found += clients.found
            problems += clients.problems
            if not all_ended:
                problems.append(f"no request ended for {patience_sec:.0f} s")
                break
            gc.collect()
            memory.append(Memory(mx.get_active_memory(), mx.get_cache_memory(), rss_bytes()))
    prefix = served.engine.stats.prefix
    if all_ended:
        served.close()
    return Report(
        requests=requests,
        at_once=at_once,
        right=found["right"],
        wrong=found["wrong"],
        cancelled=found["cancelled"],
        lost=requests - found["right"] - found["wrong"] - found["cancelled"],
        problems=tuple(dict.fromkeys(problems)),
        questions=len(asks),
        true=sum(ask.true for ask in asks),
        requests_per_sec=sum(found.values()) / seconds,
        evictions=prefix.evictions if prefix is not None else 0,
        memory=tuple(memory),
    )


def answered_alone(model: Qwen3VL, scenes: int) -> list[Ask]:
    """Questions about the first scenes, each asked with nothing else running and nothing cached."""
    alone = another_engine(model, _ALONE)
    asks = []
    with _bar(scenes, "Asking alone") as advance:
        for seed in range(scenes):
            scene = make_scene(seed)
            picture = {"type": "image", "image": scene.draw()}
            chosen = Random(f"asked {seed}").sample(questions(scene), _ASKED)
            for i, question in enumerate(chosen):
                text = {"type": "text", "text": question.question}
                # The last one first: its picture stands at another place of the prompt.
                parts = [text, picture] if i == _ASKED - 1 else [picture, text]
                asks.append(_ask(alone, [{"role": "user", "content": parts}], question))
            advance()
    alone.close()
    return asks


def _ask(model: Qwen3VL, messages: Messages, question: Question) -> Ask:
    answer = model.stream(messages, temperature=0, max_tokens=_MAX_TOKENS)
    true = is_correct(question, collect(answer).text)
    return Ask(messages, tuple(answer.handle.tokens), true)


class _Clients:
    """Threads that ask questions until `count` of them are asked."""

    def __init__(
        self,
        model: Qwen3VL,
        asks: Sequence[Ask],
        count: int,
        random: Random,
        advance: Callable[[], None],
    ):
        self.model = model
        self.asks = asks
        self.found: Counter[Outcome] = Counter()
        self.problems: list[str] = []
        self._left = count
        self._random = random
        self._advance = advance
        self._lock = threading.Lock()
        self._last_end = time.monotonic()

    def run(self, at_once: int, patience_sec: float) -> bool:
        """Whether all requests ended."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            next(thread for thread in threads if thread.is_alive()).join(0.1)
            if time.monotonic() - self._last_end > patience_sec:
                return False
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    return
                self._left -= 1
                pause = self._random.expovariate(1 / _PAUSE_SEC)
                ask = self._random.choice(self.asks)
                cancelled = self._random.random() < _CANCELLED
                chunks = self._random.randrange(6) if cancelled else None
            time.sleep(pause)
            try:
                outcome, problem = _outcome(self.model, ask, chunks)
            except Exception as error:  # noqa: BLE001
                # Whatever ended it, this request got no answer; the others go on.
                outcome, problem = "lost", f"{type(error).__name__}: {error}"
            with self._lock:
                self.found[outcome] += 1
                if problem:
                    self.problems.append(problem)
                self._last_end = time.monotonic()
                self._advance()


def _outcome(model: Qwen3VL, ask: Ask, chunks: int | None) -> tuple[Outcome, str]:
    """Ask, cancel after so many chunks, and judge what came until the last chunk."""
    answer: Stream = model.stream(ask.messages, temperature=0, max_tokens=_MAX_TOKENS)
    reason = None
    if chunks == 0:
        answer.handle.cancel()
    for i, chunk in enumerate(answer, 1):
        reason = chunk.finish_reason
        if i == chunks:
            answer.handle.cancel()
    tokens = tuple(answer.handle.tokens)
    if reason == "cancelled" and chunks is not None and tokens == ask.answer[: len(tokens)]:
        return "cancelled", ""
    if reason in ("stop", "length") and tokens == ask.answer:
        return "right", ""
    decode = model.processor.tokenizer.decode
    return "wrong", f"{decode(ask.answer)!r} became {decode(tokens)!r} ({reason})"


def rss_bytes() -> int:
    """Resident memory of this process; the largest so far where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return max_rss_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _bar(total: int, label: str) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal and it takes over a second; call to advance it."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    with tqdm(total=total, desc=label, delay=1.0, leave=False, disable=hidden) as bar:

        def advance() -> None:
            bar.update()

        yield advance


def table(report: Report) -> str:
    """The report for people."""
    lines = [
        f"{report.requests} requests, {report.at_once} at once, {report.questions} different ones "
        f"(of whose answers {report.true} are true), {report.requests_per_sec:.1f} per second",
        f"right {report.right}, cancelled {report.cancelled}, wrong {report.wrong}, "
        f"lost {report.lost}; {report.evictions} evictions",
        "",
        f"{'memory after':<16}{'arrays':>12}{'free':>12}{'resident':>12}",
    ]
    for i, memory in enumerate(report.memory, 1):
        asked = report.requests * i // STAGES
        sizes = (memory.active, memory.free, memory.rss)
        lines.append(f"{asked:<16}" + "".join(f"{cli.size(size):>12}" for size in sizes))
    return "\n".join([*lines, *(f"problem: {problem}" for problem in report.problems[:10])])
