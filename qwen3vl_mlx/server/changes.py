"""What threads and coroutines share: a lock, and waiting for what it guards to change."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

Result = TypeVar("Result")


class Changes:
    """A lock to hold with `with`, also twice. Who changes what it guards calls `notify`."""

    def __init__(self) -> None:
        self._condition = threading.Condition()  # of a lock that its holder may take again
        self._wakers: dict[object, Callable[[], None]] = {}

    def __enter__(self) -> None:
        self._condition.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._condition.release()

    def notify(self) -> None:
        """Wake all who wait, in threads and in event loops."""
        with self._condition:
            self._condition.notify_all()
            for wake in self._wakers.values():
                with suppress(RuntimeError):  # its loop is closed: nobody waits there any more
                    wake()

    def wait(self, seconds: float | None) -> None:
        """Wait in a thread that holds the lock, and lets it go meanwhile."""
        self._condition.wait(seconds)

    async def until(
        self, take: Callable[[], Result | None], patience: float | None = None
    ) -> Result | None:
        """What `take` gives, asked at every change until it gives something, with the lock held.

        None after `patience` seconds. No await follows what was taken, so none of it is lost when
        the caller is cancelled.
        """
        loop = asyncio.get_running_loop()
        changed, late = asyncio.Event(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        def give_up() -> None:
            late.set()
            changed.set()

        timer = None if patience is None else loop.call_later(patience, give_up)
        with self._condition:
            self._wakers[changed] = wake
        try:
            while True:
                changed.clear()
                with self._condition:
                    if (result := take()) is not None:
                        return result
                if late.is_set():
                    return None
                await changed.wait()
        finally:
            with self._condition:
                del self._wakers[changed]
            if timer is not None:
                timer.cancel()
