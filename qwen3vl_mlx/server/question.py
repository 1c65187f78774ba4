"""One question of any API to the engine, and its answers on their way back."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from qwen3vl_mlx import __version__
from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.asking import Form, Look, check_timeout
from qwen3vl_mlx.engine.output import Chunk, Completion, Usage, collect
from qwen3vl_mlx.engine.request import Request, Stream
from qwen3vl_mlx.engine.sampling import asked_params
from qwen3vl_mlx.errors import Qwen3VLError
from qwen3vl_mlx.processing.processor import Messages
from qwen3vl_mlx.server.errors import ApiError, as_api_error, stopping
from qwen3vl_mlx.server.lease import Lease
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.serving import Serving

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Tokens of thought for OpenAI's efforts; above "medium" the model stops by itself.
EFFORTS: Mapping[str, int | None] = {
    "none": 0,
    "off": 0,
    "minimal": 128,
    "low": 1024,
    "medium": 4096,
    "high": None,
    "xhigh": None,
    "max": None,
}


class ClientGoneError(Exception):
    """The client has closed its connection: nobody reads what would be answered."""


@dataclass(frozen=True)
class Thinking:
    """What a request says of thinking, in the words of several APIs; None says nothing."""

    enabled: bool | None = None
    effort: str | None = None
    budget: int | None = None

    def tokens(self, opens_thinking: bool) -> int | None:
        """The thinking budget; None for no limit. Raises ApiError for contradictions.

        Also for what the checkpoint cannot do: Instruct models do not think, Thinking models are
        silenced by a budget of 0.
        """
        name, budget = "thinking_budget", self.budget
        if self.effort is not None:
            name = "reasoning_effort"
            effort = self.effort.strip().lower()
            if effort not in EFFORTS:
                raise ApiError(
                    400,
                    f"reasoning_effort is {self.effort!r}; expected one of {', '.join(EFFORTS)}",
                    param=name,
                    code="invalid_value",
                )
            if budget is not None:
                raise _contradiction("reasoning_effort and thinking_budget", name)
            budget = EFFORTS[effort]
        off = budget == 0
        if self.enabled is not None:
            if (self.enabled and off) or (not self.enabled and (budget or 0) > 0):
                raise _contradiction(f"enable_thinking and {name}", "enable_thinking")
            name, off = "enable_thinking", not self.enabled
        asked = not off and self != Thinking()
        if opens_thinking:
            return 0 if off else budget
        if asked:
            raise ApiError(
                400,
                f"{name} asks for thinking, and this is an Instruct model, which does not think; "
                "leave it out or load a Thinking checkpoint",
                param=name,
                code="unsupported_value",
            )
        return None


def _contradiction(what: str, param: str) -> ApiError:
    return ApiError(400, f"{what} contradict each other; give one", param=param)


@dataclass(frozen=True)
class Question:
    """What a client asks. `messages` are OpenAI's, with pictures as the client sent them."""

    messages: Messages
    model: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)  # names of SamplingParams
    form: Form = field(default_factory=Form)
    look: Look = field(default_factory=Look)
    thinking: Thinking = field(default_factory=Thinking)
    truncate: bool | None = None  # None: as the server is set
    timeout: float | None = None  # seconds; None: as the server is set
    n: int = 1
    fields: Collection[str] = ()  # of the request, to be named in errors


async def ask(http: HttpRequest, question: Question) -> Answers:
    """Read the pictures, lay out the prompt and hand it to the engine. Raises ApiError.

    The answers hold the model until they are closed. Where the client leaves first:
    ClientGoneError.
    """
    serving: Serving = http.app.state.serving
    limit = TimeLimit.of(serving.options, question.timeout)
    work = _asked(serving, question, limit)
    return await while_connected(http, work, limit, Answers.close)


@dataclass(frozen=True)
class TimeLimit:
    """When a request has to be answered; what comes before the engine's work counts too."""

    seconds: float | None = None
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, options: ServerOptions, wanted: float | None) -> TimeLimit:
        """wanted: None is as the server is set. Raises ApiError."""
        try:
            check_timeout(wanted)
        except Qwen3VLError as error:
            raise as_api_error(error, ("timeout",)) from error
        return cls(options.timeout if wanted is None else wanted)

    @property
    def left(self) -> float | None:
        """Seconds. Raises ApiError where there are none."""
        if self.seconds is None:
            return None
        left = self.started + self.seconds - time.perf_counter()
        if left <= 0:
            raise self.passed
        return left

    @property
    def passed(self) -> ApiError:
        # Asking again by itself, as clients do after a 408, would only lengthen the queue.
        return ApiError(
            408,
            f"no answer had begun after {self.seconds:g} seconds; ask again later, or raise "
            "timeout",
            param="timeout",
            code="timeout",
            headers={"x-should-retry": "false"},
        )


async def _asked(serving: Serving, question: Question, limit: TimeLimit) -> Answers:
    lease = await serving.host.lease(question.model)
    try:
        messages = await serving.pictures.read(
            question.messages, lease.model.processor, question.look
        )
        read = replace(question, messages=messages)
        laid_out = partial(_laid_out, lease.model, read, serving.options, limit)
        request = await serving.layouts.run(laid_out)
        return submit(serving, lease, limit, [request], question.n, messages)
    except BaseException as error:
        lease.release()
        if isinstance(error, Qwen3VLError):
            raise as_api_error(error, question.fields) from error
        raise


def _laid_out(
    model: Qwen3VL, question: Question, options: ServerOptions, limit: TimeLimit
) -> Request:
    budget = question.thinking.tokens(model.processor.template.opens_thinking)
    sampling = {**question.sampling, "thinking_budget": budget}
    return model.asking.prepare(
        question.messages,
        asked_params(model.default_params, None, sampling),
        question.form,
        question.look,
        truncate=options.truncate if question.truncate is None else question.truncate,
        timeout=limit.left,
        started=limit.started,
    )


