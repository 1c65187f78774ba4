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
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import at_rest, memory, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import Live, live_server
from shapes import BAD, GOOD, JSON, MESSAGES, VALUES, mostly

from qwen3vl_mlx import load
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.server.chat_fields import ChatFields
from qwen3vl_mlx.server.options import ServerOptions

schemathesis = pytest.importorskip("schemathesis")

pytestmark = [
    pytest.mark.dev,
    pytest.mark.filterwarnings("ignore:Corrupt EXIF data"),  # Pillow's, of a bad TIFF
]

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


@pytest.fixture(scope="module", autouse=True)
def _no_network() -> Iterator[None]:
    """Nobody is reached by name: what is drawn could be somebody's."""
    resolve = socket.getaddrinfo

    def resolve_this_machine(host: Any, *rest: Any, **options: Any) -> Any:
        if host != "127.0.0.1":
            raise socket.gaierror("not in tests")
        return resolve(host, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve_this_machine)
        yield


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The demo checkpoint with a small context. Afterwards it rests, and memory is as it was."""
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
        if EXAMPLES:  # shown with pytest -s
            print(*(line for line in text.splitlines() if "http_requests_total" in line), sep="\n")
    model.close()


HELLO = {"model": "default", "messages": "Hello", "max_tokens": 2}


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
        assert set(error) >= {"type", "message"}
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


RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("label", "mode"),
    [*((label, RIGHT) for label in OPERATIONS), *((f"POST {path}", WRONG) for path in POSTS)],
)
def test_by_the_document(live: Live, operations: dict[str, Any], label: str, mode: Any) -> None:
    operation = operations[label]

    @fuzzed(6)
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call(base_url=live.url, timeout=SLOWEST)
        check_answer(operation.path, response.status_code, response.text)

    ask()


# By hand: nearly right

BODY_OF = {
    "/v1/chat/completions": lambda messages: {"messages": messages},
    "/v1/completions": lambda messages: {"prompt": json.dumps(messages, default=str)[:99]},
    "/v1/responses": lambda messages: {"input": messages, "max_tokens": None},
    "/v1/messages": lambda messages: {"messages": messages},
    "/v1/messages/count_tokens": lambda messages: {"messages": messages, "max_tokens": None},
    "/tokenize": lambda messages: {"messages": messages, "max_tokens": None},
}


@fuzzed(150)
@given(
    path=st.sampled_from(sorted(BODY_OF)),
    messages=mostly(st.lists(MESSAGES, min_size=1, max_size=3)),
    names=st.lists(st.sampled_from(sorted(VALUES)), max_size=3, unique=True),
    data=st.data(),
)
def test_messages(
    live: Live, path: str, messages: Any, names: list[str], data: st.DataObject
) -> None:
    fields = {name: data.draw(mostly(VALUES[name]), name) for name in names}
    body = {"model": "default", "max_tokens": 5, **fields, **BODY_OF[path](messages)}
    post(live, path, {name: value for name, value in body.items() if value is not None})


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
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "model": "demo"}


PICTURE_ROUTES = {
    "/v1/chat/completions": chat,
    "/v1/messages": anthropic,
    "/v1/responses": lambda uri: {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": uri}]}]
    },
    "/tokenize": chat,
    "/v1/images/tokens": lambda uri: {"images": [{"image_url": uri}]},
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_pictures(live: Live, name: str) -> None:
    uri = "data:image/png;base64," + base64.b64encode(BAD[name]).decode()
    for path, body in PICTURE_ROUTES.items():
        status, text = post(live, path, body(uri))
        assert status in (400, 413, 415), text
    assert post(live, "/v1/images/tokens", {"images": [{"image_url": GOOD}]})[0] == 200


def test_unreadable_places(live: Live, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    for place in (fifo, tmp_path, tmp_path / "nothing.png", "/dev/zero", "/proc/self/environ"):
        status, text = post(live, "/v1/chat/completions", chat(str(place)))
        assert status == 400
        assert "root" in text
