"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3vl_mlx.engine.output import Chunk
from qwen3vl_mlx.errors import Qwen3VLError
from qwen3vl_mlx.server.body import JsonRoute
from qwen3vl_mlx.server.errors import ApiError, as_api_error
from qwen3vl_mlx.server.event_stream import reply
from qwen3vl_mlx.server.fields import check_fields
from qwen3vl_mlx.server.layouts import check_countable
from qwen3vl_mlx.server.messages_answer import error_event, message, message_events
from qwen3vl_mlx.server.messages_fields import CountBody, MessagesBody
from qwen3vl_mlx.server.messages_request import chat_messages, in_their_words, question
from qwen3vl_mlx.server.question import Answers, Question, ask, while_connected
from qwen3vl_mlx.server.reply import JsonReply
from qwen3vl_mlx.server.serving import Serving, ServingOf

Result = TypeVar("Result")

router = APIRouter(route_class=JsonRoute, tags=["Anthropic"])


@router.post("/v1/messages")
async def create_message(body: MessagesBody, request: Request, serving: ServingOf) -> Response:
    """Answer a conversation with pictures, whole or as a stream."""
    if body.thread is not None:  # at this code Anthropic's tool runner goes on without
        raise ApiError(
            400,
            "thread is not supported: no conversation is kept here; send all messages every time",
            param="thread",
            code="thread_unsupported_request",
        )
    messages, places = chat_messages(body)
    asked = replace(
        question(body, messages),
        sampling=body.sampling(),
        truncate=body.truncate,
        timeout=body.timeout,
    )
    headers = check_fields(body, serving.options)
    answers = await _told(ask(request, asked), places)
    most, shown = body.max_tokens, body.shows_thinking

    async def whole() -> dict[str, Any]:
        chunks = await _chunks(answers)
        return message(answers, chunks, max_tokens=most, shows_thinking=shown)

    streamed = message_events(answers, max_tokens=most, shows_thinking=shown)
    events = streamed if body.stream else None
    return await reply(request, answers, events, error_event, whole, headers)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountBody, request: Request, serving: ServingOf) -> Response:
    """How many tokens a conversation would be, its pictures included."""
    messages, places = chat_messages(body)
    asked = question(body, messages)
    headers = check_fields(body, serving.options)
    tokens = await _told(while_connected(request, _count(serving, asked)), places)
    return JsonReply({"input_tokens": tokens}, headers=headers)


async def _chunks(answers: Answers) -> list[Chunk]:
    """The chunks of an answer, which tell the order of its parts; a Completion does not."""
    async with aclosing(answers.chunks()) as chunks:
        return [chunk async for chunk in chunks]


async def _count(serving: Serving, asked: Question) -> int:
    """Tokens of the prompt, however long it is. Raises ApiError."""
    lease = await serving.host.lease(asked.model)
    try:
        processor = lease.model.processor
        messages = await serving.pictures.read(asked.messages, processor, asked.look)
        tools = None if asked.form.tool_choice == "none" else asked.form.tools
        check_countable("messages", messages, tools)
        prompt = await serving.layouts.run(partial(processor.prompt, messages, tools=tools))
        return len(prompt.token_ids)
    except Qwen3VLError as error:
        raise as_api_error(error, asked.fields) from error
    finally:
        lease.release()


async def _told(work: Coroutine[Any, Any, Result], places: Mapping[str, str]) -> Result:
    """The result of `work`, or its failure in the words of the request."""
    try:
        return await work
    except ApiError as error:
        raise in_their_words(error, places) from error
