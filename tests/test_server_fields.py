"""Every field of a chat request, through OpenAI's own client: what is asked is what is done."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from asking import QUESTION, TRUTH, about, script
from clients import ask, asking, connect, data_uri, image_url, joined, openai, said_by
from live import Live, live_server
from PIL.Image import Image
from pydantic import BaseModel, Field
from serving import ENDLESS

from qwen3vl_mlx import Qwen3VL, load
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.processing import processor
from qwen3vl_mlx.server import picture_parts
from qwen3vl_mlx.server.chat_fields import ChatFields
from qwen3vl_mlx.server.options import ServerOptions

pytest.importorskip("llguidance")

THINKING = Path(__file__).parent / "data" / "checkpoints" / "Qwen3-VL-2B-Thinking"


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
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Qwen3VL, Any]]:
    """The demo checkpoint behind a Thinking model's template."""
    folder = tmp_path_factory.mktemp("thinking") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    shutil.copy(THINKING / "chat_template.jinja", folder)
    model = load(folder)
    with live_server(model) as live:
        yield model, connect(live)
    model.close()


# Sampling: each field does what it does in `generate`, and something.

HOT = {"temperature": 4.0, "seed": 3, "max_tokens": 16}
RUN_ON = {"temperature": 0.0, "max_tokens": 40, "logit_bias": ENDLESS["logit_bias"]}
DRY = {"dry_multiplier": 9.0, "dry_allowed_length": 1}
SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (HOT, {"temperature": 0.0}),
    (HOT, {"seed": 4}),
    (HOT, {"max_tokens": 3}),
    (HOT, {"top_p": 0.2}),
    (HOT, {"top_k": 1}),
    (HOT, {"min_p": 0.9}),
    (HOT, {"stop": ["e", "o"]}),
    ({"temperature": 0.0, "max_tokens": 40}, {"ignore_eos": True}),
    (RUN_ON, {"frequency_penalty": 2.0}),
    (RUN_ON, {"presence_penalty": 2.0}),
    (RUN_ON, {"repetition_penalty": 2.0}),
    (RUN_ON, DRY),
    ({**RUN_ON, **DRY}, {"dry_allowed_length": 4}),
    ({**RUN_ON, **DRY}, {"dry_sequence_breakers": ["a", " "]}),
    ({**RUN_ON, **DRY, "dry_multiplier": 0.1}, {"dry_base": 50.0}),
]


