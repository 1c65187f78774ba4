"""The docs page: offline, true, and usable in a browser; and what other pages can do there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("fastapi_offline")

import httpx
from fastapi.testclient import TestClient
from live import Live, live_server

from qwen3vl_mlx import load
from qwen3vl_mlx.server.app import create_app
from qwen3vl_mlx.server.docs import EXAMPLES
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.start import new_serving

CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
FRIEND, STRANGER = "friend.example", "stranger.example"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    model = load("demo")  # its own: one of the examples requantizes it
    options = ServerOptions(enable_re_isq=True, cors_origins=(f"http://{FRIEND}",))
    with live_server(model, options) as server:
        yield server
    model.close()


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


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, named in EXAMPLES.items() for name in named]
)
def test_examples_run_as_they_are(live: Live, path: str, name: str) -> None:
    body = dict(EXAMPLES[path][name])
    response = httpx.post(live.url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert "x-qwen3vl-warning" not in response.headers, "no field is unknown"
    kind = "text/event-stream" if body.get("stream") else "application/json"
    assert response.headers["content-type"].partition(";")[0] == kind


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
