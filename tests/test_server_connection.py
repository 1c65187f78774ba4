"""Bodies and clients on real connections: what is too long, and who leaves."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi")

import uvicorn
from fastapi import FastAPI
from guarded import app_of

# On a real connection


@contextmanager
def listening(app: FastAPI) -> Iterator[int]:
    """The port on which a server answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return app_of(max_body_bytes=200_000)


@pytest.fixture(scope="module")
def port(app: FastAPI) -> Iterator[int]:
    with listening(app) as number:
        yield number


@pytest.fixture
def connect(port: int) -> Iterator[Callable[[], socket.socket]]:
    opened: list[socket.socket] = []

    def connected() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        return opened[-1]

    yield connected
    for each in opened:
        each.close()


def read_reply(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of one answer that says its length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
        assert data, "the connection was closed without an answer"
    head, _, body = data.partition(b"\r\n\r\n")
    lines = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
    while len(body) < int(lines[b"content-length"]):
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)


def head_of(*lines: str) -> bytes:
    first = ("POST /echo HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*first, *lines, "", ""]).encode()


def test_a_body_announced_too_long_is_refused_before_it_is_sent(
    connect: Callable[[], socket.socket],
) -> None:
    connection = connect()
    connection.sendall(head_of("Content-Length: 200001", "Expect: 100-continue"))
    assert read_reply(connection)[0] == 413


def test_a_body_that_is_sent_all_the_same_leaves_the_connection_usable(
    connect: Callable[[], socket.socket],
) -> None:
    connection = connect()
    connection.sendall(head_of("Content-Length: 5000000"))
    connection.sendall(bytes(5_000_000))
    assert read_reply(connection)[0] == 413
    connection.sendall(head_of("Content-Length: 8") + b'{"a": 1}')
    assert read_reply(connection) == (200, {"a": 1})


def test_a_body_of_unknown_length_is_counted(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(head_of("Transfer-Encoding: chunked"))
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    for _ in range(60):
        connection.sendall(chunk)
    assert read_reply(connection)[0] == 413
    connection.sendall(b"0\r\n\r\n" + head_of("Content-Length: 8") + b'{"a": 1}')
    assert read_reply(connection) == (200, {"a": 1})


def test_a_body_of_exactly_the_limit_is_read(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    body = b'{"a": 1}'.ljust(200_000)
    connection.sendall(head_of(f"Content-Length: {len(body)}") + body)
    assert read_reply(connection) == (200, {"a": 1})


def test_clients_that_leave_while_they_send_harm_nobody(
    connect: Callable[[], socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        with closing(connect()) as connection:
            connection.sendall(head_of("Content-Length: 100") + b'{"a"')
    time.sleep(0.1)
    connection = connect()
    connection.sendall(head_of("Content-Length: 8") + b'{"a": 1}')
    assert read_reply(connection) == (200, {"a": 1})
    assert not caplog.records, "not a failure of ours"


def test_a_complete_answer_is_no_disconnect(
    app: FastAPI, connect: Callable[[], socket.socket]
) -> None:
    count = app.state.serving.metrics.registry.get_sample_value
    before = count("qwen3vl_client_disconnects_total")
    connection = connect()
    connection.sendall(b"GET /lingers HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert read_reply(connection) == (200, {})
    labels = {"route": "other", "status": "200"}
    deadline = time.monotonic() + 10
    while not count("qwen3vl_http_requests_total", labels):
        assert time.monotonic() < deadline
    assert count("qwen3vl_client_disconnects_total") == before
