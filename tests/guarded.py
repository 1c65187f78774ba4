"""Small applications behind the guards of the server."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

pytest.importorskip("fastapi")

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send

from qwen3vl_mlx.errors import CheckpointError
from qwen3vl_mlx.server.app import create_app
from qwen3vl_mlx.server.body import JsonRoute
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.start import new_serving

ASK = {"host": "localhost:1234", "content-type": "application/json"}
OURS = "http://localhost:1234"
FRIEND = "https://friend.example"
STRANGER = "https://stranger.example"
KEY = "clé-1"  # keys may be more than ASCII
KEYS = (KEY, "second")


def app_of(**options: Any) -> FastAPI:
    """The real application without a model, and routes that say what reaches them."""

    def load() -> NoReturn:
        raise CheckpointError("no test asks for it")

    app = create_app(new_serving(load, "none", ServerOptions(**options)))
    router = APIRouter(route_class=JsonRoute)

    @router.post("/echo")
    @router.post("/v1/messages/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @router.get("/echo")
    @router.delete("/echo/{name}")
    async def empty() -> dict[str, Any]:
        return {}

    @router.get("/fail")
    async def fail() -> None:
        raise RuntimeError("/home/someone/secret")

    router.add_route("/lingers", Lingering(), methods=["GET"])
    app.include_router(router)
    return app


class Lingering:
    """An answer that waits, when it is complete, until the server says that nobody listens."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({})(scope, receive, send)
        while (await receive())["type"] != "http.disconnect":
            pass


def client_of(**options: Any) -> TestClient:
    return TestClient(app_of(**options), base_url=OURS, raise_server_exceptions=False)


def code(response: Any) -> str | None:
    """The code of a refusal in OpenAI's shape; None for an answer."""
    if response.status_code < 400:
        return None
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error["code"]