def submit(
    serving: Serving,
    lease: Lease,
    limit: TimeLimit,
    requests: Sequence[Request],
    n: int = 1,
    messages: Messages = (),
) -> Answers:
    """Hand requests to the engine, each `n` times. The answers take over the lease.

    Raises what the engine raises; the lease is then still the caller's.
    """
    streams: list[Stream] = []
    try:
        for request in requests:
            streams.append(lease.model.run(replace(request, timeout=limit.left)))
            streams += lease.model.repeat(streams[-1], n - 1)
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return Answers(serving, lease, limit, streams, messages)


class Answers:
    """The answers to one question. They end, and the model is free, when they are closed.

    messages: what was asked, its pictures cut. model: the name of the one that answers;
    fingerprint: the same as long as model, weights and program are.
    """

    def __init__(
        self,
        serving: Serving,
        lease: Lease,
        limit: TimeLimit,
        streams: Sequence[Stream],
        messages: Messages,
    ):
        self.streams = streams
        self.messages = messages
        self.model = lease.name
        self.tokenizer = lease.model.processor.tokenizer
        self.fingerprint = _fingerprint(lease.model)
        self.id = uuid.uuid4().hex
        self.created = int(time.time())
        self._lease = lease
        self._limit = limit
        self._serving = serving
        self._cut = False  # the server ended what was not finished
        serving.host.open(self)

    @property
    def prompt_tokens(self) -> int:
        """Of the first prompt."""
        return len(self.streams[0].handle.request.prompt.token_ids)

    async def chunks(self, index: int = 0) -> AsyncGenerator[Chunk, None]:
        """The chunks of one answer. Raises ApiError."""
        stream = self.streams[index]
        watch = self._serving.metrics.answer_started()
        said = False
        try:
            async for chunk in stream:
                watch.chunk(chunk)
                said = said or bool(stream.handle.tokens)
                if chunk.finish_reason == "cancelled" and self._cut:
                    raise stopping()
                if chunk.finish_reason == "timeout" and not said:
                    raise self._limit.passed
                if chunk.usage is not None:
                    _log.info(_summary(chunk.usage, chunk.finish_reason))
                yield chunk
        except Qwen3VLError as error:
            raise as_api_error(error) from error
        finally:
            watch.close()

    async def merged(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """The chunks of all answers as they come, each with its answer's number."""
        if len(self.streams) == 1:
            async with aclosing(self.chunks()) as chunks:
                async for chunk in chunks:
                    yield 0, chunk
            return
        queue: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue()

        async def pour(index: int) -> None:
            try:
                async with aclosing(self.chunks(index)) as chunks:
                    async for chunk in chunks:
                        queue.put_nowait((index, chunk))
                queue.put_nowait(None)
            except Exception as error:  # noqa: BLE001
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pour(index)) for index in range(len(self.streams))]
        left = len(tasks)
        try:
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                left -= item is None
                if item is not None:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def collect(self) -> list[Completion]:
        """All answers, whole. Raises ApiError."""
        parts: list[list[Chunk]] = [[] for _ in self.streams]
        async for index, chunk in self.merged():
            parts[index].append(chunk)
        return [collect(chunks) for chunks in parts]

    def end(self) -> None:
        """Cut off what is not finished: the server is about to stop."""
        self._cut = True
        for stream in self.streams:
            stream.handle.cancel()

    def free(self) -> None:
        """Give the model back if all is said, although not all of it is read."""
        if all(stream.handle.phase == "done" for stream in self.streams):
            for stream in self.streams:
                stream.owner = None
            self._lease.release()

    def close(self) -> None:
        """Stop what is still running, and give the model back."""
        for stream in self.streams:
            stream.close()
        self._serving.host.shut(self)
        self._lease.release()


def _fingerprint(loaded: Qwen3VL) -> str:
    name = loaded.source.repo_id or loaded.source.folder.name
    weights = loaded.engine.scheduler.admission.weights  # bytes: what quantizing anew changes
    text = f"{name} {loaded.source.commit} {weights} {__version__}"
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]


def _summary(usage: Usage, reason: str | None) -> str:
    return (
        f"answer: {usage.prompt_tokens} tokens read ({usage.cached_tokens} were kept), the first "
        f"after {usage.time_to_first_token_sec:.2f} s; {usage.completion_tokens} written at "
        f"{usage.avg_compl_tok_per_sec:.1f} tokens/s, {reason}"
    )


async def while_connected(
    request: HttpRequest,
    work: Coroutine[Any, Any, Result],
    limit: TimeLimit | None = None,
    drop: Callable[[Result], None] | None = None,
) -> Result:
    """The result of `work`. Where the client leaves first it is cancelled: ClientGoneError.

    Where time is up or the server must stop first: ApiError. `drop` gets a result that came too
    late to be returned. The request's body must have been read.
    """
    serving: Serving = request.app.state.serving
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request))
    ended = asyncio.ensure_future(serving.host.ended())
    taken = False
    try:
        waited: set[asyncio.Future[Any]] = {task, gone, ended}
        left = None if limit is None else limit.left
        await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if taken := task.done():
            return task.result()
        if gone.done():
            raise ClientGoneError
        if limit is not None and not ended.done():
            raise limit.passed
        raise stopping()
    finally:
        for pending in (task, gone, ended):
            pending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await pending
        if drop and not taken and not task.cancelled() and task.exception() is None:
            drop(task.result())


async def disconnected(request: HttpRequest) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
