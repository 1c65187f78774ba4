"""A server as a process: where it listens, what it says, and how it ends, whatever is under way."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server is an extra")

from qwen3vl_mlx.server import run

ROOT = Path(__file__).parents[1]
SOON_SEC = 20.0  # for what should take one or two, on a machine that is busy

# A server of small routes, on the command line: how to load, and seconds for late answers.
SCRIPT = """
import asyncio, resource, sys
from contextlib import suppress
from types import SimpleNamespace

import mlx.core as mx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from qwen3vl_mlx import cli, load
from qwen3vl_mlx.errors import CheckpointError
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server import run
from qwen3vl_mlx.server.host import ModelHost

def demo():
    return load("demo")

def endless():
    print("computing", file=sys.stderr, flush=True)
    while True:
        mx.eval(mx.random.normal((256, 256)) @ mx.random.normal((256, 256)))

def failing():
    raise CheckpointError("there is none")

class Answers:
    def __init__(self):
        self.ended = False
        host.open(self)

    def end(self):
        self.ended = True

way, seconds, port = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
host = ModelHost(globals()[way], ["tiny"])
run._LAST_WORDS_SEC, run._ABORT_SEC, run._LOAD_SEC = 0.5, 0.2, 0.2

async def ticks(count, size):
    answers = Answers()
    try:
        for i in range(count):
            if answers.ended:
                yield b"cut"
                return
            yield b"tick" + bytes(size)
            await asyncio.sleep(0.05)
        yield b"whole"
    finally:
        host.shut(answers)

async def stream(request):
    query = request.query_params
    return StreamingResponse(ticks(int(query["count"]), int(query.get("size", 0))))

async def stuck(request):
    print("stuck", file=sys.stderr, flush=True)
    await asyncio.sleep(1000)

async def state(request):
    with suppress(ClientDisconnect):
        await request.body()
    return JSONResponse([host.status().state, resource.getrlimit(resource.RLIMIT_NOFILE)[0]])

