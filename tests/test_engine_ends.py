"""What ends requests, in every phase, and what goes wrong for one, and for all."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from driving import Driver
from serving import ENDLESS, busy, end, error

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.engine import scheduler as engine_scheduler
from qwen3vl_mlx.engine.constraints import Guide, parse_grammar
from qwen3vl_mlx.engine.sampling import Sampler
from qwen3vl_mlx.errors import EngineClosedError
from qwen3vl_mlx.models.text import TextModel
from qwen3vl_mlx.models.vision import Block
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.processing.tokenizer import StreamingDecoder

Patch = pytest.MonkeyPatch


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
