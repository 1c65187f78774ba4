"""Ask a server of this package that already runs, over a Unix socket or HTTP.

A command that asks so starts in a fraction of the time: it imports neither MLX nor a picture
library, only what Python comes with.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from qwen3vl_mlx.engine.output import Chunk, Usage
from qwen3vl_mlx.errors import InputError, QueueFullError, Qwen3VLError, TooLargeError
from qwen3vl_mlx.folders import default_socket

SERVER_VARIABLE = "QWEN3VL_SERVER"
API_KEY_VARIABLE = "QWEN3VL_API_KEY"

_CONNECT_SEC = 3.0
_SILENCE_SEC = 60.0  # the server says something every ten seconds, if only that it is there
_CALLERS_FAULT = (400, 404, 405, 415, 422)
_LOADING = "model_loading"


class ServerLoadingError(Qwen3VLError):
    """The server's model is not ready yet; ask again soon."""


class ServerGoneError(Qwen3VLError):
    """The server cannot be reached, or broke off."""


@dataclass(frozen=True)
class Server:
    """Where a server listens: a Unix socket, or an http: or https: URL without a path."""

    address: str
    socket: Path | None = None
    api_key: str | None = None


def find_server(given: str | None = None) -> Server | None:
    """The server to ask: `given`, $QWEN3VL_SERVER, or the one at the default socket, if it runs.

    Addresses are paths of sockets or URLs; "none" is no server. One that is named is returned
    without a look at whether it runs. Raises InputError for what is no address.
    """
    named = given or os.environ.get(SERVER_VARIABLE) or None
    if named is None:
        path = default_socket()
        return _at_socket(path) if listens(path) else None
    if named.lower() in ("none", "off", "0"):
        return None
    if "://" not in named:
        return _at_socket(Path(named).expanduser())
    try:
        url = urlsplit(named)
        named_well = bool(url.hostname) and url.port != 0
    except ValueError:  # brackets or a port that are none
        raise _no_address(named) from None
    if url.scheme == "unix":
        return _at_socket(Path(url.path))
    below = url.path.rstrip("/")
    if url.scheme not in ("http", "https") or not named_well or below not in ("", "/v1"):
        raise _no_address(named)
    return Server(f"{url.scheme}://{url.netloc}", api_key=os.environ.get(API_KEY_VARIABLE))


def _no_address(named: str) -> InputError:
    return InputError(
        f"{named!r} is no server's address; give http://HOST:PORT, or the path of its socket"
    )


def _at_socket(path: Path) -> Server:
    return Server(str(path), path, os.environ.get(API_KEY_VARIABLE))


def listens(path: Path) -> bool:
    """Whether somebody listens at a Unix socket that belongs to this user."""
    try:
        found = path.stat()
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
            return False
        _connected(path).close()
    except OSError:
        return False
    return True


def _connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(_CONNECT_SEC)
        made.connect(str(path))
        made.settimeout(_SILENCE_SEC)
    except OSError:
        made.close()
        raise
    return made


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path):
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = _connected(self.path)


def _connection(server: Server) -> http.client.HTTPConnection:
    if server.socket is not None:
        return _SocketConnection(server.socket)
    url = urlsplit(server.address)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname or "localhost", url.port, timeout=_SILENCE_SEC)


