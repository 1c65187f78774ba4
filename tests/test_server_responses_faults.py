"""/v1/responses where something is in the way: thoughts, refusals, failures, clients that leave."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from asking import script

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx
import openai
from clients import connect
from live import Live, live_server
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.server.options import ServerOptions

FUNCTION = {"type": "function", "name": "zoom", "parameters": {"type": "object"}}
CALL = '<tool_call>\n{"name": "zoom", "arguments": {"x": 5}}\n</tool_call>'
ENDLESS = {"extra_body": {"ignore_eos": True}}
EVENTS = TypeAdapter[Any](ResponseStreamEvent)


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    with live_server(demo, ServerOptions(max_stored_responses=3)) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    return connect(live)


@pytest.fixture(scope="module")
def thinker(thinking_demo: Qwen3VL) -> Iterator[tuple[Qwen3VL, Any]]:
    """The demo checkpoint behind the template of the Thinking models, and a client of it."""
    with live_server(thinking_demo) as live:
        yield thinking_demo, connect(live)


# Thoughts.


def test_thoughts_are_items(
    thinker: tuple[Qwen3VL, Any], monkeypatch: pytest.MonkeyPatch, requests: list[Request]
) -> None:
    model, client = thinker
    with monkeypatch.context() as patch:
        script(patch, model, "It is far.\n</think>\n\n" + CALL)
        asked: dict[str, Any] = {"input": "Look", "tools": [FUNCTION], "model": "default"}
        first = client.responses.create(**asked, include=["reasoning.encrypted_content"])
        events = list(client.responses.create(**asked, stream=True))
    Response.model_validate(first.to_dict(mode="json"), strict=True)
    thought, call = first.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "It is far.")
    assert first.usage.output_tokens_details.reasoning_tokens > 0
    for event in events:
        EVENTS.validate_python(event.to_dict(mode="json"), strict=True)
    told = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(told) == "It is far."

    # In a tool loop the model reads its thought again, whoever has kept it.
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "a cat"}
    sealed = thought.to_dict() | {"content": None}
    rest: dict[str, Any] = {"tools": [FUNCTION], "max_output_tokens": 1}
    client.responses.create(input=[result], previous_response_id=first.id, **rest)
    named = {"type": "reasoning", "id": thought.id, "summary": []}
    for item in (thought.to_dict(), sealed, named):
        items = [{"role": "user", "content": "Look"}, item, call.to_dict(), result]
        client.responses.create(input=items, **rest)
    prompts = [model.processor.tokenizer.decode(r.prompt.token_ids) for r in requests[-4:]]
    assert len(set(prompts)) == 1
    assert "It is far." in prompts[0]


def test_a_thought_may_be_bounded_or_cut(thinker: tuple[Qwen3VL, Any]) -> None:
    _, client = thinker
    cut = client.responses.create(input="Look", max_output_tokens=3, **ENDLESS)
    assert [(item.type, item.status) for item in cut.output] == [("reasoning", "incomplete")]
    assert cut.status == "incomplete"
    silent = client.responses.create(
        input="Look", reasoning={"effort": "none"}, max_output_tokens=20, temperature=0
    )
    assert [item.type for item in silent.output] == ["message"]
    assert silent.reasoning.effort == "none"


# Refusals.


PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,QUJD"}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "input_text", "text": "Look"}, *parts]}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": [{"type": "reasoning", "encrypted_content": "?"}]}, 400, "input"),
        ({"input": 5}, 422, "input"),
        ({"input": None}, 422, "input"),
        (
            {"input": [user({"type": "input_file", "file_id": "f"})]},
            400,
            "input[0].content[1].type",
        ),
        ({"input": [user(), user(PICTURE)]}, 415, "input[1].content[1].image_url"),
        (
            {"input": [user(), {"role": "system", "content": "Be brief."}]},
            400,
            "input[1]",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "4"}]},
            400,
            "input[0].call_id",
        ),
        ({"background": True}, 400, "background"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"prompt": {"id": "p"}}, 400, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, 400, "context_management"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0]"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, 422, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, 400, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, 422, "text.verbosity"),
        ({"reasoning": {"effort": "high"}}, 400, "reasoning.effort"),
        ({"reasoning": {"effort": "extreme"}}, 400, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, 422, "reasoning.summary"),
        ({"include": ["file_search_call.results"]}, 422, "include[0]"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"extra_body": {"max_tokens": 5}}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
        ({"metadata": {"a": 1}}, 422, "metadata.a"),
        ({"service_tier": "priority"}, 422, "service_tier"),
        ({"stream_options": {"include_obfuscation": False}}, 400, "stream_options"),
        ({"model": "gpt-6"}, 404, "model"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: Any, fields: dict[str, Any], status: int, param: str
) -> None:
    for stream in (False, True) if "stream_options" not in fields else (False,):
        with pytest.raises(openai.APIStatusError) as caught:
            client.responses.create(**{"input": "Hi", **fields}, stream=stream)
        assert caught.value.status_code == status
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"


def test_errors_of_a_later_turn_name_its_own_items(client: Any) -> None:
    first = client.responses.create(input=[user(), user()], max_output_tokens=1)
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(input=[user(PICTURE)], previous_response_id=first.id)
    assert caught.value.param == "input[0].content[1].image_url"


def test_unknown_fields_are_told_of(client: Any) -> None:
    raw = client.responses.with_raw_response.create(
        input="Hi", max_output_tokens=1, extra_body={"top_kk": 5}
    )
    assert "top_kk" in raw.headers["x-qwen3vl-warning"]


def test_old_turns_are_dropped_only_where_asked(client: Any, demo: Qwen3VL) -> None:
    old = user({"type": "input_text", "text": "7" * demo.context_length})
    asked: dict[str, Any] = {"input": [old, user()], "max_output_tokens": 1}
    assert client.responses.create(**asked, truncation="auto").usage.input_tokens < 100
    for fields in ({}, {"truncation": "disabled"}):
        with pytest.raises(openai.BadRequestError, match="context"):
            client.responses.create(**asked, **fields)


# Failures.


def test_the_store_is_bounded(client: Any, live: Live) -> None:
    made = [client.responses.create(input="Hi", max_output_tokens=1).id for _ in range(5)]
    assert len(live.serving.responses) == 3
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made[0])
    assert client.responses.retrieve(made[-1]).id == made[-1]


def test_what_is_too_large_to_be_kept_says_so(
    client: Any, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = len(live.serving.responses)
    monkeypatch.setattr(live.serving.responses, "max_bytes", 10)
    made = client.responses.create(input="Hi", max_output_tokens=1)
    assert made.to_dict()["store"] is False
    assert len(live.serving.responses) == kept


def test_an_answer_that_ends_with_the_server_fails_in_its_own_words(
    client: Any, live: Live
) -> None:
    stream = client.responses.create(input="Hi", stream=True, **ENDLESS)
    events = []
    for event in stream:
        events.append(event)
        if len(events) == 8:
            for answers in list(live.serving.host._answers):
                answers.end()
    *_, error, failed = events
    assert (error.type, error.code) == ("error", "shutting_down")
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert failed.response.error.message == error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in (error, failed):
        EVENTS.validate_python(event.to_dict(mode="json"), strict=True)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(failed.response.id)


def test_a_timeout_cuts_the_answer_off(client: Any) -> None:
    slow: dict[str, Any] = {"ignore_eos": True, "timeout": 0.5}
    response = client.responses.create(input="Hi", extra_body=slow)
    assert response.status == "incomplete"
    assert response.to_dict()["stop_reason"] == "timeout"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_answer_along(
    demo: Qwen3VL, live: Live, stream: bool
) -> None:
    body = {"input": "Hi", "stream": stream, "ignore_eos": True}
    kept = len(live.serving.responses)
    try:
        with httpx.stream("POST", f"{live.url}/v1/responses", json=body, timeout=1) as response:
            for line in response.iter_lines():
                if line.startswith("data") and "delta" in json.loads(line[5:]):
                    break
    except httpx.ReadTimeout:
        assert not stream
    deadline = time.monotonic() + 10
    while demo.engine.busy or live.serving.host.status().users:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(live.serving.responses) == kept
