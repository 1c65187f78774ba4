"""Who may ask a server, what it reads, and that it refuses in the words of each API."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NoReturn

import pytest

pytest.importorskip("fastapi")

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from qwen3vl_mlx.errors import CheckpointError
from qwen3vl_mlx.server import body
from qwen3vl_mlx.server.app import create_app
from qwen3vl_mlx.server.body import JsonRoute, parse_object
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.start import new_serving

ASK = {"host": "localhost:1234", "content-type": "application/json"}
OURS = "http://localhost:1234"
FRIEND = "https://friend.example"
STRANGER = "https://stranger.example"
KEY = "clé-1"  # keys may be more than ASCII
KEYS = (KEY, "second")


def app_of(**options: Any) -> FastAPI:
    """The real application without a model, and routes that say what reaches them."""

    def load() -> NoReturn:
        raise CheckpointError("no test asks for it")

    app = create_app(new_serving(load, "none", ServerOptions(**options)))
    router = APIRouter(route_class=JsonRoute)

    @router.post("/echo")
    @router.post("/v1/messages/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @router.get("/echo")
    @router.delete("/echo/{name}")
    async def empty() -> dict[str, Any]:
        return {}

    @router.get("/fail")
    async def fail() -> None:
        raise RuntimeError("/home/someone/secret")

    router.add_route("/lingers", Lingering(), methods=["GET"])
    app.include_router(router)
    return app


class Lingering:
    """An answer that waits, when it is complete, until the server says that nobody listens."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({})(scope, receive, send)
        while (await receive())["type"] != "http.disconnect":
            pass


def client_of(**options: Any) -> TestClient:
    return TestClient(app_of(**options), base_url=OURS, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of(max_body_bytes=1000, max_json_depth=8)


@pytest.fixture(scope="module")
def locked() -> TestClient:
    return client_of(api_keys=KEYS, cors_origins=(FRIEND,))


def code(response: Any) -> str | None:
    """The code of a refusal in OpenAI's shape; None for an answer."""
    if response.status_code < 400:
        return None
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error["code"]


# Hosts and origins


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST.:1234", True),
        ("127.0.0.1:1234", True),
        ("192.168.7.1", True),
        ("[::1]:1234", True),
        ("mac.local", True),
        ("stranger.example", False),
        ("localhost.stranger.example", False),
        ("127.0.0.1.stranger.example", False),
        ("mac.local.stranger.example", False),
        ("stranger.example@127.0.0.1", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_only_own_names_are_answered(host: str, allowed: bool) -> None:
    client = client_of(allowed_hosts=("mac.local",))
    for path in ("/echo", "/docs", "/docs/files/swagger-ui.css"):
        response = client.get(path, headers={"host": host})
        assert code(response) == (None if allowed else "host_not_allowed")


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, None),
        (OURS, None),
        ("https://localhost:1234", None),
        (FRIEND, None),
        (STRANGER, "origin_not_allowed"),
        ("http://localhost:3000", "origin_not_allowed"),  # another server's page
        ("http://localhost", "origin_not_allowed"),
        ("null", "origin_not_allowed"),  # a file, or a page in a sandbox
        ("http://[", "origin_not_allowed"),
        (FRIEND + ".example", "origin_not_allowed"),
    ],
)
def test_pages_of_others_send_nothing(origin: str | None, expected: str | None) -> None:
    client = client_of(cors_origins=(FRIEND + "/",))
    headers = {} if origin is None else {"origin": origin}
    assert code(client.post("/echo", json={}, headers=headers)) == expected
    assert code(client.delete("/echo/x", headers=headers)) == expected


def test_all_origins_where_asked_for() -> None:
    response = client_of(cors_origins=("*",)).post("/echo", json={}, headers={"origin": STRANGER})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"


def preflight(client: TestClient, origin: str) -> Any:
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    return client.options("/echo", headers=asked)


def test_only_named_origins_may_read(locked: TestClient) -> None:
    allowed = preflight(locked, FRIEND)
    assert allowed.status_code == 200, "a preflight carries no key"
    assert allowed.headers["access-control-allow-origin"] == FRIEND
    assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
    refused = locked.post("/echo", json={}, headers={"origin": FRIEND})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == FRIEND, "its page may read why"
    assert "access-control-allow-origin" not in preflight(locked, STRANGER).headers
    asked = locked.get("/health", headers={"origin": STRANGER})
    assert "access-control-allow-origin" not in asked.headers


