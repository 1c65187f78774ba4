"""Failures as HTTP answers: a status, and a body in the shape that the route's clients expect."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3vl_mlx.errors import (
    EngineClosedError,
    InputError,
    QueueFullError,
    TooLargeError,
    TooLongError,
    UnsupportedImageError,
)

_LONGEST = 1000  # characters of a message: it may quote what the client sent
_LONGEST_LINE = 300
_RETRY_SEC = "1"
_FREE_SEC = "5"  # after which a model in use may be asked for alone again
_FOLDERS = re.compile(r"(?<![\w/:.~])[~.]*/(?:[^\s/'\"]+/)*")

_OPENAI_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


@dataclass(eq=False)
class ApiError(Exception):
    """What a client is told. `param` is the field at fault, `code` a word for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def text(self) -> str:
        message = self.message
        return message if len(message) <= _LONGEST else message[:_LONGEST] + " ..."


def openai_error(error: ApiError) -> dict[str, Any]:
    """The body that OpenAI's clients read."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.text,
            "type": _OPENAI_KINDS.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """The body that Anthropic's clients read."""
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_KINDS.get(error.status, kind)
    details = {"details": {"error_code": error.code}} if error.code else {}
    return {"type": "error", "error": {"type": kind, "message": error.text, **details}}


def as_api_error(error: BaseException, fields: Collection[str] = ()) -> ApiError:
    """What a client is told of a failure. fields: the request's, to be named where one is at fault.

    What is nobody's input says nothing of this machine.
    """
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, InputError):
        status, code = 400, "invalid_value"
        if isinstance(error, UnsupportedImageError):
            status, code = 415, "unsupported_image"
        elif isinstance(error, TooLargeError):
            status, code = 413, "too_large"
        elif isinstance(error, TooLongError):
            code = "context_length_exceeded"
        return ApiError(status, message, param=_field_at_fault(message, fields), code=code)
    if isinstance(error, QueueFullError):
        return ApiError(429, message, code="queue_full", headers={"Retry-After": _RETRY_SEC})
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the model is not available now", code="model_unavailable")
    return ApiError(500, "an internal error; the server's log has more", code="internal_error")


def _field_at_fault(message: str, fields: Collection[str]) -> str | None:
    """The field a message begins with: errors of this package name it there."""
    found = re.match(r"(\w+)(?:\[\d+\]|\.\w+)*", message)
    return found[0] if found and found[1] in fields else None


def stopping() -> ApiError:
    """What is told to whoever asks too late."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def model_busy(patience: float) -> ApiError:
    """What is told to whoever waited `patience` seconds for the model alone."""
    return ApiError(
        409,
        f"the model is in use, and was not free within {patience:g} seconds; ask again later",
        code="model_busy",
        headers={"Retry-After": _FREE_SEC},
    )


def one_line(error: Exception) -> str:
    """An error in one line for strangers: files keep their names, not where they are."""
    line = " ".join(str(error).split()) or type(error).__name__
    line = line.replace(str(Path.home()), "~")
    return _FOLDERS.sub("", line)[:_LONGEST_LINE]
