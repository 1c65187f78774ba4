"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3vl_mlx.server.body import JsonRoute
from qwen3vl_mlx.server.chat_fields import ChatFields
from qwen3vl_mlx.server.chat_reply import completion_body, completion_events, error_event
from qwen3vl_mlx.server.event_stream import EventStream
from qwen3vl_mlx.server.fields import check_fields
from qwen3vl_mlx.server.question import ask, while_connected
from qwen3vl_mlx.server.reply import JsonReply
from qwen3vl_mlx.server.serving import ServingOf

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat_completions(fields: ChatFields, request: Request, serving: ServingOf) -> Response:
    """Answer a conversation with pictures, whole or as a stream."""
    headers = check_fields(fields, serving.options)
    answers = await while_connected(request, ask(serving, fields.question()))
    if fields.stream:
        return EventStream(
            answers,
            completion_events(answers, wants_usage=fields.wants_usage),
            error_event,
            serving.options.keep_alive_sec,
            headers,
        )
    try:
        completions = await while_connected(request, answers.collect())
    finally:
        answers.close()
    return JsonReply(completion_body(answers, completions), headers=headers)