def test_no_origin_may_read_by_default(client: TestClient) -> None:
    for response in (preflight(client, FRIEND), client.get("/echo", headers={"origin": FRIEND})):
        assert not [name for name in response.headers if name.startswith("access-control")]


# Keys


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, False),
        ({"authorization": f"Bearer {KEY}"}, True),
        ({"authorization": f"bearer  {KEY}"}, True),
        ({"authorization": "Bearer second"}, True),
        ({"x-api-key": "second"}, True),
        ({"authorization": "Bearer wrong", "x-api-key": KEY}, True),
        ({"authorization": f"Basic {KEY}"}, False),
        ({"authorization": KEY}, False),
        ({"authorization": "Bearer"}, False),
        ({"authorization": "Bearer "}, False),
        ({"x-api-key": ""}, False),
        ({"x-api-key": KEY + "x"}, False),
        ({"x-api-key": "clé"}, False),
        ({"x-api-key": "SECOND"}, False),
    ],
)
def test_keys(locked: TestClient, headers: dict[str, str], allowed: bool) -> None:
    raw = {name: value.encode() for name, value in headers.items()}
    for path in ("/echo", "/metrics", "/v1/models", "/nowhere"):
        response = locked.get(path, headers=raw)
        assert (response.status_code != 401) == allowed, path
        if not allowed:
            assert code(response) == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text


def test_a_missing_key_is_told_from_a_wrong_one(locked: TestClient) -> None:
    assert "needs an API key" in locked.get("/echo").text
    assert "wrong API key" in locked.get("/echo", headers={"x-api-key": "wrong"}).text


def test_what_is_open_without_a_key(locked: TestClient) -> None:
    described = ("/docs", "/openapi.json", "/api-doc/openapi.json", "/docs/files/swagger-ui.css")
    for path in ("/health", "/", *described):
        assert locked.get(path).status_code != 401, path
    for path in ("/docsx", "/health/x", "/HEALTH", "/docs%2e/echo"):
        assert locked.get(path).status_code == 401, path
    assert locked.get("/docs/%2e%2e/echo").status_code == 404


def test_a_key_is_not_asked_for_by_default(client: TestClient) -> None:
    assert client.get("/echo").status_code == 200
    assert client.get("/echo", headers={"authorization": "Bearer foobar"}).status_code == 200


def test_refusals_have_the_shape_of_their_api(locked: TestClient) -> None:
    body = locked.post("/v1/messages/echo", json={}).json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "authentication_error"
    assert locked.post("/echo", json={}).json()["error"]["type"] == "authentication_error"


# Bodies

KINDS = [
    ("application/json", None),
    ("application/json; charset=utf-8", None),
    ("APPLICATION/JSON", None),
    ("text/plain", "unsupported_content_type"),
    ("application/x-www-form-urlencoded", "unsupported_content_type"),
    ("multipart/form-data; boundary=x", "unsupported_content_type"),
    ("text/plain; application/json", "unsupported_content_type"),
    ("", "unsupported_content_type"),
]


@pytest.mark.parametrize(("kind", "expected"), KINDS)
def test_only_json_is_read(client: TestClient, kind: str, expected: str | None) -> None:
    """A page of another origin may send all other kinds without asking first."""
    response = client.post("/echo", content=b'{"a": 1}', headers={"content-type": kind})
    assert code(response) == expected
    assert response.status_code == (415 if expected else 200)


def test_compressed_bodies_are_refused(client: TestClient) -> None:
    headers = {**ASK, "content-encoding": "gzip"}
    response = client.post("/echo", content=b"\x1f\x8b", headers=headers)
    assert (response.status_code, code(response)) == (415, "unsupported_encoding")


