"""LangChain's ChatOpenAI against the server, as its users write it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from asking import OTHER_TRUTH, QUESTION, TRUTH, script
from asking import about as seen
from clients import at_rest, base64_of, data_uri, until
from live import Live, live_server
from PIL.Image import Image

pytest.importorskip("llguidance")
pytest.importorskip("langchain_openai")

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field

from qwen3vl_mlx import Qwen3VL

pytestmark = pytest.mark.dev


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    with live_server(demo) as live:
        yield live
        until(lambda: at_rest(live))


@pytest.fixture(scope="module")
def chat(live: Live) -> Any:
    return chat_of(live)


def chat_of(live: Live, **options: Any) -> Any:
    return ChatOpenAI(
        model="default",
        api_key="any",
        base_url=f"{live.url}/v1",
        temperature=0,
        max_retries=0,
        timeout=60,
        **options,
    )


# The ways in which LangChain's documentation writes a picture.
PARTS = {
    "OpenAI's": lambda image: {"type": "image_url", "image_url": {"url": data_uri(image)}},
    "a plain url": lambda image: {"type": "image_url", "image_url": data_uri(image)},
    "standard": lambda image: {
        "type": "image",
        "base64": base64_of(image),
        "mime_type": "image/png",
    },
    "older standard": lambda image: {
        "type": "image",
        "source_type": "base64",
        "data": base64_of(image),
        "mime_type": "image/png",
    },
    "standard, by url": lambda image: {"type": "image", "url": data_uri(image)},
}


def about(image: Image, form: str = "OpenAI's") -> HumanMessage:
    return HumanMessage(content=[PARTS[form](image), {"type": "text", "text": QUESTION}])


@pytest.mark.parametrize("form", PARTS)
def test_invoke(chat: Any, scene: Image, form: str) -> None:
    answer = chat.invoke([about(scene, form)])
    assert answer.content == TRUTH
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == "demo"
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 20


def test_stream(chat: Any, scene: Image) -> None:
    chunks = list(chat.stream([about(scene)], stream_usage=True))
    assert len(chunks) > 5
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert whole.content == TRUTH
    assert whole.usage_metadata == chat.invoke([about(scene)]).usage_metadata | {
        "input_token_details": whole.usage_metadata["input_token_details"]
    }


def test_conversation_chain_and_batch(
    chat: Any, demo: Qwen3VL, scene: Image, other_scene: Image
) -> None:
    turns = [about(scene), AIMessage(TRUTH), about(other_scene)]
    told = {"role": "assistant", "content": TRUTH}
    followed = demo.generate([*seen(scene), told, *seen(other_scene)]).text
    assert chat.invoke(turns).content == followed != TRUTH
    whole = [{"role": "system", "content": "Be brief."}, *seen(scene)]
    expected = demo.generate(whole)
    answer = chat.invoke([SystemMessage("Be brief."), about(scene)])
    assert answer.content == expected.text
    assert answer.usage_metadata["input_tokens"] == expected.usage.prompt_tokens
    answers = chat.batch([[about(scene)], [about(other_scene)], [about(scene)]])
    assert [answer.content for answer in answers] == [TRUTH, OTHER_TRUTH, TRUTH]
    picture = {"type": "image_url", "image_url": {"url": "{picture}"}}
    prompt = ChatPromptTemplate([("user", [picture, {"type": "text", "text": "{question}"}])])
    asked = {"picture": data_uri(scene), "question": QUESTION}
    assert (prompt | chat).invoke(asked).content == TRUTH


def test_asynchronous(chat: Any, scene: Image, other_scene: Image) -> None:
    async def ask_both() -> tuple[str, str]:
        async def stream(image: Image) -> str:
            return "".join([chunk.content async for chunk in chat.astream([about(image)])])

        whole, streamed = await asyncio.gather(chat.ainvoke([about(scene)]), stream(other_scene))
        return whole.content, streamed

    assert asyncio.run(ask_both()) == (TRUTH, OTHER_TRUTH)


@tool
def zoom(x: Annotated[int, Field(ge=0, le=9)]) -> str:
    """Look closer."""
    return f"closer to {x}"


CALL = '<tool_call>\n{"name": "zoom", "arguments": {"x": 5}}\n</tool_call>'


@pytest.mark.parametrize("streams", [False, True])
def test_tools(
    chat: Any, demo: Qwen3VL, scene: Image, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [about(scene)]
    with monkeypatch.context() as patched:
        script(patched, demo, CALL)
        bound = chat.bind_tools([zoom])
        if streams:
            first, *rest = bound.stream(asked)
            answer = sum(rest, start=first)
        else:
            answer = bound.invoke(asked)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("zoom", {"x": 5})
    message = zoom.invoke({**call, "type": "tool_call"})
    assert isinstance(message, ToolMessage)
    done = bound.invoke([*asked, answer, message, *asked])
    assert done.response_metadata["finish_reason"] == "stop"


def test_a_tool_that_must_be_called(chat: Any) -> None:
    bound = chat.bind_tools([zoom], tool_choice="zoom", strict=True)
    (call, *_) = bound.invoke("Hello", max_tokens=200).tool_calls
    assert call["name"] == "zoom"
    assert isinstance(call["args"]["x"], int)


class Scene(BaseModel):
    """What is to be seen."""

    model_config = ConfigDict(extra="forbid")

    background: Literal["blue", "green", "red"]
    corners: int = Field(ge=0, le=9)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: Any, scene: Image, method: str) -> None:
    structured = chat.with_structured_output(Scene, method=method, strict=True)
    assert isinstance(structured.invoke([about(scene)], max_tokens=500), Scene)


def test_a_conversation_that_is_too_long(chat: Any) -> None:
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        chat.invoke("Hello there. " * 1000)


def test_the_responses_api(live: Live, scene: Image) -> None:
    chat = chat_of(live, use_responses_api=True)
    assert chat.invoke([about(scene)]).text == TRUTH
    assert "".join(chunk.text for chunk in chat.stream([about(scene)])) == TRUTH
