"""Anthropic's own client against the server: what it asks, what it reads, what it raises."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from asking import OTHER_TRUTH, QUESTION, TRUTH, about, script
from PIL.Image import Image

pytest.importorskip("anthropic")
pytest.importorskip("fastapi")

import anthropic
from live import Live, live_server
from pydantic import BaseModel

from qwen3vl_mlx.api import Qwen3VL

ZOOM = {
    "name": "zoom",
    "description": "Looks closer.",
    "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}},
}
CALL = '<tool_call>\n{"name": "zoom", "arguments": {"x": 5}}\n</tool_call>'


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    with live_server(demo) as live:
        yield live
        deadline = time.monotonic() + 5
        while live.serving.host.status().users:  # nobody may keep the model
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="module")
def thinker(thinking_demo: Qwen3VL) -> Iterator[tuple[Qwen3VL, Live]]:
    """The demo checkpoint behind the template of the Thinking models."""
    with live_server(thinking_demo) as live:
        yield thinking_demo, live


def connect(live: Live) -> Any:
    return anthropic.Anthropic(api_key="any", base_url=live.url, max_retries=0)


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    return connect(live)


def picture(image: Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": data},
    }


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def asking(*content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": [*content]}]
    return {"model": "default", "max_tokens": 64, "messages": messages, **fields}


# Answers.


def test_a_message(client: Any, demo: Qwen3VL, scene: Image) -> None:
    demo.engine.clear_caches()
    asked = asking(picture(scene), text(QUESTION), metadata={"user_id": "me"})
    reply = client.messages.create(**asked)
    assert [block.to_dict() for block in reply.content] == [text(TRUTH)]
    assert (reply.role, reply.type, reply.model) == ("assistant", "message", "demo")
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
    assert reply.id.startswith("msg_")
    alone = demo.generate(QUESTION, images=[scene]).usage
    assert reply.usage.input_tokens == alone.prompt_tokens
    assert reply.usage.cache_read_input_tokens == 0
    assert reply.usage.output_tokens == alone.completion_tokens
    again = client.messages.create(**asked)
    assert again.usage.cache_read_input_tokens == alone.prompt_tokens - 1
    assert again.usage.input_tokens == 1
    assert again.id != reply.id
    assert client.beta.messages.create(**asked).content[0].text == TRUTH


def test_a_stream_adds_up_to_the_message(client: Any, scene: Image) -> None:
    asked = asking(picture(scene), text(QUESTION))
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 5
    assert "".join(pieces) == TRUTH

    def told(message: Any) -> dict[str, Any]:
        return {**message.to_dict(), "id": "", "content": [b.to_dict() for b in message.content]}

    assert told(final) == told(whole)


def test_the_order_of_events(client: Any, live: Live, scene: Image) -> None:
    asked = asking(picture(scene), text(QUESTION), stream=True)
    kinds = [event.type for event in client.messages.create(**asked)]
    first, *deltas, stop, delta, end = kinds[1:]
    assert (kinds[0], first) == ("message_start", "content_block_start")
    assert set(deltas) == {"content_block_delta"}
    assert (stop, delta, end) == ("content_block_stop", "message_delta", "message_stop")
    request = urllib.request.Request(
        f"{live.url}/v1/messages",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        lines = response.read().decode().splitlines()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert events == [kinds[0], "ping", *kinds[1:]]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data")]
    assert [event["type"] for event in data] == events


@pytest.mark.parametrize(
    ("fields", "ended"),
    [
        ({"stop_sequences": ["zebra", " star"]}, ("stop_sequence", " star")),
        ({"stop_sequences": ["zebra"]}, ("end_turn", None)),
        ({"max_tokens": 3}, ("max_tokens", None)),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_ends(
    client: Any, scene: Image, fields: dict[str, Any], ended: tuple[Any, Any], streams: bool
) -> None:
    asked = asking(picture(scene), text(QUESTION), **fields)
    if streams:
        with client.messages.stream(**asked) as stream:
            reply = stream.get_final_message()
    else:
        reply = client.messages.create(**asked)
    assert (reply.stop_reason, reply.stop_sequence) == ended
    assert TRUTH.startswith(reply.content[0].text)
    assert (reply.content[0].text == TRUTH) == (ended[0] == "end_turn")


def test_several_turns_and_a_system_prompt(
    client: Any, demo: Qwen3VL, scene: Image, other_scene: Image
) -> None:
    turns = [
        {"role": "user", "content": [picture(scene), text(QUESTION)]},
        {"role": "assistant", "content": TRUTH},
        {"role": "user", "content": [picture(other_scene), text(QUESTION)]},
    ]
    reply = client.messages.create(
        model="demo",
        max_tokens=64,
        system=[{**text("Be brief."), "cache_control": {"type": "ephemeral"}}],
        messages=turns,
    )
    expected = demo.generate(
        [
            {"role": "system", "content": "Be brief."},
            *about(scene),
            {"role": "assistant", "content": TRUTH},
            *about(other_scene),
        ],
        max_tokens=64,
    )
    assert reply.content[0].text == expected.text
    assert sum(tokens_read(reply)) == expected.usage.prompt_tokens


def tokens_read(reply: Any) -> tuple[int, int]:
    return reply.usage.input_tokens, reply.usage.cache_read_input_tokens


def test_an_async_client(live: Live, scene: Image, other_scene: Image) -> None:
    async def ask_both() -> list[str]:
        async with anthropic.AsyncAnthropic(api_key="any", base_url=live.url) as client:
            replies = await asyncio.gather(
                *(
                    client.messages.create(**asking(picture(image), text(QUESTION)))
                    for image in (scene, other_scene)
                )
            )
        return [reply.content[0].text for reply in replies]

    assert asyncio.run(ask_both()) == [TRUTH, OTHER_TRUTH]


# Tools, structures, thoughts.


def test_a_tool_round_trip_with_a_picture(
    client: Any, demo: Qwen3VL, scene: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asking(text("Look closer."), tools=[ZOOM])
    with monkeypatch.context() as patched:
        script(patched, demo, f"I shall.\n{CALL}\n{CALL}")
        first = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    assert first.stop_reason == streamed.stop_reason == "tool_use"
    for message in (first, streamed):
        said, *uses = message.content
        assert said.text == "I shall."
        assert [(use.type, use.name, use.input) for use in uses] == [
            ("tool_use", "zoom", {"x": 5})
        ] * 2
        assert len({use.id for use in uses}) == 2
    results = [
        {"type": "tool_result", "tool_use_id": use.id, "content": [picture(scene)]}
        for use in first.content[1:]
    ]
    messages = [
        *asked["messages"],
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [*results, text(QUESTION)]},
    ]
    second = client.messages.create(**{**asked, "messages": messages})
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"x": 5}}}
    function = {
        "name": "zoom",
        "description": ZOOM["description"],
        "parameters": ZOOM["input_schema"],
    }
    answer = demo.generate(
        [
            {"role": "user", "content": "Look closer."},
            {"role": "assistant", "content": "I shall.", "tool_calls": [call, call]},
            *({**about(scene)[0], "role": "tool", "content": about(scene)[0]["content"][:1]},) * 2,
            {"role": "user", "content": QUESTION},
        ],
        tools=[{"type": "function", "function": function}],
        max_tokens=64,
    )
    assert second.content[0].text == answer.text
    assert sum(tokens_read(second)) == answer.usage.prompt_tokens


def test_the_tool_runner(client: Any, demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    @anthropic.beta_tool
    def zoom(x: int) -> str:
        """Looks closer."""
        looked.append(x)
        return "a star"

    asked = asking(text("Look closer."), tools=[zoom])
    script(monkeypatch, demo, CALL)
    replies = []
    for reply in client.beta.messages.tool_runner(**asked):
        script(monkeypatch, demo, "I see a star.")
        replies.append(reply)
    assert looked == [5]
    assert [reply.stop_reason for reply in replies] == ["tool_use", "end_turn"]
    assert replies[1].content[0].text == "I see a star."
    assert sum(tokens_read(replies[1])) > sum(tokens_read(replies[0]))  # all of it was sent again


def test_tool_choice_binds(client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"x": {"enum": [5, 6]}}, "required": ["x"]}
    strict = {**ZOOM, "strict": True, "input_schema": {**schema, "additionalProperties": False}}
    asked = asking(text("Hello"), tools=[{**strict, "input_examples": [{"x": 6}]}])
    reply = client.messages.create(
        **asked, tool_choice={"type": "any", "disable_parallel_tool_use": True}
    )
    assert [(block.type, block.name) for block in reply.content] == [("tool_use", "zoom")]
    assert reply.content[0].input in ({"x": 5}, {"x": 6})
    reply = client.messages.create(**asked, tool_choice={"type": "none"})
    assert {block.type for block in reply.content} <= {"text"}
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        client.messages.create(**asked, tool_choice={"type": "tool", "name": "fly"})


class Scene(BaseModel):
    color: Literal["red", "green", "blue"]


def test_a_parsed_answer(client: Any, scene: Image) -> None:
    pytest.importorskip("llguidance")
    asked = {**asking(picture(scene), text(QUESTION)), "max_tokens": 512}
    reply = client.messages.parse(**asked, output_format=Scene)
    assert reply.parsed_output in [Scene(color=color) for color in ("red", "green", "blue")]


def test_thoughts(thinker: tuple[Qwen3VL, Live], monkeypatch: pytest.MonkeyPatch) -> None:
    model, live = thinker
    client = connect(live)
    asked = asking(text("Hello"))
    with monkeypatch.context() as patched:
        script(patched, model, "I see.\n</think>\n\nHi.")
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        hidden = client.messages.create(
            **asked, thinking={"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
        )
    for message in (whole, streamed, hidden):
        thought, answer = message.content
        assert (thought.type, answer.text) == ("thinking", "Hi.")
        assert thought.thinking == ("" if message is hidden else "I see.")
        assert thought.signature
    history = [
        *asked["messages"],
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": "And?"},
    ]
    count = client.messages.count_tokens(model="default", messages=history).input_tokens
    assert count == len(
        model.processor.prompt(
            [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi.", "reasoning_content": "I see."},
                {"role": "user", "content": "And?"},
            ]
        ).token_ids
    )
    silent = client.messages.create(**{**asked, "thinking": {"type": "disabled"}})
    assert all(block.type == "text" or not block.thinking.strip() for block in silent.content)


# Counting.


def test_tokens_are_counted_as_they_are_read(client: Any, scene: Image) -> None:
    asked = asking(picture(scene), text(QUESTION), system="Be brief.", tools=[ZOOM])
    reply = client.messages.create(**asked)
    del asked["max_tokens"]
    count = client.messages.count_tokens(**asked).input_tokens
    assert count == sum(tokens_read(reply))
    assert client.messages.count_tokens(**asked, tool_choice={"type": "none"}).input_tokens < count


def test_what_fills_the_context_is_counted_and_refused(client: Any, demo: Qwen3VL) -> None:
    asked = asking(text("on and " * 2000))
    with pytest.raises(anthropic.BadRequestError, match="context") as caught:
        client.messages.create(**asked)
    assert caught.value.type == "invalid_request_error"
    del asked["max_tokens"]
    count = client.messages.count_tokens(**asked).input_tokens
    assert count > demo.asking.context_length


# Refusals.


@pytest.mark.parametrize(
    ("fields", "error", "kind", "named"),
    [
        ({"model": "claude"}, "NotFoundError", "not_found_error", "demo, default"),
        ({"max_tokens": 0}, "BadRequestError", "invalid_request_error", "max_tokens"),
        (
            {"extra_body": {"max_tokens": "9"}},
            "UnprocessableEntityError",
            "invalid_request_error",
            "max_tokens",
        ),
        (
            {"extra_body": {"temperature": -1}},
            "BadRequestError",
            "invalid_request_error",
            "temperature",
        ),
        ({"messages": []}, "UnprocessableEntityError", "invalid_request_error", "messages"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            "BadRequestError",
            "invalid_request_error",
            "^(?!.*enable_thinking).*thinking",
        ),
        ({"container": "c"}, "BadRequestError", "invalid_request_error", "container"),
        (
            {"extra_body": {"mcp_servers": [{"type": "url"}]}},
            "BadRequestError",
            "invalid_request_error",
            "mcp_servers",
        ),
        (
            {"stop_sequences": [""]},
            "UnprocessableEntityError",
            "invalid_request_error",
            "stop_sequences",
        ),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_refusals(
    client: Any, fields: dict[str, Any], error: str, kind: str, named: str, streams: bool
) -> None:
    with pytest.raises(getattr(anthropic, error), match=named) as caught:
        client.messages.create(**{**asking(text("Hello")), "stream": streams, **fields})
    assert caught.value.type == kind


@pytest.mark.parametrize(
    ("block", "named"),
    [
        (7, "messages[0].content[0]"),
        ({"type": "text"}, "messages[0].content[0].text"),
        ({"type": "image", "source": {"type": "url"}}, "messages[0].content[0].source.url"),
    ],
)
def test_fields_are_named_without_their_models(client: Any, block: Any, named: str) -> None:
    with pytest.raises(anthropic.UnprocessableEntityError) as caught:
        client.messages.create(**asking(block))
    assert caught.value.body["error"]["message"].partition(":")[0] == named


def test_a_picture_at_fault_is_named_as_it_was_sent(client: Any, scene: Image) -> None:
    broken = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "%"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("a"), broken]}
    use = {"type": "tool_use", "id": "toolu_1", "name": "zoom", "input": {}}
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(
            model="default",
            max_tokens=9,
            system="Be brief.",
            messages=[
                {"role": "user", "content": [picture(scene), text("Look.")]},
                {"role": "assistant", "content": [use]},
                {"role": "user", "content": [result]},
            ],
        )
    assert caught.value.status_code in (400, 415)
    assert "messages[2].content[0].content[1]" in caught.value.message


def test_a_stream_that_is_cut_off_says_why(demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, demo, "on and " * 400)
    with live_server(demo) as live:
        events = connect(live).messages.create(
            **{**asking(text("Hello")), "max_tokens": 1500}, stream=True
        )
        assert next(events).type == "message_start"
        assert next(events).type == "content_block_start"
        assert asyncio.run(live.serving.host.end_all())
        with pytest.raises(anthropic.APIStatusError, match="shutting down") as caught:
            list(events)
    assert caught.value.type == "overloaded_error"
