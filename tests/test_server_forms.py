"""Tools, structured answers and thoughts through OpenAI's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from asking import QUESTION, TRUTH, about, script
from clients import ask, asking, connect, data_uri, image_url, joined, openai, said_by
from live import Live, live_server
from PIL.Image import Image
from pydantic import BaseModel, Field

from qwen3vl_mlx import Qwen3VL

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    with live_server(demo) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    return connect(live)


@pytest.fixture(scope="module")
def asked(scene: Image) -> list[dict[str, Any]]:
    return asking(image_url(data_uri(scene)), QUESTION)


@pytest.fixture(scope="module")
def thinker(thinking_demo: Qwen3VL) -> Iterator[tuple[Qwen3VL, Any]]:
    """The demo checkpoint behind a Thinking model's template."""
    with live_server(thinking_demo) as live:
        yield thinking_demo, connect(live)


# Tools and forms


def tool(name: str, strict: bool = False) -> dict[str, Any]:
    x = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {
        "type": "object",
        "properties": {"x": x},
        "required": ["x"],
        "additionalProperties": False,
    }
    function = {"name": name, "description": "Looks closer.", "parameters": schema}
    return {"type": "function", "function": {**function, "strict": strict}}


TOOLS = [tool("zoom"), tool("turn")]
CALLS = "".join(
    f'\n<tool_call>\n{{"name": "{name}", "arguments": {{"x": {x}}}}}\n</tool_call>'
    for name, x in (("zoom", 5), ("turn", 6))
)


def called(calls: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


@pytest.mark.parametrize("words", ["I shall.", ""])
def test_tool_calls(
    client: Any,
    demo: Qwen3VL,
    scene: Image,
    asked: list[dict[str, Any]],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        script(patched, demo, words + CALLS)
        (whole,) = ask(client, asked, tools=TOOLS).choices
        chunks = [c.choices[0] for c in ask(client, asked, tools=TOOLS, stream=True)]
    assert whole.finish_reason == chunks[-1].finish_reason == "tool_calls"
    assert whole.message.content == (words or None)
    assert "".join(chunk.delta.content or "" for chunk in chunks) == words
    streamed = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [call.index for call in streamed] == [0, 1]
    for calls in (whole.message.tool_calls, streamed):
        assert called(calls) == [("zoom", {"x": 5}), ("turn", {"x": 6})]
        assert len({call.id for call in calls}) == 2
        assert {call.type for call in calls} == {"function"}
    # And what the tools have seen goes back, in whatever order.
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": asked[0]["content"][:1]}
        for call in whole.message.tool_calls
    ]
    history = [*asked, whole.message.to_dict()]
    answer = ask(client, [*history, *reversed(results), *asked], tools=TOOLS, max_tokens=24)
    seen = {"role": "tool", "content": about(scene)[0]["content"][:1]}
    calls = [
        {"type": "function", "function": {"name": name, "arguments": {"x": x}}}
        for name, x in (("zoom", 5), ("turn", 6))
    ]
    said = {"role": "assistant", "content": words, "tool_calls": calls}
    expected = demo.generate(
        [*about(scene), said, seen, seen, *about(scene)], tools=TOOLS, max_tokens=24
    )
    assert said_by(answer) == expected.text
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "required"}, {"zoom", "turn"}),
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"zoom", "turn"}),
        ({"tool_choice": {"type": "function", "function": {"name": "turn"}}}, {"turn"}),
        ({"tool_choice": "required", "tools": [tool("zoom", strict=True)]}, {"zoom"}),
        ({"tool_choice": "none"}, set()),
        ({"tool_choice": "auto"}, set()),  # the demo checkpoint never learned to call
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_tool_choice(client: Any, fields: dict[str, Any], names: set[str], streams: bool) -> None:
    answer = ask(
        client, asking("Hello"), **{"tools": TOOLS, **fields}, max_tokens=100, stream=streams
    )
    if streams:
        choices = [chunk.choices[0] for chunk in answer]
        calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
        reason = choices[-1].finish_reason
    else:
        calls = answer.choices[0].message.tool_calls or []
        reason = answer.choices[0].finish_reason
    assert bool(calls) == bool(names)
    assert (reason == "tool_calls") == bool(names)
    assert {name for name, _ in called(calls)} <= names
    assert all(set(arguments) == {"x"} for _, arguments in called(calls))
    if fields.get("parallel_tool_calls") is False:
        assert len(calls) == 1