@contextmanager
def _request(
    server: Server, method: str, path: str, body: Mapping[str, Any] | None = None
) -> Iterator[http.client.HTTPResponse]:
    """A request and its answer with status 200. Raises what the server's refusal means."""
    connection = _connection(server)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if server.api_key:
        headers["Authorization"] = f"Bearer {server.api_key}"
    try:
        with _gone_if_broken(server):
            data = None if body is None else json.dumps(body).encode()
            with suppress(BrokenPipeError):  # it answered before it had read all, and says why
                connection.request(method, path, data, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(server, response.status, response.read())
        yield response
    finally:
        connection.close()


@contextmanager
def _gone_if_broken(server: Server) -> Iterator[None]:
    """Around what is done with the connection alone: the caller's own errors are its own."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ServerGoneError(
            f"the server at {server.address} does not answer ({problem or type(error).__name__}); "
            "start it with `qwen3vl serve --socket`, or give --no-server"
        ) from error


def _refusal(server: Server, status: int, body: bytes) -> Qwen3VLError:
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = f"status {status}: no answer that can be read", None
    if code == _LOADING:
        return ServerLoadingError(message)
    if status == 413:
        return TooLargeError(message)
    if status in _CALLERS_FAULT:
        return InputError(message)
    if status == 429:
        return QueueFullError(message)
    return Qwen3VLError(f"the server at {server.address} says: {message}")


def served_models(server: Server) -> list[str]:
    """Names of the model that a server runs, its own first. Raises Qwen3VLError."""
    with _request(server, "GET", "/v1/models") as response, _gone_if_broken(server):
        found = json.loads(response.read())
    return [str(model["id"]) for model in found["data"]]


def is_ready(server: Server) -> bool:
    """Whether a server answers questions now. Raises ServerGoneError."""
    try:
        with _request(server, "GET", "/health"):
            return True
    except ServerGoneError:
        raise
    except Qwen3VLError:
        return False


@contextmanager
def stream_chat(server: Server, body: Mapping[str, Any]) -> Iterator[Iterator[Chunk]]:
    """The chunks of a chat completion; leaving the context ends the work on the server.

    body: a request to /v1/chat/completions. Raises InputError, QueueFullError,
    ServerLoadingError, ServerGoneError or Qwen3VLError, as its refusal or failure means.
    """
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with _request(server, "POST", "/v1/chat/completions", asked) as response:
        yield _chunks(server, response)


def _chunks(server: Server, lines: IO[bytes] | http.client.HTTPResponse) -> Iterator[Chunk]:
    """Server-sent events to chunks. The last comes when the usage has come, after the end."""
    ending: dict[str, Any] | None = None
    thought, answered = False, False
    for event in _events(server, lines):
        if "error" in event:
            raise Qwen3VLError(f"the server at {server.address} says: {event['error']['message']}")
        for choice in event["choices"]:
            delta = choice["delta"]
            text, reasoning = delta.get("content") or "", delta.get("reasoning_content") or ""
            thought, answered = thought or bool(reasoning), answered or bool(text)
            if text or reasoning:
                yield Chunk(text=text, reasoning=reasoning)
            if choice["finish_reason"] is not None:
                ending = choice
        if ending is not None and event.get("usage"):
            yield _last_chunk(ending, event["usage"], answered or not thought)
            return
    raise ServerGoneError(f"the server at {server.address} broke off in the middle of the answer")


def _events(
    server: Server, lines: IO[bytes] | http.client.HTTPResponse
) -> Iterator[dict[str, Any]]:
    while True:
        with _gone_if_broken(server):
            line = lines.readline()
        if not line:
            return
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


def _last_chunk(
    ending: Mapping[str, Any], usage: Mapping[str, Any], reasoning_closed: bool
) -> Chunk:
    """The engine's own words for the end, which the server has beside OpenAI's."""
    reason, why = ending["finish_reason"], ending.get("stop_reason")
    own = reason == "length" and why is not None
    return Chunk(
        finish_reason=why if own else reason,
        stop=None if own else why,
        usage=_usage(usage),
        reasoning_closed=reasoning_closed,
    )


def _usage(fields: Mapping[str, Any]) -> Usage:
    details = fields["completion_tokens_details"]
    accepted = details["accepted_prediction_tokens"]
    return Usage(
        prompt_tokens=fields["prompt_tokens"],
        completion_tokens=fields["completion_tokens"],
        total_tokens=fields["total_tokens"],
        cached_tokens=fields["prompt_tokens_details"]["cached_tokens"],
        total_prompt_time_sec=fields["total_prompt_time_sec"],
        total_completion_time_sec=fields["total_completion_time_sec"],
        total_time_sec=fields["total_time_sec"],
        avg_prompt_tok_per_sec=fields["avg_prompt_tok_per_sec"],
        avg_compl_tok_per_sec=fields["avg_compl_tok_per_sec"],
        avg_tok_per_sec=fields["avg_tok_per_sec"],
        time_to_first_token_sec=fields["time_to_first_token_sec"],
        peak_memory_bytes=fields["peak_memory_bytes"],
        drafted_tokens=accepted + details["rejected_prediction_tokens"],
        accepted_tokens=accepted,
    )
