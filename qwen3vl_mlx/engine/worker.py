"""A thread that does one thing after another, also while the interpreter ends.

A concurrent.futures pool takes nothing more from when the interpreter begins to end, which is
before the functions registered with atexit run.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")
_Queue: TypeAlias = "SimpleQueue[Callable[[], None] | None]"


class Worker:
    """Its thread starts with the first task, and ends with `close` or with the worker itself."""

    def __init__(self, name: str):
        self.name = name
        self._queue: _Queue = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, task: Callable[[], Result]) -> Future[Result]:
        """Do `task` after all that was asked before. For one thread; not after `close`."""
        if self._closed:
            raise RuntimeError(f"{self.name} is closed")
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._queue,), name=self.name, daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._queue.put, None).atexit = False
        future: Future[Result] = Future()
        self._queue.put(lambda: _do(task, future))
        return future

    def close(self) -> None:
        """Wait until all that was asked is done, and end the thread."""
        self._closed = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()


def _work(queue: _Queue) -> None:
    while (task := queue.get()) is not None:
        task()
        del task  # what it holds is free while the next is waited for


def _do(task: Callable[[], Result], future: Future[Result]) -> None:
    try:
        result = task()
    except BaseException as error:  # noqa: BLE001
        future.set_exception(error)
    else:
        future.set_result(result)
