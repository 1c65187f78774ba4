"""The docs page: offline, true, and usable in a browser; and what other pages can do there.

Run `python tests/test_server_docs.py` from the repository's root to write the answers that the
page shows anew: after a change of what an answer has, or of the examples.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("fastapi_offline")

import httpx
from clients import until
from fastapi.testclient import TestClient
from live import Live, live_server

from qwen3vl_mlx import Qwen3VL, load
from qwen3vl_mlx.errors import HubError
from qwen3vl_mlx.server.app import create_app
from qwen3vl_mlx.server.docs import ANSWERS, EXAMPLES
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.start import new_serving

pytestmark = pytest.mark.dev
CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
FRIEND, STRANGER = "friend.example", "stranger.example"

SHOWN: dict[str, dict[str, dict[str, Any]]] = json.loads(ANSWERS.read_text(encoding="utf-8"))
READABLE = (  # routes without a body, and what their examples are called
    ("/v1/models", "get", "the demo"),
    ("/v1/models/{name}", "get", "the demo"),
    ("/v1/responses/{response_id}", "get", "a picture"),
    ("/v1/responses/{response_id}", "delete", "a picture"),
    ("/v1/responses/{response_id}/input_items", "get", "a picture"),
    ("/health", "get", "the demo"),
    ("/", "get", "the demo"),
    ("/metrics", "get", "the beginning"),
)
ALL = [*((path, "post", name) for path in EXAMPLES for name in EXAMPLES[path]), *READABLE]
FIRST, LAST = 3, 3  # events of a stream that are shown
LINES = 7  # of /metrics


@contextmanager
def demo_server() -> Iterator[Live]:
    model = load("demo")  # its own: one of the examples requantizes it
    options = ServerOptions(enable_re_isq=True, cors_origins=(f"http://{FRIEND}",))
    with live_server(model, options) as server:
        yield server
    model.close()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with demo_server() as server:
        yield server


def ask(url: str, path: str, method: str, name: str) -> httpx.Response:
    """The answer to an example, or of a route without a body."""
    response_id = ""
    if "{response_id}" in path:
        body = EXAMPLES["/v1/responses"][name]
        response_id = httpx.post(f"{url}/v1/responses", json=body, timeout=60).json()["id"]
    place = url + path.format(response_id=response_id, name="demo")
    body = dict(EXAMPLES[path][name]) if method == "post" else None
    response = httpx.request(method, place, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response


def kind_of(response: httpx.Response) -> str:
    return response.headers["content-type"].partition(";")[0]


def events_of(text: str) -> list[str]:
    """A stream's events, without comments."""
    return [event for event in text.strip().split("\n\n") if not event.startswith(":")]


