"""Request bodies: JSON objects of sane size, depth and numbers, or a refusal that says why."""

from __future__ import annotations

import asyncio
import codecs
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.question import ClientGoneError

_MOST_COMMAS = 500_000  # a Python object takes 20 times the bytes of a short JSON value
_LARGE = 2**20  # bytes that take longer to parse than other requests shall wait
_MOST_OBJECTS = 50_000  # and lists: what is done for each is slower than for a number
_MOST_NAMES = 10_000  # in one object
_LARGEST = 2**64  # integers below it: the largest that any field takes is a seed


class JsonRequest(Request):
    """A request whose JSON is read by `parse_object`."""

    _parsed: dict[str, Any] | None = None

    async def json(self) -> dict[str, Any]:
        if self._parsed is None:
            depth = self.app.state.serving.options.max_json_depth
            body = await self.body()
            if len(body) > _LARGE:
                self._parsed = await asyncio.to_thread(parse_object, body, depth)
            else:
                self._parsed = parse_object(body, depth)
            self._body = b"{}"  # what was read may hold many pictures, and is not needed again
        return self._parsed


class JsonRoute(APIRoute):
    """The class of all routes that take a body: FastAPI then reads it as `parse_object` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_and_handle(request: Request) -> Response:
            request = JsonRequest(request.scope, request.receive)
            try:
                await request.json()  # FastAPI would hide what goes wrong in here
            except ClientDisconnect as error:
                raise ClientGoneError from error
            return await handle(request)

        return read_and_handle


def parse_object(data: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object that a body holds: UTF-8, with or without a byte order mark.

    Raises ApiError: 400 for what is not JSON (NaN, halves of surrogate pairs and numbers of
    thousands of digits included), for numbers beyond float64 or 64 bits, and for nesting deeper
    than `max_depth`; 413 for too many values, objects or names in an object; 422 for another kind
    of value.
    """
    if not data:
        raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
    if data.count(b",") > _MOST_COMMAS:
        raise _too_many("the body", _MOST_COMMAS, "values")
    try:
        value = from_json(data.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(
            422, f"the body must be a JSON object, got {_KINDS[type(value)]}", code="invalid_type"
        )
    _check(value, max_depth)
    return value


_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _check(value: dict[str, Any], max_depth: int) -> None:
    """Look at all values, level by level: no depth of nesting can exhaust Python's stack."""
    level: list[dict[str, Any] | list[Any]] = [value]
    count = 0
    for _ in range(max_depth):
        below = []
        count += len(level)
        if count > _MOST_OBJECTS:
            raise _too_many("the body", _MOST_OBJECTS, "objects and lists")
        for each in level:
            if isinstance(each, dict) and len(each) > _MOST_NAMES:
                raise _too_many("an object of the body", _MOST_NAMES, "names")
            for inner in each.values() if isinstance(each, dict) else each:
                if isinstance(inner, (dict, list)):
                    below.append(inner)
                elif isinstance(inner, float) and not math.isfinite(inner):
                    raise _too_large("a number of the body is beyond what a float64 can hold")
                elif isinstance(inner, int) and abs(inner) >= _LARGEST:
                    raise _too_large("a whole number of the body has more than 64 bits")
        level = below
        if not level:
            return
    raise ApiError(
        400,
        f"the body is nested deeper than {max_depth} levels; flatten it",
        code="too_deep",
    )


def _too_many(what: str, most: int, kind: str) -> ApiError:
    return ApiError(413, f"{what} holds more than {most:,} {kind}; send fewer", code="too_large")


def _too_large(message: str) -> ApiError:
    return ApiError(400, f"{message}; send a smaller one", code="invalid_value")
