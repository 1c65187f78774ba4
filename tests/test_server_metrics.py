"""What a server counts: exposed as Prometheus reads it, and true of the traffic before."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

pytest.importorskip("fastapi")

import httpx
from asking import SCENES
from fastapi.testclient import TestClient
from live import Live, live_server
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.engine.output import Chunk
from qwen3vl_mlx.errors import CheckpointError
from qwen3vl_mlx.server.app import create_app
from qwen3vl_mlx.server.metrics import Metrics
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.start import new_serving

CHAT = "/v1/chat/completions"
Numbers = dict[str, float]


def parsed(text: str) -> Numbers:
    """`name{label="value"}` -> value. Names, types and help are checked by the parser."""
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    assert len({family.name for family in families}) == len(families)
    numbers = {}
    for family in families:
        for name, labels, value, *_ in family.samples:
            inner = ",".join(f'{key}="{label}"' for key, label in labels.items())
            numbers[f"{name}{{{inner}}}" if inner else name] = value
    return numbers


@pytest.fixture(scope="module")
def live(demo: Qwen3VL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(demo, ServerOptions(image_roots=(SCENES.resolve(),))) as server:
        yield server


@pytest.fixture
def scrape(live: Live) -> Callable[[], Numbers]:
    return lambda: parsed(httpx.get(f"{live.url}/metrics").text)


@pytest.fixture
def grown(scrape: Callable[[], Numbers]) -> Callable[[str], float]:
    """By how much a number has grown since the test began."""
    before = scrape()
    return lambda name: scrape().get(name, 0) - before.get(name, 0)


def ask(live: Live, **fields: Any) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": str(SCENES / "scene18.png")}},
        {"type": "text", "text": "Describe the image."},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}
    response = httpx.post(f"{live.url}{CHAT}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_is_counted(live: Live, grown: Callable[[str], float]) -> None:
    usage = ask(live)["usage"]
    for kind in ("prompt", "completion"):
        assert grown(f"qwen3vl_{kind}_tokens_total") == usage[f"{kind}_tokens"] > 0
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert grown("qwen3vl_cached_prompt_tokens_total") == cached
    assert grown('qwen3vl_answers_total{finish_reason="length"}') == 1
    assert grown(f'qwen3vl_http_requests_total{{route="{CHAT}",status="200"}}') == 1
    assert grown(f'qwen3vl_http_request_duration_seconds_count{{route="{CHAT}"}}') == 1
    times = {
        "time_to_first_token": usage["time_to_first_token_sec"],
        "answer_duration": usage["total_time_sec"],
        "time_per_output_token": usage["total_completion_time_sec"] / 7,
    }
    for name, seconds in times.items():
        assert grown(f"qwen3vl_{name}_seconds_count") == 1
        assert grown(f"qwen3vl_{name}_seconds_sum") == pytest.approx(seconds)
    assert 0 < grown("qwen3vl_inter_token_latency_seconds_count") <= 7
    assert 0 < grown("qwen3vl_inter_token_latency_seconds_sum") <= usage["total_time_sec"]
    assert grown("qwen3vl_engine_steps_total") >= 7


def test_caches_are_counted(live: Live, grown: Callable[[str], float]) -> None:
    live.serving.host.model.engine.clear_caches()
    ask(live)
    assert grown("qwen3vl_prefix_cache_misses_total") == 1
    assert grown("qwen3vl_feature_cache_misses_total") == 1
    again = sum(ask(live)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2))
    assert again > 0
    assert grown("qwen3vl_prefix_cache_misses_total") == 1
    assert grown("qwen3vl_prefix_cache_hits_total") == 2
    assert grown("qwen3vl_prefix_cache_hit_tokens_total") == again
    assert grown("qwen3vl_cached_prompt_tokens_total") == again


def test_what_is_held_now(live: Live, scrape: Callable[[], Numbers]) -> None:
    ask(live)
    now = scrape()
    assert now["qwen3vl_prefix_cache_bytes"] > 0
    assert now["qwen3vl_feature_cache_bytes"] > 0
    assert now["qwen3vl_memory_peak_bytes"] >= now["qwen3vl_memory_active_bytes"] > 0
    assert now["qwen3vl_memory_cache_bytes"] >= 0
    for name in ("requests_waiting", "requests_running", "answers_in_flight", "reserved_bytes"):
        assert now[f"qwen3vl_{name}"] == 0
    assert now["qwen3vl_http_requests_in_flight"] == 1, "the one that asks"
    states = {name: value for name, value in now.items() if "model_state" in name}
    assert states.pop('qwen3vl_model_state{state="ready"}') == 1
    assert len(states) == 4
    assert not any(states.values())


def test_refusals_are_counted_by_route(live: Live, grown: Callable[[str], float]) -> None:
    httpx.post(f"{live.url}{CHAT}", json={})
    httpx.post(f"{live.url}{CHAT}", content=b"x", headers={"content-type": "text/plain"})
    httpx.get(f"{live.url}/v1/models/a-{time.time()}")
    for i in range(3):
        httpx.get(f"{live.url}/nowhere/{i}")
        httpx.get(f"{live.url}/docs/files/{i}")
    assert grown(f'qwen3vl_http_requests_total{{route="{CHAT}",status="422"}}') == 1
    assert grown('qwen3vl_http_requests_total{route="other",status="415"}') == 1
    assert grown('qwen3vl_http_requests_total{route="/v1/models/{name:path}",status="404"}') == 1
    assert grown('qwen3vl_http_requests_total{route="other",status="404"}') >= 3


def test_a_client_that_leaves_is_counted(
    live: Live, scrape: Callable[[], Numbers], grown: Callable[[str], float]
) -> None:
    body = {
        "messages": [{"role": "user", "content": "Count to a million."}],
        "max_tokens": 1500,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{live.url}{CHAT}", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert all(next(lines) is not None for _ in range(6))
        during = scrape()
        assert during["qwen3vl_answers_in_flight"] == 1
        assert during["qwen3vl_requests_running"] == 1
        assert during["qwen3vl_http_requests_in_flight"] == 2
        assert during["qwen3vl_reserved_bytes"] > 0
    deadline = time.monotonic() + 10
    while scrape()["qwen3vl_answers_in_flight"] or scrape()["qwen3vl_requests_running"]:
        assert time.monotonic() < deadline
    assert grown("qwen3vl_client_disconnects_total") == 1
    assert grown('qwen3vl_answers_total{finish_reason="abandoned"}') == 1


def test_a_client_that_leaves_before_the_answer_begins(
    live: Live, grown: Callable[[str], float]
) -> None:
    messages = [{"role": "user", "content": "Count to a million."}]
    body = {"messages": messages, "max_tokens": 1500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}{CHAT}", json=body, timeout=0.05)
    deadline = time.monotonic() + 10
    while not grown(f'qwen3vl_http_requests_total{{route="{CHAT}",status="499"}}'):
        assert time.monotonic() < deadline
    assert grown("qwen3vl_client_disconnects_total") == 1


def test_openmetrics_where_asked_for(live: Live) -> None:
    asked = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = httpx.get(f"{live.url}/metrics", headers=asked)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert {"qwen3vl_answers"} <= {family.name for family in openmetrics(response.text)}


def test_without_a_model() -> None:
    """Nothing waits for what is not there."""

    def load() -> NoReturn:
        raise CheckpointError("no test asks for it")

    client = TestClient(
        create_app(new_serving(load, "none", ServerOptions())), base_url="http://localhost"
    )
    now = parsed(client.get("/metrics").text)
    assert now['qwen3vl_model_state{state="unloaded"}'] == 1
    assert "qwen3vl_requests_running" not in now
    assert "qwen3vl_memory_active_bytes" in now
    assert json.dumps(now)


def test_a_watch_counts_its_answer_once() -> None:
    serving = new_serving(lambda: pytest.fail("no test asks for it"), "none", ServerOptions())
    metrics: Metrics = serving.metrics
    reason = {"finish_reason": "stop"}

    def value(name: str, labels: dict[str, str] | None = None) -> float | None:
        return metrics.registry.get_sample_value(f"qwen3vl_{name}", labels)

    watch = metrics.answer_started()
    assert value("answers_in_flight") == 1
    watch.chunk(Chunk(text="a"))
    assert value("inter_token_latency_seconds_count") == 0, "two make a gap"
    watch.chunk(Chunk(text="b"))
    watch.chunk(Chunk(finish_reason="stop"))
    watch.close()
    watch.close()
    assert value("inter_token_latency_seconds_count") == 1
    assert value("answers_in_flight") == 0
    assert value("answers_total", reason) == 1
    assert value("answers_total", {"finish_reason": "abandoned"}) is None
