"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3vl_mlx.server.body import JsonRoute
from qwen3vl_mlx.server.chat_fields import ChatFields
from qwen3vl_mlx.server.chat_reply import completion_body, completion_events, error_event
from qwen3vl_mlx.server.event_stream import reply
from qwen3vl_mlx.server.fields import check_fields
from qwen3vl_mlx.server.question import ask
from qwen3vl_mlx.server.serving import ServingOf

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat_completions(fields: ChatFields, request: Request, serving: ServingOf) -> Response:
    """Answer a conversation with pictures, whole or as a stream."""
    headers = check_fields(fields, serving.options)
    answers = await ask(request, fields.question())

    async def whole() -> dict[str, Any]:
        return completion_body(answers, await answers.collect())

    events = completion_events(answers, wants_usage=fields.wants_usage) if fields.stream else None
    return await reply(request, answers, events, error_event, whole, headers)
