"""Many requests on one model: who waits for whom, what ends whom, and what is left behind.

Steps are counted, not timed: a `Driver` steps the scheduler in the test's own thread. The engine's
thread itself is tested on the bundled checkpoint.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from asking import QUESTION, TRUTH, user
from driving import Driver, assert_nothing_held
from law import INPUTS, picture
from law import user as turn
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.engine import scheduler as engine_scheduler
from qwen3vl_mlx.engine.constraints import Guide, parse_grammar
from qwen3vl_mlx.engine.engine import EngineOptions
from qwen3vl_mlx.engine.output import Chunk
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.request import Handle
from qwen3vl_mlx.engine.sampling import Sampler
from qwen3vl_mlx.engine.vision import Encoding
from qwen3vl_mlx.errors import EngineClosedError, InputError, QueueFullError
from qwen3vl_mlx.models.text import TextModel
from qwen3vl_mlx.models.vision import Block
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.processing.tokenizer import StreamingDecoder

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Qwen3VL]) -> Qwen3VL:
    return tiny_model("dense64")


@pytest.fixture(scope="module")
def prompts(model: Qwen3VL) -> dict[str, Prompt]:
    return {name: model.processor.prompt(messages) for name, messages in INPUTS.items()}


@pytest.fixture
def serve() -> Iterator[Callable[..., Qwen3VL]]:
    models: list[Qwen3VL] = []

    def served(**options: Any) -> Qwen3VL:
        models.append(load("demo", engine=EngineOptions(**options)))
        return models[-1]

    yield served
    for each in models:
        each.close()


def end(handle: Handle) -> Chunk:
    """The last chunk, of a request that has ended."""
    assert handle.phase == "done"
    return list(handle)[-1]


def error(handle: Handle) -> BaseException:
    assert handle.phase == "done"
    with pytest.raises(Exception) as caught:  # noqa: PT011
        list(handle)
    return caught.value


ENDLESS = {"logit_bias": {1000: -1e9, 998: -1e9}, "max_tokens": 1500}  # for the demo checkpoint


@contextmanager
def busy(model: Qwen3VL) -> Iterator[None]:
    """Hold the engine's thread between two steps."""
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        go_on.wait()

    thread = threading.Thread(target=model.engine.call, args=(hold,))
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        go_on.set()
        thread.join()


# Phases, and how long rows wait for others.


def test_phases(model: Qwen3VL, prompts: dict[str, Prompt], drive: Callable[..., Driver]) -> None:
    driver = drive(model, max_batch=2, prefill_chunk=20, interleave=20)
    first, second, third = (driver.ask(prompts[name], 40) for name in ("text", "image", "video"))
    seen = set()
    while driver.scheduler.busy:
        load = driver.scheduler.load
        phases = [handle.phase for handle in (first, second, third)]
        seen.add(tuple(phases))
        counted = (load.waiting, load.prefilling, load.running)
        assert counted == tuple(map(phases.count, ("waiting", "prefilling", "running")))
        assert load.prefilling + load.running <= 2
        assert (load.reserved_bytes > 0) == (load.prefilling + load.running > 0)
        driver.step()
    assert {
        ("waiting", "waiting", "waiting"),
        ("prefilling", "prefilling", "waiting"),
        ("running", "running", "waiting"),
    } <= seen
    assert any(phases[0] == "done" and phases[2] == "prefilling" for phases in seen)
    assert (driver.scheduler.load.finished, driver.scheduler.load.failed) == (3, 0)
    driver.drain()


@contextmanager
def counted_work() -> Iterator[list[float]]:
    """Prompt tokens read, and visual tokens' worth of the tower done, since it was last emptied."""
    work: list[float] = []
    step, block = Prefill.step, Block.__call__

    def counted_step(self: Prefill, tokens: int) -> mx.array:
        hidden = step(self, tokens)
        work.append(hidden.shape[1])
        return hidden

    def counted_block(self: Block, x: mx.array, *args: Any) -> mx.array:
        work.append(x.shape[-2] / 4 / 5)  # patches of a token, blocks of the tower
        return block(self, x, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefill, "step", counted_step)
        patch.setattr(Block, "__call__", counted_block)
        yield work


