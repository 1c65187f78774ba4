"""What is asked of the engine, and the answer on its way."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeAlias

from qwen3vl_mlx.engine.constraints import Grammar
from qwen3vl_mlx.engine.output import Chunk, Completion, collect
from qwen3vl_mlx.engine.sampling import SamplingParams
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.processing.prompt import Prompt

if TYPE_CHECKING:
    import asyncio

Phase: TypeAlias = Literal["waiting", "prefilling", "running", "done"]

_WAKE_SEC = 0.2  # Ctrl-C just before a wait would pass unseen until the wait ends


@dataclass(frozen=True)
class Request:
    """One question, laid out and ready to run."""

    prompt: Prompt
    params: SamplingParams
    max_tokens: int
    eos_token_ids: frozenset[int]
    thinking: bool  # the prompt opens a thought, so the answer begins inside it
    tools: bool  # parse tool calls
    preparation_sec: float  # what reading the pictures and laying out the prompt took
    grammar: Grammar | None = None  # what the answer, or a tool call in it, must follow
    timeout: float | None = None  # seconds from submission until the answer is cut off
    breakers: frozenset[int] = frozenset()  # tokens no repetition runs across, for DRY


class Handle:
    """An answer on its way: iterate over its chunks, with `for` or `async for`, in any thread.

    The last chunk has `finish_reason` and `usage`. What ends one request alone is raised here.
    """

    def __init__(self, request: Request, on_cancel: Callable[[Handle], None]):
        self.request = request
        self.phase: Phase = "waiting"
        self.tokens: list[int] = []  # of the answer so far, an end token included
        self._on_cancel = on_cancel
        self._items: deque[Chunk | BaseException] = deque()
        self._ready = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._taken = False  # some item was taken
        self._ended = False  # the last item was taken

    def cancel(self) -> None:
        """End the answer; its last chunk comes with finish_reason "cancelled". Returns at once."""
        if self.phase != "done":
            self._on_cancel(self)

    def result(self) -> Completion:
        """Wait for the whole answer. Raises InputError where some of it was read already."""
        if self._taken:
            raise InputError("this answer was read already, in part at least: collect its chunks")
        return collect(self)

    def put(self, item: Chunk | BaseException) -> None:
        """For the engine: the next chunk, or what went wrong."""
        with self._ready:
            if isinstance(item, BaseException) or item.finish_reason is not None:
                self.phase = "done"
                self._on_cancel = _nothing  # who keeps the answer does not keep the engine
            self._items.append(item)
            self._ready.notify_all()
            if self._waiter is not None:
                loop, event = self._waiter
                with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                    loop.call_soon_threadsafe(event.set)

    def __iter__(self) -> Iterator[Chunk]:
        while not self._ended:
            with self._ready:
                while not self._items:
                    self._ready.wait(_WAKE_SEC)
                item = self._items.popleft()
            yield self._opened(item)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        import asyncio  # 10 ms that scripts need not pay

        event = asyncio.Event()
        with self._ready:
            self._waiter = (asyncio.get_running_loop(), event)
        while not self._ended:
            event.clear()
            while self._items:
                yield self._opened(self._items.popleft())
            if not self._ended:
                await event.wait()

    def _opened(self, item: Chunk | BaseException) -> Chunk:
        self._taken = True
        if isinstance(item, BaseException):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item


def _nothing(_: Handle) -> None:
    pass


class Stream:
    """An answer's chunks for one reader: closing it, or dropping it, ends the work.

    owner: what must live as long as the answer is read.
    """

    def __init__(self, handle: Handle, owner: object = None):
        self.handle = handle
        self.owner = owner
        self._chunks = iter(handle)
        self._closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        if self._closed:
            raise StopIteration
        return next(self._chunks)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        try:
            async for chunk in self.handle:
                yield chunk
        finally:  # a task that is cancelled wants no more
            self.close()

    def close(self) -> None:
        """End the answer where it is; no more chunks come."""
        self._closed = True
        self.handle.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.handle.cancel()