def shape(value: Any) -> Any:
    """Names and types; a list's by its first element, an event's with its name."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return type(value).__name__


def event_shape(event: str) -> Any:
    told, _, data = event.rpartition("data: ")
    return told, data if data == "[DONE]" else shape(json.loads(data))


@pytest.fixture(scope="module")
def openapi(live: Live) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{live.url}/openapi.json").json()
    return document


def test_the_page_names_nothing_elsewhere(live: Live) -> None:
    page = httpx.get(f"{live.url}/docs").text
    places = re.findall(r"""(?:src|href|url)[=:]\s*["']([^"']+)""", page)
    assert len(places) == 4
    for place in places:
        assert place.startswith("/")
        assert httpx.get(live.url + place).status_code == 200, place


def test_every_route_with_a_body_has_examples(openapi: dict[str, Any]) -> None:
    bodies = {
        path: operation["requestBody"]["content"]["application/json"]["examples"]
        for path, operations in openapi["paths"].items()
        for operation in operations.values()
        if "requestBody" in operation
    }
    assert bodies.keys() == EXAMPLES.keys()
    assert all(bodies.values())


def test_every_operation_shows_answers(openapi: dict[str, Any]) -> None:
    shown: list[tuple[str, str, str]] = []
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            if path != "/v1/responses/{response_id}/cancel":  # always refused
                for content in operation["responses"]["200"]["content"].values():
                    shown += [(path, method, name) for name in content["examples"]]
    assert sorted(shown) == sorted(ALL)


@pytest.mark.parametrize(("path", "method", "name"), ALL)
def test_examples_are_answered_as_shown(live: Live, path: str, method: str, name: str) -> None:
    response = ask(live.url, path, method, name)
    assert "x-qwen3vl-warning" not in response.headers, "no field is unknown"
    shown, kind = SHOWN[path][method][name], kind_of(response)
    if isinstance(shown, dict):
        assert kind == "application/json"
        assert shape(response.json()) == shape(shown)
    elif isinstance(shown, list):
        assert kind == "text/event-stream"
        events = events_of(response.text)
        assert len(events) > FIRST + LAST
        told = [event_shape(event) for event in (*events[:FIRST], *events[-LAST:])]
        assert told == [event_shape(event) for event in shown if not event.startswith(":")]
    else:
        assert kind == "text/plain"
        lines = [line.rpartition(" ")[0] for line in response.text.splitlines()]
        assert lines[:LINES] == [line.rpartition(" ")[0] for line in shown.splitlines()]


def test_the_document_has_mistral_rs_address_too(live: Live, openapi: dict[str, Any]) -> None:
    assert httpx.get(f"{live.url}/api-doc/openapi.json").json() == openapi
    assert "/api-doc/openapi.json" not in openapi["paths"]


def check_schema(
    openapi: dict[str, Any], path: str, method: str, answer: Any, status: int = 200
) -> None:
    schemas = pytest.importorskip("jsonschema_rs")
    content = openapi["paths"][path][method]["responses"][str(status)]["content"]
    assert answer, "there is something to check"
    schemas.validate(content["application/json"]["schema"], answer)


def test_the_answers_shown_fit_their_schemas(openapi: dict[str, Any]) -> None:
    for path, method, name in ALL:
        if isinstance(shown := SHOWN[path][method][name], dict):
            check_schema(openapi, path, method, shown)
            with pytest.raises(ValueError, match="required property"):
                check_schema(openapi, path, method, {"other": 1})


TOLD = {"input": "Hello", "max_output_tokens": 1}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", TOLD),
        ("/v1/responses", {"input": "What colour is the disc?"}),
        (
            "/v1/responses",
            {
                **TOLD,
                "instructions": "Be short.",
                "tools": [{"type": "function", "name": "report", "parameters": {}}],
                "tool_choice": {"type": "function", "name": "report"},
                "metadata": {"a": "b"},
                "user": "somebody",
                "reasoning": {"effort": "none"},
            },
        ),
        ("/v1/chat/completions", {"messages": "Hello", "max_tokens": 1, "n": 2, "logprobs": True}),
        ("/v1/completions", {"prompt": ["A", "B"], "max_tokens": 0, "echo": True}),
        (
            "/v1/messages",
            {
                "model": "demo",
                "max_tokens": 1,
                "messages": [{"role": "user", "content": "Hello"}],
                "thinking": {"type": "disabled"},
            },
        ),
    ],
)
def test_schemas_hold_for_other_answers(
    live: Live, openapi: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    response = httpx.post(live.url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    check_schema(openapi, path, "post", response.json())


def test_schemas_hold_for_an_empty_page(live: Live, openapi: dict[str, Any]) -> None:
    made = httpx.post(f"{live.url}/v1/responses", json=TOLD, timeout=60).json()
    place = f"{live.url}/v1/responses/{made['id']}/input_items"
    last = httpx.get(place).json()["last_id"]
    page = httpx.get(place, params={"after": last}).json()
    assert page["data"] == []
    check_schema(openapi, "/v1/responses/{response_id}/input_items", "get", page)


def test_schemas_hold_without_a_model() -> None:
    def fails() -> Qwen3VL:
        raise HubError("no such model")

    serving = new_serving(fails, "none", ServerOptions())
    client = TestClient(create_app(serving), base_url="http://localhost")
    openapi = client.get("/openapi.json").json()
    serving.host.start()
    try:
        until(lambda: serving.host.status().state == "failed", 10)
        for path, status in (("/v1/models", 200), ("/v1/models/{name}", 200), ("/health", 503)):
            response = client.get(path.format(name="none"))
            assert response.status_code == status
            check_schema(openapi, path, "get", response.json(), status)
    finally:
        serving.host.close()


def test_failures_are_described_as_they_are(live: Live, openapi: dict[str, Any]) -> None:
    schemas = openapi["components"]["schemas"]
    for path, schema in (
        ("/v1/chat/completions", "OpenAIError"),
        ("/v1/messages", "AnthropicError"),
    ):
        content = openapi["paths"][path]["post"]["responses"]["default"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith(schema)
        body = httpx.post(live.url + path, json={"max_tokens": "many"}).json()
        assert body.keys() == set(schemas[schema]["required"])
        assert body["error"].keys() >= set(schemas[schema]["properties"]["error"]["required"])
    assert "HTTPValidationError" not in str(openapi)


@pytest.mark.parametrize("keys", [(), ("one",)])
def test_keys_are_described_where_they_are_asked_for(keys: tuple[str, ...]) -> None:
    options = ServerOptions(api_keys=keys)
    app = create_app(new_serving(lambda: pytest.fail("not needed"), "none", options))
    document = TestClient(app, base_url="http://localhost").get("/openapi.json").json()
    assert ("security" in document) == bool(keys)
    assert ("securitySchemes" in document["components"]) == bool(keys)


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        # Names of other machines lead nowhere, and two to this one: no packet can leave it.
        rules = f"MAP {FRIEND} 127.0.0.1, MAP {STRANGER} 127.0.0.1, MAP * ~NOTFOUND"
        quiet = "quic", "background-networking", "component-update", "sync", "gpu"
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--no-first-run",
                f"--host-resolver-rules={rules}, EXCLUDE 127.0.0.1",
                *(f"--disable-{what}" for what in quiet),
                # Chromium's own guard of this machine, so that ours is tested.
                "--disable-features=LocalNetworkAccessChecks",
            ],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1200, "height": 1600})
    opened.set_default_timeout(20_000)
    yield opened
    opened.close()


