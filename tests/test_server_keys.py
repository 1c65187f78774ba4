"""Keys of the objects inside a request: read, told of, or refused; and lists of sane length."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("fastapi")

from pydantic import ValidationError

from qwen3vl_mlx.server.chat_fields import ChatFields
from qwen3vl_mlx.server.completion_fields import CompletionFields
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.fields import MOST_ENTRIES, Fields, check_fields
from qwen3vl_mlx.server.known_keys import (
    FLAT_TOOLS,
    ITEMS,
    MESSAGES,
    TOOLS,
    Keys,
    OneOf,
    Shape,
    unread,
)
from qwen3vl_mlx.server.messages_fields import CountBody, MessagesBody
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.responses_fields import ResponseFields
from qwen3vl_mlx.server.tokens import DetokenizeFields, ImageTokensFields, TokenizeFields

USER = {"role": "user", "content": "Hi"}
CACHE = {"cache_control": {"type": "ephemeral"}}
CALLS = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
SCHEMA = {"type": "object", "properties": {"anything": {"x-own": 1}}}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}


def chat(*messages: dict[str, Any], **fields: Any) -> tuple[type[Fields], dict[str, Any]]:
    return ChatFields, {"messages": [USER, *messages], **fields}


def said(**fields: Any) -> tuple[type[Fields], dict[str, Any]]:
    return chat({"role": "assistant", "content": "Yes", **fields})


def part(**fields: Any) -> tuple[type[Fields], dict[str, Any]]:
    return ChatFields, {"messages": [{"role": "user", "content": [fields]}]}


def url(**fields: Any) -> tuple[type[Fields], dict[str, Any]]:
    return part(type="image_url", image_url={"url": "u", **fields})


def formed(**fields: Any) -> tuple[type[Fields], dict[str, Any]]:
    return chat(response_format=fields)


def response(*items: dict[str, Any], **fields: Any) -> tuple[type[Fields], dict[str, Any]]:
    return ResponseFields, {"input": list(items) or "Hi", **fields}


def anthropic(*blocks: dict[str, Any], **fields: Any) -> tuple[type[Fields], dict[str, Any]]:
    messages = [{"role": "user", "content": list(blocks) or "Hi"}]
    return MessagesBody, {"model": "m", "max_tokens": 1, "messages": messages, **fields}


def warning(asked: tuple[type[Fields], dict[str, Any]], **options: Any) -> str | None:
    kind, body = asked
    headers = check_fields(kind.model_validate(body), ServerOptions(**options))
    return headers.get("x-qwen3vl-warning")


TEXT = {"type": "text", "text": "Hi"}
TOLD: list[tuple[tuple[type[Fields], dict[str, Any]], str]] = [
    (chat({**USER, "foo": 1}), "messages[1].foo"),
    (chat({**USER, "name": "Ann"}), "messages[1].name"),
    (chat({"role": "system", "content": "", "name": "Ann"}), "messages[1].name"),
    (said(name="Ann"), "messages[1].name"),
    (said(refusal="No."), "messages[1].refusal"),
    (said(tool_calls=[{**CALLS[0], "foo": 1}]), "messages[1].tool_calls[0].foo"),
    (part(**TEXT, foo=False), "messages[0].content[0].foo"),
    (part(**TEXT, image_url="u"), "messages[0].content[0].image_url"),
    (part(image="u", detial="low"), "messages[0].content[0].detial"),
    (url(detial="low"), "messages[0].content[0].image_url.detial"),
    (part(type="video", video=[{"url": "u", "at": 1}]), "messages[0].content[0].video[0].at"),
    (chat(tools=[{"type": "function", "function": FUNCTION, "bar": 1}]), "tools[0].bar"),
    (
        chat(tools=[{"type": "function", "function": {**FUNCTION, "foo": 1}}]),
        "tools[0].function.foo",
    ),
    (
        chat(tool_choice={"type": "function", "function": {"name": "f", "x": 1}}),
        "tool_choice.function.x",
    ),
    (formed(type="json_object", foo=1), "response_format.foo"),
    (
        formed(type="json_schema", json_schema={"schema": {}, "foo": 1}),
        "response_format.json_schema.foo",
    ),
    (chat(grammar={"type": "regex", "value": "a", "flags": "i"}), "grammar.flags"),
    (
        (CompletionFields, {"prompt": "A", "response_format": {"type": "text", "x": 1}}),
        "response_format.x",
    ),
    ((TokenizeFields, {"messages": [{**USER, "foo": 1}]}), "messages[0].foo"),
    (
        (ImageTokensFields, {"images": [{"image_url": {"url": "u", "x": 1}}]}),
        "images[0].image_url.x",
    ),
    (response({**USER, "name": "Ann"}), "input[0].name"),
    (response({"role": "user", "content": [{**TEXT, "foo": 1}]}), "input[0].content[0].foo"),
    (
        response({"type": "function_call_output", "output": [{**TEXT, "x": 1}]}),
        "input[0].output[0].x",
    ),
    (response({"type": "reasoning", "summary": [{"text": "", "x": 1}]}), "input[0].summary[0].x"),
    (response(tools=[{"type": "function", **FUNCTION, "foo": 1}]), "tools[0].foo"),
    (anthropic({**TEXT, "foo": 1}), "messages[0].content[0].foo"),
    (anthropic(tools=[{"name": "f", "input_schema": {}, "foo": 1}]), "tools[0].foo"),
    (
        anthropic({"type": "tool_result", "tool_use_id": "a", "content": [{**TEXT, "x": 1}]}),
        "messages[0].content[0].content[0].x",
    ),
]


@pytest.mark.parametrize(("asked", "place"), TOLD, ids=[place for _, place in TOLD])
def test_keys_that_nobody_reads_are_told_of(
    asked: tuple[type[Fields], dict[str, Any]], place: str
) -> None:
    assert warning(asked) == f'unknown fields ignored: "{place}"'
    with pytest.raises(ApiError) as caught:
        warning(asked, unknown_fields="refuse")
    assert (caught.value.status, caught.value.param) == (400, place)


REFUSED = [
    (said(audio={"id": "x"}), "messages[1].audio"),
    (said(function_call={"name": "f", "arguments": ""}), "messages[1].function_call"),
    (
        response(tools=[{"type": "function", **FUNCTION, "defer_loading": True}]),
        "tools[0].defer_loading",
    ),
    (chat(prompt_cache_options={"ttl": "12h"}), "prompt_cache_options"),
]


@pytest.mark.parametrize(("asked", "place"), REFUSED, ids=[place for _, place in REFUSED])
def test_what_must_not_be_passed_over_is_refused_by_name(
    asked: tuple[type[Fields], dict[str, Any]], place: str
) -> None:
    with pytest.raises(ApiError, match="not supported") as caught:
        warning(asked)
    assert (caught.value.param, caught.value.code) == (place, "unsupported_parameter")


KNOWN = [
    said(tool_calls=CALLS, refusal=None, audio=None, function_call=None, annotations=[], name=None),
    chat({"role": "tool", "content": "4", "name": "f"}),
    part(**TEXT, **CACHE),
    part(type="image_url", image_url="u", detail="low", min_pixels=1, max_pixels=9),
    url(detail="low", min_pixels=1, max_pixels=9),
    part(type="video", video=["u"], fps=2),
    part(image="u"),
    chat(tools=[{"type": "function", "function": FUNCTION, **CACHE}], tool_choice="auto"),
    formed(**SCHEMA, title="any key of a schema"),
    formed(type="json_schema", json_schema={"name": "n", "schema": SCHEMA, "strict": True}),
    response(
        {"role": "user", "content": [{"type": "input_image", "image_url": "u", "detail": "low"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": None, "status": None},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "x"},
        {"type": "function_call_output", "call_id": "c", "output": "4", "status": "completed"},
        tools=[{"type": "function", **FUNCTION, "defer_loading": False}],
    ),
    anthropic({**TEXT, **CACHE}, user_profile_id="a", workspace_id="b"),
    (CountBody, {"model": "m", "messages": [USER], "user_profile_id": "a", "workspace_id": "b"}),
]


@pytest.mark.parametrize("asked", KNOWN, ids=range(len(KNOWN)))
def test_what_clients_send_is_known(asked: tuple[type[Fields], dict[str, Any]]) -> None:
    assert warning(asked, unknown_fields="refuse") is None


def test_many_unknown_keys_are_one_short_warning() -> None:
    strange = [{**USER, f"key{at}": 1} for at in range(1000)]
    told = warning(chat(*strange))
    assert told is not None
    assert told.endswith("and 992 more")
    assert len(told) < 1000
    with pytest.raises(ApiError, match="audio"):
        warning(chat(*strange, {"role": "assistant", "content": "", "audio": {"id": "x"}}))


def keys_of(shape: Shape, kind: str = "") -> Keys:
    if not isinstance(shape, OneOf):
        return shape
    found = shape.kinds.get(kind, shape.otherwise)
    assert found is not None
    return found


def test_every_key_of_the_official_clients_is_known_or_listed_here() -> None:
    chats = pytest.importorskip("openai.types.chat")
    responses = pytest.importorskip("openai.types.responses")
    inputs = pytest.importorskip("openai.types.responses.response_input_item_param")
    shared = pytest.importorskip("openai.types.shared_params")
    parts = keys_of(MESSAGES, "user").inner["content"]
    item_parts = keys_of(ITEMS, "message").inner["content"]
    call = "function_call"
    table: list[tuple[Any, Keys, set[str]]] = [
        (chats.ChatCompletionUserMessageParam, keys_of(MESSAGES, "user"), {"name"}),
        (chats.ChatCompletionSystemMessageParam, keys_of(MESSAGES, "system"), {"name"}),
        (
            chats.ChatCompletionAssistantMessageParam,
            keys_of(MESSAGES, "assistant"),
            {"name", "refusal"},
        ),
        (chats.ChatCompletionToolMessageParam, keys_of(MESSAGES, "tool"), set()),
        (chats.ChatCompletionContentPartTextParam, keys_of(parts, "text"), set()),
        (chats.ChatCompletionContentPartImageParam, keys_of(parts, "image_url"), set()),
        (chats.ChatCompletionFunctionToolParam, keys_of(TOOLS), set()),
        (shared.FunctionDefinition, keys_of(keys_of(TOOLS).inner["function"]), set()),
        (responses.EasyInputMessageParam, keys_of(ITEMS, "message"), set()),
        (responses.ResponseOutputMessageParam, keys_of(ITEMS, "message"), set()),
        (responses.ResponseReasoningItemParam, keys_of(ITEMS, "reasoning"), set()),
        (responses.ResponseFunctionToolCallParam, keys_of(ITEMS, call), {"async", "namespace"}),
        (inputs.FunctionCallOutput, keys_of(ITEMS, f"{call}_output"), {"namespace"}),
        (responses.ResponseInputTextParam, keys_of(item_parts, "input_text"), set()),
        (responses.ResponseOutputTextParam, keys_of(item_parts, "output_text"), set()),
        (responses.ResponseInputImageParam, keys_of(item_parts, "input_image"), set()),
        (
            responses.FunctionToolParam,
            keys_of(FLAT_TOOLS),
            {"allowed_callers", "output_schema"},
        ),
    ]
    for theirs, ours, told in table:
        names = theirs.__required_keys__ | theirs.__optional_keys__
        assert names - ours.known - set(ours.inner) - set(ours.refused) == told, theirs.__name__


def test_every_field_of_the_official_clients_is_declared() -> None:
    chats = pytest.importorskip("openai.types.chat.completion_create_params")
    responses = pytest.importorskip("openai.types.responses.response_create_params")
    legacy = pytest.importorskip("openai.types.completion_create_params")
    messages = pytest.importorskip("anthropic.types.message_create_params")
    counts = pytest.importorskip("anthropic.types.message_count_tokens_params")
    table: list[tuple[Any, type[Fields]]] = [
        (chats.CompletionCreateParamsStreaming, ChatFields),
        (responses.ResponseCreateParamsStreaming, ResponseFields),
        (legacy.CompletionCreateParamsStreaming, CompletionFields),
        (messages.MessageCreateParamsStreaming, MessagesBody),
        (counts.MessageCountTokensParams, CountBody),
    ]
    for theirs, ours in table:
        names = theirs.__required_keys__ | theirs.__optional_keys__
        assert not names - set(ours.model_fields) - set(ours.impossible), theirs.__name__


@pytest.mark.parametrize("value", [None, 5, "x", [5, [5], {"role": []}], {"role": {}}, {}])
def test_values_of_the_wrong_type_are_left_to_others(value: Any) -> None:
    assert not list(unread(value, MESSAGES, "messages"))


# Long lists


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (chat(*[USER] * MOST_ENTRIES), "messages"),
        (chat(tools=[{}] * (MOST_ENTRIES + 1)), "tools"),
        (chat(stop=["x"] * (MOST_ENTRIES + 1)), "stop"),
        (response(*[USER] * (MOST_ENTRIES + 1)), "input"),
        (anthropic(*[TEXT] * (MOST_ENTRIES + 1)), "messages"),
        ((ImageTokensFields, {"images": [{}] * (MOST_ENTRIES + 1)}), "images"),
        ((CompletionFields, {"prompt": ["x"] * (MOST_ENTRIES + 1)}), "prompt"),
    ],
)
def test_lists_are_of_some_thousands_at_most(
    asked: tuple[type[Fields], dict[str, Any]], field: str
) -> None:
    kind, body = asked
    with pytest.raises(ValidationError, match=f"at most {MOST_ENTRIES} items") as caught:
        kind.model_validate(body)
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize("entry", [None, "x", 1.5, {}, []])
@pytest.mark.parametrize(
    ("kind", "field", "others"),
    [
        (CompletionFields, "prompt", {}),
        (DetokenizeFields, "tokens", {}),
        (ChatFields, "messages", {}),
        (ResponseFields, "input", {}),
        (MessagesBody, "messages", {"model": "m", "max_tokens": 1}),
        (MessagesBody, "stop_sequences", {"model": "m", "max_tokens": 1, "messages": [USER]}),
    ],
)
def test_a_list_of_faults_is_told_as_one(
    kind: type[Fields], field: str, others: dict[str, Any], entry: Any
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({field: [entry] * 100_000, **others})
    assert caught.value.error_count() < 10


def test_many_numbers_are_no_work_to_look_at() -> None:
    started = time.perf_counter()
    for kind, field in ((DetokenizeFields, "tokens"), (CompletionFields, "prompt")):
        assert warning((kind, {field: [1] * 400_000})) is None
    assert time.perf_counter() - started < 0.5
