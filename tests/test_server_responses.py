"""OpenAI's own client against /v1/responses: asked, streamed, gone on from, refused, forgotten."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from asking import QUESTION, TRUTH, about, script
from PIL.Image import Image

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai
from clients import connect
from live import Live, live_server
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.server.options import ServerOptions

SCHEMA = {
    "type": "object",
    "properties": {"x": {"enum": [5]}},
    "required": ["x"],
    "additionalProperties": False,
}
ZOOM = {"name": "zoom", "description": "Looks closer.", "parameters": SCHEMA}
FLAT, NESTED = {"type": "function", **ZOOM}, {"type": "function", "function": ZOOM}
CALL = '<tool_call>\n{"name": "zoom", "arguments": {"x": 5}}\n</tool_call>'
EVENTS = TypeAdapter[Any](ResponseStreamEvent)


@pytest.fixture(scope="module")
def live(demo: Qwen3VL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("pictures").resolve()
    with live_server(demo, ServerOptions(image_roots=(root,))) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    return connect(live)


@pytest.fixture(scope="module")
def url(scene: Image) -> str:
    file = io.BytesIO()
    scene.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def user(*parts: str | dict[str, Any]) -> dict[str, Any]:
    texts = ({"type": "input_text", "text": p} if isinstance(p, str) else p for p in parts)
    return {"role": "user", "content": list(texts)}


def picture(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url, "detail": "auto", **fields}


def strict(response: Any) -> dict[str, Any]:
    """A response's JSON, once OpenAI's type has taken it."""
    told: dict[str, Any] = response.to_dict(mode="json")
    Response.model_validate(told, strict=True)
    return told


# Answers.


def test_a_response(client: Any, demo: Qwen3VL, scene: Image, url: str) -> None:
    demo.engine.clear_caches()
    response = client.responses.create(input=[user(picture(url), QUESTION)], temperature=0)
    told = strict(response)
    assert response.output_text == TRUTH
    assert [item.type for item in response.output] == ["message"]
    assert (response.status, response.model, response.error) == ("completed", "demo", None)
    assert (response.temperature, response.tools, response.tool_choice) == (0, [], "auto")
    alone = demo.generate(QUESTION, images=[scene]).usage
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (
        alone.prompt_tokens,
        alone.completion_tokens,
    )
    assert usage.total_tokens == alone.total_tokens
    assert usage.input_tokens_details.cached_tokens == 0
    assert told["usage"]["total_time_sec"] > 0
    assert response.incomplete_details is None


def test_the_response_repeats_what_was_asked(client: Any) -> None:
    asked: dict[str, Any] = {
        "instructions": "Be brief.",
        "max_output_tokens": 3,
        "metadata": {"whose": "mine"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "key",
        "safety_identifier": "me",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "none",
        "tools": [FLAT],
        "top_p": 0.5,
        "truncation": "auto",
        "store": False,
    }
    told = strict(client.responses.create(input="Hi", **asked))
    assert {name: told[name] for name in asked} == asked


def test_every_form_of_input_asks_what_chat_asks(
    client: Any, url: str, requests: list[Request]
) -> None:
    image = {"type": "image_url", "image_url": {"url": url}}
    calls = [{"id": "c1", "type": "function", "function": {"name": "zoom", "arguments": "{}"}}]
    system = {"role": "system", "content": "Be brief.\n\nBe kind."}
    pairs: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        ({"input": "Hi"}, [{"role": "user", "content": "Hi"}]),
        (
            {"input": [user("A", picture(url), "B")]},
            [{"role": "user", "content": [{"type": "text", "text": "A"}, image, *texts("B")]}],
        ),
        (
            {"input": [user(picture(url, detail="low"))]},
            [{"role": "user", "content": [{**image, "image_url": {"url": url, "detail": "low"}}]}],
        ),
        (
            {
                "instructions": "Be brief.",
                "input": [{"role": "developer", "content": "Be kind."}, user("Hi")],
            },
            [system, {"role": "user", "content": "Hi"}],
        ),
        (
            {
                "input": [
                    user("Look"),
                    {"role": "assistant", "content": "I zoom."},
                    {"type": "function_call", "call_id": "c1", "name": "zoom", "arguments": "{}"},
                    {
                        "type": "function_call_output",
                        "call_id": "c1",
                        "output": [picture(url), {"type": "input_text", "text": "here"}],
                    },
                ],
                "tools": [{**FLAT, "strict": False}],
            },
            [
                {"role": "user", "content": "Look"},
                {"role": "assistant", "content": "I zoom.", "tool_calls": calls},
                {"role": "tool", "tool_call_id": "c1", "content": [image, *texts("here")]},
            ],
        ),
    ]
    for asked, messages in pairs:
        tools = {"tools": [NESTED]} if "tools" in asked else {}
        client.responses.create(**asked, max_output_tokens=1)
        client.chat.completions.create(model="default", messages=messages, max_tokens=1, **tools)
        ours, theirs = (request.prompt for request in requests[-2:])
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert [m.identity for m in ours.media] == [m.identity for m in theirs.media]


def texts(*words: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": word} for word in words]


def test_a_stream_tells_what_the_whole_response_says(client: Any, url: str) -> None:
    asked = {"model": "default", "input": [user(picture(url), QUESTION)], "temperature": 0}
    events = list(client.responses.create(**asked, stream=True))
    for number, event in enumerate(events):
        EVENTS.validate_python(event.to_dict(mode="json"), strict=True)
        assert event.sequence_number == number
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event.response.status for event in events[:2]] == ["in_progress"] * 2
    assert events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 5
    assert "".join(deltas) == TRUTH == events[-1].response.output_text
    assert client.responses.retrieve(events[0].response.id) == events[-1].response
    with client.responses.stream(**asked) as stream:
        final = stream.get_final_response()
    assert final.output_text == TRUTH
    whole = strict(client.responses.create(**asked))
    assert without_ids(whole) == without_ids(events[-1].response.to_dict(mode="json"))


def without_ids(told: dict[str, Any]) -> dict[str, Any]:
    """What two answers to the same question have in common."""
    output = [{**item, "id": ""} for item in told["output"]]
    own = {"id", "created_at", "completed_at", "usage"}
    return {**{k: v for k, v in told.items() if k not in own}, "output": output}


def test_log_probabilities(client: Any, url: str) -> None:
    asked = {"input": [user(picture(url), QUESTION)], "temperature": 0, "top_logprobs": 2}
    include = ["message.output_text.logprobs"]
    response = client.responses.create(**asked, include=include)
    strict(response)
    entries = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == TRUTH
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert b"".join(bytes(entry.bytes) for entry in entries) == TRUTH.encode()
    events = client.responses.create(**asked, include=include, stream=True)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [e.token for d in deltas for e in d.logprobs] == [entry.token for entry in entries]


def test_an_answer_that_is_too_long_is_incomplete(client: Any) -> None:
    response = client.responses.create(input="Hi", max_output_tokens=2, temperature=0)
    told = strict(response)
    assert (response.status, response.output[-1].status) == ("incomplete", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (told["stop_reason"], response.usage.output_tokens) == (None, 2)
    events = list(client.responses.create(input="Hi", max_output_tokens=2, stream=True))
    assert events[-1].type == "response.incomplete"


class Scene(BaseModel):
    colour: Literal["blue", "green"]


def test_structured_output(client: Any, url: str) -> None:
    asked = {"model": "default", "input": [user(picture(url), QUESTION)], "temperature": 0}
    parsed = client.responses.parse(**asked, text_format=Scene, max_output_tokens=300)
    assert isinstance(parsed.output_parsed, Scene)
    assert strict(parsed)["text"]["format"]["schema"]["required"] == ["colour"]
    with client.responses.stream(**asked, text_format=Scene, max_output_tokens=300) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    anything = client.responses.create(
        **asked, text={"format": {"type": "json_object"}}, max_output_tokens=5
    )
    assert anything.output_text.startswith("{")


def test_tools(
    client: Any, demo: Qwen3VL, url: str, monkeypatch: pytest.MonkeyPatch, requests: list[Request]
) -> None:
    with monkeypatch.context() as patch:
        script(patch, demo, f"I zoom.\n{CALL}\n{CALL}")
        asked = {"input": [user(picture(url), "Look")], "tools": [FLAT]}
        first = client.responses.create(**asked)
        events = list(client.responses.create(**asked, stream=True))
    strict(first)
    message, call, other = first.output
    assert message.content[0].text == "I zoom."
    assert (call.type, call.name, call.arguments) == ("function_call", "zoom", '{"x": 5}')
    assert call.call_id != other.call_id
    assert first.status == "completed"
    for event in events:
        EVENTS.validate_python(event.to_dict(mode="json"), strict=True)
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert [e.arguments for e in done] == ['{"x": 5}'] * 2

    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": [picture(url)]},
        {"type": "function_call_output", "call_id": other.call_id, "output": "nothing"},
    ]
    rest: dict[str, Any] = {"tools": [FLAT], "max_output_tokens": 1}
    client.responses.create(previous_response_id=first.id, input=results, **rest)
    whole = [*asked["input"], *(item.to_dict() for item in first.output), *results]
    client.responses.create(input=whole, store=False, **rest)
    gone_on, repeated = (request.prompt for request in requests[-2:])
    assert gone_on.token_ids.tolist() == repeated.token_ids.tolist()
    assert len(gone_on.media) == 2


def test_a_tool_may_be_forced(client: Any) -> None:
    for choice in ({"type": "function", "name": "zoom"}, "required"):
        response = client.responses.create(
            input="Hi", tools=[FLAT], tool_choice=choice, temperature=0, max_output_tokens=300
        )
        assert response.output[0].name == "zoom"
        assert strict(response)["tool_choice"] == choice


# Conversations.


def test_a_response_is_gone_on_from(
    client: Any, demo: Qwen3VL, live: Live, scene: Image, requests: list[Request]
) -> None:
    file = live.serving.options.image_roots[0] / "scene.png"
    scene.save(file)
    first = client.responses.create(
        input=[user(picture(str(file)), QUESTION)], instructions="Be brief.", temperature=0
    )
    file.unlink()  # what was seen once is not read again
    second = client.responses.create(
        input="And its shape?", previous_response_id=first.id, temperature=0
    )
    third = client.responses.create(input="Sure?", previous_response_id=second.id, temperature=0)
    history = [
        *about(scene),
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And its shape?"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "Sure?"},
    ]
    asked = demo.processor.prompt(history)  # without the first turn's instructions
    assert requests[-1].prompt.token_ids.tolist() == asked.token_ids.tolist()
    assert requests[-1].prompt.media[0].identity == asked.media[0].identity
    assert third.usage.input_tokens_details.cached_tokens > len(asked.visual_rows)
    assert third.previous_response_id == second.id
    # Another way from the same place, and from one that is forgotten.
    client.responses.delete(first.id)
    other = client.responses.create(input="Sure?", previous_response_id=second.id, temperature=0)
    assert other.output_text == third.output_text


def test_what_the_model_was_given_is_listed(client: Any, url: str) -> None:
    first = client.responses.create(input=[user(picture(url), "A")], max_output_tokens=1)
    second = client.responses.create(
        input=[user("B"), user("C")], previous_response_id=first.id, max_output_tokens=1
    )
    listed = list(client.responses.input_items.list(second.id, order="asc"))
    assert [item.role for item in listed] == ["user", "assistant", "user", "user"]
    assert listed[0].content[0].image_url == url
    assert listed[1] == first.output[0]
    back = client.responses.input_items.list(second.id, limit=3)
    assert [item.id for item in back.data] == [item.id for item in reversed(listed[1:])]
    assert back.has_more
    assert [item.id for item in back] == [item.id for item in reversed(listed)], "page by page"


def test_items_may_be_named(client: Any, requests: list[Request]) -> None:
    first = client.responses.create(input="A", temperature=0)
    items = [user("A"), {"type": "item_reference", "id": first.output[0].id}, user("B")]
    client.responses.create(input=items, max_output_tokens=1)
    client.responses.create(input="B", previous_response_id=first.id, max_output_tokens=1)
    named, gone_on = (request.prompt.token_ids.tolist() for request in requests[-2:])
    assert named == gone_on


def test_responses_are_forgotten(client: Any) -> None:
    kept = client.responses.create(input="Hi", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(kept.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        list(client.responses.retrieve(kept.id, stream=True))
    client.responses.delete(kept.id)
    loose = client.responses.create(input="Hi", max_output_tokens=1, store=False)
    actions: list[Callable[[str], Any]] = [
        client.responses.retrieve,
        client.responses.delete,
        client.responses.cancel,
        client.responses.input_items.list,
    ]
    for response in (kept, loose):
        for action in actions:
            with pytest.raises(openai.NotFoundError, match=response.id):
                action(response.id)
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(input="Hi", previous_response_id=response.id)
        assert caught.value.param == "previous_response_id"
        assert caught.value.code == "previous_response_not_found"
