"""Threads that do jobs: as many at once as are worth it, and never more jobs than threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ended(Generic[Job, Result]):
    """A job and what came of it, or what was raised."""

    job: Job
    result: Result | None = None
    error: BaseException | None = None


class Crew(Generic[Job, Result]):
    """`size` threads that call `do`.

    Not a ThreadPoolExecutor: the interpreter waits for its threads, and one that waits for a
    server's next word could keep a command from ending for a minute.
    """

    def __init__(self, do: Callable[[Job], Result], size: int):
        self.do = do
        self.size = size
        self.busy = 0  # jobs that were given and whose end was not taken
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Ended[Job, Result]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    @property
    def free(self) -> bool:
        """Whether a thread has nothing to do."""
        return self.busy < self.size

    def give(self, job: Job) -> None:
        """Begin a job. Its end is to be taken."""
        self.busy += 1
        if len(self._threads) < self.busy:
            self._threads.append(threading.Thread(target=self._run, daemon=True))
            self._threads[-1].start()
        self._jobs.put(job)

    def take(self, timeout: float) -> Ended[Job, Result] | None:
        """The next job that has ended; None where none does in `timeout` seconds."""
        try:
            ended = self._ended.get(timeout=timeout) if timeout > 0 else self._ended.get_nowait()
        except queue.Empty:
            return None
        self.busy -= 1
        return ended

    def dismiss(self) -> None:
        """Let threads end when their jobs have."""
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                ended = Ended[Job, Result](job, self.do(job))
            except BaseException as error:  # noqa: BLE001  for the thread that takes it
                ended = Ended[Job, Result](job, error=error)
            self._ended.put(ended)