def test_reading_holds_running_rows_up_for_no_more_than_was_set(
    model: Qwen3VL, drive: Callable[..., Driver]
) -> None:
    """A long prompt, a large picture and many small ones come while a row decodes."""
    limit = 30
    large, small = picture(1, 512, 256), [picture(seed) for seed in range(2, 8)]
    block = 512 * 256 / 32**2 / 5  # one block of the tower over all of a picture is not divided
    driver = drive(model, interleave=limit)
    row = driver.ask(model.processor.prompt(user("Hi")), 1000)
    driver.until(lambda: len(row.tokens) > 1)
    others = [turn("word " * 300), turn(large, "Well?"), turn(*small, "And?"), turn("So?")]
    handles = [driver.ask(model.processor.prompt([each]), 2) for each in others]
    with counted_work() as work:
        total, steps = 0.0, 0
        while not all(handle.phase == "done" for handle in handles):
            before = len(row.tokens)
            driver.step()
            assert len(row.tokens) == before + 1
            assert sum(work) <= limit + block
            total += sum(work)
            steps += 1
            work.clear()
    tokens = sum(len(handle.request.prompt.token_ids) for handle in handles)
    assert total > tokens + 128 + 24 - 20  # all was read and seen; a common beginning is cached
    assert steps < 2 * total / limit + 20  # and the budget was used
    row.cancel()
    driver.drain()


def test_a_short_prompt_overtakes_a_long_one(model: Qwen3VL, drive: Callable[..., Driver]) -> None:
    driver = drive(model, prefill_chunk=32, interleave=32)
    long = driver.ask(model.processor.prompt([turn("word " * 500)]))
    short = driver.ask(model.processor.prompt([turn("So, what is there to be seen?")]), 3)
    driver.until(lambda: short.phase == "done")
    assert long.phase == "prefilling"
    driver.finish(long)


@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_a_step_waits_for_the_device_once(
    tiny_model: Callable[[str], Qwen3VL], drive: Callable[..., Driver], variant: str
) -> None:
    """Also while a prompt with a picture is read, and while requests come and go."""
    model = tiny_model(variant)
    driver = drive(model, interleave=8)
    names = ("text", "image", "same grid", "later turn")
    prompts = [model.processor.prompt(INPUTS[name]) for name in names]
    rows = [driver.ask(prompt, 60 + 3 * i) for i, prompt in enumerate(prompts[:2])]
    driver.until(lambda: all(row.phase == "running" for row in rows))
    driver.step()
    waits: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [
            *((mx.array, name) for name in ("tolist", "item", "__bool__", "__int__", "__float__")),
            *((mx, name) for name in ("eval", "synchronize")),
        ]:
            patch.setattr(owner, name, noted(getattr(owner, name), name, waits))
        later = [driver.ask(prompt, 20) for prompt in prompts[2:]]
        for _ in range(55):
            driver.step()
            assert waits == ["tolist"]
            waits.clear()
    assert all(handle.phase == "done" for handle in later)
    driver.finish(*rows)
    driver.drain()


