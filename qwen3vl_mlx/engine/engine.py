"""The engine: one thread that owns a model and answers the requests of all front ends."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import mlx.core as mx

from qwen3vl_mlx.engine.admission import Admission, memory_limit
from qwen3vl_mlx.engine.constraints import GrammarCompiler
from qwen3vl_mlx.engine.draft_model import DraftCheckpoint, DraftModel
from qwen3vl_mlx.engine.feature_cache import FeatureCache, FeatureCacheStats
from qwen3vl_mlx.engine.job import first_reserve
from qwen3vl_mlx.engine.load import Limits, Load
from qwen3vl_mlx.engine.prefix_cache import PrefixCache, PrefixStats
from qwen3vl_mlx.engine.request import Handle, Request
from qwen3vl_mlx.engine.scheduler import Scheduler
from qwen3vl_mlx.engine.speculative import (
    MOST_DRAFTED,
    Drafter,
    Either,
    Lookup,
    Speculation,
)
from qwen3vl_mlx.errors import EngineClosedError, InputError, QueueFullError
from qwen3vl_mlx.forks import check_not_forked, is_forked
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.tokenizer import Tokenizer
from qwen3vl_mlx.quant.plan import PREFILL_CHUNK

Result = TypeVar("Result")

_DRAFT_SHARE = 4  # a draft model's caches get this part of the model's on top
_DEADLINE_SEC = 0.05  # how long the clock may go unseen while the disk is read


@dataclass(frozen=True)
class EngineOptions:
    """How a model is served. Bytes of 0 switch a cache off.

    cache_folder keeps the prefix cache over restarts. memory_limit: bytes for weights, caches and
    work together, by default the device's working set. kv_bits: 8 or 4 quantizes keys and values.
    speculative: "lookup" guesses what was said before; draft: a smaller model that guesses. At
    most draft_tokens guesses are verified at once. Answers stay what they are without.
    """

    max_batch: int = 8
    max_queue: int = 256
    prefill_chunk: int = PREFILL_CHUNK
    interleave: int = 512
    prefix_cache_bytes: int = 2 * 2**30
    feature_cache_bytes: int = 512 * 2**20
    cache_folder: Path | None = None
    cache_folder_bytes: int = 10 * 2**30
    kv_bits: int | None = None
    memory_limit: int | None = None
    speculative: Literal["lookup"] | None = None
    draft: DraftCheckpoint | None = None
    draft_tokens: int = MOST_DRAFTED

    def __post_init__(self) -> None:
        counts = ("max_batch", "max_queue", "prefill_chunk", "interleave", "draft_tokens")
        sizes = ("prefix_cache_bytes", "feature_cache_bytes", "cache_folder_bytes")
        for name, least in {**dict.fromkeys(counts, 1), **dict.fromkeys(sizes, 0)}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} must be a whole number from {least}, got {value!r}")
        if self.memory_limit is not None and type(self.memory_limit) is not int:
            raise InputError(f"memory_limit must be bytes, got {self.memory_limit!r}")
        if self.kv_bits not in (None, 4, 8):
            raise InputError(f"kv_bits must be 8, 4 or None, got {self.kv_bits!r}")
        if self.cache_folder is not None and not self.prefix_cache_bytes:
            raise InputError("cache_folder keeps what prefix_cache_bytes holds: give it some")
        if self.speculative not in (None, "lookup"):
            raise InputError(f'speculative must be "lookup" or None, got {self.speculative!r}')
        if self.draft is not None and not isinstance(self.draft, DraftCheckpoint):
            raise InputError(
                f"draft is a DraftCheckpoint: load(..., draft={self.draft!r}) loads one"
            )
        if self.draft_tokens > MOST_DRAFTED:
            raise InputError(f"draft_tokens must be at most {MOST_DRAFTED}")


@dataclass(frozen=True)
class _Message:
    """Something for the engine's thread to do, and whom to tell where that fails."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None]


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing and what its caches did."""

    load: Load
    prefix: PrefixStats | None
    features: FeatureCacheStats


class Engine:
    """Answers requests, many at once, on a thread of its own that starts with the first one."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, compiler: GrammarCompiler, options: EngineOptions
    ):
        self.options = options
        admission = Admission.for_model(
            model,
            memory_limit(options.memory_limit),
            options.kv_bits,
            chunk=options.prefill_chunk,
        )
        if (draft := options.draft) is not None:
            draft.check(model, tokenizer)
            other = Admission.for_model(
                draft.model, admission.limit, options.kv_bits, chunk=options.interleave
            )
            admission = admission.beside(other)
        if options.memory_limit is not None and admission.available <= 0:
            raise InputError(
                f"memory_limit is {options.memory_limit:,} bytes, and the weights take "
                f"{admission.weights:,} and the program {admission.reserved:,}: raise it, or load "
                "a smaller model, or one of fewer bits"
            )
        self.scheduler = Scheduler(
            model,
            tokenizer,
            compiler,
            admission,
            _prefix_cache(model, options),
            FeatureCache(options.feature_cache_bytes),
            Limits(options.max_batch, options.prefill_chunk, options.interleave, options.kv_bits),
            _speculation(model, options),
            partial(_notify, weakref.ref(self)),
        )
        self._inbox: deque[_Message] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._submitted = 0
        self._thread: threading.Thread | None = None
        self._at_exit = partial(_close, weakref.ref(self))

    def submit(self, request: Request) -> Handle:
        """Ask; returns at once, from any thread.

        Raises InputError for what can never fit in memory, QueueFullError, EngineClosedError, and
        ForkedProcessError in a child process.
        """
        check_not_forked()  # before the lock: it may have been held in the parent
        admission = self.scheduler.admission
        cost = admission.cost(request.prompt, first_reserve(request, admission))
        if problem := admission.refuse(cost):
            raise InputError(problem)
        handle = Handle(request, self._cancel)
        submitted = time.perf_counter()
        with self._wake:
            # Numbers only: they may be a step old, as the thread goes on.
            free = max(0, self.options.max_batch - self.scheduler.active)
            queued = self._submitted - self.scheduler.counts.begun - free
            if queued >= self.options.max_queue:
                raise QueueFullError(
                    f"{queued} requests are waiting and the queue holds "
                    f"{self.options.max_queue}; ask again later"
                )
            self._send(_Message(lambda: self.scheduler.add(handle, submitted), handle.put))
            self._submitted += 1
        return handle

    def call(self, action: Callable[[], Result]) -> Result:
        """Run something on the owner thread between two steps, and wait for its result."""
        check_not_forked()
        future: Future[Result] = Future()
        message = _Message(lambda: future.set_result(action()), future.set_exception)
        with self._wake:
            self._send(message)
        return future.result()

    @property
    def closed(self) -> bool:
        """Whether it answers no more: closed, or failed."""
        return self._closed

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._inbox) or self._submitted > self.scheduler.counts.ended

    @property
    def stats(self) -> EngineStats:
        """A look from outside: numbers may be a step apart."""
        prefix = self.scheduler.prefix
        return EngineStats(
            self.scheduler.load,
            prefix.stats if prefix is not None else None,
            self.scheduler.features.stats,
        )

    def clear_caches(self) -> None:
        """Forget all prefixes and features, on disk too."""

        def clear() -> None:
            for cache in self.scheduler.caches:
                cache.clear()
            mx.clear_cache()

        self.call(clear)

    def close(self) -> None:
        """End all requests as cancelled, write what is to be kept, and stop the thread."""
        if is_forked():  # the parent's thread, which goes on there
            return
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            atexit.unregister(self._at_exit)

    def close_if_idle(self) -> bool:
        """Close, unless something is asked that has not ended; whether it is closed now."""
        check_not_forked()
        with self._wake:
            if self.busy and not self._closed:
                return False
            self._closed = True
        self.close()
        return True

    def _cancel(self, handle: Handle) -> None:
        if is_forked():
            return
        with self._wake:
            if not self._closed:
                self._send(_Message(lambda: self.scheduler.cancel(handle), handle.put))

    def _send(self, message: _Message) -> None:
        """Put a message before the thread, which starts with the first. Holds the lock."""
        if self._closed:
            raise EngineClosedError("this engine is closed; load the model again")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="qwen3vl-engine", daemon=True)
            # A thread that still computes while the interpreter ends takes the process down.
            atexit.register(self._at_exit)
            self._thread.start()
        self._inbox.append(message)
        self._wake.notify_all()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            with self._wake:
                self._closed = True
            cause = EngineClosedError(f"the engine failed: {type(error).__name__}: {error}")
            self.scheduler.abandon(cause)
            while self._inbox:
                self._inbox.popleft().fail(cause)
            raise  # for threading.excepthook to print
        finally:
            mx.synchronize()
            mx.clear_streams()  # left to the interpreter's end, this thread's would abort it

    def _serve(self) -> None:
        scheduler = self.scheduler
        while True:
            with self._wake:
                while not (self._inbox or scheduler.busy or self._closed):
                    self._wake.wait()
                closed = self._closed
            while self._inbox:
                _deliver(self._inbox.popleft())
            if closed:
                break
            scheduler.step()
            with self._wake:
                if scheduler.stalled and not (self._inbox or self._closed):
                    self._wake.wait(_DEADLINE_SEC)
        scheduler.close()