@in_browser
def test_examples_are_run_on_the_page(page: Any, live: Live) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{live.url}/docs")
    for method, path, answer in (
        ("post", "/v1/chat/completions", '"chat.completion"'),
        ("post", "/v1/messages", '"end_turn"'),
        ("get", "/metrics", "qwen3vl_model_state"),
    ):
        block = page.locator(f".opblock-{method}", has=page.locator(f'[data-path="{path}"]'))
        block.locator(".opblock-summary-control").click()
        block.locator(".execute").click()
        result = block.locator(".live-responses-table tbody")
        assert result.locator(".response-col_status").first.inner_text().split()[0] == "200"
        assert answer in result.inner_text()
    assert all(url.startswith((live.url, "data:")) for url in asked), asked


FETCH = """async ([url, headers]) => {
    const body = '{"messages": "Hello", "max_tokens": 2, "n": 3}';
    try {
        const response = await fetch(url, {method: 'POST', headers, body});
        return [response.status, (await response.json()).error?.code ?? null];
    } catch (error) { return [0, null]; }
}"""


@in_browser
@pytest.mark.parametrize(
    ("origin", "kind", "status"),
    [
        (FRIEND, "application/json", 200),
        (FRIEND, "text/plain", 415),
        (STRANGER, "application/json", 0),
        (STRANGER, "text/plain", 0),
    ],
)
def test_only_pages_of_named_origins_ask(
    page: Any, live: Live, origin: str, kind: str, status: int
) -> None:
    counts = live.serving.metrics.registry.get_sample_value
    before = counts("qwen3vl_answers_total", {"finish_reason": "length"}) or 0
    page.route("**/page", lambda route: route.fulfill(body="a page", content_type="text/html"))
    page.goto(f"http://{origin}/page")
    url = f"{live.url}/v1/chat/completions"
    assert page.evaluate(FETCH, [url, {"content-type": kind}])[0] == status
    after = counts("qwen3vl_answers_total", {"finish_reason": "length"}) or 0
    assert (after > before) == (status == 200), "nothing is computed for strangers either"


@in_browser
def test_a_page_whose_name_is_bent_to_this_machine_reads_nothing(page: Any, live: Live) -> None:
    port = live.url.rpartition(":")[2]
    response = page.goto(f"http://{STRANGER}:{port}/v1/models")
    assert response.status == 403
    assert "host_not_allowed" in response.text()
    assert page.evaluate(FETCH, ["/v1/chat/completions", {"content-type": "application/json"}]) == [
        403,
        "host_not_allowed",
    ]


def write_answers() -> None:
    """Write what the demo answers now."""
    answers: dict[str, Any] = {}
    with demo_server() as live:
        for path, method, name in ALL:
            response = ask(live.url, path, method, name)
            kind, told = kind_of(response), answers.setdefault(path, {}).setdefault(method, {})
            if kind == "application/json":
                told[name] = rounded(response.text)
            elif kind == "text/event-stream":
                events = [
                    event if event.endswith("[DONE]") else f"{head}{json.dumps(rounded(data))}"
                    for event in events_of(response.text)
                    for head, data in [re.split(r"(?<=data: )", event, maxsplit=1)]
                ]
                told[name] = [*events[:FIRST], ": and so on", *events[-LAST:]]
            else:
                told[name] = "".join(response.text.splitlines(keepends=True)[:LINES])
    ANSWERS.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


def rounded(text: str) -> Any:
    """JSON with times that are easily read."""
    return json.loads(text, parse_float=lambda number: round(float(number), 3))


if __name__ == "__main__":
    write_answers()
