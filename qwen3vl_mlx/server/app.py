"""The application: routes, and what every failure looks like."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from qwen3vl_mlx import __version__
from qwen3vl_mlx.errors import Qwen3VLError
from qwen3vl_mlx.server import (
    admin,
    chat,
    completions,
    docs,
    messages,
    metrics,
    responses,
    tokens,
)
from qwen3vl_mlx.server.errors import ApiError, as_api_error
from qwen3vl_mlx.server.guard import add_guards
from qwen3vl_mlx.server.question import ClientGoneError
from qwen3vl_mlx.server.reply import error_reply
from qwen3vl_mlx.server.serving import Serving

_log = logging.getLogger(__name__)

_CLIENT_GONE = 499  # nginx's; nobody reads it but the log

_PLACES = ("body", "query", "path", "header")  # where FastAPI says a field is
_SHAPE = re.compile(r"(str|int|float|bool|none|(list|dict|literal|tuple)\[.*)", re.DOTALL)
_LONGEST_NAME = 200


def create_app(serving: Serving) -> FastAPI:
    """The ASGI application of one server. Whoever runs it starts and closes `serving.host`."""
    app = FastAPI(
        title="qwen3vl_mlx",
        version=__version__,
        summary="Qwen3-VL on this machine, for clients of OpenAI and Anthropic",
        docs_url=None,
        redoc_url=None,
    )
    app.state.serving = serving
    for module in (chat, completions, responses, messages, tokens, admin, metrics):
        app.include_router(module.router)
    docs.add_docs(app)
    handlers: dict[type[Exception], Callable[[Request, Exception], Response]] = {
        ApiError: _failed,
        Qwen3VLError: _failed,
        RequestValidationError: _misshapen,
        HTTPException: _http_failed,
        ClientGoneError: _left,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    add_guards(app, serving)
    return app


def _failed(request: Request, error: Exception) -> Response:
    return error_reply(request.url.path, as_api_error(error))


def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


def _http_failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path[:200]}; /docs has the routes"
    elif error.status_code == 405:
        message = f"{request.url.path[:200]} does not take {request.method}; /docs has the routes"
    failure = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return error_reply(request.url.path, failure)


def _misshapen(request: Request, error: Exception) -> Response:
    """422: the first field that has not the shape it must have."""
    assert isinstance(error, RequestValidationError)
    faults = [(_field(fault["loc"]), str(fault["msg"])) for fault in error.errors()]
    field = faults[0][0]
    # A field that takes several shapes has one fault for each.
    wrong = " or ".join(dict.fromkeys(message for place, message in faults if place == field))
    failure = ApiError(
        422, f"{field or 'the body'}: {wrong}", param=field or None, code="invalid_type"
    )
    return error_reply(request.url.path, failure)


def _field(place: Sequence[str | int]) -> str:
    """`messages[0].content` of pydantic's place, up to where it names one of several shapes."""
    name = ""
    for part in place[1:] if place[:1] and place[0] in _PLACES else place:
        if isinstance(part, int):
            name += f"[{part}]"
        elif _SHAPE.fullmatch(part):
            break
        elif not part[:1].isupper():  # what is upper case names a model, one of several
            name += f".{part}"
    return name.lstrip(".")[:_LONGEST_NAME]
