"""Items of the Responses API: as chat messages, and out of an answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")

from pydantic import TypeAdapter

from qwen3vl_mlx.engine.logprobs import TokenLogprob
from qwen3vl_mlx.engine.output import Chunk, ToolCall, make_usage
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.response_store import Turn
from qwen3vl_mlx.server.responses_conversation import Conversation
from qwen3vl_mlx.server.responses_items import chat_messages, input_items
from qwen3vl_mlx.server.responses_output import OutputWriter

USAGE = make_usage(prompt=1, completion=1, cached=0, started=0, first=0, ended=0, peak=0)
URL = "data:image/png;base64,AAAA"
PIXELS = {"type": "input_image", "image_url": URL}
USER = {"role": "user", "content": "Hi"}


def message(role: str, content: object = None) -> dict[str, Any]:
    return {"role": role, "content": content}


def shown(**fields: Any) -> list[dict[str, Any]]:
    """Input with a picture alone."""
    return [message("user", [{"type": "input_image", **fields}])]


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}


def foreign_thought(**fields: Any) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], **fields}


def called(name: str, **fields: Any) -> dict[str, Any]:
    call = {"call_id": f"call_{name}", "name": name, "arguments": "{}"}
    return {"type": "function_call", **call, **fields}


def output_of(name: str, output: object = "4") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"call_{name}", "output": output}


def chat(role: str, *parts: str | dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A chat message of parts, a text among them as it is."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": role, "content": content, **fields}


def image(detail: str = "auto", **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": URL, "detail": detail}, **fields}


def said(content: str, *calls: str, **fields: Any) -> dict[str, Any]:
    """A chat message of the model's."""
    functions = [{"name": name, "arguments": "{}"} for name in calls]
    tool_calls = [
        {"id": f"call_{function['name']}", "type": "function", "function": function}
        for function in functions
    ]
    return {
        **message("assistant", content),
        **({"tool_calls": tool_calls} if calls else {}),
        **fields,
    }


def result(*parts: str | dict[str, Any]) -> dict[str, Any]:
    return chat("tool", *parts, tool_call_id="call_a")


