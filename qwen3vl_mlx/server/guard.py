"""Who may ask, and how much: pure ASGI middlewares before all routes.

A server on a desktop is reached by every page its owner's browser opens. Three rules keep them
out: the Host must be one of ours (DNS rebinding), another origin may send nothing that is not
named, and bodies are JSON (which a browser sends to strangers only after asking).
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3vl_mlx.server.errors import ApiError, as_api_error
from qwen3vl_mlx.server.metrics import Metrics
from qwen3vl_mlx.server.reply import error_reply
from qwen3vl_mlx.server.serving import Serving

_log = logging.getLogger(__name__)

# These need no key, as the files of /docs do.
_OPEN_PATHS = {"/", "/health", "/docs", "/openapi.json", "/api-doc/openapi.json"}
_DOCS_FILES = "/docs/"
_HARMLESS = {"GET", "HEAD", "OPTIONS"}  # change nothing, and answer no other origin
_CLIENT_LEFT = 499
_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


def add_guards(app: FastAPI, serving: Serving) -> None:
    """Put all middlewares before the app. The last one added is the first one asked."""
    options = serving.options
    origins = [origin.rstrip("/") for origin in options.cors_origins]
    app.add_middleware(
        Gate,
        hosts=("localhost", options.host, *options.allowed_hosts),
        origins=origins,
        api_keys=options.api_keys,
        max_body_bytes=options.max_body_bytes,
    )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("x-request-id", "x-qwen3vl-warning", "retry-after"),
        )
    app.add_middleware(Envelope, metrics=serving.metrics)


class Envelope:
    """Outermost: every request gets an id, every answer its headers, and both are counted."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(receive, send, request_id)
        started = time.perf_counter()
        self.metrics.request_started()
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.status is not None:
                raise  # the connection is cut: half an answer cannot be taken back
            _log.exception("request %s failed", request_id)
            reply = error_reply(scope["path"], as_api_error(error))
            await reply(scope, exchange.receive, exchange.send)
        finally:
            route = scope.get("route")
            self.metrics.request_ended(
                "other" if route is None else route.path,
                exchange.status or _CLIENT_LEFT,
                time.perf_counter() - started,
                client_left=exchange.client_left,
            )


@dataclass
class _Exchange:
    """One request and its answer, on their way through the outermost middleware."""

    inner_receive: Receive
    inner_send: Send
    request_id: str
    status: int | None = None
    complete: bool = False
    client_left: bool = False

    async def receive(self) -> Message:
        message = await self.inner_receive()
        # Servers say so too when the answer is complete.
        if message["type"] == "http.disconnect" and not self.complete:
            self.client_left = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
            headers["content-security-policy"] = "frame-ancestors 'none'"
        elif not message.get("more_body", False):
            self.complete = True
        await self.inner_send(message)


class Gate:
    """Refuses hosts, origins, callers and bodies before any route sees them.

    hosts: names this server is reached by; addresses always pass, as only a name can be bent to
    another machine. origins: of pages that may ask; "*" for all. api_keys: each opens; where
    there are none, none is asked for.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        origins: Collection[str],
        api_keys: Sequence[str],
        max_body_bytes: int,
    ):
        self.app = app
        self.hosts = {_plain(host) for host in hosts}
        self.origins = origins
        self.api_keys = [key.encode() for key in api_keys]
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        method: str = scope["method"]
        try:
            check_host(headers, self.hosts)
            if method not in _HARMLESS:
                check_origin(headers, self.origins)
            if not _is_open(scope["path"]):
                check_key(headers, self.api_keys)
            if _has_body(headers):
                check_content(headers)
            check_length(int(headers.get("content-length", 0)), self.max_body_bytes)
        except ApiError as error:
            await error_reply(scope["path"], error)(scope, receive, send)
            return
        await self.app(scope, _counted(receive, self.max_body_bytes), send)


def check_host(headers: Headers, hosts: Collection[str]) -> None:
    """Refuse names that are not this server's. Raises ApiError 403."""
    given = headers.get("host", "")
    try:
        name = "" if "@" in given else _plain(urlsplit(f"//{given}").hostname or "")
    except ValueError:
        name = ""
    if name not in hosts and not _is_address(name):
        raise ApiError(
            403,
            f"this server is not called {given[:200]!r}; ask for localhost or its address, or "
            "start it with --allowed-host",
            code="host_not_allowed",
        )


def check_origin(headers: Headers, origins: Collection[str]) -> None:
    """Refuse what a page of another origin sends. Raises ApiError 403."""
    origin = headers.get("origin")
    if origin is None or origin in origins or "*" in origins:
        return
    if origin.lower() not in {f"{scheme}://{headers['host']}".lower() for scheme in _SCHEMES}:
        raise ApiError(
            403,
            f"pages of {origin[:200]!r} may not ask this server; start it with --cors-origin",
            code="origin_not_allowed",
        )


_SCHEMES = ("http", "https")  # a proxy may add TLS


def check_key(headers: Headers, api_keys: Sequence[bytes]) -> None:
    """Ask for one of the keys, if there are any. Raises ApiError 401."""
    if not api_keys:
        return
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    given = [text.encode("latin-1") for text in (bearer, headers.get("x-api-key", "")) if text]
    # All are compared, each in constant time: how long it takes tells nothing.
    if True not in [hmac.compare_digest(one, key) for one in given for key in api_keys]:
        problem = "wrong API key" if given else "this server needs an API key"
        if not given and "authorization" in headers:
            problem = "the Authorization header has no Bearer"
        raise ApiError(
            401,
            f"{problem}; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def check_content(headers: Headers) -> None:
    """Ask for plain JSON: a page may send other kinds anywhere. Raises ApiError 415."""
    kind = headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            f"the Content-Type is {kind[:100]!r}; send JSON as 'Content-Type: application/json'",
            code="unsupported_content_type",
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(
            415, "compressed bodies are not read; send it as it is", code="unsupported_encoding"
        )


def check_length(length: int, max_body_bytes: int) -> None:
    """Raises ApiError 413."""
    if length > max_body_bytes:
        raise ApiError(
            413,
            f"the body is longer than {max_body_bytes:,} bytes; send fewer or smaller pictures, "
            "or start the server with a larger --max-body",
            code="too_large",
        )


def _counted(receive: Receive, max_body_bytes: int) -> Receive:
    """`receive` that raises ApiError 413 once more than announced, or allowed, has come."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        check_length(total, max_body_bytes)
        return message

    return counted


def _plain(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_DOCS_FILES)
