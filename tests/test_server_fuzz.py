"""Whatever is sent, the server answers in its own words, soon, and is at rest afterwards.

FUZZ_EXAMPLES is how many examples each test draws, anew each time; without it they are few, and
the same ones.
"""

from __future__ import annotations

import base64
import gc
import http.client
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import at_rest, data_uri, memory, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import Live, live_server
from malformed import malformed

from qwen3vl_mlx import load
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.server.chat_fields import ChatFields
from qwen3vl_mlx.server.options import ServerOptions

schemathesis = pytest.importorskip("schemathesis")

CONTEXT = 160  # tokens: no answer is long
SLOWEST = 20  # seconds of one answer, on a machine that does much else
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))

POSTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/images/tokens",
    "/re_isq",
)
OPERATIONS = (
    *(f"POST {path}" for path in POSTS),
    "GET /v1/responses/{response_id}",
    "DELETE /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "GET /v1/responses/{response_id}/input_items",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /",
    "GET /metrics",
)


def fuzzed(few: int) -> Any:
    """Settings of a test: so many examples where nobody asks for more."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The demo checkpoint with a small context. At the end it is at rest, and memory is as it was."""
    folder = tmp_path_factory.mktemp("fuzz") / "demo"
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    with live_server(model, ServerOptions(max_body_bytes=2**20, max_json_depth=32)) as live:
        assert post(live, "/v1/chat/completions", HELLO)[0] == 200
        before = memory(live)
        yield live
        until(lambda: at_rest(live), 5)
        gc.collect()
        assert memory(live) <= before + 2**20
        status, text = exchange(live, "GET", "/metrics", b"")
        assert status == 200
        for gauge in ("http_requests_in_flight", "answers_in_flight"):
            assert f"qwen3vl_{gauge} {'1' if gauge.startswith('http') else '0'}.0\n" in text
        assert model.engine.stats.load.failed == 0
    model.close()


HELLO = {"messages": "Hello", "max_tokens": 2}


