"""How a chat request ends that does not end well: too early, too many, or left alone."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from asking import QUESTION, TRUTH
from clients import (
    ask,
    asking,
    at_rest,
    connect,
    connect_async,
    data_uri,
    image_url,
    joined,
    memory,
    openai,
    said_by,
    text,
    until,
)
from fastapi.testclient import TestClient
from live import Live, live_server
from PIL.Image import Image
from serving import ENDLESS, busy

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.server.app import create_app
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.start import new_serving

LONG = {"max_tokens": 1500, "logit_bias": ENDLESS["logit_bias"]}


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    with live_server(demo, ServerOptions(allow_private_urls=True)) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    return connect(live)


# Not now


HELLO = asking("Hello")


def test_a_model_that_loads(demo: Qwen3VL) -> None:
    go_on = threading.Event()

    def load() -> Qwen3VL:
        assert go_on.wait(30)
        return demo

    serving = new_serving(load, "demo", ServerOptions())
    app = TestClient(create_app(serving), base_url="http://localhost")
    asked = {"messages": HELLO, "max_tokens": 1}
    serving.host.start()
    refused = app.post("/v1/chat/completions", json=asked)
    go_on.set()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_loading"
    assert refused.json()["error"]["type"] == "server_error"
    assert int(refused.headers["retry-after"]) > 0
    until(lambda: serving.host.status().state == "ready")
    assert app.post("/v1/chat/completions", json=asked).status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_a_full_queue(serve: Callable[..., Qwen3VL], streams: bool) -> None:
    model = serve(max_batch=1, max_queue=2)
    with live_server(model) as live, ThreadPoolExecutor() as pool:
        client = connect(live)
        with busy(model):
            accepted = [pool.submit(ask, client, HELLO, max_tokens=4) for _ in range(3)]
            until(lambda: live.serving.host.status().users == 3)
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client, HELLO, stream=streams)
            with pytest.raises(openai.RateLimitError):
                ask(client, HELLO, n=2)
        assert int(caught.value.response.headers["retry-after"]) > 0
        assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
        assert len({said_by(answer.result()) for answer in accepted}) == 1
        with busy(model):  # the client comes again, as it was told
            accepted = [pool.submit(ask, client, HELLO, max_tokens=4) for _ in range(3)]
            until(lambda: live.serving.host.status().users == 3)
            patient = client.with_options(max_retries=3)
            late = pool.submit(ask, patient, HELLO, max_tokens=4)
            time.sleep(0.2)
        assert late.result().usage.completion_tokens == 4
        until(lambda: at_rest(live))


# Left


class Slow(BaseHTTPRequestHandler):
    """A picture that never comes."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(200):
                self.wfile.write(b"\x89PNG")
                time.sleep(0.05)
        except OSError:
            type(self).left.set()

    def log_message(self, *_: object) -> None:
        pass

    left = threading.Event()


@pytest.fixture
def slow_picture() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Slow.left.clear()
    yield f"http://127.0.0.1:{server.server_port}/a.png"
    server.shutdown()
    server.server_close()


def answering(live: Live) -> bool:
    """Whether the engine has begun something, or could if nobody held it."""
    model = live.serving.host.model
    return model is not None and model.engine.busy


def leave_stream(live: Live, fields: dict[str, Any]) -> None:
    """After the first word."""
    stream = ask(connect(live), **fields, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()


def leave_by_timeout(live: Live, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.APITimeoutError):
        ask(connect(live, timeout=0.3), **fields)


def leave_by_reset(live: Live, fields: dict[str, Any]) -> None:
    """As a process that is killed."""
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"))
    body = json.dumps({"stream": True, **fields})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    until(lambda: answering(live))
    linger = (1).to_bytes(4, "little") + bytes(4)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def leave_task(live: Live, fields: dict[str, Any]) -> None:
    async def cancel() -> None:
        async with connect_async(live) as client:
            task = asyncio.create_task(ask(client, **fields))
            while not answering(live):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())


