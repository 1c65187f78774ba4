"""Server-sent events: an answer as it is made, until its end or until its reader leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen3vl_mlx.server.errors import ApiError, as_api_error
from qwen3vl_mlx.server.question import Answers, disconnected

_log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One event. JSON holds no newline, so that one `data:` line is enough."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


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
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            if await self._send_events(send, gone):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the connection broke while it was written to
            pass
        finally:
            gone.cancel()
            self.answers.close()

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
                await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            if following is not None:
                following.cancel()
                with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                    await following
            await self.events.aclose()
