"""Chat requests that are refused: the status, the field at fault, the code and the words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from clients import (
    ask,
    asking,
    connect,
    data_uri,
    image_url,
    openai,
)
from live import Live, live_server

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.server.options import ServerOptions

OPTIONS = ServerOptions(
    max_body_bytes=2**20,
    max_images=3,
    max_image_pixels=90_000,
    max_download_bytes=10_000,
    allow_private_urls=True,
    aliases=("qwen", "gpt-4o"),
)


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    with live_server(demo, OPTIONS) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    return connect(live)


SMALL = data_uri(np.zeros((32, 32, 3), np.uint8))
HUGE = data_uri(np.zeros((301, 300, 3), np.uint8))
HELLO = asking("Hello")
OPEN: dict[str, Any] = {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": "{}"}}],
}
RESULTS = [{"role": "tool", "tool_call_id": f"call_{at}", "content": "4"} for at in (1, 2)]

# name: the fields, the status, the field at fault, the code, and words of the message
REFUSED: dict[str, tuple[dict[str, Any], int, str | None, str | None, str]] = {
    "max_tokens": ({"max_tokens": 0}, 400, "max_tokens", "invalid_value", "1"),
    "max_completion_tokens": (
        {"max_completion_tokens": -1},
        400,
        "max_completion_tokens",
        "invalid_value",
        "1",
    ),
    "temperature": ({"temperature": -1}, 400, "temperature", "invalid_value", "0"),
    "top_p": ({"top_p": 1.5}, 400, "top_p", "invalid_value", "1"),
    "frequency_penalty": ({"frequency_penalty": 3}, 400, "frequency_penalty", "invalid_value", "2"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None, "20"),
    "top_logprobs alone": ({"top_logprobs": 2}, 400, "top_logprobs", None, "logprobs"),
    "n": ({"n": 0}, 400, "n", "invalid_value", "128"),
    "n too large": ({"n": 129}, 400, "n", "invalid_value", "128"),
    "seed": ({"seed": -1}, 400, "seed", "invalid_value", "0"),
    "stop": ({"stop": [""]}, 400, "stop", "invalid_value", "empty"),
    "many stops": ({"stop": ["x"] * 65}, 400, "stop", "invalid_value", "64"),
    "result of no call": (
        {"messages": [*HELLO, CALL, *RESULTS, *HELLO]},
        400,
        "messages[3].tool_call_id",
        "invalid_value",
        "call_2",
    ),
    "many messages": ({"messages": HELLO * 4097}, 422, "messages", "invalid_type", "4096"),
    "logit_bias word": ({"logit_bias": {"cat": 1}}, 400, "logit_bias", "invalid_value", "cat"),
    "logit_bias token": ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "invalid_value", "99999"),
    "timeout": ({"timeout": 0}, 400, "timeout", "invalid_value", "0"),
    "max_pixels": ({"max_pixels": 0}, 400, "max_pixels", "invalid_value", "max_pixels"),
    "stream_options": (
        {"stream": False, "stream_options": {"include_usage": True}},
        400,
        "stream_options",
        None,
        "stream",
    ),
    "tool_choice": ({"tool_choice": "required"}, 400, "tool_choice", None, "tools"),
    "tool without a name": (
        {"tools": [{"type": "function", "function": {}}]},
        400,
        "tools[0]",
        None,
        "name",
    ),
    "response_format": ({"response_format": {"type": "xml"}}, 400, "response_format", None, "xml"),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": OPEN}}},
        400,
        "response_format",
        None,
        "nowhere",
    ),
    "grammar": ({"grammar": {"type": "regex", "value": "("}}, 400, "grammar", None, "regex"),
    "grammar and format": (
        {"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "json_object"}},
        400,
        "response_format",
        None,
        "exclude",
    ),
    "model": ({"model": "gpt-5"}, 404, "model", "model_not_found", "demo, qwen, gpt-4o, default"),
    "no messages": ({"messages": []}, 400, "messages", None, "empty"),
    "role": (
        {"messages": [{"role": "king", "content": "Hi"}]},
        400,
        "messages[0].role",
        None,
        "king",
    ),
    "content": (
        {"messages": [{"role": "user", "content": 5}]},
        400,
        "messages[0].content",
        None,
        "int",
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        400,
        "messages[0].content[0]",
        None,
        "input_audio",
    ),
    "video file": (
        {
            "messages": asking(
                {"type": "video_url", "video_url": {"url": "https://127.0.0.1/a.mp4"}}
            )
        },
        400,
        "messages[0].content[0].video_url",
        None,
        "frames",
    ),
    "no url": (
        {"messages": asking("So", {"type": "image_url", "image_url": {}})},
        400,
        "messages[0].content[1].image_url",
        None,
        "URL",
    ),
    "detail": (
        {"messages": asking(image_url(SMALL, detail="fine"))},
        400,
        "messages[0].content[0].image_url",
        None,
        "fine",
    ),
    "ftp": (
        {"messages": asking(image_url("ftp://127.0.0.1/a.png"))},
        400,
        "messages[0].content[0].image_url",
        None,
        "ftp",
    ),
    "path": (
        {"messages": asking(image_url("/etc/passwd"))},
        400,
        "messages[0].content[0].image_url",
        None,
        "--image-root",
    ),
    "not an image": (
        {"messages": asking(image_url("data:image/png;base64,aGVsbG8="))},
        415,
        "messages[0].content[0].image_url",
        "unsupported_image",
        "image",
    ),
    "too many pixels": (
        {"messages": asking("So", image_url(HUGE))},
        413,
        "messages[0].content[1].image_url",
        "too_large",
        "pixels",
    ),
    "too many pictures": (
        {"messages": asking(*[image_url(SMALL)] * 4)},
        400,
        "messages",
        None,
        "3",
    ),
    "body": ({"user": "x" * 2**20}, 413, None, "too_large", "1,048,576"),
    "type": ({"temperature": "hot"}, 422, "temperature", "invalid_type", "number"),
    "type of a truth": ({"stream": 1}, 422, "stream", "invalid_type", "boolean"),
    "type of an inner field": (
        {"stream": True, "stream_options": {"include_usage": "yes"}},
        422,
        "stream_options.include_usage",
        "invalid_type",
        "boolean",
    ),
    "type of messages": ({"messages": 5}, 422, "messages", "invalid_type", ""),
    "type of a message": ({"messages": ["Hi"]}, 422, "messages", "invalid_type", ""),
    "modalities": ({"modalities": ["text", "audio"]}, 422, "modalities[1]", "invalid_type", "text"),
    "service_tier": ({"service_tier": "flex"}, 422, "service_tier", "invalid_type", "auto"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("streams", [False, True])
def test_refused(client: Any, name: str, streams: bool) -> None:
    fields, status, param, code, words = REFUSED[name]
    asked = {"model": "default", "messages": HELLO, "stream": streams, **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=asked, cast_to=object)
    error = caught.value
    assert error.status_code == status, error
    assert error.param == param
    assert code is None or error.code == code
    assert words in error.body["message"]
    assert error.type == "invalid_request_error"
    assert error.response.headers["x-request-id"]


@pytest.mark.parametrize("result", [RESULTS[0], {"role": "tool", "content": "4"}])
def test_results_of_calls_are_read(client: Any, result: dict[str, Any]) -> None:
    assert ask(client, [*HELLO, CALL, result], max_tokens=1)


def test_other_routes_and_methods(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="/docs"):
        client.embeddings.create(model="default", input="x")
    with pytest.raises(openai.APIStatusError, match="GET") as caught:
        client.get("/chat/completions", cast_to=object)
    assert caught.value.status_code == 405


@pytest.mark.parametrize("name", ["demo", "qwen", "gpt-4o", "default"])
def test_names_of_the_model(client: Any, name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=1)
    assert answer.model == ("demo" if name == "default" else name)
    assert {model.id for model in client.models.list()} >= {"demo", "qwen", "gpt-4o"}
    assert client.models.retrieve(name).root == "demo"