def messages_of(items: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return chat_messages(input_items(items, lambda _: None))[0]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("Hi", [chat("user", "Hi")]),
        ([USER], [chat("user", "Hi")]),
        ([{"type": "message", **USER, "id": None, "status": None}], [chat("user", "Hi")]),
        ([message("developer", "Be brief.")], [chat("developer", "Be brief.")]),
        (shown(image_url=URL, detail="low"), [chat("user", image("low"))]),
        (
            shown(image_url={"url": URL, "detail": "original"}),
            [chat("user", image("original"))],
        ),
        (shown(image_url=URL, max_pixels=9), [chat("user", image(max_pixels=9))]),
        (shown(image_url={"url": URL, "max_pixels": 9}), [chat("user", image(max_pixels=9))]),
        (
            [message("user", [{"type": "input_text", "text": "?"}, PIXELS])],
            [chat("user", "?", image())],
        ),
        ([message("user", [image("low")])], [chat("user", image("low"))]),
        ([USER, message("assistant", "Yes")], [chat("user", "Hi"), said("Yes")]),
        (
            [
                message(
                    "assistant",
                    [{"type": "output_text", "text": "Ye"}, {"type": "refusal", "refusal": "s"}],
                )
            ],
            [said("Yes")],
        ),
        ([message("assistant", [PIXELS])], [chat("assistant", image())]),
        # What the model did in one turn is one message.
        ([thought("Hm"), message("assistant", "Yes")], [said("Yes", reasoning_content="Hm")]),
        ([message("assistant", "See"), called("a"), called("b")], [said("See", "a", "b")]),
        ([called("a"), message("assistant", "See")], [said("See", "a")]),
        (
            [thought("Hm"), called("a"), output_of("a"), thought("So"), message("assistant", "4")],
            [
                said("", "a", reasoning_content="Hm"),
                {"role": "tool", "tool_call_id": "call_a", "content": "4"},
                said("4", reasoning_content="So"),
            ],
        ),
        # Two turns stay two.
        ([message("assistant", "A"), message("assistant", "B")], [said("A"), said("B")]),
        (
            [message("assistant", "A"), thought("Hm"), message("assistant", "B")],
            [said("A"), said("B", reasoning_content="Hm")],
        ),
        (
            [called("a"), thought("Hm"), called("b")],
            [said("", "a"), said("", "b", reasoning_content="Hm")],
        ),
        (
            [output_of("a", [PIXELS, {"type": "input_text", "text": "a map"}])],
            [result(image(), "a map")],
        ),
        # Thoughts of other servers: what is readable is read.
        (
            [foreign_thought(summary=[{"type": "summary_text", "text": "Hm"}]), called("a")],
            [said("", "a", reasoning_content="Hm")],
        ),
        (
            [foreign_thought(encrypted_content="gAAAA-_."), called("a")],
            [said("", "a")],
        ),
    ],
)
def test_items_become_the_messages_that_chat_clients_send(
    items: str | list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    assert messages_of(items) == expected


CONTENT = "input[0].content[0]"


@pytest.mark.parametrize(
    ("items", "place"),
    [
        ([], "input"),
        ([{}], "input[0].id"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0].id"),
        ([USER, {"type": "web_search_call", "id": "ws_1"}], "input[1].type"),
        ([{"type": ["message"]}], "input[0].type"),
        ([message("tool", "4")], "input[0].role"),
        ([message("user")], "input[0].content"),
        ([message("user", ["Hi"])], CONTENT),
        ([message("user", [{"type": "input_text"}])], f"{CONTENT}.text"),
        ([message("user", [{"type": "input_file", "file_id": "f"}])], f"{CONTENT}.type"),
        (shown(file_id="f"), f"{CONTENT}.file_id"),
        (shown(), f"{CONTENT}.image_url"),
        (shown(image_url={}), f"{CONTENT}.image_url"),
        (shown(image_url=URL, detail="huge"), f"{CONTENT}.detail"),
        (shown(image_url=URL, detail=["low"]), f"{CONTENT}.detail"),
        ([message("system", [PIXELS])], "input[0].content"),
        ([called("f", arguments={})], "input[0].arguments"),
        ([{**called("f"), "name": None}], "input[0].name"),
        ([{**output_of("f"), "call_id": None}], "input[0].call_id"),
        ([output_of("f", None)], "input[0].output"),
        ([output_of("f", [{"type": "input_audio"}])], "input[0].output[0].type"),
        ([{"type": "reasoning", "content": "Hm"}], "input[0].content"),
        ([{**USER, "id": 7}], "input[0].id"),
    ],
)
def test_what_is_wrong_with_an_item_is_named_by_its_place(items: list[Any], place: str) -> None:
    with pytest.raises(ApiError) as caught:
        messages_of(items)
    assert caught.value.status == 400
    assert caught.value.param == place
    assert caught.value.message.startswith(place)


KEYS = (
    *("type", "role", "content", "id", "call_id", "name", "arguments", "output", "summary"),
    *("encrypted_content", "text", "image_url", "detail", "refusal"),
)
WORDS = (
    *("message", "user", "assistant", "system", "reasoning", "function_call", "auto"),
    *("function_call_output", "input_text", "input_image", "output_text", "refusal"),
)
plain = st.none() | st.integers(0, 2) | st.sampled_from(WORDS)
objects = st.dictionaries(st.sampled_from(KEYS), plain | st.lists(plain, max_size=1), max_size=4)
values = plain | objects | st.lists(objects, max_size=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), values, max_size=6), max_size=3))
def test_any_input_is_messages_or_an_error_of_the_clients(items: list[dict[str, Any]]) -> None:
    wrong: ApiError | None = None
    try:
        messages_of(items)
    except ApiError as error:
        wrong = error
    assert wrong is None or (wrong.status == 400 and wrong.param)


def test_references_stand_for_what_they_name() -> None:
    (item,) = input_items("Hi", lambda _: None)
    found = {item["id"]: item}
    assert input_items([{"type": "item_reference", "id": item["id"]}], found.get) == [item]
    assert input_items([{"id": item["id"]}], found.get) == [item]


def test_head_messages_of_the_system_become_one_and_errors_keep_their_places() -> None:
    items = input_items(
        [
            message("system", "B"),
            message("developer", [{"type": "input_text", "text": "C"}]),
            USER,
            thought("Hm"),
            called("f"),
            output_of("f", [PIXELS]),
        ],
        lambda _: None,
    )
    conversation = Conversation((), items, *chat_messages(items), "A")
    asked = conversation.asked()
    assert [message["role"] for message in asked] == ["system", "user", "assistant", "tool"]
    assert asked[0]["content"] == "A\n\nB\n\nC"

    def place(told: str) -> str | None:
        return conversation.told(ApiError(400, told, param=told)).param

    assert place("messages[1].content[0].image_url") == "input[2].content[0].image_url"
    assert place("messages[2]") == "input[3]"
    assert place("messages[3].content[0]") == "input[5].output[0]"
    assert place("messages[9]") == "messages[9]"
    assert place("max_tokens") == "max_output_tokens"
    assert place("reasoning_effort") == "reasoning.effort"