BODIES = [
    (b"", 400, "invalid_json"),
    (b" ", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b"{'a': 1}", 400, "invalid_json"),
    (b'{"a": 1} {}', 400, "invalid_json"),
    (b'{"a": NaN}', 400, "invalid_json"),
    (b'{"a": -Infinity}', 400, "invalid_json"),
    (b'{"a": 1e999}', 400, "invalid_value"),
    (b'{"a": [-1e999]}', 400, "invalid_value"),
    (b'{"a": 18446744073709551616}', 400, "invalid_value"),
    (b'{"a": {"b": -18446744073709551616}}', 400, "invalid_value"),
    (b'{"a": ' + b"9" * 900 + b"}", 400, "invalid_value"),
    (b'{"a": "\\ud800"}', 400, "invalid_json"),
    (b'{"\\udc00": 1}', 400, "invalid_json"),
    (b'{"a": "\xff"}', 400, "invalid_json"),
    ('{"a": 1}'.encode("utf-16"), 400, "invalid_json"),
    (b'{"a": ' + b"[" * 8 + b"]" * 8 + b"}", 400, "too_deep"),
    (b'{"a": ' + b'{"a":' * 8 + b"1" + b"}" * 9, 400, "too_deep"),
    (b"[" * 999, 400, "invalid_json"),
    (b"[1]", 422, "invalid_type"),
    (b'"text"', 422, "invalid_type"),
    (b"1", 422, "invalid_type"),
    (b"null", 422, "invalid_type"),
    (b"true", 422, "invalid_type"),
    (b'{"a": "' + b"x" * 1000 + b'"}', 413, "too_large"),
]


@pytest.mark.parametrize(("body", "status", "expected"), BODIES, ids=range(len(BODIES)))
def test_bodies_refused(client: TestClient, body: bytes, status: int, expected: str) -> None:
    response = client.post("/echo", content=body, headers=ASK)
    assert (response.status_code, code(response)) == (status, expected)
    assert len(response.content) < 500
    assert response.content.isascii()


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": "\\ud83d\\ude00 é\\u0000", "": null}'.encode(),
        b'{"a": 18446744073709551615, "b": -1e308, "c": true}',
        b'{"a": ' + b"[" * 7 + b"]" * 7 + b"}",
    ],
)
def test_bodies_read(client: TestClient, body: bytes) -> None:
    response = client.post("/echo", content=body, headers=ASK)
    assert response.status_code == 200
    assert response.json() == json.loads(body.decode("utf-8-sig"))


