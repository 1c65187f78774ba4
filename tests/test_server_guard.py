"""Who may ask a server, from where, and what every answer carries."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from guarded import FRIEND, KEY, KEYS, OURS, STRANGER, client_of, code


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of(max_body_bytes=1000, max_json_depth=8)


@pytest.fixture(scope="module")
def locked() -> TestClient:
    return client_of(api_keys=KEYS, cors_origins=(FRIEND,))


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
