"""JSON answers and failures as HTTP responses."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi.responses import JSONResponse

from qwen3vl_mlx.server.errors import ApiError, anthropic_error, openai_error

_log = logging.getLogger(__name__)

_SHOWN = 200  # characters in the log


class JsonReply(JSONResponse):
    """JSON in ASCII: what a model or client wrote may hold half a character, which UTF-8 cannot."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def error_reply(path: str, error: ApiError) -> JsonReply:
    """A failure in the shape that the clients of a route read. The log has it too."""
    # As JSON, so that no client can write lines of its own into the log.
    _log.info("%s %s: %s", path[:_SHOWN], error.status, json.dumps(error.text[:_SHOWN]))
    shape = anthropic_error if path.startswith("/v1/messages") else openai_error
    return JsonReply(shape(error), error.status, headers=dict(error.headers))
