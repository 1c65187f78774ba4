"""A model host for tests: models that are no models, loads that wait to be let go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server is an extra")


from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.host import ModelHost

NAMES = ("owner/Qwen3-VL-2B", "gpt-4o", "vision")
SOON_SEC = 10.0  # for what should happen at once, on a machine that is busy


@dataclass
class Fake:
    """A model as far as the host knows one."""

    closed: bool = False
    engine: Any = field(default_factory=lambda: SimpleNamespace(closed=False))

    def close(self) -> None:
        self.closed = True


class Loads:
    """A loader that may be held up or fail, and what it has made."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.failure: Exception | None = None
        self.made: list[Fake] = []
        self.count = 0

    def __call__(self) -> Any:
        self.count += 1
        self.begun.set()
        assert self.go_on.wait(SOON_SEC)
        if self.failure is not None:
            raise self.failure
        self.made.append(Fake())
        return self.made[-1]


@asynccontextmanager
async def hosting(loads: Callable[[], Any], **options: Any) -> AsyncIterator[ModelHost]:
    host = ModelHost(loads, NAMES, **options)
    try:
        yield host
    finally:
        if isinstance(loads, Loads):
            loads.go_on.set()
        assert host.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    for _ in range(int(SOON_SEC / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came about")


async def state(host: ModelHost, wanted: str) -> None:
    await until(lambda: host.status().state == wanted)


async def refused(asking: Coroutine[Any, Any, object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await asking
    return caught.value


async def pending(task: asyncio.Task[Any]) -> bool:
    """Whether a task still waits after it had time to end."""
    await asyncio.sleep(0.05)
    return not task.done()
