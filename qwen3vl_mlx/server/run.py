"""A server from its first socket to its last answer: listening, the log, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from math import ceil
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from qwen3vl_mlx.errors import InputError, Qwen3VLError
from qwen3vl_mlx.server.unix_socket import listen_at

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from qwen3vl_mlx.server.options import ServerOptions
    from qwen3vl_mlx.server.serving import Serving

_KEEP_ALIVE_SEC = 75  # longer than clients keep idle connections: theirs is the end to close
_LAST_WORDS_SEC = 5.0  # for answers that were cut off to say so
_ABORT_SEC = 2.0  # for handlers to see that their connection is gone
_LOAD_SEC = 2.0  # for a load, which cannot be interrupted
_TWICE_SEC = 0.5  # a launcher may pass on a Ctrl-C that the terminal sent us too
_NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_OPEN_FILES = (65536, 10240)  # the second is macOS's own bound

_POLL = re.compile(r'"(GET|HEAD) /(health|metrics) HTTP/[\d.]+" 200$')

_log = logging.getLogger(__name__)


def run(serving: Serving, *, debug: bool = False) -> None:
    """Serve all routes: see `serve`."""
    from qwen3vl_mlx.server.app import create_app

    serve(create_app(serving), serving, debug=debug)


def serve(app: ASGIApp, serving: Serving, *, debug: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C; answers under way may finish, for up to `shutdown_sec`.

    A second signal ends the process at once. Call it on the main thread. Raises Qwen3VLError where
    it cannot listen.
    """
    options = serving.options
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        places = []
        if options.port is not None:
            sockets += listen(options.host, options.port)
            places.append(_url(options.host, sockets[0]))
        if options.socket is not None:
            sockets.append(stack.enter_context(listen_at(options.socket)))
            places.append(str(options.socket))
        _serve(app, serving, sockets, places, debug=debug)


def _serve(
    app: ASGIApp,
    serving: Serving,
    sockets: list[socket.socket],
    places: Sequence[str],
    *,
    debug: bool,
) -> None:
    raise_file_limit()
    options = serving.options
    config = uvicorn.Config(
        app,
        log_config=_log_config(debug),
        lifespan="on",
        ws="none",
        proxy_headers=False,  # anyone could send them
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SEC,
        timeout_graceful_shutdown=ceil(options.shutdown_sec + _LAST_WORDS_SEC + _ABORT_SEC),
    )
    server = _Server(config, serving, places)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    try:
        server.run(sockets)
    finally:
        serving.pictures.close()
        serving.layouts.close()
        closed = serving.host.close(_LOAD_SEC)
    if not closed:
        os._exit(0)  # the interpreter's own end, under a thread that computes, would abort


class _Server(uvicorn.Server):
    """uvicorn, saying where it listens and giving answers time to end."""

    def __init__(self, config: uvicorn.Config, serving: Serving, places: Sequence[str]):
        super().__init__(config)
        self.serving = serving
        self.places = places
        self._asked_at: float | None = None  # to stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None and now - self._asked_at > _TWICE_SEC:
            os._exit(128 + sig)
        self._asked_at = self._asked_at or now
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serving.host.start()
        for place in self.places:
            if place.startswith("http"):
                _log.info("Listening on %s/v1 (docs: %s/docs; Ctrl-C stops)", place, place)
            else:
                _log.info("Listening on %s (for `qwen3vl ask`; Ctrl-C stops)", place)
        for line in _who_may_what(self.serving.options):
            _log.info(line)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = self.serving.options.shutdown_sec
        _log.info("Stopping; answers may take %g seconds more (Ctrl-C ends them now)", seconds)
        ending = asyncio.create_task(self._end_late_answers(seconds))
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_late_answers(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.serving.host.end_all(_LAST_WORDS_SEC)
        await asyncio.sleep(0.1)  # the last words are on their way
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _who_may_what(options: ServerOptions) -> list[str]:
    """What others than this machine, and the readers of its files, may do here."""
    lines = []
    if options.allowed_hosts:
        keys = "with a key" if options.api_keys else "WITHOUT A KEY"
        names = ", ".join(options.allowed_hosts)
        lines.append(f"Others may ask {keys}, by address or as {names}")
    if options.image_roots:
        folders = ", ".join(map(str, options.image_roots))
        lines.append(f"Clients may name picture files below {folders}")
    return lines


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on all addresses of `host`, with one port; 0 is any that is free.

    Raises Qwen3VLError.
    """
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise InputError(f"host {host!r} is no address of this machine: {error}") from error
    sockets: list[socket.socket] = []
    for family, address in dict.fromkeys((one[0], str(one[4][0])) for one in found):
        try:
            sockets.append(_prompt(socket.create_server((address, port), family=family)))
        except OSError as error:
            if error.errno in _NO_ADDRESS:
                continue  # "localhost" may have an IPv6 address where the machine has none
            for each in sockets:
                each.close()
            raise _cannot_listen(host, port, error) from error
        port = sockets[0].getsockname()[1]
    if not sockets:
        raise InputError(f"host {host!r} is no address of this machine")
    return sockets


def _prompt(listening: socket.socket) -> socket.socket:
    """The same socket, known to be TCP: only then does asyncio set TCP_NODELAY on what it accepts.

    Without that, every answer on a connection that is kept waits 40 ms for the client's system.
    """
    family, descriptor = listening.family, listening.detach()
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=descriptor)


def _cannot_listen(host: str, port: int, problem: OSError) -> Qwen3VLError:
    if problem.errno == errno.EADDRINUSE:
        return Qwen3VLError(
            f"port {port} of {host} is in use: stop what listens there, or choose another port "
            "(0 is any that is free)"
        )
    if problem.errno == errno.EACCES:
        return Qwen3VLError(f"this user may not listen on port {port}: choose one above 1023")
    return Qwen3VLError(f"cannot listen on port {port} of {host}: {problem.strerror or problem}")


def _url(host: str, listening: socket.socket) -> str:
    host, port = host.strip("[]"), listening.getsockname()[1]
    if host in ("0.0.0.0", "::"):
        host = "localhost"  # all addresses: this one works in a browser here
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_file_limit() -> None:
    """Allow as many open connections as this user may have: macOS starts with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in _OPEN_FILES:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= limit:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        except (ValueError, OSError):  # the kernel may allow less than it says
            continue
        return


class _Uncancelled(logging.Filter):
    """Drops the tracebacks of handlers that were cancelled when time was up."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class _NotPolls(logging.Filter):
    """Drops what is asked every few seconds, when it was answered as always."""

    def filter(self, record: logging.LogRecord) -> bool:
        return _POLL.search(record.getMessage()) is None


def _log_config(debug: bool) -> dict[str, Any]:
    def level(name: str) -> dict[str, Any]:
        return {"handlers": ["stderr"], "level": name, "propagate": False}

    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "line": {"format": "%(asctime)s %(levelname)s %(message)s", "datefmt": "%H:%M:%S"}
        },
        "filters": {"uncancelled": {"()": _Uncancelled}, "not polls": {"()": _NotPolls}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "line",
                "filters": ["uncancelled"],
            }
        },
        "loggers": {
            "qwen3vl_mlx": level("DEBUG" if debug else "INFO"),
            "uvicorn.access": {**level("INFO"), "filters": [] if debug else ["not polls"]},
            "uvicorn.error": level("WARNING"),
        },
    }