def noted(function: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return wrapper


# Ends.


def test_timeout_in_every_phase(
    model: Qwen3VL,
    prompts: dict[str, Prompt],
    drive: Callable[..., Driver],
    monkeypatch: Patch,
) -> None:
    clock = SimpleNamespace(perf_counter=lambda: now)
    now = 0.0
    monkeypatch.setattr(engine_scheduler, "time", clock)
    driver = drive(model, max_batch=2, interleave=4)
    handles = []
    for name, seconds in (("text", 100), ("image and video", 50), ("video", 20)):
        handles.append(driver.ask(prompts[name], 500, timeout=seconds, submitted=0.0))
        driver.step()
    running, reading, waiting = handles
    assert [handle.phase for handle in handles] == ["running", "prefilling", "waiting"]
    for now, ended in ((19.0, []), (21.0, [waiting]), (51.0, [reading]), (101.0, [running])):
        driver.step()
        assert all(handle.phase == "done" for handle in ended)
        assert sum(handle.phase == "done" for handle in handles) == (now > 20) + (now > 50) + (
            now > 100
        )
    assert [end(handle).finish_reason for handle in handles] == ["timeout"] * 3
    usage = end_usage(driver, prompts["text"])
    assert usage.completion_tokens == 3
    driver.drain()


def end_usage(driver: Driver, prompt: Prompt) -> Any:
    """The engine goes on: one more answer of three tokens."""
    handle = driver.ask(prompt, 3)
    driver.finish(handle)
    return end(handle).usage


def test_cancelling_in_every_phase(
    model: Qwen3VL, prompts: dict[str, Prompt], drive: Callable[..., Driver]
) -> None:
    driver = drive(model, max_batch=3, interleave=4)
    running = driver.ask(prompts["text"], 500)
    driver.until(lambda: len(running.tokens) == 3)
    encoding = driver.ask(prompts["image and video"])
    driver.step()
    assert driver.scheduler.reader._encoding is not None
    reading = driver.ask(prompts["later turn"])
    waiting = driver.ask(prompts["video"])
    driver.step()
    encoding.cancel()
    assert driver.scheduler.reader._encoding is None
    driver.until(
        lambda: any(
            job.handle is reading and job.prefill.done > 8 for job in driver.scheduler.reader.jobs
        )
    )
    for handle in (reading, waiting, running):
        assert handle.phase != "done"
        handle.cancel()
        handle.cancel()
    for handle in (running, encoding, reading, waiting):
        last = end(handle)
        assert last.finish_reason == "cancelled"
        assert last.usage is not None
        assert last.usage.completion_tokens == len(handle.tokens)
    assert not driver.scheduler.busy
    driver.drain()
    running.cancel()
    assert driver.scheduler.load.finished == 4


def test_a_dropped_stream_ends_its_answer(serve: Callable[..., Qwen3VL]) -> None:
    model = serve()
    stream = model.stream("Hello", **ENDLESS)
    next(stream)
    del stream
    gc.collect()
    with model.stream("Hello", **ENDLESS) as left:
        next(left)
    closed = model.stream("Hello", **ENDLESS)
    closed.close()
    assert list(closed) == []
    model.engine.call(lambda: None)
    assert not model.engine.busy


def test_an_answer_outlives_the_name_of_its_model() -> None:
    stream = load("demo").stream("What is 3 + 4?")
    gc.collect()
    assert "".join(chunk.text for chunk in stream) == "7"


# Refused, or queued.


def test_a_full_queue_refuses(serve: Callable[..., Qwen3VL]) -> None:
    model = serve(max_queue=2)
    with busy(model):
        streams = [model.stream("What is 3 + 4?") for _ in range(2)]
        with pytest.raises(QueueFullError, match="2"):
            model.stream("Hello")
    assert ["".join(chunk.text for chunk in stream) for stream in streams] == ["7", "7"]
    assert model.generate("What is 3 + 4?").text == "7"


def test_what_can_never_fit_is_refused_with_what_would(
    serve: Callable[..., Qwen3VL],
) -> None:
    model = serve()
    admission = model.engine.scheduler.admission
    prompt = model.processor.prompt(user("Hello"))
    cost = admission.cost(prompt, 64)
    limited = serve(memory_limit=admission.weights + admission.reserved + cost.total)
    with pytest.raises(InputError, match=r"GiB.*max_tokens=(\d+)") as caught:
        limited.generate("Hello", max_tokens=1900)
    offered = int(str(caught.value).split("max_tokens=")[1].split(",")[0].split()[0])
    assert limited.generate("Hello", max_tokens=min(offered, 4)).text
    with pytest.raises(InputError, match="max_tokens"):
        limited.generate("Hello", max_tokens=offered + 256)
    assert limited.engine.stats.load.failed == 2


def test_what_does_not_fit_now_waits(
    model: Qwen3VL, prompts: dict[str, Prompt], drive: Callable[..., Driver]
) -> None:
    admission = model.engine.scheduler.admission
    costs = [admission.cost(prompts["image"], 20)] * 2
    limit = admission.weights + admission.reserved + admission.together(costs)
    driver = drive(model, memory_limit=limit)
    handles = [driver.ask(prompts["image"], 20) for _ in range(5)]
    most = 0
    while driver.scheduler.busy:
        driver.step()
        load = driver.scheduler.load
        most = max(most, load.prefilling + load.running)
        held = load.reserved_bytes + kept_bytes(driver)
        assert held <= driver.scheduler.admission.available
    assert 2 <= most <= 3
    assert all(handle.tokens == handles[0].tokens for handle in handles)
    assert len(handles[0].tokens) == 20
    driver.drain()


def kept_bytes(driver: Driver) -> int:
    prefix = driver.scheduler.prefix
    assert prefix is not None
    return prefix.stats.bytes + driver.scheduler.features.stats.bytes


# What goes wrong for one, and for all.


class BrokenError(Exception):
    pass


def raise_in(owner: Any, name: str, patch: Patch, *, when: Callable[..., bool]) -> None:
    function = getattr(owner, name)

    def maybe(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise BrokenError(name)
        return function(*args, **kwargs)

    patch.setattr(owner, name, maybe)


def nth(count: int) -> Callable[..., bool]:
    """True from the call with this number on."""
    calls = itertools.count(1)
    return lambda *_: next(calls) >= count


def odd(sampler: Sampler) -> bool:
    return sampler.params.frequency_penalty == 0.5


BREAKS: dict[str, Callable[[Patch], None]] = {
    "guide, made": lambda patch: raise_in(Guide, "__init__", patch, when=nth(1)),
    "guide, first mask": lambda patch: raise_in(Guide, "mask", patch, when=nth(1)),
    "guide, later mask": lambda patch: raise_in(Guide, "mask", patch, when=nth(4)),
    "guide, token": lambda patch: raise_in(Guide, "consume", patch, when=nth(4)),
    "sampler, first token": lambda patch: raise_in(
        Sampler, "adjusted", patch, when=lambda self, *_: odd(self)
    ),
    "sampler, later token": lambda patch: raise_in(
        Sampler, "adjusted", patch, when=lambda self, _, state, *__: odd(self) and state.step > 3
    ),
    "sampler, made": lambda patch: raise_in(Sampler, "start", patch, when=lambda self: odd(self)),
}


@pytest.mark.parametrize("name", BREAKS)
def test_one_request_fails_alone(
    model: Qwen3VL,
    prompts: dict[str, Prompt],
    drive: Callable[..., Driver],
    monkeypatch: Patch,
    name: str,
) -> None:
    driver = drive(model)
    alone = driver.ask(prompts["image"], 12)
    driver.finish(alone)
    BREAKS[name](monkeypatch)
    before = driver.ask(prompts["text"], 12)
    grammar = parse_grammar({"type": "json_object"}, None, None, None)
    broken = driver.ask(prompts["image"], 12, frequency_penalty=0.5, grammar=grammar)
    after = driver.ask(prompts["image"], 12)
    driver.finish(before, broken, after)
    assert isinstance(error(broken), BrokenError)
    assert [end(handle).finish_reason for handle in (before, after)] == ["length"] * 2
    assert after.tokens == alone.tokens
    assert driver.scheduler.load.failed == 1
    driver.drain()


@pytest.mark.parametrize("method", ["push", "flush"])
@pytest.mark.parametrize("how", ["end", "cancel", "timeout"])
def test_a_broken_tokenizer_fails_its_request_alone(
    model: Qwen3VL,
    prompts: dict[str, Prompt],
    drive: Callable[..., Driver],
    monkeypatch: Patch,
    method: str,
    how: str,
) -> None:
    driver = drive(model)
    broken, other = driver.ask(prompts["image"], 12, timeout=1e6), driver.ask(prompts["text"], 12)
    driver.until(lambda: len(other.tokens) == 3)
    (job,) = [job for job in driver.scheduler.running.values() if job.handle is broken]
    raise_in(StreamingDecoder, method, monkeypatch, when=lambda self, *_: self is job.text.decoder)
    if how == "cancel" and method == "flush":
        broken.cancel()
    elif how == "timeout" and method == "flush":
        job.deadline = 0.0
    driver.finish(broken, other)
    assert isinstance(error(broken), BrokenError)
    assert end(other).finish_reason == "length"
    driver.drain()


def test_a_failed_pass_ends_all_rows_and_the_engine_goes_on(
    model: Qwen3VL, prompts: dict[str, Prompt], drive: Callable[..., Driver]
) -> None:
    driver = drive(model, interleave=10)
    rows = [driver.ask(prompts[name], 50) for name in ("text", "image")]
    driver.until(lambda: all(len(row.tokens) > 2 for row in rows))
    reading, waiting = driver.ask(prompts["video"], 5), driver.ask(prompts["same grid"], 5)
    driver.step()
    assert reading.phase == "prefilling"
    with pytest.MonkeyPatch.context() as patch:
        raise_in(TextModel, "__call__", patch, when=lambda self, tokens, *_: len(tokens) == 2)
        driver.step()
    assert [type(error(row)) for row in rows] == [BrokenError, BrokenError]
    driver.finish(reading, waiting)
    assert [len(handle.tokens) for handle in (reading, waiting)] == [5, 5]
    again = driver.ask(prompts["text"], 50)
    driver.finish(again)
    assert again.tokens[: len(rows[0].tokens)] == rows[0].tokens
    driver.drain()


def test_a_picture_that_breaks_the_tower_ends_its_request_alone(
    model: Qwen3VL, prompts: dict[str, Prompt], drive: Callable[..., Driver]
) -> None:
    driver = drive(model, prefill_chunk=10)
    with pytest.MonkeyPatch.context() as patch:
        raise_in(Block, "__call__", patch, when=nth(3))
        broken, other = driver.ask(prompts["image"]), driver.ask(prompts["text"])
        driver.finish(broken, other)
    assert isinstance(error(broken), BrokenError)
    assert end(other).finish_reason == "length"
    again = driver.ask(prompts["image"])
    driver.finish(again)
    assert len(again.tokens) == 16
    driver.drain()


def test_a_failed_engine_says_so_to_all(serve: Callable[..., Qwen3VL], monkeypatch: Patch) -> None:
    model = serve()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with busy(model):
        streams = [model.stream("Hello") for _ in range(3)]
        step = model.engine.scheduler.step

        def fail() -> None:
            step()
            raise SystemExit

        monkeypatch.setattr(model.engine.scheduler, "step", fail)
    for stream in streams:
        with pytest.raises(EngineClosedError, match="SystemExit"):
            list(stream)
    with pytest.raises(EngineClosedError):
        model.generate("Hello")


# Shared work.


@contextmanager
def counted_reading() -> Iterator[dict[str, list[Any]]]:
    """Tokens of each chunk read, and identities of each tower pass."""
    seen: dict[str, list[Any]] = {"tokens": [], "media": []}
    step, begin = Prefill.step, Encoding.__init__

    def counted_step(self: Prefill, tokens: int) -> mx.array:
        hidden = step(self, tokens)
        seen["tokens"].append(hidden.shape[1])
        return hidden

    def counted_begin(self: Encoding, tower: Any, media: Any) -> None:
        seen["media"] += [medium.identity for medium in media]
        begin(self, tower, media)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefill, "step", counted_step)
        patch.setattr(Encoding, "__init__", counted_begin)
        yield seen


def test_a_picture_that_many_ask_about_at_once_is_encoded_once(
    model: Qwen3VL, drive: Callable[..., Driver]
) -> None:
    seen = picture(1, 96)
    asked = [[turn(f"Number {i}", seen, "Well?", seen)] for i in range(4)]
    driver = drive(model, interleave=5, prefill_chunk=5)
    with counted_reading() as work:
        handles = [driver.ask(model.processor.prompt(messages)) for messages in asked]
        driver.finish(*handles)
    assert len(work["media"]) == 1
    driver.drain()


def test_a_new_prompt_that_many_ask_at_once_is_read_once(
    model: Qwen3VL, prompts: dict[str, Prompt], drive: Callable[..., Driver]
) -> None:
    driver = drive(model, interleave=16, prefill_chunk=16)
    prompt = prompts["image and video"]
    with counted_reading() as work:
        handles = [driver.ask(prompt) for _ in range(4)]
        driver.finish(*handles)
    assert sum(work["tokens"]) == len(prompt.token_ids) + 3  # each its last
    assert all(handle.tokens == handles[0].tokens for handle in handles)
    driver.drain()


def test_cached_tokens_are_those_that_were_not_read(
    model: Qwen3VL, drive: Callable[..., Driver]
) -> None:
    driver = drive(model, prefill_chunk=40)
    messages: list[dict[str, Any]] = []
    for i in range(4):
        messages = [*messages, turn(picture(i, 96), "And this?" * i)]
        prompt = model.processor.prompt(messages)
        with counted_reading() as work:
            handle = driver.ask(prompt, 6)
            driver.finish(handle)
        usage = end(handle).usage
        assert usage is not None
        assert usage.prompt_tokens == len(prompt.token_ids)
        assert usage.cached_tokens == usage.prompt_tokens - sum(work["tokens"])
        assert (usage.cached_tokens > 0) == (i > 0)
        assert work["media"] == [prompt.media[-1].identity]
        messages = [*messages, {"role": "assistant", "content": "So it is."}]


def test_statistics(
    model: Qwen3VL, prompts: dict[str, Prompt], drive: Callable[..., Driver]
) -> None:
    driver = drive(model)
    for _ in range(2):
        driver.finish(driver.ask(prompts["same grid"], 3))
    prefix, features = driver.scheduler.prefix, driver.scheduler.features.stats
    assert prefix is not None
    length = len(prompts["same grid"].token_ids)
    held = prefix.stats
    assert (held.hits, held.misses, held.hit_tokens) == (1, 1, length - 1)
    assert held.tokens == length + 2  # the last token of an answer is never read
    assert held.bytes == held.tokens * 4 * 2 * 2 * 32 * 4  # layers, k and v, heads, width, float32
    assert (features.entries, features.misses, features.hits) == (2, 2, 0)
    load = driver.scheduler.load
    assert (load.finished, load.waiting, load.prefilling, load.running) == (2, 0, 0, 0)
    assert load.reserved_bytes == 0


# The thread.


def test_any_thread_may_ask(demo: Qwen3VL, scene: Image) -> None:
    sums = [(a, b) for a in range(2, 5) for b in range(2, 6)]

    def ask(pair: tuple[int, int]) -> str:
        return demo.generate(f"What is {pair[0]} + {pair[1]}?").text

    alone = [ask(pair) for pair in sums]
    with ThreadPoolExecutor(12) as pool:
        picture = pool.submit(lambda: demo.generate(QUESTION, images=[scene]).text)
        assert list(pool.map(ask, sums)) == alone
        assert picture.result() == TRUTH


def test_answers_are_awaited(demo: Qwen3VL, scene: Image) -> None:
    async def ask(text: str, **media: Any) -> str:
        handle = demo.stream(text, **media)
        return "".join([chunk.text async for chunk in handle.handle])

    async def both() -> list[str]:
        return await asyncio.gather(ask("What is 3 + 4?"), ask(QUESTION, images=[scene]))

    assert asyncio.run(both()) == ["7", TRUTH]


def test_a_loop_that_is_gone_harms_nobody(demo: Qwen3VL) -> None:
    async def leave() -> Any:
        stream = demo.stream("Hello", **ENDLESS)
        async for _ in stream.handle:
            return stream

    left = asyncio.run(leave())
    assert demo.generate("What is 3 + 4?").text == "7"
    left.close()


def test_closing_ends_everything(serve: Callable[..., Qwen3VL]) -> None:
    model = serve(max_batch=2)
    streams = [model.stream("Hello", **ENDLESS) for _ in range(4)]
    next(streams[0])
    model.close()
    model.close()
    assert [list(stream)[-1].finish_reason for stream in streams] == ["cancelled"] * 4
    assert_nothing_held(model.engine.scheduler)
    for ask in (model.generate, model.stream, model.logits):
        with pytest.raises(EngineClosedError, match="closed"):
            ask("Hello")
    streams[0].close()


def test_a_model_that_is_dropped_takes_its_thread_and_weights_along() -> None:
    model = load("demo")
    model.generate("Hello", max_tokens=2)
    thread = model.engine._thread
    assert thread is not None
    assert thread.is_alive()
    gone = [weakref.ref(model), weakref.ref(model.engine), weakref.ref(model.model)]
    del model
    gc.collect()
    thread.join(timeout=20)
    assert not thread.is_alive()
    del thread
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_quantizing_anew_lets_the_old_weights_go() -> None:
    model = load("demo")
    model.generate("Hello", max_tokens=2)
    old = weakref.ref(model.model)
    model.requantize("8bit")
    gc.collect()
    assert old() is None
    assert model.generate("What is 3 + 4?").text == "7"
    model.close()


PROGRAM = """
import sys, threading
from qwen3vl_mlx import load
model = load("demo")
endless = {"logit_bias": {1000: -1e9, 998: -1e9}, "max_tokens": 1900}
streams = [model.stream("Hello", **endless) for _ in range(3)]
for stream in streams:
    next(stream)
print("running", flush=True)
if sys.argv[1] == "wait":
    list(streams[0])
elif sys.argv[1] == "thread":
    threading.Thread(target=list, args=(streams[0],), daemon=True).start()
elif sys.argv[1] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("how", "code"), [("leave", 0), ("thread", 0), ("raise", 3), ("wait", -signal.SIGINT)]
)
def test_a_program_that_ends_while_it_answers_ends_cleanly(how: str, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        if how == "wait":
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.rstrip().endswith(b"KeyboardInterrupt") if how == "wait" else errors == b""