def test_errors_about_a_later_turn_count_from_its_own_items() -> None:
    first = input_items([{"role": "system", "content": "A"}, USER], lambda _: None)
    turn = Turn(first, [], chat_messages(first)[0])
    items = input_items("And now?", lambda _: None)
    conversation = Conversation((turn,), items, *chat_messages(items))
    assert len(conversation.asked()) == 3
    error = conversation.told(ApiError(400, "messages[2].content[1] is bad", param="temperature"))
    assert error.message == "input[0].content[1] is bad"
    assert error.param == "temperature"
    earlier = conversation.told(ApiError(400, "messages[1] is bad"))
    assert earlier.message == "messages[1] is bad"


CALL = ToolCall("call_1", "look", '{"at": 1}')
LOGPROB = TokenLogprob("Hi", 5, -0.5, (72, 105))


def written(chunks: Sequence[Chunk], **options: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    writer = OutputWriter(**options)
    return [event for chunk in chunks for event in writer.push(chunk)], writer.items


def end(reason: str = "stop", **fields: Any) -> Chunk:
    return Chunk(finish_reason=reason, usage=USAGE, **fields)  # type: ignore[arg-type]


def shape(events: Sequence[dict[str, Any]]) -> list[str]:
    """Names of events, deltas of the same kind once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for name, _ in itertools.groupby(names)]


MESSAGE = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
SILENT = [name for name in MESSAGE if "delta" not in name]
REASONING = [name.replace("output_text", "reasoning_text") for name in MESSAGE]
CALLED = [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
]
HM, HI, CALLS = Chunk(reasoning="Hm"), Chunk(text="Hi"), Chunk(tool_calls=(CALL,))


@pytest.mark.parametrize(
    ("chunks", "names", "kinds"),
    [
        ([HI, Chunk(text="!"), end()], MESSAGE, ["message"]),
        ([HM, HI, end()], REASONING + MESSAGE, ["reasoning", "message"]),
        ([HM, end("length", reasoning_closed=False)], REASONING, ["reasoning"]),
        ([CALLS, CALLS, end("tool_calls")], CALLED * 2, ["function_call"] * 2),
        ([Chunk(tool_calls=(CALL, CALL)), end("tool_calls")], CALLED * 2, ["function_call"] * 2),
        (
            [HI, CALLS, HI, end("tool_calls")],
            MESSAGE + CALLED + MESSAGE,
            ["message", "function_call", "message"],
        ),
        ([end(text="Hi")], MESSAGE, ["message"]),
        ([end()], SILENT, ["message"]),
        ([HM, end()], REASONING + SILENT, ["reasoning", "message"]),
        ([end("length")], [], []),
    ],
)
def test_events_tell_of_items_in_the_order_of_the_api(
    chunks: list[Chunk], names: list[str], kinds: list[str]
) -> None:
    events, items = written(chunks)
    assert shape(events) == names
    assert [item["type"] for item in items] == kinds
    done = [event["item"] for event in events if event["type"].endswith("output_item.done")]
    assert done == items
    for event in events:
        whose = event.get("item_id") or event["item"]["id"]
        assert whose == items[event["output_index"]]["id"]
    for item in items:
        deltas = [e["delta"] for e in events if "delta" in e and e["item_id"] == item["id"]]
        content = item.get("content") or [{"text": item.get("arguments")}]
        assert "".join(deltas) == content[0]["text"]


def test_an_item_that_is_cut_off_says_so() -> None:
    _, items = written([Chunk(reasoning="Hm"), Chunk(text="H"), end("timeout")])
    assert [item["status"] for item in items] == ["completed", "incomplete"]


def test_events_are_what_the_openai_package_says() -> None:
    types = pytest.importorskip("openai.types.responses")
    chunks = [
        Chunk(reasoning="Hm"),
        Chunk(text="Hi", logprobs=(LOGPROB,)),
        Chunk(tool_calls=(CALL,)),
    ]
    events, items = written([*chunks, end()], seals=True)
    adapter = TypeAdapter(types.ResponseStreamEvent)
    for number, event in enumerate(events):
        adapter.validate_python({**event, "sequence_number": number}, strict=True)
    for item in items:
        TypeAdapter(types.ResponseOutputItem).validate_python(item, strict=True)
    seal = {**items[0], "content": None}
    assert messages_of([seal]) == [said("", reasoning_content="Hm")]


def test_log_probabilities_stand_beside_text_alone() -> None:
    chunks = [
        Chunk(reasoning="Hm", logprobs=(LOGPROB,)),
        Chunk(text="Hi", logprobs=(LOGPROB,)),
        end(logprobs=(LOGPROB,)),
    ]
    events, items = written(chunks)
    told = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert [len(entries) for entries in told] == [1, 1]
    assert items[1]["content"][0]["logprobs"] == told[0] + told[1]
    assert "logprobs" not in items[0]["content"][0]
