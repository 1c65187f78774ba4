"""What texts and pictures cost, and what a server says of itself and its model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from clients import data_uri, image_url, text, until
from law import picture

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from qwen3vl_mlx import __version__
from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.engine.admission import weights_bytes
from qwen3vl_mlx.errors import CheckpointError
from qwen3vl_mlx.processing.image import PixelBudget
from qwen3vl_mlx.server.app import create_app
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.serving import Serving
from qwen3vl_mlx.server.start import new_serving

NAME = "somebody/Qwen3-VL-Demo"


@contextmanager
def served(make: Callable[[], Qwen3VL], **options: Any) -> Iterator[tuple[TestClient, Serving]]:
    """A client of a server that begins to load."""
    serving = new_serving(make, NAME, ServerOptions(**options))
    with TestClient(create_app(serving), base_url="http://localhost") as client:
        serving.host.start()
        yield client, serving


@contextmanager
def ready(model: Qwen3VL, **options: Any) -> Iterator[tuple[TestClient, Serving]]:
    with served(lambda: model, **options) as (client, serving):
        until(lambda: serving.host.status().state == "ready")
        yield client, serving
        assert serving.host.status().users == 0


@pytest.fixture(scope="module")
def client(demo: Qwen3VL) -> Iterator[TestClient]:
    with ready(demo, aliases=("another",)) as (client, _):
        yield client


def post(client: TestClient, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: TestClient, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    response = client.post(path, json=body)
    assert response.status_code >= 400
    error: dict[str, Any] = response.json()["error"]
    return response.status_code, error


# ---- texts


@pytest.mark.parametrize(
    "prompt",
    ["", "What is 3 + 4?", "<|im_start|>user\nHi<|im_end|>\n", "é🙂\n\n中", "<think>no</think>"],
)
def test_a_text_and_its_tokens(client: TestClient, demo: Qwen3VL, prompt: str) -> None:
    found = post(client, "/tokenize", prompt=prompt, return_token_strs=True)
    assert found["tokens"] == demo.processor.tokenizer.encode(prompt)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == demo.context_length
    assert post(client, "/detokenize", tokens=found["tokens"]) == {"prompt": prompt}
    if prompt.isascii():
        assert "".join(found["token_strs"]) == prompt


def test_tokens_are_named_where_that_is_asked(client: TestClient) -> None:
    assert post(client, "/tokenize", prompt="A")["token_strs"] is None


CALCULATOR = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize("tools", [None, [CALCULATOR]])
def test_a_conversation_costs_what_its_answer_says(
    client: TestClient, demo: Qwen3VL, tools: list[dict[str, Any]] | None
) -> None:
    content = [text("What is"), image_url(data_uri(picture(1, 96, 96))), text("this?")]
    asked = {"messages": [{"role": "user", "content": content}], "tools": tools}
    found = post(client, "/tokenize", **asked)
    answer = post(client, "/v1/chat/completions", max_tokens=1, **asked)
    assert found["count"] == len(found["tokens"]) == answer["usage"]["prompt_tokens"]
    assert found["tokens"].count(demo.model.config.image_token_id) == 9  # 96 x 96 pixels
    closed = post(client, "/tokenize", add_generation_prompt=False, **asked)
    assert found["tokens"][: closed["count"]] == closed["tokens"]
    assert closed["count"] < found["count"]


def test_a_conversation_beyond_the_context_is_still_counted(client: TestClient) -> None:
    found = post(client, "/tokenize", messages=[{"role": "user", "content": "A " * 3000}])
    assert found["count"] > 3000 > found["max_model_len"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "one of"),
        ("/tokenize", {"prompt": "A", "messages": []}, "prompt", "one of"),
        ("/tokenize", {"messages": []}, "messages", "empty"),
        ("/tokenize", {"messages": [{"role": "x"}]}, "messages[0].role", "role"),
        (
            "/tokenize",
            {"prompt": "A", "continue_final_message": True},
            "continue_final_message",
            "not supported",
        ),
        ("/detokenize", {"tokens": [1024]}, "tokens", "1024"),
        ("/detokenize", {"tokens": [5, -1]}, "tokens", "-1"),
    ],
)
def test_what_cannot_be_counted_is_named(
    client: TestClient, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    status, error = refused(client, path, **body)
    assert (status, error["param"]) == (400, param)
    assert words in error["message"]


# ---- pictures


@pytest.fixture
def large(demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TestClient]]:
    """`large(**options)`: a server of the demo with the limits of the released models."""
    settings = replace(demo.processor.settings, image=PixelBudget(65536, 16777216))
    monkeypatch.setattr(demo, "processor", replace(demo.processor, settings=settings))
    with ready(demo) as (client, serving):

        def with_options(**options: Any) -> TestClient:
            changed = new_serving(lambda: demo, NAME, ServerOptions(**options))
            client.app.state.serving = replace(changed, host=serving.host)  # type: ignore
            return client

        yield with_options


@pytest.mark.parametrize(
    ("size", "wishes", "max_pixels", "expected"),
    [
        # Sides are rounded to multiples of 32, halves to even ones.
        ((1280, 720), {}, None, (1280, 704)),
        ((4032, 3024), {}, None, (1856, 1376)),
        ((4032, 3024), {"detail": "auto"}, None, (1856, 1376)),
        ((4032, 3024), {"detail": "low"}, None, (576, 416)),
        ((4032, 3024), {"detail": "high"}, None, (4032, 3008)),
        ((4032, 3024), {"detail": "high"}, 10**6, (1152, 864)),
        ((4032, 3024), {"max_pixels": 10**6}, None, (1152, 864)),
        ((3024, 4032), {"max_pixels": 10**6}, None, (864, 1152)),
        ((20, 20), {}, None, (256, 256)),
        ((320, 320), {"min_pixels": 400_000}, None, (640, 640)),
    ],
)
def test_pictures_cost_what_their_size_says(
    large: Callable[..., TestClient],
    size: tuple[int, int],
    wishes: dict[str, Any],
    max_pixels: int | None,
    expected: tuple[int, int],
) -> None:
    width, height = size
    image = {"width": width, "height": height, **wishes}
    found = post(large(max_pixels=max_pixels), "/v1/images/tokens", images=[image])
    (cost,) = found["data"]
    assert (cost["width"], cost["height"]) == expected
    assert cost["grid_thw"] == [1, expected[1] // 16, expected[0] // 16]
    assert cost["tokens"] == expected[0] * expected[1] // 32**2
    assert found["total_tokens"] == cost["tokens"] + 2


@pytest.mark.parametrize("size", [(96, 64), (33, 700), (640, 480)])
@pytest.mark.parametrize(
    ("own", "all_of_them"),
    [
        ({}, {}),
        ({"max_pixels": 20_000}, {}),
        ({}, {"max_pixels": "full"}),
        ({"detail": "low"}, {"max_pixels": 30_000}),
        ({}, {"min_pixels": 40_000}),
    ],
)
def test_size_picture_and_prompt_agree(
    client: TestClient, size: tuple[int, int], own: dict[str, Any], all_of_them: dict[str, Any]
) -> None:
    width, height = size
    shown = {"image_url": data_uri(picture(3, width, height)), **own}
    images = [{"width": width, "height": height, **own}, shown]
    found = post(client, "/v1/images/tokens", images=images, **all_of_them)
    assert found["data"][0] == found["data"][1]
    messages = [{"role": "user", "content": [{"type": "image_url", **shown}]}]
    counts = [
        post(client, "/tokenize", messages=asked, **limits)["count"]
        for asked, limits in (
            (messages, all_of_them),
            ([{"role": "user", "content": ""}], {}),
        )
    ]
    assert 2 * (counts[0] - counts[1]) == found["total_tokens"]


SIZE = {"width": 64, "height": 64}


@pytest.mark.parametrize(
    ("images", "status", "param", "words"),
    [
        ([SIZE, {"width": 64}], 400, "images[1]", "height"),
        ([SIZE, {}], 400, "images[1]", "image_url"),
        ([SIZE, {**SIZE, "image_url": "AAAA"}], 400, "images[1]", "either"),
        ([SIZE, {"height": 64, "image_url": "AAAA"}], 400, "images[1]", "either"),
        ([SIZE, {"width": 0, "height": 64}], 400, "images[1]", "0x64"),
        ([SIZE, {"width": 1, "height": 300}], 400, "images[1]", "200 times"),
        ([SIZE, {"width": 10**9, "height": 10**9}], 413, "images[1]", "over the limit"),
        ([SIZE, {**SIZE, "detail": "sharp"}], 400, "images[1].image_url", "sharp"),
        ([SIZE, {**SIZE, "max_pixels": 0}], 400, "images[1].image_url", "max_pixels"),
        ([SIZE, {"image_url": "AAAA" * 400}], 415, "images[1].image_url", "not an image"),
        ([SIZE, {"image_url": "/etc/passwd"}], 400, "images[1].image_url", "--image-root"),
        ([SIZE, {"image_url": "http://127.0.0.1/a.png"}], 400, "images[1].image_url", "private"),
        ([SIZE, {"image_url": {"url": ""}}], 400, "images[1].image_url", "empty"),
        ([], 422, "images", "at least 1"),
    ],
)
def test_a_picture_that_cannot_be_is_named(
    client: TestClient, images: list[dict[str, Any]], status: int, param: str, words: str
) -> None:
    found, error = refused(client, "/v1/images/tokens", images=images)
    assert (found, error["param"]) == (status, param)
    assert words in error["message"]


# ---- the model's names


def test_every_name_of_the_model_is_listed(client: TestClient, demo: Qwen3VL) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == [NAME, "another"]
    for entry in listed["data"]:
        assert client.get(f"/v1/models/{entry['id']}").json() == entry
        assert entry["max_model_len"] == demo.context_length
        assert (entry["object"], entry["root"]) == ("model", NAME)
    assert client.get("/v1/models/default").json() == listed["data"][0]


def test_another_is_not_found(client: TestClient) -> None:
    response = client.get("/v1/models/gpt-4o")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert all(name in response.text for name in (NAME, "another", "default"))


# ---- health


def test_health_tells_loading_from_ready(demo: Qwen3VL) -> None:
    go_on = threading.Event()

    def waiting() -> Qwen3VL:
        assert go_on.wait(10)
        return demo

    with served(waiting) as (client, serving):
        early = client.get("/health")
        assert (early.status_code, early.json()["status"]) == (503, "loading")
        assert int(early.headers["Retry-After"]) > 0
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None
        go_on.set()
        until(lambda: serving.host.status().state == "ready")
        later = client.get("/health")
        assert (later.status_code, later.json()["status"]) == (200, "ready")
        assert later.json()["model"] == NAME
        probe = client.head("/health")
        assert (probe.status_code, probe.content) == (200, b"")


def test_health_tells_why_there_is_no_model() -> None:
    def failing() -> Qwen3VL:
        raise CheckpointError("/home/me/models/vl/config.json is damaged")

    with served(failing) as (client, serving):
        until(lambda: serving.host.status().state == "failed")
        response = client.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "failed")
    assert response.json()["reason"] == "config.json is damaged"


def test_an_unloaded_model_is_well(demo: Qwen3VL) -> None:
    serving = new_serving(lambda: demo, NAME, ServerOptions())  # nobody has started it
    response = TestClient(create_app(serving), base_url="http://localhost").get("/health")
    assert (response.status_code, response.json()["status"]) == (200, "unloaded")


def test_the_root_says_what_this_is(client: TestClient) -> None:
    found = client.get("/").json()
    assert (found["name"], found["version"]) == ("qwen3vl_mlx", __version__)
    assert {client.get(found[name]).status_code for name in ("docs", "health", "models")} == {200}


# ---- quantizing anew


def test_nobody_quantizes_unless_that_is_enabled(demo: Qwen3VL) -> None:
    before = demo.model
    with ready(demo) as (client, _):
        status, error = refused(client, "/re_isq", quantize="8bit")
    assert (status, error["code"]) == (403, "re_isq_disabled")
    assert demo.model is before


@pytest.mark.parametrize(
    ("asked", "name"), [({"ggml_type": "Q4K"}, "4bit"), ({"quantize": "8bit"}, "8bit")]
)
def test_the_model_is_quantized_anew(
    serve: Callable[..., Qwen3VL], asked: dict[str, str], name: str
) -> None:
    model = serve()
    whole = weights_bytes(model.model)
    with ready(model, enable_re_isq=True) as (client, _):
        found = post(client, "/re_isq", **asked)
        question = {"prompt": "A red", "max_tokens": 4, "temperature": 0}
        said = post(client, "/v1/completions", **question)["choices"][0]["text"]
    assert (found["quantization"], found["weights_bytes"]) == (name, weights_bytes(model.model))
    assert found["weights_bytes"] < whole
    expected = model.asking.request(
        model.processor.layout(model.processor.tokenizer.encode("A red"), ()),
        replace(model.default_params, max_tokens=4),
        tools=False,
        started=0,
    )
    assert said == model.run(expected).handle.result().text


def test_quantizing_waits_for_answers_and_not_for_ever(
    serve: Callable[..., Qwen3VL],
) -> None:
    model = serve()
    before = model.model
    with ready(model, enable_re_isq=True) as (client, serving), ThreadPoolExecutor(1) as pool:
        lease = asyncio.run(serving.host.lease())
        asked = pool.submit(post, client, "/re_isq", quantize="4bit")
        until(lambda: serving.host._held)
        status, error = refused(client, "/re_isq", quantize="9bit")  # which waits for nothing
        assert (status, error["param"]) == (400, "quantize")
        assert not asked.done()
        assert model.model is before
        lease.release()
        assert asked.result(30)["quantization"] == "4bit"


def test_what_was_unloaded_comes_back_as_it_was() -> None:
    with served(lambda: load("demo"), enable_re_isq=True, idle_unload_sec=0.3) as (client, serving):
        until(lambda: serving.host.status().state == "ready")
        quantized = post(client, "/re_isq", quantize="4bit")["weights_bytes"]
        until(lambda: serving.host.status().state == "unloaded")
        post(client, "/tokenize", prompt="A")
        assert weights_bytes(serving.host.model.model) == quantized
        serving.host.close()


@pytest.mark.parametrize(
    "asked",
    [{}, {"quantize": "4bit", "ggml_type": "Q4K"}, {"quantize": "9bit"}, {"ggml_type": ""}],
)
def test_what_to_quantize_to_must_be_clear(demo: Qwen3VL, asked: dict[str, str]) -> None:
    with ready(demo, enable_re_isq=True) as (client, _):
        status, error = refused(client, "/re_isq", **asked)
    assert (status, error["param"]) == (400, "quantize")