WAYS = [leave_stream, leave_by_timeout, leave_by_reset, leave_task]


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("n", [1, 3])
def test_whoever_leaves_takes_the_request_along(
    live: Live,
    client: Any,
    demo: Qwen3VL,
    scene: Image,
    leave: Callable[[Live, dict[str, Any]], None],
    n: int,
) -> None:
    asked = asking(image_url(data_uri(scene.resize((128, 128)))), QUESTION)
    before = memory(live)
    steps = demo.engine.stats.load.steps
    leave(live, {"messages": asked, "n": n, **LONG})
    until(lambda: at_rest(live), 1)
    assert demo.engine.stats.load.steps < steps + LONG["max_tokens"] / 2
    until(lambda: memory(live) <= before + 2**14, 1)
    assert joined(ask(client, asking("Hello"), max_tokens=4, stream=True))


def test_whoever_leaves_while_waiting(serve: Callable[..., Qwen3VL]) -> None:
    model = serve(max_batch=1)
    with live_server(model) as live:
        with busy(model):
            for leave in WAYS[1:]:
                leave(live, {"messages": HELLO, "n": 2, **LONG})
                until(lambda: live.serving.host.status().users == 0, 1)
        until(lambda: at_rest(live), 1)


@pytest.mark.parametrize("leave", [leave_by_timeout])
def test_whoever_leaves_while_a_picture_is_fetched(
    live: Live, slow_picture: str, leave: Callable[[Live, dict[str, Any]], None]
) -> None:
    leave(live, {"messages": asking(image_url(slow_picture), text("What?"))})
    until(lambda: at_rest(live), 1)
    assert Slow.left.wait(1)


ROUTES = {
    "/v1/chat/completions": {},
    "/v1/messages": {"max_tokens": 4},
    "/v1/responses": {},
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("streams", [False, True])
def test_the_time_limit_counts_what_comes_before_the_engine(
    live: Live, client: Any, slow_picture: str, path: str, streams: bool
) -> None:
    asked = {"model": "default", "timeout": 0.5, "stream": streams, **ROUTES[path]}
    if path == "/v1/responses":
        part = {"type": "input_image", "image_url": slow_picture}
        asked["input"] = [{"role": "user", "content": [part]}]
    elif path == "/v1/messages":
        source = {"type": "url", "url": slow_picture}
        asked["messages"] = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    else:
        asked["messages"] = asking(image_url(slow_picture))
    started = time.monotonic()
    with pytest.raises(openai.APIStatusError, match=r"0\.5 seconds") as late:
        client.post(path.removeprefix("/v1"), body=asked, cast_to=dict)
    assert late.value.status_code == 408
    assert time.monotonic() - started < 5  # the picture takes ten seconds
    until(lambda: at_rest(live), 2)
    assert Slow.left.wait(2)


def test_what_was_waited_before_is_no_longer_the_engines(
    serve: Callable[..., Qwen3VL], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = serve()
    with live_server(model) as live:
        asked: list[Request] = []
        read, run = live.serving.pictures.read, model.run

        async def read_slowly(*args: Any) -> Any:
            await asyncio.sleep(0.4)
            return await read(*args)

        def noted(request: Request) -> Any:
            asked.append(request)
            return run(request)

        monkeypatch.setattr(live.serving.pictures, "read", read_slowly)
        monkeypatch.setattr(model, "run", noted)
        ask(connect(live), HELLO, max_tokens=2, extra_body={"timeout": 30})
    assert 29 < asked[0].timeout < 29.6


def test_others_answer_as_ever(live: Live, client: Any, scene: Image) -> None:
    asked = asking(image_url(data_uri(scene.resize((256, 256)))), QUESTION)
    alone = said_by(ask(client, asked))
    assert alone == TRUTH
    with ThreadPoolExecutor() as pool:
        left = [
            pool.submit(leave_stream, live, {"messages": asked, "n": 2, **LONG}) for _ in range(3)
        ]
        stayed = [pool.submit(ask, client, asked) for _ in range(4)]
        assert [said_by(answer.result()) for answer in stayed] == [alone] * 4
        for each in left:
            each.result()
    until(lambda: at_rest(live), 1)