@pytest.mark.parametrize(("base", "fields"), SAMPLING, ids=str)
def test_sampling(
    client: Any,
    demo: Qwen3VL,
    scene: Image,
    asked: list[dict[str, Any]],
    base: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    expected = demo.generate(about(scene), sampling={**base, **fields})
    answer = ask(client, asked, extra_body={**base, **fields})
    assert said_by(answer) == expected.text
    assert answer.usage.completion_tokens == expected.usage.completion_tokens
    assert said_by(ask(client, asked, extra_body=base)) != expected.text


def test_both_names_of_the_answers_length(client: Any, asked: list[dict[str, Any]]) -> None:
    for fields in (
        {"max_completion_tokens": 3},
        {"max_completion_tokens": 3, "max_tokens": 3},
    ):
        answer = ask(client, asked, **fields)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    with pytest.raises(openai.BadRequestError, match="contradict"):
        ask(client, asked, max_tokens=3, max_completion_tokens=4)


@pytest.mark.parametrize(
    ("stop", "words", "found"),
    [
        (" with", "A blue background", " with"),
        (["zebra", " star", "purple"], "A blue background with a ", "purple"),
        (["zebra"], TRUTH, None),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_stop(
    client: Any, asked: list[dict[str, Any]], stop: Any, words: str, found: Any, streams: bool
) -> None:
    answer = ask(client, asked, stop=stop, stream=streams)
    if streams:
        chunks = list(answer)
        assert joined(chunks) == words
        choice = chunks[-1].choices[0]
    else:
        assert said_by(answer) == words
        choice = answer.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", found)


def test_a_bias_on_a_token(client: Any, demo: Qwen3VL, asked: list[dict[str, Any]]) -> None:
    (token,) = demo.processor.tokenizer.encode("A")
    assert not said_by(ask(client, asked, logit_bias={str(token): -100})).startswith("A ")
    assert said_by(ask(client, asked, max_tokens=3, logit_bias={str(token): 100})) == "AAA"


@pytest.mark.parametrize("streams", [False, True])
def test_several_answers(
    client: Any, demo: Qwen3VL, scene: Image, asked: list[dict[str, Any]], streams: bool
) -> None:
    expected = demo.generate(about(scene), n=3, sampling=HOT)
    texts = [expected.text, *(other.text for other in expected.alternatives)]
    assert len(set(texts)) > 1
    answer = ask(client, asked, n=3, stream=streams, **HOT)
    if streams:
        chunks = list(answer)
        assert [joined(chunks, index) for index in range(3)] == texts
        ends = [c.choices[0] for c in chunks if c.choices[0].finish_reason]
        assert sorted(end.index for end in ends) == [0, 1, 2]
        return
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == texts
    usages = [expected.usage, *(other.usage for other in expected.alternatives)]
    assert answer.usage.completion_tokens == sum(usage.completion_tokens for usage in usages)
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


# Log-probabilities


@pytest.mark.parametrize("words", [None, "Ünï 日本 😀"])
def test_logprobs(
    client: Any,
    demo: Qwen3VL,
    asked: list[dict[str, Any]],
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if words is not None:
        script(monkeypatch, demo, words)
    whole = ask(client, asked, logprobs=True, top_logprobs=3).choices[0]
    entries = whole.logprobs.content
    spoken = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert spoken == whole.message.content == (words or TRUTH)
    for entry in entries:
        assert entry.token == bytes(entry.bytes).decode(errors="replace")
        assert len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] <= 0
        if words is None:
            assert entry.top_logprobs[0].token == entry.token
    chunks = list(ask(client, asked, logprobs=True, top_logprobs=3, stream=True))
    parts = [chunk.choices[0] for chunk in chunks]
    streamed = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert [entry.to_dict() for entry in streamed] == [entry.to_dict() for entry in entries]
    bare = ask(client, asked, logprobs=True).choices[0].logprobs.content
    assert [(entry.token, entry.top_logprobs) for entry in bare] == [(e.token, []) for e in entries]
    assert ask(client, asked, logprobs=False).choices[0].logprobs is None


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
    fields = {"model": "default", "messages": asked, "max_tokens": 300}
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
    forever = {str(token): -1e9 for token in (*model.eos_token_ids, 1013)}
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


# How large pictures are seen

AUTO, LOW = 36 * 1024, 16 * 1024  # in place of those of models that see more than the demo's 61440


@pytest.mark.parametrize(
    ("of_part", "of_request", "tokens"),
    [
        ({}, {}, 36),
        ({"detail": "auto"}, {}, 36),
        ({"detail": "high"}, {}, 49),
        ({"detail": "low"}, {}, 16),
        ({"detail": "low"}, {"max_pixels": 9 * 1024}, 9),
        ({"detail": "high"}, {"max_pixels": 25 * 1024}, 25),
        ({"max_pixels": 25 * 1024}, {}, 25),
        ({"max_pixels": 25 * 1024}, {"max_pixels": 9 * 1024}, 25),
        ({}, {"max_pixels": 25 * 1024}, 25),
        ({}, {"max_pixels": "full"}, 49),
    ],
)
def test_how_large_pictures_are_seen(
    client: Any,
    of_part: dict[str, Any],
    of_request: dict[str, Any],
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processor, "DESKTOP_MAX_PIXELS", AUTO)
    monkeypatch.setattr(picture_parts, "LOW_DETAIL_PIXELS", LOW)
    picture = data_uri(np.zeros((320, 320, 3), np.uint8))
    asked = asking(image_url(picture, **of_part), "Hello")
    answer = ask(client, asked, extra_body=of_request, max_tokens=1)
    text_alone = ask(client, asking("Hello"), max_tokens=1)
    marks = 2  # before and after the picture
    seen = answer.usage.prompt_tokens - text_alone.usage.prompt_tokens - marks
    assert seen == tokens


def test_small_pictures_are_seen_larger(client: Any) -> None:
    picture = data_uri(np.zeros((96, 96, 3), np.uint8))
    fields: dict[str, Any]
    for fields in ({}, {"min_pixels": 36 * 1024}):
        answer = ask(client, asking(image_url(picture)), extra_body=fields, max_tokens=1)
        plain = ask(client, asking(""), max_tokens=1)
        seen = answer.usage.prompt_tokens - plain.usage.prompt_tokens - 2
        assert seen == (36 if fields else 9)


# Limits


def test_truncation(client: Any) -> None:
    long = [
        {"role": "user", "content": "Hello there. " * 400},
        {"role": "assistant", "content": "Hi. " * 400},
        *asking("Hello"),
    ]
    with pytest.raises(openai.BadRequestError, match="2048") as caught:
        ask(client, long)
    assert caught.value.code == "context_length_exceeded"
    answer = ask(client, long, max_tokens=8, extra_body={"truncate_sequence": True})
    assert answer.usage.prompt_tokens < 2048


def test_a_timeout_cuts_the_answer_off(client: Any, demo: Qwen3VL) -> None:
    fields = {**ENDLESS, "logit_bias": {str(k): v for k, v in ENDLESS["logit_bias"].items()}}
    answer = ask(client, asking("Hello"), **fields, extra_body={"timeout": 0.2})
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.stop_reason) == ("length", "timeout")
    assert 0 < answer.usage.completion_tokens < 1500
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, asking("Hello"), extra_body={"timeout": 1e-6})
    assert (caught.value.status_code, caught.value.param) == (408, "timeout")


# What cannot be honoured


@pytest.mark.parametrize("name", ChatFields.impossible)
def test_impossible_fields_are_refused(client: Any, name: str) -> None:
    declared = name in ChatFields.model_fields  # and has a type
    for value in (True,) if declared else (True, "x", [1], {"a": 1}):
        with pytest.raises(openai.BadRequestError, match=name) as caught:
            ask(client, asking("Hello"), extra_body={name: value})
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)