def _prefix_cache(model: Model, options: EngineOptions) -> PrefixCache | None:
    if options.prefix_cache_bytes == 0:
        return None
    disk = None
    if options.cache_folder is not None:
        from qwen3vl_mlx.engine.prefix_disk import DiskTier, fingerprint

        identity = fingerprint(model, options.kv_bits)
        disk = DiskTier(options.cache_folder, identity, options.cache_folder_bytes)
    return PrefixCache(options.prefix_cache_bytes, disk)


def _speculation(model: Model, options: EngineOptions) -> Speculation | None:
    drafters: list[Drafter] = []
    if options.speculative == "lookup":
        drafters.append(Lookup())
    if (draft := options.draft) is not None:
        prefix = options.prefix_cache_bytes // _DRAFT_SHARE
        features = FeatureCache(options.feature_cache_bytes // _DRAFT_SHARE)
        held = PrefixCache(prefix) if prefix else None
        drafters.append(DraftModel(draft.model, features, held, options.kv_bits))
    if not drafters:
        return None
    drafter = drafters[0] if len(drafters) == 1 else Either(*drafters)
    return Speculation(drafter, model.config.text, options.draft_tokens)


def _deliver(message: _Message) -> None:
    try:
        message.run()
    except BaseException as error:
        message.fail(error)
        if not isinstance(error, Exception):
            raise


def _notify(engine: weakref.ref[Engine]) -> None:
    if (own := engine()) is not None:
        with own._wake:
            own._wake.notify_all()


def _close(engine: weakref.ref[Engine]) -> None:
    if (own := engine()) is not None:
        own.close()