app = Starlette(routes=[
    Route("/ticks", stream), Route("/stuck", stuck), Route("/state", state, methods=["GET", "POST"])
])
options = ServerOptions(host="127.0.0.1", port=port, shutdown_sec=seconds)
pool = SimpleNamespace(close=lambda: None)
serving = SimpleNamespace(options=options, host=host, pictures=pool, layouts=pool)
sys.exit(cli.run(lambda: run.serve(app, serving)))
"""


class Process:
    """A server that runs apart, and what it says."""

    def __init__(self, *command: str, preexec: Callable[[], None] | None = None):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=preexec,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def says(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches."""
        for _ in range(int(SOON_SEC / 0.01)):
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"nothing like {pattern!r} in {self.lines}")

    @property
    def port(self) -> int:
        return int(self.says(r"Listening on http://127\.0\.0\.1:(\d+)/v1")[1])

    def get(self, path: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SOON_SEC)
        connection.request("GET", path)
        return connection.getresponse()

    def post(self, path: str, body: object) -> http.client.HTTPConnection:
        """Ask, and do not wait for the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SOON_SEC)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        """Wait for its end, which shows no traceback."""
        status = self.process.wait(SOON_SEC)
        self._reader.join()
        assert not re.search("Traceback|Exception", self.said), self.said
        return status

    @property
    def said(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """`start(way, seconds, port)`: SCRIPT as a process, ended with the test."""
    script = tmp_path / "server.py"
    script.write_text(SCRIPT)
    with ExitStack() as stack:

        def started(way: str = "demo", seconds: float = 10, port: int = 0, **how: Any) -> Process:
            process = Process(str(script), way, str(seconds), str(port), **how)
            stack.callback(process.end)
            return process

        yield started


def rest_of(response: http.client.HTTPResponse) -> tuple[threading.Thread, list[bytes]]:
    """Read on in a thread; the rest is there when it has ended. Fails where it is cut."""
    body: list[bytes] = []
    thread = threading.Thread(target=lambda: body.append(response.read()))
    thread.start()
    return thread, body


STOPS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])


def test_it_says_where_it_listens_and_stops_when_told(start: Callable[..., Process]) -> None:
    server = start()
    server.says("tiny is ready")
    assert server.get("/state").status == 200
    assert '"GET /state HTTP/1.1" 200' in server.says("GET /state").string
    server.signal(signal.SIGTERM)
    assert server.status() == 0
    assert f"(docs: http://127.0.0.1:{server.port}/docs" in server.said
    with pytest.raises(ConnectionRefusedError):
        server.get("/state")


@STOPS
def test_it_stops_while_the_model_still_loads(start: Callable[..., Process], number: int) -> None:
    server = start("endless")
    server.says("computing")
    assert b'"loading"' in server.get("/state").read()
    server.signal(number)
    assert server.status() == 0


def test_a_load_that_fails_is_told_of_and_the_server_goes_on(start: Callable[..., Process]) -> None:
    server = start("failing")
    server.says("ERROR tiny could not be loaded: there is none")
    assert b'"failed"' in server.get("/state").read()
    server.signal(signal.SIGTERM)
    assert server.status() == 0


@STOPS
def test_answers_under_way_are_finished(start: Callable[..., Process], number: int) -> None:
    server = start()
    response = server.get("/ticks?count=12")
    assert response.read(4) == b"tick"
    reader, body = rest_of(response)
    server.signal(number)
    if number == signal.SIGINT:
        server.signal(number)  # as launchers pass it on
    server.says("Stopping")
    time.sleep(0.2)
    with pytest.raises(ConnectionRefusedError):
        server.get("/state")
    assert server.status() == 0
    reader.join()
    assert body == [b"tick" * 11 + b"whole"]


def test_late_answers_are_ended_with_a_last_word(start: Callable[..., Process]) -> None:
    server = start(seconds=0.3)
    streams = [rest_of(server.get("/ticks?count=100000")) for _ in range(3)]
    server.signal(signal.SIGTERM)
    started = time.monotonic()
    assert server.status() == 0
    assert time.monotonic() - started < SOON_SEC / 4
    for reader, body in streams:
        reader.join()
        assert re.fullmatch(rb"(tick)+cut", body[0])


def test_nobody_can_keep_it_from_ending(start: Callable[..., Process]) -> None:
    """A handler that never ends, clients that do not read, or that never finish asking."""
    server = start(seconds=0.2)
    with ExitStack() as stack:
        for request in (
            b"GET /stuck HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /ticks?count=100000&size=1000000 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /sta",
            b"POST /state HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n",
            b"",
        ):
            stack.enter_context(client(server.port)).sendall(request)
        server.says("stuck")
        time.sleep(0.3)
        server.signal(signal.SIGTERM)
        assert server.status() == 0


def client(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port))


def test_a_second_signal_ends_it_at_once(start: Callable[..., Process]) -> None:
    server = start(seconds=1000)
    response = server.get("/ticks?count=100000")
    server.signal(signal.SIGINT)
    server.says("Stopping")
    time.sleep(run._TWICE_SEC + 0.1)
    started = time.monotonic()
    server.signal(signal.SIGINT)
    assert server.status() == 128 + signal.SIGINT
    assert time.monotonic() - started < SOON_SEC / 4
    response.close()


def test_a_port_in_use_is_one_line(start: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start(port=port)
        assert server.status() == 1
        assert server.lines == [
            f"error: port {port} of 127.0.0.1 is in use: stop what listens there, or choose "
            "another port (0 is any that is free)"
        ]


def test_idle_connections_beyond_the_usual_limit_hold_nobody_up(
    start: Callable[..., Process],
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 1000:
        pytest.skip("this machine allows too few open files")

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))

    server = start(preexec=few)
    with ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(client(server.port))
        assert server.get("/state").status == 200
        server.signal(signal.SIGTERM)
        assert server.status() == 0


def test_a_script_that_ends_while_it_loads_ends_well() -> None:
    script = """
import time
import mlx.core as mx
from qwen3vl_mlx.server.host import ModelHost

def computing():
    until = time.monotonic() + 1
    while time.monotonic() < until:
        mx.eval(mx.random.normal((256, 256)) @ mx.random.normal((256, 256)))
    raise ValueError("enough")

ModelHost(computing, ["tiny"]).start()
"""
    assert Process("-c", script).status() == 0


def test_the_real_server_ends_what_is_under_way() -> None:
    """Streams of every kind, answers that are not streamed, and who waits in the queue."""
    command = ("-m", "qwen3vl_mlx.server", "--model", "demo", "--port", "0")
    server = Process(*command, "--shutdown-timeout", "0.5s", "--max-batch", "4")
    try:
        server.says("demo is ready")
        endless = {"1000": -100, "998": -100}
        chat = {"messages": [{"role": "user", "content": "Hello"}], "logit_bias": endless}
        asked = [
            ("/v1/chat/completions", {**chat, "max_tokens": 3000, "stream": True}),
            ("/v1/completions", {"prompt": "a", "logit_bias": endless, "max_tokens": 3000}),
        ]
        answers = []
        for path, body in asked * 4:
            answers.append(server.post(path, {"model": "default", **body}))
        server.says(r"chat/completions.* 200")
        server.signal(signal.SIGTERM)
        assert server.status() == 0
        for connection in answers:
            response = connection.getresponse()
            body = response.read()
            assert b"shutting_down" in body
            if response.status == 200:
                assert body.endswith(b"data: [DONE]\n\n")
            else:
                assert response.status == 503
            connection.close()
    finally:
        server.end()
