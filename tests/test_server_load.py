"""Many clients at once, of whom some are killed: the others get their own answers, soon."""

from __future__ import annotations

import http.client
import json
import random
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from asking import QUESTION, SCENES
from clients import ask, asking, at_rest, connect, data_uri, image_url, joined, memory, until
from live import Live, live_server
from PIL import Image

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.server.run import raise_file_limit

CLIENTS = 24
IDLE = 1200


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    raise_file_limit()
    with live_server(demo) as live:
        yield live


def questions() -> list[Any]:
    """Every picture differs, and their sizes do."""
    asked = []
    for number in range(CLIENTS):
        with Image.open(SCENES / f"scene{number:02}.png") as scene:
            side = 160 + 32 * (number % 4)
            asked.append(asking(image_url(data_uri(scene.resize((side, 160)))), QUESTION))
    return asked


def read(live: Live, messages: Any) -> str:
    with connect(live) as client:
        return joined(ask(client, messages, stream=True))


def kill(live: Live, messages: Any, after: int) -> None:
    """Read some of the answer's bytes, and be gone without a word."""
    host = live.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    body = json.dumps({"messages": messages, "stream": True, "ignore_eos": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    connection.getresponse().read(after)
    linger = (1).to_bytes(4, "little") + bytes(4)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.sock.close()


def test_a_third_is_killed(live: Live, demo: Qwen3VL) -> None:
    asked = questions()
    alone = [demo.generate(messages).text for messages in asked]
    assert len(set(alone)) > CLIENTS // 2
    before = memory(live)
    draw = random.Random(5)
    with ThreadPoolExecutor(CLIENTS) as pool:
        killed = [
            pool.submit(kill, live, messages, draw.randrange(1, 4000)) for messages in asked[::3]
        ]
        answers = {
            number: pool.submit(read, live, messages)
            for number, messages in enumerate(asked)
            if number % 3
        }
        assert {n: answer.result() for n, answer in answers.items()} == {
            n: alone[n] for n in answers
        }
        for each in killed:
            each.result()
    until(lambda: at_rest(live), 1)
    until(lambda: memory(live) <= before + 2**14, 5)
    assert demo.engine.stats.load.failed == 0


def test_idle_connections_are_in_nobodys_way(live: Live) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < 3 * IDLE:  # both ends are in this process
        pytest.skip(f"only {limit} files may be open")
    asked = questions()[0]
    alone = read(live, asked)
    address = ("127.0.0.1", int(live.url.rpartition(":")[2]))
    with ExitStack() as stack:
        for number in range(IDLE):
            connection = stack.enter_context(socket.create_connection(address, timeout=10))
            # Silent, in the midst of a head, or of a body.
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            rest = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            connection.sendall((b"", head, head + rest)[number % 3])
        started = time.monotonic()
        assert read(live, asked) == alone
        assert time.monotonic() - started < 5
        assert len([*connect(live).models.list()]) == 1
    until(lambda: at_rest(live), 2)
    assert read(live, asked) == alone
