"""The served model's life: loaded in the background, lent to requests, unloaded when idle.

One thread loads, requantizes and unloads, one thing after another. Coroutines of any event loop
wait for it without blocking theirs.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, TypeAlias, TypeVar
from weakref import WeakSet

import mlx.core as mx

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.server.changes import Changes
from qwen3vl_mlx.server.errors import ApiError, model_busy, one_line, stopping
from qwen3vl_mlx.server.lease import Lease

Result = TypeVar("Result")
State: TypeAlias = Literal["loading", "ready", "failed", "unloaded", "closing"]

DEFAULT_NAME = "default"  # always means the model that is served

_HOLD_SEC = 5.0  # that new requests wait for `exclusive`, whose turn may be long in coming
_RETRY_SEC = 5  # after which a client may ask again for what is not there yet

_log = logging.getLogger(__name__)


class Endable(Protocol):
    """An answer under way that the server can end before its time."""

    def end(self) -> None:
        """Cut the answer off, so that it comes to a proper end soon."""


@dataclass(frozen=True)
class Status:
    """What the model is doing, for how many seconds, and why it failed where it has."""

    state: State
    seconds: float
    reason: str | None
    users: int  # requests that hold the model


class ModelHost:
    """Holds the one model of a server. Its thread runs from `start`, or the first use, to `close`.

    load: makes the model. names: what requests may call it; the first is its own, the others
    aliases. idle_unload_sec: unload after so long without a request; the next one loads it again.
    """

    def __init__(
        self,
        load: Callable[[], Qwen3VL],
        names: Sequence[str],
        idle_unload_sec: float | None = None,
    ):
        self.names = tuple(names)
        self.idle_unload_sec = idle_unload_sec
        self._load = load
        self._change: Callable[[Qwen3VL], None] | None = None
        self._changes = Changes()  # guards the rest
        self._end = Changes()  # every request waits for it, so nothing else may wake them
        self._state: State = "unloaded"
        self._since = time.monotonic()  # of the state
        self._used = self._since  # when it was last given back
        self._reason: str | None = None
        self._model: Qwen3VL | None = None
        self._first = False  # the load that requests do not wait for
        self._users = 0
        self._held = False  # by `exclusive`
        self._answers: WeakSet[Endable] = WeakSet()  # what nobody reads ends by itself
        self._ending = False  # no more requests
        self._closing = False  # no more model
        self._tasks: deque[Callable[[], None]] = deque()
        self._working = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load in the background; until that is done, requests are told to come again."""
        with self._changes:
            if self._state == "unloaded" and not self._closing:
                self._first = True
                self._begin_load()

    def name(self, asked: str | None) -> str:
        """The name to report for the one asked for. Raises ApiError 404, naming those there are."""
        if asked is None or asked == DEFAULT_NAME:
            return self.names[0]
        if asked in self.names:
            return asked
        known = ", ".join(dict.fromkeys((*self.names, DEFAULT_NAME)))
        raise ApiError(
            404,
            f"no model {asked[:100]!r} is served here; ask for one of: {known} "
            "(--alias adds names)",
            param="model",
            code="model_not_found",
        )

    @property
    def model(self) -> Qwen3VL | None:
        """A look at what is loaded now, if anything. To ask it, take a lease."""
        return self._model

    def status(self) -> Status:
        """What to tell of the model now. For any thread; never waits for it."""
        with self._changes:
            state: State = "closing" if self._ending or self._closing else self._state
            return Status(state, time.monotonic() - self._since, self._reason, self._users)

    # Using the model.

    async def lease(self, asked: str | None = None) -> Lease:
        """Hold the model for a request. Loads it again where it was unloaded, and waits for that.

        Raises ApiError: 404 for an unknown name, 503 while it first loads, or where it cannot.
        """
        name = self.name(asked)

        def use(model: Qwen3VL) -> Lease:
            self._users += 1
            return Lease(model, name, self._give_back)

        lease = await self._changes.until(self._taking(use))
        assert lease is not None  # it waits without limit
        return lease

    @asynccontextmanager
    async def exclusive(self, patience: float = 60.0) -> AsyncIterator[Qwen3VL]:
        """The model for oneself: waits for the requests that use it.

        New ones wait too, but only for a few seconds until it is free: one long answer is not to
        hold up all. Others go on when the block is left and what it had `run` is done. Raises
        ApiError: what `lease` does, and 409 where the model is not free within `patience` seconds.
        """
        if (model := await self._held_alone(patience)) is None:
            raise model_busy(patience)
        try:
            yield model
        finally:
            self._send(self._let_go)

    async def _held_alone(self, patience: float) -> Qwen3VL | None:
        def hold(model: Qwen3VL) -> Qwen3VL:
            self._held = True
            return model

        def hold_if_unused(model: Qwen3VL) -> Qwen3VL | None:
            return None if self._users else hold(model)

        until = time.monotonic() + patience
        if (model := await self._changes.until(self._taking(hold), patience)) is None:
            return None
        free = False
        try:
            left = min(_HOLD_SEC, until - time.monotonic())
            free = bool(await self._changes.until(lambda: self._users == 0 or None, left))
        finally:
            if not free:
                self._let_go()
        if free:
            return model
        del model  # it may be unloaded meanwhile
        left = until - time.monotonic()
        return await self._changes.until(self._taking(hold_if_unused), left)

    async def run(self, action: Callable[[], Result]) -> Result:
        """Do something slow to the model on its thread, inside `exclusive`.

        A pool's threads will not do: they end without what MLX needs. An action that has begun
        goes on when the caller is cancelled.
        """
        future: Future[Result] = Future()
        self._send(partial(self._do, action, future))
        return await asyncio.wrap_future(future)

    def after_load(self, change: Callable[[Qwen3VL], None]) -> None:
        """Do `change` to the model whenever it is loaded from now on, instead of the last one.

        For what `run` did to it to outlast its unloading.
        """
        self._change = change

    # The end.

    def open(self, answers: Endable) -> None:
        """Remember answers that are under way: `end_all` ends them."""
        with self._changes:
            self._answers.add(answers)
            ending = self._ending
        if ending:
            answers.end()

    def shut(self, answers: Endable) -> None:
        """Forget answers that have ended. Doing it again does nothing."""
        with self._changes:
            self._answers.discard(answers)
            self._changes.notify()

    async def ended(self) -> None:
        """Return when no more requests are taken, for what has no answers to end yet."""
        await self._end.until(lambda: self._ending or None)

    async def end_all(self, patience: float = 5.0) -> bool:
        """End all open answers and take no more requests; whether all were shut in time."""
        with self._changes:
            self._ending = True
            self._changes.notify()
            answers = list(self._answers)
        self._end.notify()
        for each in answers:
            each.end()
        return await self._changes.until(lambda: not self._answers or None, patience) is not None

    def close(self, patience: float | None = None) -> bool:
        """Unload for good, and write what the engine is to keep; whether that is done.

        A load cannot be interrupted. One that takes more than `patience` seconds still goes on
        where this returns False, and only `os._exit` ends the process without harm then.
        """
        with self._changes:
            self._ending = self._closing = True
            self._changes.notify()
        self._end.notify()
        until = None if patience is None else time.monotonic() + patience
        while self._thread is not None and self._thread.is_alive():
            if until is not None and self._working and time.monotonic() > until:
                return False
            self._thread.join(0.05)
        atexit.unregister(self.close)
        return True

    # The parts.

    def _taking(self, use: Callable[[Qwen3VL], Result]) -> Callable[[], Result | None]:
        """For `until`: what `use` makes of the model once it is there, and nobody's alone."""
        asked = False

        def take() -> Result | None:
            nonlocal asked
            model, asked = self._usable(asked), True
            return None if model is None or self._held else use(model)

        return take

    def _usable(self, asked: bool) -> Qwen3VL | None:
        """The model, or None while it loads again. asked: not to be begun once more."""
        if self._ending:
            raise stopping()
        if self._state == "failed" and (self._first or asked):
            raise ApiError(
                503,
                f"{self.names[0]} could not be loaded: {self._reason}",
                code="model_failed",
                headers={"x-should-retry": "false"},  # clients ask again by themselves else
            )
        if self._state == "loading" and self._first:
            seconds = time.monotonic() - self._since
            raise ApiError(
                503,
                f"{self.names[0]} is loading, for {seconds:.0f} seconds so far; ask again soon",
                code="model_loading",
                headers={"Retry-After": str(_RETRY_SEC)},
            )
        model = self._model if self._state == "ready" else None
        if model is not None and model.engine.closed and not self._held:
            self._state = "unloaded"
            self._send(self._unload)
        if self._state in ("unloaded", "failed"):
            self._begin_load()
            return None
        return model

    def _begin_load(self) -> None:
        self._enter("loading")
        self._send(self._load_model)

    def _enter(self, state: State, reason: str | None = None) -> None:
        with self._changes:
            self._state, self._reason = state, reason
            self._since = self._used = time.monotonic()
            self._changes.notify()

    def _give_back(self) -> None:
        with self._changes:
            self._users -= 1
            self._used = time.monotonic()
            self._changes.notify()

    def _let_go(self) -> None:
        with self._changes:
            self._held = False
            self._used = time.monotonic()
            self._changes.notify()

    def _send(self, task: Callable[[], None]) -> None:
        with self._changes:
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="qwen3vl-host", daemon=True)
                # A thread that still computes while the interpreter ends takes the process down.
                atexit.register(self.close)
                self._thread.start()
            self._tasks.append(task)
            self._changes.notify()

    # On the thread.

    def _keep(self) -> None:
        try:
            while (task := self._next()) is not None:
                task()
                self._working = False
                del task  # what it holds is free while the next is waited for
        finally:
            self._unload()
            mx.synchronize()
            mx.clear_streams()  # left to the interpreter's end, this thread's would abort it

    def _next(self) -> Callable[[], None] | None:
        with self._changes:
            while not self._tasks:
                if self._closing:
                    return None
                left = self._idle_left()
                if left is not None and left <= 0:
                    self._enter("unloaded")
                    return self._unload
                self._changes.wait(left)
            self._working = True
            return self._tasks.popleft()

    def _idle_left(self) -> float | None:
        """Seconds until the model is unloaded if nothing happens; None for never."""
        if self.idle_unload_sec is None or self._state != "ready" or self._users or self._held:
            return None
        return self._used + self.idle_unload_sec - time.monotonic()

    def _load_model(self) -> None:
        if self._closing:
            return
        _log.info("loading %s", self.names[0])
        started = time.monotonic()
        try:
            model = self._load()
            if self._change is not None:
                self._change(model)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is told of
            shown = _log.isEnabledFor(logging.DEBUG)
            _log.error("%s could not be loaded: %s", self.names[0], error, exc_info=shown)
            self._enter("failed", one_line(error))
            return
        _log.info("%s is ready after %.1f seconds", self.names[0], time.monotonic() - started)
        with self._changes:
            self._model, self._first = model, False
            self._enter("ready")

    def _unload(self) -> None:
        with self._changes:
            model, self._model = self._model, None
        if model is None:
            return
        if not self._closing:
            what = "has failed" if model.engine.closed else "is unloaded"
            _log.info("%s %s; it is loaded again when asked for", self.names[0], what)
        model.close()
        del model
        gc.collect()  # model and engine refer to each other
        mx.clear_cache()

    def _do(self, action: Callable[[], Result], future: Future[Result]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self._closing:
                raise stopping()
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
