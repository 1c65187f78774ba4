"""What a server did and is doing, for Prometheus: GET /metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import get_args

import mlx.core as mx
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen3vl_mlx.engine.engine import EngineStats
from qwen3vl_mlx.engine.output import Chunk, Usage
from qwen3vl_mlx.server.host import ModelHost, State

# Seconds. A token takes 10 ms to 100 ms on a desktop, a prompt with pictures up to minutes.
_TOKEN_SEC = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_FIRST_SEC = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_ANSWER_SEC = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

router = APIRouter(tags=["Server"])


class Metrics:
    """The numbers of one server. Call from any thread."""

    def __init__(self, host: ModelHost):
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineNumbers(host))

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"qwen3vl_{name}", meaning, labels, registry=registry)

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(f"qwen3vl_{name}", meaning, registry=registry)

        def seconds(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            full = f"qwen3vl_{name}_seconds"
            return Histogram(full, meaning, labels, buckets=buckets, registry=registry)

        self._requests = counter("http_requests", "HTTP requests answered", "route", "status")
        self._requests_now = gauge("http_requests_in_flight", "HTTP requests being answered")
        self._request_sec = seconds(
            "http_request_duration", "From a request to its last byte", _ANSWER_SEC, "route"
        )
        self._disconnects = counter(
            "client_disconnects", "Clients that left before their answer was complete"
        )
        self._answers = counter("answers", "Answers that ended, by why", "finish_reason")
        self._answers_now = gauge("answers_in_flight", "Answers asked for that have not ended")
        self._first_sec = seconds(
            "time_to_first_token", "From a request to its first token", _FIRST_SEC
        )
        self._gap_sec = seconds(
            "inter_token_latency", "Between two pieces of an answer, mostly tokens", _TOKEN_SEC
        )
        self._token_sec = seconds(
            "time_per_output_token", "Between two tokens, on an answer's average", _TOKEN_SEC
        )
        self._answer_sec = seconds(
            "answer_duration", "From a request to its last token", _ANSWER_SEC
        )
        self._prompt = counter("prompt_tokens", "Tokens of prompts, cached ones included")
        self._cached = counter("cached_prompt_tokens", "Tokens of prompts that were cached")
        self._completion = counter("completion_tokens", "Tokens of answers")
        self._drafted = counter("drafted_tokens", "Tokens guessed ahead")
        self._accepted = counter("accepted_tokens", "Tokens guessed ahead, and right")

    def request_started(self) -> None:
        """An HTTP request has come."""
        self._requests_now.inc()

    def request_ended(
        self, route: str, status: int, seconds: float, *, client_left: bool = False
    ) -> None:
        """Its last byte was sent, or its client has left. route: the path's template."""
        self._requests_now.dec()
        self._requests.labels(route, status).inc()
        self._request_sec.labels(route).observe(seconds)
        if client_left:
            self._disconnects.inc()

    def answer_started(self) -> AnswerWatch:
        """An answer is asked for: give its chunks to what this returns, and close it."""
        self._answers_now.inc()
        return AnswerWatch(self)

    def between_tokens(self, seconds: float) -> None:
        """For `AnswerWatch`."""
        self._gap_sec.observe(seconds)

    def answer_ended(self, reason: str, usage: Usage | None) -> None:
        """For `AnswerWatch`. usage: None where nobody waited for the answer's end."""
        self._answers_now.dec()
        self._answers.labels(reason).inc()
        if usage is None:
            return
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._completion.inc(usage.completion_tokens)
        self._drafted.inc(usage.drafted_tokens)
        self._accepted.inc(usage.accepted_tokens)
        if usage.completion_tokens:
            self._first_sec.observe(usage.time_to_first_token_sec)
            self._answer_sec.observe(usage.total_time_sec)
        if usage.completion_tokens > 1:
            self._token_sec.observe(usage.total_completion_time_sec / (usage.completion_tokens - 1))


class AnswerWatch:
    """Sees the chunks of one answer as they come."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._last: float | None = None  # when a chunk came
        self._open = True

    def chunk(self, chunk: Chunk) -> None:
        """The next chunk has come."""
        if chunk.finish_reason is not None:
            self._end(chunk.finish_reason, chunk.usage)
            return
        now = time.perf_counter()
        if self._last is not None:
            self._metrics.between_tokens(now - self._last)
        self._last = now

    def close(self) -> None:
        """No more chunks come. Doing it again does nothing."""
        self._end("abandoned", None)

    def _end(self, reason: str, usage: Usage | None) -> None:
        if self._open:
            self._open = False
            self._metrics.answer_ended(reason, usage)


class _EngineNumbers(Collector):
    """What the engine counts itself, read when it is asked for. Counts begin anew with a load."""

    def __init__(self, host: ModelHost):
        self.host = host

    def collect(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "qwen3vl_model_state", "1 for what the model is", labels=["state"]
        )
        now = self.host.status().state
        for each in get_args(State):
            state.add_metric([each], each == now)
        yield state
        yield _gauge("memory_active_bytes", "Memory of MLX in use", mx.get_active_memory())
        yield _gauge("memory_cache_bytes", "Memory of MLX kept for reuse", mx.get_cache_memory())
        yield _gauge("memory_peak_bytes", "Most memory of MLX in use so far", mx.get_peak_memory())
        model = self.host.model
        if model is not None:
            yield from _engine_numbers(model.engine.stats)


def _engine_numbers(stats: EngineStats) -> Iterator[Metric]:
    load, prefix, features = stats.load, stats.prefix, stats.features
    yield _gauge("requests_waiting", "Requests in the queue", load.waiting)
    yield _gauge("requests_prefilling", "Requests whose prompt is being read", load.prefilling)
    yield _gauge("requests_running", "Requests being answered", load.running)
    yield _gauge("reserved_bytes", "Memory promised to requests", load.reserved_bytes)
    yield _counter("engine_steps", "Rounds of the scheduler", load.steps)
    yield _counter("engine_failures", "Requests that failed within the engine", load.failed)
    for name, what, cache in (
        ("prefix_cache", "prompts' beginnings", prefix),
        ("feature_cache", "pictures' features", features),
    ):
        if cache is not None:
            yield _counter(f"{name}_hits", f"Finds among {what}", cache.hits)
            yield _counter(f"{name}_misses", f"Looks in vain among {what}", cache.misses)
            yield _counter(f"{name}_evictions", f"Dropped {what}", cache.evictions)
            yield _gauge(f"{name}_bytes", f"Memory of kept {what}", cache.bytes)
    if prefix is not None:
        yield _counter("prefix_cache_hit_tokens", "Tokens found, not computed", prefix.hit_tokens)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"qwen3vl_{name}", meaning, value=value)


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"qwen3vl_{name}", meaning, value=value)


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Counts, times and memory in Prometheus' text format, or in OpenMetrics' where asked for."""
    own: Metrics = request.app.state.serving.metrics  # `serving` imports this module
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(own.registry), media_type=media_type)
