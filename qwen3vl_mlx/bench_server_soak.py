"""`python -m qwen3vl_mlx.bench --server-soak SECONDS`: does the server lose answers, or leak?

Many clients stream short answers about drawn pictures at once, and a third of them leave on the
way. Every answer is compared with the one that another process gave when it was asked nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from statistics import median
from typing import Literal, TypeAlias

from qwen3vl_mlx import cli
from qwen3vl_mlx.bench_server_clients import (
    Answer,
    Question,
    Server,
    Side,
    answers_alone,
    ask,
    numbers,
    resident_bytes,
    serving,
)
from qwen3vl_mlx.soak import Memory

Outcome: TypeAlias = Literal["right", "left", "wrong", "failed"]

QUESTIONS = 96
CLIENTS = 64
STAGES = 4  # of equal length; the first is the warm-up
_LEAVING = 1 / 3  # share of the requests whose client leaves
_SAMPLE_SEC = 1.0
_IDLE_SEC = 10.0  # until the last answers of clients that left must be gone
# So small that entries are evicted all the time.
_SMALL_CACHES = ("--prefix-cache", "8M", "--feature-cache", "1M")


@dataclass(frozen=True)
class Report:
    """What became of the requests. `memory`: the median of each stage."""

    seconds: float
    clients: int
    questions: int  # distinct ones
    right: int
    left: int
    wrong: int
    failed: int
    problems: tuple[str, ...]
    unfinished: int  # requests the server still had after all clients were done
    exit_status: int  # after SIGTERM
    memory: tuple[Memory, ...]

    @property
    def requests(self) -> int:
        return self.right + self.left + self.wrong + self.failed

    @property
    def clean(self) -> bool:
        return not (self.wrong or self.failed or self.unfinished or self.exit_status)


def soak(
    side: Side, questions: Sequence[Question], seconds: float, clients: int = CLIENTS
) -> Report:
    """Let `clients` ask for so many seconds. Raises Qwen3VLError."""
    with serving(side) as server:
        alone = answers_alone(server, questions)
    small = replace(side, command=(*side.command, *_SMALL_CACHES))
    with serving(small) as server:
        crowd = _Crowd(server, questions, alone)
        began = time.perf_counter()
        samples = crowd.run(clients, seconds)
        took = time.perf_counter() - began
        unfinished = _unfinished(server)
    found = crowd.found
    return Report(
        seconds=took,
        clients=clients,
        questions=len(questions),
        right=found["right"],
        left=found["left"],
        wrong=found["wrong"],
        failed=found["failed"],
        problems=tuple(crowd.problems),
        unfinished=unfinished,
        exit_status=server.process.returncode,
        memory=_stages(samples),
    )


class _Crowd:
    """Clients that ask questions, each one after another, until they are told to stop."""

    def __init__(self, server: Server, questions: Sequence[Question], alone: Sequence[Answer]):
        self.server = server
        self.questions = questions
        self.alone = alone
        self.found: Counter[Outcome] = Counter()
        self.problems: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._enough = threading.Event()

    def run(self, clients: int, seconds: float) -> list[Memory]:
        """The server's memory, sampled meanwhile."""
        deadline = time.monotonic() + seconds
        samples = []
        with ThreadPoolExecutor(clients) as pool:
            try:
                working = [pool.submit(self._work, Random(f"client {i}")) for i in range(clients)]
                while time.monotonic() < deadline and self.server.process.poll() is None:
                    time.sleep(_SAMPLE_SEC)
                    samples.append(_memory(self.server))
            finally:
                self._enough.set()
        for each in working:
            each.result()
        return samples

    def _work(self, random: Random) -> None:
        while not self._enough.is_set():
            which = random.randrange(len(self.questions))
            alone = self.alone[which]
            leave_after = None
            if random.random() < _LEAVING:
                leave_after = random.randrange(max(1, len(alone.times)))
            answer = ask(self.server, self.questions[which], leave_after)
            problem = answer.problem
            outcome: Outcome = "right" if answer.finish_reason else "left"
            if problem:
                outcome = "failed"
            elif not answer.is_as(alone):
                outcome = "wrong"
                problem = f"{alone.text!r} became {answer.text!r} ({answer.finish_reason})"
            with self._lock:
                self.found[outcome] += 1
                if problem:
                    self.problems[problem] += 1


def _stages(samples: Sequence[Memory]) -> tuple[Memory, ...]:
    cuts = [len(samples) * i // STAGES for i in range(STAGES + 1)]
    stages = [samples[cuts[i] : cuts[i + 1]] for i in range(STAGES)]
    return tuple(
        Memory(
            active=int(median(sample.active for sample in stage)),
            free=int(median(sample.free for sample in stage)),
            rss=int(median(sample.rss for sample in stage)),
        )
        for stage in stages
        if stage
    )


def _memory(server: Server) -> Memory:
    found = numbers(server)
    return Memory(
        active=int(found["qwen3vl_memory_active_bytes"]),
        free=int(found["qwen3vl_memory_cache_bytes"]),
        rss=resident_bytes(server.process.pid),
    )


def _unfinished(server: Server) -> int:
    """Requests that the engine still has when all clients are done, if any stay."""
    deadline = time.monotonic() + _IDLE_SEC
    while True:
        found = numbers(server)
        left = sum(
            found[f"qwen3vl_requests_{where}"] for where in ("waiting", "prefilling", "running")
        )
        if not left or time.monotonic() > deadline:
            return int(left)
        time.sleep(0.1)


def table(report: Report) -> str:
    """The report for people."""
    lines = [
        f"{report.clients} clients for {report.seconds:.0f} s, {report.questions} different "
        f"questions: {report.requests} requests, {report.requests / report.seconds:.1f} per second",
        f"right {report.right}, left on the way {report.left}, wrong {report.wrong}, failed "
        f"{report.failed}; still there at the end {report.unfinished}, exit status "
        f"{report.exit_status}",
        "",
        f"{'memory, median':<16}{'arrays':>12}{'free':>12}{'resident':>12}",
    ]
    for i, memory in enumerate(report.memory, 1):
        sizes = (memory.active, memory.free, memory.rss)
        part = f"part {i} of {STAGES}"
        lines.append(f"{part:<16}" + "".join(f"{cli.size(size):>12}" for size in sizes))
    return "\n".join([*lines, *(f"problem: {problem}" for problem in report.problems[:10])])