def test_nesting_of_any_depth_is_refused() -> None:
    for depth in (100, 300, 100_000):
        with pytest.raises(ApiError) as caught:
            parse_object(b'{"a":' * depth + b"1" + b"}" * depth, max_depth=64)
        assert caught.value.status == 400


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b'{"a": [' + b"0," * 600_000 + b"1]}", "500,000 values"),
        (b'{"a": [' + b"[]," * 60_000 + b"1]}", "50,000 objects"),
        (b'{"a": [' + b'{"b": {}},' * 30_000 + b"1]}", "50,000 objects"),
        (b"{" + b",".join(b'"%d": 1' % at for at in range(10_001)) + b"}", "10,000 names"),
    ],
)
def test_many_small_values_are_refused(sent: bytes, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        parse_object(sent, max_depth=64)
    assert caught.value.status == 413


def test_long_bodies_are_read_like_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_LARGE", 10)
    client = client_of()
    assert client.post("/echo", json={"a": "long" * 20}).json() == {"a": "long" * 20}
    refused = client.post("/echo", content=b'{"a": nothing at all}', headers=ASK)
    assert (refused.status_code, code(refused)) == (400, "invalid_json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(VALUES | st.binary())
def test_every_body_is_read_as_json_does_or_refused(value: Any) -> None:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    outcome = read(body)
    if isinstance(outcome, ApiError):
        assert outcome.status in (400, 422)
        assert outcome.text.isascii()
    else:
        assert json.dumps(outcome) == json.dumps(json.loads(body.decode("utf-8-sig")))


def read(body: bytes) -> dict[str, Any] | ApiError:
    try:
        return parse_object(body, max_depth=8)
    except ApiError as error:
        return error


# What every answer carries


def test_request_ids(client: TestClient) -> None:
    assert client.get("/echo", headers={"x-request-id": "my-1"}).headers["x-request-id"] == "my-1"
    made = {client.get("/echo").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    for strange in ("", "a b", "é", "x" * 129, "a\r\nset-cookie: b"):
        raw = {"x-request-id": strange.encode()}
        assert client.get("/echo", headers=raw).headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/echo", 200),
        ("GET", "/nowhere", 404),
        ("PUT", "/echo", 405),
        ("POST", "/echo", 400),
        ("GET", "/fail", 500),
    ],
)
def test_headers_of_every_answer(client: TestClient, method: str, path: str, status: int) -> None:
    headers = {"content-type": "application/json"} if method == "PUT" else {}
    response = client.request(method, path, headers=headers)
    assert response.status_code == status
    assert response.headers["x-request-id"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert (status == 200) == ("error" not in response.json())


def test_inner_failures_say_nothing_of_this_machine(client: TestClient) -> None:
    response = client.get("/fail")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert code(response) == "internal_error"


# On a real connection


@contextmanager
def listening(app: FastAPI) -> Iterator[int]:
    """The port on which a server answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return app_of(max_body_bytes=200_000)


@pytest.fixture(scope="module")
def port(app: FastAPI) -> Iterator[int]:
    with listening(app) as number:
        yield number


@pytest.fixture
def connect(port: int) -> Iterator[Callable[[], socket.socket]]:
    opened: list[socket.socket] = []

    def connected() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        return opened[-1]

    yield connected
    for each in opened:
        each.close()


def read_reply(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of one answer that says its length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
        assert data, "the connection was closed without an answer"
    head, _, body = data.partition(b"\r\n\r\n")
    lines = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
    while len(body) < int(lines[b"content-length"]):
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)


def head_of(*lines: str) -> bytes:
    first = ("POST /echo HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*first, *lines, "", ""]).encode()


def test_a_body_announced_too_long_is_refused_before_it_is_sent(
    connect: Callable[[], socket.socket],
) -> None:
    connection = connect()
    connection.sendall(head_of("Content-Length: 200001", "Expect: 100-continue"))
    assert read_reply(connection)[0] == 413


def test_a_body_that_is_sent_all_the_same_leaves_the_connection_usable(
    connect: Callable[[], socket.socket],
) -> None:
    connection = connect()
    connection.sendall(head_of("Content-Length: 5000000"))
    connection.sendall(bytes(5_000_000))
    assert read_reply(connection)[0] == 413
    connection.sendall(head_of("Content-Length: 8") + b'{"a": 1}')
    assert read_reply(connection) == (200, {"a": 1})


def test_a_body_of_unknown_length_is_counted(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(head_of("Transfer-Encoding: chunked"))
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    for _ in range(60):
        connection.sendall(chunk)
    assert read_reply(connection)[0] == 413
    connection.sendall(b"0\r\n\r\n" + head_of("Content-Length: 8") + b'{"a": 1}')
    assert read_reply(connection) == (200, {"a": 1})


def test_a_body_of_exactly_the_limit_is_read(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    body = b'{"a": 1}'.ljust(200_000)
    connection.sendall(head_of(f"Content-Length: {len(body)}") + body)
    assert read_reply(connection) == (200, {"a": 1})


def test_clients_that_leave_while_they_send_harm_nobody(
    connect: Callable[[], socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        with closing(connect()) as connection:
            connection.sendall(head_of("Content-Length: 100") + b'{"a"')
    time.sleep(0.1)
    connection = connect()
    connection.sendall(head_of("Content-Length: 8") + b'{"a": 1}')
    assert read_reply(connection) == (200, {"a": 1})
    assert not caplog.records, "not a failure of ours"


def test_a_complete_answer_is_no_disconnect(
    app: FastAPI, connect: Callable[[], socket.socket]
) -> None:
    count = app.state.serving.metrics.registry.get_sample_value
    before = count("qwen3vl_client_disconnects_total")
    connection = connect()
    connection.sendall(b"GET /lingers HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert read_reply(connection) == (200, {})
    labels = {"route": "other", "status": "200"}
    deadline = time.monotonic() + 10
    while not count("qwen3vl_http_requests_total", labels):
        assert time.monotonic() < deadline
    assert count("qwen3vl_client_disconnects_total") == before