class Scene(BaseModel):
    background: Literal["blue", "green", "red"]
    shapes: list[Literal["star", "triangle"]] = Field(max_length=2)
    corners: int = Field(ge=0, le=9)


def test_parsed_answers(client: Any, asked: list[dict[str, Any]]) -> None:
    fields = {"model": "default", "messages": asked, "max_tokens": 500}
    parsed = client.chat.completions.parse(**fields, response_format=Scene)
    assert isinstance(parsed.choices[0].message.parsed, Scene)
    with client.chat.completions.stream(**fields, response_format=Scene) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "text"}}, TRUTH),
        ({"grammar": {"type": "regex", "value": "(yes|no)!"}}, "(yes|no)!"),
        ({"grammar": {"type": "lark", "value": 'start: "a" "b"'}}, "ab"),
        ({"grammar": {"type": "json_schema", "value": {"const": [1]}}}, r"\[\s*1\s*\]"),
    ],
)
def test_grammars(
    client: Any, asked: list[dict[str, Any]], fields: dict[str, Any], words: str
) -> None:
    assert re.fullmatch(words, said_by(ask(client, asked, extra_body=fields)))


def test_any_json(client: Any, asked: list[dict[str, Any]]) -> None:
    answer = ask(client, asked, response_format={"type": "json_object"}, max_tokens=60)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(said_by(answer)), dict)
    assert said_by(answer).startswith("{")


# Thinking

SAID = "I see.\n</think>\n\nHi."


def test_thoughts(thinker: tuple[Qwen3VL, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, client = thinker
    with monkeypatch.context() as patched:
        script(patched, model, SAID)
        whole = ask(client, asking("Hello"))
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = ask(client, asking("Hello"), **options)
    (choice,) = whole.choices
    assert (choice.message.content, choice.message.reasoning_content) == ("Hi.", "I see.")
    assert joined(chunks) == "Hi."
    deltas = [chunk.choices[0].delta.to_dict() for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "I see."
    count = len(model.processor.tokenizer.encode("I see."))
    for usage in (whole.usage, last.usage):
        assert usage.completion_tokens_details.reasoning_tokens == count
    history = [*asking("Hello"), choice.message.to_dict(), *asking("And?")]
    count = len(
        model.processor.prompt(
            [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi.", "reasoning_content": "I see."},
                {"role": "user", "content": "And?"},
            ]
        ).token_ids
    )
    assert ask(client, history, max_tokens=1).usage.prompt_tokens == count


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({}, None),
        ({"thinking_budget": 4}, 4),
        ({"thinking_budget": 0}, 0),
        ({"enable_thinking": False}, 0),
        ({"enable_thinking": True, "thinking_budget": 2}, 2),
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": "high"}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 0),
        ({"chat_template_kwargs": {"thinking_budget": 3}}, 3),
    ],
)
def test_how_long_it_thinks(
    thinker: tuple[Qwen3VL, Any], fields: dict[str, Any], most: int | None
) -> None:
    model, client = thinker
    (close,) = model.processor.tokenizer.encode("</think>")
    forever = {str(token): -1e9 for token in (*model.eos_token_ids, close)}
    answer = ask(client, asking("Hello"), extra_body=fields, max_tokens=40, logit_bias=forever)
    thought = getattr(answer.choices[0].message, "reasoning_content", "")
    if most is None:
        assert said_by(answer) == ""
        assert thought
    else:
        assert said_by(answer)
        assert len(model.processor.tokenizer.encode(thought)) <= most


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"enable_thinking": True, "thinking_budget": 0}, "enable_thinking"),
        ({"enable_thinking": False, "thinking_budget": 9}, "enable_thinking"),
        ({"enable_thinking": False, "reasoning_effort": "low"}, "enable_thinking"),
        ({"thinking_budget": 9, "reasoning_effort": "low"}, "reasoning_effort"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "enable_thinking",
        ),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"thinking_budget": -1}, "thinking_budget"),
    ],
)
def test_contradictions_of_thinking(
    thinker: tuple[Qwen3VL, Any], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(thinker[1], asking("Hello"), extra_body=fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [{"enable_thinking": True}, {"reasoning_effort": "low"}, {"thinking_budget": 5}],
    ids=str,
)
def test_an_instruct_model_does_not_think(client: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="Instruct") as caught:
        ask(client, asking("Hello"), extra_body=fields)
    assert caught.value.param in fields
    quiet = {"enable_thinking": False, "reasoning_effort": "none", "thinking_budget": 0}
    ask(client, asking("Hello"), extra_body={name: quiet[name] for name in fields}, max_tokens=1)