def exchange(live: Live, method: str, path: str, body: bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=SLOWEST)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def post(live: Live, path: str, body: bytes | dict[str, Any]) -> tuple[int, str]:
    """Send it; the status, and the answer's text, which is checked."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, text = exchange(live, "POST", path, data)
    check_answer(path, status, text)
    return status, text


def check_answer(path: str, status: int, text: str) -> None:
    assert status < 500, text
    assert "Traceback" not in text
    assert "qwen3vl_mlx/" not in text
    if status < 400:
        return
    error = json.loads(text)["error"]
    if path.startswith("/v1/messages"):
        assert json.loads(text)["type"] == "error"
        assert set(error) == {"type", "message"}
    else:
        assert set(error) == {"type", "message", "param", "code"}
        assert error["param"] is None or isinstance(error["param"], str)
    assert 0 < len(error["message"]) < 1100
    assert isinstance(error["type"], str)


# By the document


@pytest.fixture(scope="module")
def document(live: Live) -> Any:
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


@pytest.fixture(scope="module")
def operations(document: Any) -> dict[str, Any]:
    found = (result.ok() for result in document.get_all_operations())
    return {operation.label: operation for operation in found}


def test_the_document_has_all_operations(operations: dict[str, Any]) -> None:
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("label", OPERATIONS)
def test_by_the_document(live: Live, operations: dict[str, Any], label: str, mode: Any) -> None:
    operation = operations[label]
    if mode.is_negative and not (operation.body or operation.path_parameters):
        pytest.skip("there is nothing to get wrong")

    @fuzzed(6)
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call(base_url=live.url, timeout=SLOWEST)
        check_answer(operation.path, response.status_code, response.text)

    ask()


# By hand: nearly right

GOOD = data_uri(np.zeros((64, 96, 3), np.uint8))
BAD = malformed()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any] = JSON) -> Any:
    return st.integers(0, 9).flatmap(lambda draw: bad if draw == 9 else good)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


WORDS = st.sampled_from(
    ["Hello", "", " ", "<|im_end|>", "<|image_pad|>", "<think>", "\x00", "é", "😀", "a" * 300]
)
SOURCES = mostly(
    st.just(GOOD),
    st.sampled_from(
        [
            *(f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in BAD.values()),
            "",
            "data:",
            "data:image/png;base64",
            "data:image/png;base64,%%%",
            "data:text/plain,hello",
            "data:image/png;base64," + "A" * 999,
            "/etc/passwd",
            "~root/.ssh/id_rsa",
            "../../x.png",
            "a\x00b.png",
            "file:///etc/passwd",
            "file://host/etc/passwd",
            "http://127.0.0.1:9/a.png",
            "http://[::1]:9/a.png",
            "http://[",
            "http://localhost/a.png",
            "https://127.0.0.1/a.png",
            "ftp://127.0.0.1/a.png",
            "x" * 5000,
        ]
    )
    | JSON,
)
PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, mostly(WORDS)),
    st.builds(lambda text: {"type": "input_text", "text": text}, WORDS),
    st.builds(
        lambda url, fields: {"type": "image_url", "image_url": {"url": url, **fields}},
        SOURCES,
        optional(
            detail=mostly(st.sampled_from(["low", "high", "auto"])),
            max_pixels=mostly(st.integers(1, 50000)),
            min_pixels=mostly(st.integers(1, 50000)),
        ),
    ),
    st.builds(lambda url: {"type": "input_image", "image_url": url}, SOURCES),
    st.builds(lambda url: {"image": url, "max_pixels": 9999}, SOURCES),
    st.builds(
        lambda frames, fps: {"type": "video", "video": frames, "fps": fps},
        mostly(st.lists(SOURCES, min_size=1, max_size=3)),
        mostly(st.sampled_from([1, 2, 0.5])),
    ),
    st.builds(
        lambda kind, data: {
            "type": "image",
            "source": {"type": kind, "media_type": "image/png", "data": data, "url": data},
        },
        st.sampled_from(["base64", "url", "file"]),
        SOURCES,
    ),
    st.sampled_from(
        [
            {"type": "tool_use", "id": "call_1", "name": "f", "input": {}},
            {"type": "tool_result", "tool_use_id": "call_1", "content": "So."},
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"type": "refusal", "refusal": "No."},
        ]
    ),
    JSON,
)
CALLS = st.lists(
    st.builds(
        lambda name, arguments: {
            "id": "call_1",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        },
        mostly(st.just("f")),
        mostly(st.sampled_from(["{}", {}, "{", "[]", '{"x": NaN}'])),
    ),
    max_size=2,
)
MESSAGES = st.builds(
    lambda role, content, rest: {"role": role, "content": content, **rest},
    mostly(st.sampled_from(["user", "user", "user", "assistant", "tool", "system", "developer"])),
    mostly(WORDS | st.lists(PARTS, max_size=4)),
    optional(
        tool_calls=mostly(CALLS),
        tool_call_id=mostly(st.just("call_1")),
        reasoning_content=mostly(WORDS),
        name=mostly(WORDS),
        type=st.just("message"),
    ),
)
SCHEMAS = st.sampled_from(
    [
        {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]},
        {"$ref": "#"},
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(a*)*b{1,9999}"},
        {"type": "array", "minItems": 10**9},
        {"allOf": [{"type": "string"}, {"type": "number"}]},
        {"const": "\x00"},
        {},
    ]
)
TOOLS = st.lists(
    st.builds(
        lambda name, schema, strict: {
            "type": "function",
            "name": name,
            "input_schema": schema,
            "function": {"name": name, "parameters": schema, "strict": strict},
        },
        mostly(st.sampled_from(["f", "g", "", "f g"])),
        mostly(SCHEMAS),
        mostly(st.booleans()),
    ),
    max_size=3,
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(-1, 9),
    "max_completion_tokens": st.integers(-1, 9),
    "n": st.integers(-1, 3),
    "temperature": st.sampled_from([0, 1, 1e-9, 1e300, -1, 5e-324]),
    "top_p": st.sampled_from([0, 0.5, 1, 5e-324, -0.0]),
    "top_k": st.integers(-1, 2000),
    "stop": st.lists(WORDS, max_size=5) | WORDS,
    "seed": st.integers(-1, 2**64),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(-1, 21),
    "logit_bias": st.dictionaries(
        st.sampled_from(["5", "1000", "2000", "-1", "x", "٣"]), st.sampled_from([0, 100, -1e308])
    ),
    "tools": TOOLS,
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]
    ),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}])
    | SCHEMAS.map(lambda s: {"type": "json_schema", "json_schema": {"name": "x", "schema": s}}),
    "grammar": st.builds(
        lambda kind, value: {"type": kind, "value": value},
        st.sampled_from(["regex", "lark", "json_schema", "llguidance"]),
        st.sampled_from(["a|b", "(", "start: start", "start: /(a*)*/", "{}", '{"grammars": []}'])
        | SCHEMAS,
    ),
    "timeout": st.sampled_from([1e-9, 0.01, 5, -1, 1e308]),
    "stream": st.booleans(),
    "min_pixels": st.integers(-1, 2**40),
    "max_pixels": st.integers(-1, 2**40) | st.just("full"),
    "truncate_sequence": st.booleans(),
    "dry_multiplier": st.sampled_from([0, 1, 1e300]),
    "dry_sequence_breakers": st.lists(WORDS, max_size=3),
    "user": WORDS,
}
FIELDS = optional(
    **{name: mostly(VALUES.get(name, JSON)) for name in sorted({*ChatFields.model_fields, *VALUES})}
)


@fuzzed(150)
@given(
    path=st.sampled_from(POSTS[:6]),
    messages=mostly(st.lists(MESSAGES, min_size=1, max_size=4)),
    fields=st.dictionaries(st.sampled_from(sorted(VALUES)), st.none(), max_size=4),
    data=st.data(),
)
def test_messages(
    live: Live, path: str, messages: Any, fields: dict[str, None], data: st.DataObject
) -> None:
    drawn = {name: data.draw(mostly(VALUES[name]), name) for name in fields}
    body = {"max_tokens": 5, **drawn, **dict.fromkeys(("messages", "input", "prompt"), messages)}
    if path != "/v1/responses":
        del body["input"]
    if path != "/v1/completions":
        del body["prompt"]
    post(live, path, body)


@fuzzed(60)
@given(st.dictionaries(st.sampled_from(sorted(ChatFields.model_fields)), JSON, max_size=5))
def test_fields(live: Live, fields: dict[str, Any]) -> None:
    post(live, "/v1/chat/completions", {**HELLO, **fields})


# By hand: nowhere near

BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"5",
    b'{"messages": "Hello", "max_tokens": NaN}',
    b'{"messages": "Hello", "temperature": 1e999}',
    b'{"messages": "\\ud800"}',
    b'{"messages": "\xff\xfe"}',
    b'\xef\xbb\xbf{"messages": ""}',
    b'{"messages": "Hello", "seed": ' + b"9" * 5000 + b"}",
    b'{"messages": "Hello", "messages": []}',
    b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    b"[" * 50000,
    b'{"messages": [' + b"{}," * 9999 + b"{}]}",
    b'{"' + b"x" * 9999 + b'": 1, "messages": "Hello", "max_tokens": 1}',
    b"{" + b",".join(b'"k%d": 1' % n for n in range(9999)) + b"}",
    b"x" * (2**20 + 1),
)


@pytest.mark.parametrize("path", POSTS)
def test_bodies(live: Live, path: str) -> None:
    for body in BODIES:
        post(live, path, body)
    assert post(live, "/v1/chat/completions", HELLO)[0] == 200


@fuzzed(40)
@given(
    path=st.sampled_from(POSTS),
    body=st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.integers(1, 60).map(lambda cut: json.dumps(HELLO).encode()[:cut]),
)
def test_bytes(live: Live, path: str, body: bytes) -> None:
    post(live, path, body)


@fuzzed(30)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "FOO"]),
    path=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12)
    | st.sampled_from(["v1/models/%00", "v1/models/..%2f..", "v1/responses/%ff", "docs/../x"]),
)
def test_paths(live: Live, method: str, path: str) -> None:
    status, text = exchange(live, method, f"/{path}", b"{}")
    if method == "HEAD" or status < 400:
        assert status < 500
    else:
        check_answer(f"/{path}", status, text)


# Pictures that are none


def chat(uri: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": uri}]}]}


def anthropic(uri: str) -> dict[str, Any]:
    data = uri.partition(",")[2]
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1}


PICTURE_ROUTES = {
    "/v1/chat/completions": chat,
    "/v1/messages": anthropic,
    "/v1/responses": lambda uri: {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": uri}]}]
    },
    "/tokenize": chat,
    "/v1/images/tokens": lambda uri: {"images": [uri]},
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_pictures(live: Live, name: str) -> None:
    uri = "data:image/png;base64," + base64.b64encode(BAD[name]).decode()
    for path, body in PICTURE_ROUTES.items():
        status, text = post(live, path, body(uri))
        assert status in (400, 413, 415), text
    assert post(live, "/v1/images/tokens", {"images": [GOOD]})[0] == 200


def test_unreadable_places(live: Live, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    for place in (fifo, tmp_path, tmp_path / "nothing.png", "/dev/zero", "/proc/self/environ"):
        status, text = post(live, "/v1/chat/completions", chat(str(place)))
        assert status == 400
        assert "root" in text
