"""What bodies are read: JSON objects of sane size, depth and numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from guarded import ASK, client_of, code
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.server import body
from qwen3vl_mlx.server.body import parse_object
from qwen3vl_mlx.server.errors import ApiError


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of(max_body_bytes=1000, max_json_depth=8)


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
