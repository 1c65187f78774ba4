"""Anthropic's messages in OpenAI's words; answers as content blocks, whole or piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")

from qwen3vl_mlx.engine.output import Chunk, FinishReason, ToolCall, make_usage
from qwen3vl_mlx.processing.template import ChatTemplate
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.messages_answer import BlockWriter, content_blocks, stop_fields
from qwen3vl_mlx.server.messages_fields import MessagesBody
from qwen3vl_mlx.server.messages_request import chat_messages, in_their_words, question
from qwen3vl_mlx.server.question import Thinking

CHECKPOINTS = Path(__file__).parent / "data" / "checkpoints"

DATA = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
PICTURE = {"type": "image", "source": DATA}
SEEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "zoom", "input": {"x": 5}}
USED = {
    "id": "toolu_1",
    "type": "function",
    "function": {"name": "zoom", "arguments": {"x": 5}},
}


def body(*messages: dict[str, Any], **fields: Any) -> MessagesBody:
    return MessagesBody.model_validate(
        {"model": "default", "max_tokens": 9, "messages": [*messages], **fields}
    )


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else [*content]}


def said(*content: Any) -> dict[str, Any]:
    return {**user(*content), "role": "assistant"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def result(content: Any, number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": f"toolu_{number}", "content": content, **fields}


def tool_message(*content: Any, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"toolu_{number}", "content": [*content]}


# Requests.


CONVERSATIONS: dict[str, tuple[MessagesBody, list[dict[str, Any]]]] = {
    "text": (body(user("Hi")), [user(text("Hi"))]),
    "system": (
        body(user("Hi"), system=[text("Be brief."), {**text(" No."), "cache_control": None}]),
        [{"role": "system", "content": [text("Be brief."), text(" No.")]}, user(text("Hi"))],
    ),
    "system among the messages": (
        body({"role": "system", "content": "B"}, user("Hi"), system="A"),
        [{"role": "system", "content": [text("A"), text("B")]}, user(text("Hi"))],
    ),
    "pictures in order": (
        body(user(text("a"), PICTURE, text("b"), {"type": "image", "source": {
            "type": "url", "url": "https://example.com/a.png"}})),
        [user(text("a"), SEEN, text("b"), {
            "type": "image_url", "image_url": {"url": "https://example.com/a.png"}})],
    ),
    "neighbours are one turn": (
        body(user("a"), user("b"), said("c"), said("d"), user("e")),
        [user(text("a"), text("b")), said(text("c"), text("d")), user(text("e"))],
    ),
    "tool round trip": (
        body(
            user("a"),
            said({"type": "thinking", "thinking": "Hm.", "signature": "s"}, text("b"), USE),
            user(result([text("c"), PICTURE]), text("d")),
        ),
        [
            user(text("a")),
            {**said(text("b")), "reasoning_content": "Hm.", "tool_calls": [USED]},
            tool_message(text("c"), SEEN),
            user(text("d")),
        ],
    ),
    "parallel calls": (
        body(
            user("a"),
            said(USE, {**USE, "id": "toolu_2", "caller": {"type": "direct"}}),
            user(result("c"), result("d", 2, is_error=True), result([], 3)),
        ),
        [
            user(text("a")),
            {"role": "assistant", "content": [], "tool_calls": [USED, {**USED, "id": "toolu_2"}]},
            tool_message(text("c")),
            tool_message(text("Error: "), text("d"), number=2),
            tool_message(number=3),
        ],
    ),
    "text behind a call stays behind it": (
        body(user("a"), said(text("b"), USE, text("c"), USE), user("d")),
        [
            user(text("a")),
            {**said(text("b")), "tool_calls": [USED]},
            {**said(text("c")), "tool_calls": [USED]},
            user(text("d")),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_messages(name: str) -> None:
    asked, expected = CONVERSATIONS[name]
    assert chat_messages(asked)[0] == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("checkpoint", ["Qwen3-VL-2B-Instruct", "Qwen3-VL-2B-Thinking"])
def test_the_template_writes_what_it_writes_for_openai(name: str, checkpoint: str) -> None:
    source = (CHECKPOINTS / checkpoint / "chat_template.jinja").read_text()
    template = ChatTemplate(source, added_tokens=["<|im_end|>"], special_tokens=["<|im_end|>"])
    messages, _ = chat_messages(CONVERSATIONS[name][0])
    plain = [{**m, "content": _joined(m["content"])} for m in messages]
    assert template.render(messages) == template.render(plain)


def _joined(content: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """As clients of OpenAI write what is only text."""
    if any(part["type"] != "text" for part in content):
        return content
    return "".join(part["text"] for part in content)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (user({"type": "document", "source": {}}), "messages[0].content[0]: a block of type 'docu"),
        (user(text("a"), {"type": "search_result"}), "messages[0].content[1]"),
        (user(result([text("a"), {"type": "document"}])), "messages[0].content[0].content[1]"),
        (user(result([USE])), "messages[0].content[0].content[0]"),
        (user({"type": "image", "source": {"type": "file", "file_id": "x"}}), "'file'"),
        (user(USE), "'tool_use' is not supported in user content"),
        (said(result("a")), "'tool_result' is not supported in assistant content"),
        (said({"type": "redacted_thinking", "data": "x"}), "only Anthropic can read it"),
        (said({"type": "server_tool_use", "id": "a", "name": "web_search"}), "'server_tool_use'"),
        ({"role": "system", "content": [PICTURE]}, "'image' is not supported in system content"),
        (said("The answer is ("), "prefill"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(message: dict[str, Any], named: str) -> None:
    messages = [message] if named == "prefill" else [message, user("?")]
    with pytest.raises(ApiError) as caught:
        chat_messages(body(*messages))
    assert caught.value.status == 400
    assert named in caught.value.message


def test_failures_name_what_the_client_sent() -> None:
    asked = body(
        user("a"), said(USE), user(result([text("b"), PICTURE]), PICTURE), system=[text("s")]
    )
    messages, places = chat_messages(asked)
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "tool", "user"]

    def told(message: str) -> str:
        return in_their_words(ApiError(400, message), places).message

    assert told("messages[3].content[1].image_url.url: no") == (
        "messages[2].content[0].content[1]: no"
    )
    assert told("messages[4].content[0] is bad, messages[0] is not") == (
        "messages[2].content[1] is bad, system[0] is not"
    )
    assert told("messages[2] is") == "messages[1] is"
    assert told("reasoning_effort is") == "output_config.effort is"


def asked_form(**fields: Any) -> dict[str, Any]:
    form = question(body(user("a"), **fields), []).form
    return {name: value for name, value in vars(form).items() if value is not None}


def test_tools() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    plain = {"name": "zoom", "input_schema": schema}
    rich = {
        **plain,
        "type": "custom",
        "description": "Zooms.",
        "strict": True,
        "input_examples": [{"x": 1}],
    }
    assert asked_form(tools=[plain, rich])["tools"] == [
        {"type": "function", "function": {"name": "zoom", "parameters": schema}},
        {
            "type": "function",
            "function": {
                "name": "zoom",
                "description": "Zooms.",
                "parameters": {**schema, "examples": [{"x": 1}]},
                "strict": True,
            },
        },
    ]
    with pytest.raises(ApiError, match=r"tools\[0\]: type 'web_search_20260318' is a tool that"):
        asked_form(tools=[{"type": "web_search_20260318", "name": "web_search"}])


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, {}),
        ({"tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        (
            {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"tool_choice": {"type": "tool", "name": "zoom"}},
            {"tool_choice": {"type": "function", "function": {"name": "zoom"}}},
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "array"}}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "array"}},
                }
            },
        ),
    ],
)
def test_forms(fields: dict[str, Any], form: dict[str, Any]) -> None:
    assert asked_form(**fields) == form


@pytest.mark.parametrize(
    ("thinking", "effort", "expected"),
    [
        (None, None, Thinking()),
        (None, "low", Thinking(effort="low")),
        (None, "high", Thinking()),
        ({"type": "adaptive"}, None, Thinking()),
        ({"type": "adaptive"}, "low", Thinking(effort="low")),
        ({"type": "disabled"}, "low", Thinking(enabled=False)),
        ({"type": "enabled", "budget_tokens": 7}, "low", Thinking(enabled=True, budget=7)),
        ({"type": "enabled"}, "low", Thinking(enabled=True, effort="low")),
    ],
)
def test_thinking(thinking: Any, effort: Any, expected: Thinking) -> None:
    asked = body(user("a"), thinking=thinking, output_config={"effort": effort})
    assert question(asked, []).thinking == expected


# Answers.


def call(number: int) -> ToolCall:
    return ToolCall(f"call_{number}", "zoom", '{"x": 5}')


CHUNKS = st.lists(
    st.one_of(
        st.builds(Chunk, reasoning=st.sampled_from(["a", "b\n"])),
        st.builds(Chunk, text=st.sampled_from(["c", " d"])),
        st.builds(Chunk, tool_calls=st.tuples(st.integers(0, 9).map(call))),
        st.just(Chunk()),
    ),
    max_size=9,
)


@given(CHUNKS, st.booleans())
def test_events_add_up_to_the_blocks(chunks: list[Chunk], shown: bool) -> None:
    writer = BlockWriter("s", shows_thinking=shown)
    events = [event for chunk in chunks for event in writer.push(chunk)] + [*writer.close()]
    blocks: list[dict[str, Any]] = []
    open_block = False
    for event in events:
        assert event["index"] == len(blocks) - (event["type"] != "content_block_start")
        assert open_block == (event["type"] != "content_block_start")
        open_block = event["type"] != "content_block_stop"
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"]})
        elif event["type"] == "content_block_delta":
            kind = event["delta"]["type"]
            if kind == "input_json_delta":
                blocks[-1]["input"] = json.loads(event["delta"]["partial_json"])
            else:
                name = kind.removesuffix("_delta")
                assert event["delta"][name]
                blocks[-1][name] += event["delta"][name]
    assert not open_block
    assert blocks == content_blocks(chunks, "s", shows_thinking=shown)
    spoken = "".join(chunk.text for chunk in chunks)
    assert "".join(block.get("text", "") for block in blocks) == spoken
    thought = "".join(chunk.reasoning for chunk in chunks) if shown else ""
    assert "".join(block.get("thinking", "") for block in blocks) == thought


def test_blocks_keep_the_order_of_what_was_said() -> None:
    chunks = [
        Chunk(reasoning="a"),
        Chunk(text="b"),
        Chunk(text="c"),
        Chunk(tool_calls=(call(1), call(2))),
        Chunk(text="d"),
    ]
    used = {"type": "tool_use", "name": "zoom", "input": {"x": 5}}
    assert content_blocks(chunks, "s") == [
        {"type": "thinking", "thinking": "a", "signature": "s"},
        text("bc"),
        {**used, "id": "toolu_1"},
        {**used, "id": "toolu_2"},
        text("d"),
    ]


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [
        ("stop", None, ("end_turn", None, None)),
        ("stop", "END", ("stop_sequence", "END", None)),
        ("tool_calls", None, ("tool_use", None, None)),
        ("length", None, ("max_tokens", None, None)),
        ("timeout", None, ("max_tokens", None, "timeout")),
        ("repetition", None, ("max_tokens", None, "repetition")),
    ],
)
def test_why_an_answer_ended(
    reason: FinishReason, stop: str | None, expected: tuple[str | None, ...]
) -> None:
    usage = make_usage(prompt=3, completion=5, cached=0, started=1, first=2, ended=3, peak=0)
    last = Chunk(finish_reason=reason, stop=stop, usage=usage)
    told = stop_fields(last, max_tokens=5)
    assert (told["stop_reason"], told["stop_sequence"], told.get("finish_reason")) == expected
    if reason == "length":  # fewer than were asked for: there was no room for more
        assert stop_fields(last, max_tokens=6)["stop_reason"] == "model_context_window_exceeded"