def test_impossible_fields_that_ask_for_nothing(client: Any) -> None:
    for value in (None, False, [], {}, ""):
        nothing = {name: value for name in ChatFields.impossible if name != "store"}
        assert ask(client, asking("Hello"), extra_body=nothing, max_tokens=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"]},
        {"service_tier": "auto"},
        {"store": False},
        {"verbosity": "medium"},
        {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
    ],
    ids=str,
)
def test_fields_that_change_nothing(client: Any, fields: dict[str, Any]) -> None:
    raw = client.chat.completions.with_raw_response
    response = ask_raw(raw, fields)
    assert "x-qwen3vl-warning" not in response.headers


def ask_raw(raw: Any, fields: dict[str, Any]) -> Any:
    return raw.create(model="default", messages=asking("Hello"), max_tokens=1, extra_body=fields)


UNKNOWN = [
    ({"colour": 1}, "colour"),
    ({"max_token": None}, "max_token"),
    ({"stream": True, "stream_options": {"speed": 1}}, "stream_options.speed"),
    ({"chat_template_kwargs": {"tone": "kind"}}, "chat_template_kwargs.tone"),
    ({'x\n"é': 1}, "x"),
]


@pytest.mark.parametrize(("fields", "name"), UNKNOWN)
def test_unknown_fields_are_told_of(
    client: Any, demo: Qwen3VL, fields: dict[str, Any], name: str
) -> None:
    response = ask_raw(client.chat.completions.with_raw_response, fields)
    assert name in response.headers["x-qwen3vl-warning"]


@pytest.mark.parametrize(("fields", "name"), UNKNOWN)
def test_unknown_fields_may_be_refused(demo: Qwen3VL, fields: dict[str, Any], name: str) -> None:
    with live_server(demo, ServerOptions(unknown_fields="refuse")) as strict:
        with pytest.raises(openai.BadRequestError, match="unknown fields") as caught:
            ask_raw(connect(strict).chat.completions.with_raw_response, fields)
        assert caught.value.code == "unknown_parameter"
        assert caught.value.param.startswith(name)
