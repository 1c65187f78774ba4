"""OpenAI's Responses API: /v1/responses, kept in memory."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from qwen3vl_mlx.server.body import JsonRoute
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.event_stream import reply
from qwen3vl_mlx.server.fields import check_fields
from qwen3vl_mlx.server.question import ask
from qwen3vl_mlx.server.reply import JsonReply
from qwen3vl_mlx.server.response_store import StoredResponse
from qwen3vl_mlx.server.responses_conversation import begin
from qwen3vl_mlx.server.responses_fields import ResponseFields
from qwen3vl_mlx.server.responses_reply import Reply
from qwen3vl_mlx.server.serving import Serving, ServingOf

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post("/v1/responses")
async def create_response(fields: ResponseFields, request: Request, serving: ServingOf) -> Response:
    """Answer items, whole or as a stream of typed events; go on from a stored response."""
    headers = check_fields(fields, serving.options)
    conversation = await serving.layouts.run(partial(begin, fields, serving.responses))
    try:
        answers = await ask(request, fields.question(conversation.asked()))
    except ApiError as error:
        raise conversation.told(error) from error
    made = Reply(serving, answers, fields, conversation)
    events = made.stream() if fields.stream else None
    return await reply(request, answers, events, made.failed, made.complete, headers)


@router.get("/v1/responses/{response_id}")
async def get_response(response_id: str, serving: ServingOf, stream: bool = False) -> Response:
    """A stored response."""
    if stream:
        raise ApiError(
            400,
            "stream is for responses in the background, and there are none here",
            param="stream",
            code="unsupported_parameter",
        )
    return JsonReply(_stored(serving, response_id).body)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, serving: ServingOf) -> Response:
    """Forget a stored response. Those that go on from it keep its turn."""
    _stored(serving, response_id)
    serving.responses.remove(response_id)
    return JsonReply({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, serving: ServingOf) -> Response:
    """Refused: only responses made in the background can be cancelled, and there are none."""
    _stored(serving, response_id)
    raise ApiError(
        400,
        "only a response in the background can be cancelled, and there are none here; close the "
        "connection to end an answer",
        code="unsupported_operation",
    )


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    serving: ServingOf,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """What the model was given, page by page: earlier turns of the conversation included."""
    items = _stored(serving, response_id).input_items
    if order == "desc":
        items.reverse()
    if after is not None:
        names = [item["id"] for item in items]
        if after not in names:
            raise ApiError(
                400, f"after names no item of this response: {after[:100]!r}", param="after"
            )
        items = items[names.index(after) + 1 :]
    page = items[:limit]
    body: dict[str, Any] = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }
    return JsonReply(body)


def _stored(serving: Serving, response_id: str) -> StoredResponse:
    found = serving.responses.get(response_id)
    if found is None:
        raise ApiError(
            404,
            f"no response {response_id[:100]!r} is kept here: it was not stored, was deleted, or "
            "made room for others",
            param="response_id",
            code="response_not_found",
        )
    return found
