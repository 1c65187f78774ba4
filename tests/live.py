"""A server on this machine for tests: a real socket, a model that is loaded already."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

pytest.importorskip("fastapi")

import uvicorn

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.server.app import create_app
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.run import listen
from qwen3vl_mlx.server.serving import Serving
from qwen3vl_mlx.server.start import new_serving


@dataclass(frozen=True)
class Live:
    """A server that listens. `url` has no slash at its end."""

    url: str
    serving: Serving


@contextmanager
def live_server(model: Qwen3VL, options: ServerOptions | None = None) -> Iterator[Live]:
    """Serve `model` on a free port of the loopback address; stopped at the end."""
    serving = new_serving(lambda: model, "demo", options or ServerOptions())
    (listener,) = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(create_app(serving), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    serving.host.start()
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not (server.started and serving.host.status().state == "ready"):
            assert time.monotonic() < deadline, serving.host.status()
            time.sleep(0.01)
        yield Live(url, serving)
        _check_at_rest(serving)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        serving.pictures.close()
        serving.layouts.close()
    assert not thread.is_alive()


def _check_at_rest(serving: Serving) -> None:
    """Nobody holds the model, and nothing runs, once all clients have gone."""
    deadline = time.monotonic() + 10
    numbers = serving.metrics.registry.get_sample_value

    def left() -> dict[str, float | None]:
        return {
            "users": serving.host.status().users,
            **{
                name: numbers(f"qwen3vl_{name}")
                for name in ("answers_in_flight", "http_requests_in_flight")
            },
        }

    while any(left().values()):
        assert time.monotonic() < deadline, left()
        time.sleep(0.02)
