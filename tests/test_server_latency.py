"""What one request may cost the others: no long stop of the server, no model held for nothing."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server is an extra")

from clients import asking, at_rest, until
from live import Live, live_server

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.api import load
from qwen3vl_mlx.errors import QueueFullError
from qwen3vl_mlx.server import event_stream, layouts, question
from qwen3vl_mlx.server.completion_fields import CompletionFields
from qwen3vl_mlx.server.completions import _token_ids
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.event_stream import EventStream, sse
from qwen3vl_mlx.server.layouts import Layouts
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.question import Answers, Question, TimeLimit
from qwen3vl_mlx.server.serving import Serving
from qwen3vl_mlx.server.start import new_serving

LONGEST_STOP_SEC = 0.5  # on a machine that does other things too
WORDS = "The quick brown fox counts 12 red squares. "


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    with live_server(demo) as live:
        yield live


# Long texts


def post(live: Live, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def longest_wait(live: Live, meanwhile: Callable[[], Any]) -> tuple[Any, float]:
    """What `meanwhile` gives, and how long /health took at most until it did."""
    longest = 0.0
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(meanwhile)
        while not pending.done():
            connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=60)
            started = time.perf_counter()
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            longest = max(longest, time.perf_counter() - started)
            connection.close()
    return pending.result(), longest


FIVE_MB = WORDS * (5_000_000 // len(WORDS))
TOO_LONG = {
    "chat": ("/v1/chat/completions", {"messages": asking(FIVE_MB)}),
    "system": (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": FIVE_MB}, *asking("Hi")]},
    ),
    "truncated": ("/v1/chat/completions", {"messages": asking(FIVE_MB), "truncate_sequence": True}),
    "messages": ("/v1/messages", {"messages": asking(FIVE_MB), "max_tokens": 1}),
    "responses": ("/v1/responses", {"input": FIVE_MB}),
    "completions": ("/v1/completions", {"prompt": FIVE_MB}),
    "tokenize": ("/tokenize", {"prompt": FIVE_MB}),
    "tokenized chat": ("/tokenize", {"messages": asking(FIVE_MB)}),
    "count": ("/v1/messages/count_tokens", {"messages": asking(FIVE_MB)}),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_what_can_never_fit_is_refused_before_it_is_read(live: Live, case: str) -> None:
    path, fields = TOO_LONG[case]
    body = json.dumps({"model": "default", **fields}).encode()
    started = time.perf_counter()
    (status, refusal), longest = longest_wait(live, lambda: post(live, path, body))
    assert time.perf_counter() - started < 2  # reading it takes ten seconds
    assert longest < LONGEST_STOP_SEC
    if "count" in path or "tokenize" in path:
        assert (status, "2,000,000" in refusal["error"]["message"]) == (413, True)
    else:
        assert (status, "prompt is too long" in refusal["error"]["message"]) == (400, True)


def test_others_are_answered_while_a_long_text_is_read(live: Live) -> None:
    text = (WORDS * 50_000)[:1_500_000]
    body = json.dumps({"prompt": text}).encode()
    (status, told), longest = longest_wait(live, lambda: post(live, "/tokenize", body))
    assert (status, told["count"] > 100_000) == (200, True)
    assert longest < LONGEST_STOP_SEC


def test_old_turns_are_dropped_by_their_length(live: Live) -> None:
    said = [
        {"role": "user", "content": FIVE_MB[:500_000]},
        {"role": "assistant", "content": "Yes."},
    ]
    asked = {"messages": [*said * 8, *asking("Hello")], "max_tokens": 4, "truncate_sequence": True}
    status, answer = post(live, "/v1/chat/completions", json.dumps(asked).encode())
    alone = {"messages": asking("Hello"), "max_tokens": 4}
    _, expected = post(live, "/v1/chat/completions", json.dumps(alone).encode())
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_a_prompt_cut_by_its_length_ends_as_the_whole_does(demo: Qwen3VL) -> None:
    text = "".join(f"{number} red squares. " for number in range(10_000))
    fields = CompletionFields(prompt=text, max_tokens=4, truncate_sequence=True)
    ids = _token_ids(demo, text, fields, ServerOptions())
    assert list(ids) == demo.processor.tokenizer.encode(text)[-(demo.context_length - 4) :]


# Threads for it


def test_layouts_have_an_end_to_their_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_MOST_WAITING", 6)
    go_on, begun = threading.Event(), []

    def work() -> None:
        begun.append(1)
        assert go_on.wait(10)

    async def main() -> None:
        rooms = Layouts()
        tasks = [asyncio.create_task(rooms.run(work)) for _ in range(6)]
        while len(begun) < 4:
            await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError, match="6 prompts"):
            await rooms.run(work)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        go_on.set()
        assert await rooms.run(lambda: 3) == 3
        assert len(begun) == 4  # those who left in time cost nothing
        rooms.close()

    asyncio.run(main())


# Time limits


def test_a_time_limit() -> None:
    options = ServerOptions(timeout=5)
    limit = TimeLimit.of(options, None)
    assert limit.seconds == 5
    assert limit.left is not None
    assert 4 < limit.left <= 5
    assert TimeLimit.of(options, 2.5).seconds == 2.5
    assert TimeLimit.of(ServerOptions(timeout=None), None).left is None
    with pytest.raises(ApiError) as passed:
        _ = TimeLimit(0.5, time.perf_counter() - 1).left
    assert (passed.value.status, passed.value.code) == (408, "timeout")
    assert "0.5 seconds" in passed.value.message
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ApiError) as refused:
            TimeLimit.of(options, wrong)
        assert (refused.value.status, refused.value.param) == (400, "timeout")


# Readers that do not read


async def asked(serving: Serving, n: int = 1, max_tokens: int = 4) -> Answers:
    asking_for = Question(messages=asking("Hello"), n=n, sampling={"max_tokens": max_tokens})
    return await question._asked(serving, asking_for, TimeLimit())


def test_an_answer_that_is_not_read_does_not_hold_the_model() -> None:
    async def main() -> None:
        serving = new_serving(lambda: load("demo"), "demo", ServerOptions(idle_unload_sec=0.05))
        try:
            answers = await asked(serving, n=3)
            model = weakref.ref(serving.host.model)
            answers.free()  # too early: nothing happens
            assert serving.host.status().users == 1
            while any(stream.handle.phase != "done" for stream in answers.streams):
                await asyncio.sleep(0.01)
            answers.free()
            assert serving.host.status().users == 0
            while serving.host.status().state != "unloaded" or model() is not None:
                gc.collect()
                await asyncio.sleep(0.01)
            completions = await answers.collect()
            assert [each.usage.completion_tokens for each in completions] == [4] * 3
            assert answers.tokenizer.encode("Hello")
            answers.close()
            assert serving.host.status().users == 0
        finally:
            serving.host.close()

    asyncio.run(asyncio.wait_for(main(), 30))


class Said:
    """Answers as far as a stream knows them."""

    def __init__(self) -> None:
        self.freed, self.closed = 0, False

    def free(self) -> None:
        self.freed += 1

    def close(self) -> None:
        self.closed = True


def test_a_reader_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "_LOOK_SEC", 0.02)
    monkeypatch.setattr(event_stream, "_STALL_SEC", 0.1)
    said, sent = Said(), []

    async def events() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"data: {}\n\n"

    async def receive() -> Any:
        await asyncio.sleep(10)

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 4:
            await asyncio.sleep(10)

    async def main() -> None:
        stream = EventStream(said, events(), lambda error: b"", 10)  # type: ignore[arg-type]
        await asyncio.wait_for(stream({"type": "http"}, receive, send), 5)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert len(sent) == 4
    assert said.closed
    assert said.freed >= 3


def test_what_stops_midway_leaves_no_task(demo: Qwen3VL) -> None:
    async def main() -> None:
        serving = new_serving(lambda: demo, "demo", ServerOptions())
        answers = await asked(serving, n=3, max_tokens=200)
        before = asyncio.all_tasks()
        async with aclosing(answers.merged()) as chunks:
            await anext(chunks)
            assert len(asyncio.all_tasks()) == len(before) + 3
        assert asyncio.all_tasks() == before
        answers.close()

    asyncio.run(main())


def test_answers_that_nobody_took_are_forgotten(demo: Qwen3VL) -> None:
    """As where the caller is cancelled in the moment in which they come."""

    async def main() -> None:
        serving = new_serving(lambda: demo, "demo", ServerOptions())
        answers = await asked(serving, max_tokens=1500)
        assert serving.host.status().users == 1
        del answers
        gc.collect()
        assert serving.host.status().users == 0
        assert await serving.host.end_all(0.05)

    asyncio.run(main())


def test_a_request_that_is_cancelled_as_it_is_done_gives_the_model_back(demo: Qwen3VL) -> None:
    async def main() -> None:
        serving = new_serving(lambda: demo, "demo", ServerOptions())

        async def never() -> Any:
            await asyncio.sleep(10)

        app = SimpleNamespace(state=SimpleNamespace(serving=serving))
        http: Any = SimpleNamespace(app=app, receive=never)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def work() -> Answers:
            answers = await asked(serving, max_tokens=1500)
            done.set_result(None)
            return answers

        task = asyncio.create_task(question.while_connected(http, work(), None, Answers.close))
        await done
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        assert serving.host.status().users == 0

    asyncio.run(main())


def test_events_hold_no_number_that_json_has_not() -> None:
    assert sse({"a": 1.5}, "x") == b'event: x\ndata: {"a": 1.5}\n\n'
    with pytest.raises(ValueError, match="JSON"):
        sse({"a": float("nan")})


def test_nothing_is_left(live: Live) -> None:
    until(lambda: at_rest(live))
