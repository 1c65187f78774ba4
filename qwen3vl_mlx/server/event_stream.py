"""Server-sent events: an answer as it is made, until its end or until its reader leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import suppress
from math import ceil
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from qwen3vl_mlx.server.errors import ApiError, as_api_error
from qwen3vl_mlx.server.question import Answers, disconnected, while_connected
from qwen3vl_mlx.server.reply import JsonReply
from qwen3vl_mlx.server.serving import Serving

_log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_LOOK_SEC = 1.0  # between two looks at a reader that takes nothing
_STALL_SEC = 60.0  # after which it is given up


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One event. JSON holds no newline, so that one `data:` line is enough."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data, allow_nan=False)}\n\n".encode()


class EventStream(Response):
    """Sends `events` as they come, comments while none do, and closes `answers` at the end.

    A failure in between becomes the event that `on_error` makes of it. When the client leaves,
    the answers leave the engine with it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answers: Answers,
        events: AsyncGenerator[bytes, None],
        on_error: Callable[[ApiError], bytes],
        keep_alive_sec: float,
        headers: Mapping[str, str] | None = None,
    ):
        self.answers = answers
        self.events = events
        self.on_error = on_error
        self.keep_alive_sec = keep_alive_sec
        self.status_code = 200
        self.background = None
        self.init_headers(
            {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(disconnected(Request(scope, receive)))
        start = {"status": self.status_code, "headers": self.raw_headers}
        try:
            await self._send(send, gone, {"type": "http.response.start", **start})
            if await self._send_events(send, gone):
                await self._send(send, gone, _body(b"", more=False))
        except OSError:  # the connection broke, or nobody reads what is written to it
            pass
        finally:
            gone.cancel()
            self.answers.close()

    async def _send(self, send: Send, gone: asyncio.Future[None], message: Message) -> None:
        """Send, with the model free as soon as all is said, whether or not it is read.

        TimeoutError where the client takes nothing for too long.
        """
        sending = asyncio.ensure_future(send(message))
        try:
            for _ in range(ceil(_STALL_SEC / _LOOK_SEC)):
                await asyncio.wait(
                    {sending, gone}, timeout=_LOOK_SEC, return_when=asyncio.FIRST_COMPLETED
                )
                if sending.done():
                    return sending.result()
                if gone.done():
                    raise ConnectionResetError
                self.answers.free()
            raise TimeoutError
        finally:
            await _cancelled(sending)

    async def _send_events(self, send: Send, gone: asyncio.Future[None]) -> bool:
        """Send all events; False where the client has left."""
        following: asyncio.Future[bytes] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(self.events))
                waited: set[asyncio.Future[Any]] = {following, gone}
                await asyncio.wait(
                    waited,
                    timeout=self.keep_alive_sec,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if gone.done():
                    return False
                body = _KEEP_ALIVE
                if following.done():
                    try:
                        body = following.result()
                    except StopAsyncIteration:
                        return True
                    except Exception as error:  # noqa: BLE001
                        failure = as_api_error(error)
                        if failure.status == 500:
                            _log.error("an answer failed", exc_info=error)
                        body = self.on_error(failure)
                    following = None
                await self._send(send, gone, _body(body, more=True))
        finally:
            if following is not None:
                await _cancelled(following)
            await self.events.aclose()


def _body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _cancelled(future: asyncio.Future[Any]) -> None:
    future.cancel()
    with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
        await future


async def reply(
    request: Request,
    answers: Answers,
    events: AsyncGenerator[bytes, None] | None,
    on_error: Callable[[ApiError], bytes],
    whole: Callable[[], Coroutine[Any, Any, Mapping[str, Any]]],
    headers: Mapping[str, str] | None,
) -> Response:
    """The answers as a stream of `events`, or without those as what `whole` makes of them.

    The answers are closed when they are sent or lost.
    """
    if events is not None:
        serving: Serving = request.app.state.serving
        return EventStream(answers, events, on_error, serving.options.keep_alive_sec, headers)
    try:
        body = await while_connected(request, whole())
    finally:
        answers.close()
    return JsonReply(body, headers=headers)
