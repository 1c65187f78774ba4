"""What a browser may do here: this page's own requests, and nothing that leaves the machine."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Pictures and links that a model writes are never fetched from elsewhere. Gradio's page needs
# inline scripts and styles, blobs for the camera, and data for its icons.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "frame-src 'self'",
        "form-action 'self'",
        "base-uri 'self'",
        "object-src 'none'",
        "frame-ancestors 'self'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """ASGI middleware: a name bent to this machine's address, and another site's page, get nothing.

    names: what others call this machine; empty where only this machine itself can connect, and None
    where the page is shared under a name that is not known.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str] | None = ()):
        self.app = app
        self.names = None if names is None else frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = self._problem(headers.get("host", ""), headers.get("origin"))
        if problem:
            await PlainTextResponse(problem, status_code=403)(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self.app(scope, receive, guarded)

    def _problem(self, host: str, origin: str | None) -> str | None:
        if self.names is None:
            return None
        name = host_name(f"//{host}")
        known = name in self.names or (bool(self.names) and is_address(name))
        if not known and not is_loopback(name):
            return f"this page is not reached as {name!r}"
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "another site's page may not ask here"
        return None


def host_name(url: str) -> str:
    """The host of a URL, "" where there is none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether it is a number and no name, which cannot be bent."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
