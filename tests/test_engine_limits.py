"""Too little memory, too many requests, broken helpers: what is short costs time, not answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from driving import Driver
from law import TOLERANCE, picture, user

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine import job as engine_job
from qwen3vl_mlx.engine.batch import Batch, Decoding
from qwen3vl_mlx.engine.constraints import parse_grammar
from qwen3vl_mlx.engine.prefix_disk import DiskTier
from qwen3vl_mlx.engine.reader import PromptReader
from qwen3vl_mlx.engine.request import Handle
from qwen3vl_mlx.engine.speculative import MOST_DRAFTED, Lookup, Speculation
from qwen3vl_mlx.errors import EngineClosedError, InputError, QueueFullError
from qwen3vl_mlx.processing.prompt import Prompt

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Qwen3VL]) -> Qwen3VL:
    return tiny_model("dense64")


def asked(model: Qwen3VL, *parts: Any) -> Prompt:
    return model.processor.prompt([user(*parts)])


def end_reason(handle: Handle) -> str | None:
    assert handle.phase == "done"
    return list(handle)[-1].finish_reason


# Answers without a limit of their own outgrow the memory.

_FIRST, _STEP, _MOST = 24, 16, 600


@pytest.fixture
def small_steps(monkeypatch: Patch) -> None:
    """Answers are taken for unbounded, and reserved by a few tokens at a time."""
    monkeypatch.setattr(engine_job, "first_reserve", lambda *_: _FIRST)
    monkeypatch.setattr(engine_job, "_GROWTH", _STEP)
    monkeypatch.setattr(engine_job, "_RESUMED_CHUNK", 8)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.4},
    "guide": {"grammar": parse_grammar({"type": "json_object"}, None, None, None)},
}


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("others", [1, 3])
@pytest.mark.parametrize("options", [{}, {"prefix_cache_bytes": 0}], ids=["cached", "anew"])
def test_neighbours_do_not_cut_an_answer_short(
    model: Qwen3VL,
    drive: Callable[..., Driver],
    way: str,
    others: int,
    options: dict[str, Any],
) -> None:
    prompt = asked(model, picture(1, 96), "Tell me at length.")
    admission = model.engine.scheduler.admission
    alone = drive(model, prefix_cache_bytes=0)
    law = alone.ask(prompt, _MOST, seed=5, **WAYS[way])
    alone.finish(law)
    logits = alone.logits(law)
    # Two fit as they begin, and one alone to its end.
    pair = admission.together([admission.cost(prompt, 2 * _FIRST)] * 2)
    limit = max(pair, admission.cost(prompt, _MOST).total + 2**18)
    driver = drive(model, memory_limit=admission.weights + admission.reserved + limit, **options)
    handle = driver.ask(prompt, _MOST, seed=5, **WAYS[way])
    neighbours = [driver.ask(asked(model, f"Number {i}"), _MOST) for i in range(others)]
    phases: list[str] = []
    everyone = [handle, *neighbours]
    while driver.scheduler.busy:
        driver.step()
        phases += [each.phase for each in everyone if each.tokens]
        assert driver.scheduler.load.reserved_bytes <= driver.scheduler.admission.available
    assert way == "guide" or "waiting" in phases
    assert handle.tokens == law.tokens
    assert np.abs(driver.logits(handle) - logits).max() <= TOLERANCE * np.abs(logits).max()
    assert end_reason(handle) == end_reason(law)
    assert [len(each.tokens) for each in neighbours] == [_MOST] * others
    driver.drain()


@pytest.mark.usefixtures("small_steps")
def test_an_answer_that_fills_the_memory_alone_ends(
    model: Qwen3VL, drive: Callable[..., Driver]
) -> None:
    prompt = asked(model, "Tell me.")
    admission = model.engine.scheduler.admission
    limit = admission.weights + admission.reserved + admission.cost(prompt, 200).total
    driver = drive(model, memory_limit=limit)
    handle = driver.ask(prompt, 3000)
    driver.finish(handle)
    assert end_reason(handle) == "length"
    assert 200 <= len(handle.tokens) < 1500
    driver.drain()


# What guesses and remembers may break without harm.


@pytest.mark.parametrize("method", ["begin", "keep", "waits", "draft", "advance", "caches"])
def test_a_broken_drafter_changes_no_answer(
    model: Qwen3VL,
    drive: Callable[..., Driver],
    monkeypatch: Patch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    prompts = [asked(model, "one two three " * 8), asked(model, picture(1), "And?")]
    plain = drive(model)
    laws = [plain.ask(prompt, 40) for prompt in prompts]
    plain.finish(*laws)

    class Broken(Lookup):
        def waits(self, row: Decoding) -> bool:
            return True

    def fail(*_: Any) -> Any:
        raise RuntimeError(method)

    monkeypatch.setattr(Broken, method, property(fail) if method == "caches" else fail)
    driver = drive(model)
    config = model.model.config.text
    driver.scheduler.speculation = Speculation(Broken(), config, MOST_DRAFTED)
    handles = [driver.ask(prompt, 40) for prompt in prompts]
    driver.finish(*handles)
    assert [handle.tokens for handle in handles] == [law.tokens for law in laws]
    assert sum("guessing ahead" in each.message for each in caplog.records) == 1
    driver.drain()


@pytest.mark.parametrize("running", [False, True])
def test_a_failed_join_ends_those_it_touched(
    model: Qwen3VL, drive: Callable[..., Driver], running: bool
) -> None:
    driver = drive(model)
    first = [driver.ask(asked(model, "Hi"), 40)] if running else []
    driver.until(lambda: all(len(each.tokens) > 2 for each in first))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "join", fail_join)
        joining = driver.ask(asked(model, "Well?"), 5)
        driver.finish(joining)
    for each in [joining, *first]:
        with pytest.raises(RuntimeError, match="join"):
            list(each)
    again = driver.ask(asked(model, "Well?"), 5)
    driver.finish(again)
    assert end_reason(again) == "length"
    driver.drain()


def fail_join(*_: Any) -> None:
    raise RuntimeError("join")


def test_a_prefix_that_cannot_be_kept_harms_nobody(
    model: Qwen3VL, drive: Callable[..., Driver], monkeypatch: Patch
) -> None:
    driver = drive(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("insert")

    assert driver.scheduler.prefix is not None
    monkeypatch.setattr(driver.scheduler.prefix, "insert", fail)
    late = driver.ask(asked(model, "Hi"), 400, timeout=1e6)
    driver.until(lambda: len(late.tokens) > 2)
    next(iter(driver.scheduler.running.values())).deadline = 0.0
    driver.finish(late)
    assert end_reason(late) == "timeout"
    driver.drain()


# The disk.

PROGRAM = """
import sys
from qwen3vl_mlx import EngineOptions, load
model = load("demo", engine=EngineOptions(cache_folder=sys.argv[1]))
endless = {"logit_bias": {1000: -1e9, 998: -1e9}, "max_tokens": 1500}
stream = model.stream("Write a story " * 20, **endless)
next(stream)
"""


def test_a_program_that_ends_keeps_what_it_computed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list(tmp_path.iterdir())) >= 2  # the prompt, and the answer so far


def long_prompts(model: Qwen3VL, count: int) -> list[Prompt]:
    return [asked(model, f"{i} " + "word " * 60) for i in range(count)]


def test_only_what_may_begin_is_read_from_the_disk(
    model: Qwen3VL, drive: Callable[..., Driver], tmp_path: Path
) -> None:
    prompts = long_prompts(model, 6)
    before = drive(model, cache_folder=tmp_path)
    before.finish(*[before.ask(prompt, 1) for prompt in prompts])
    assert before.scheduler.prefix is not None
    before.scheduler.prefix.close()
    driver = drive(model, cache_folder=tmp_path, max_batch=3)
    handles = [driver.ask(prompt, 3) for prompt in prompts]
    most = 0
    while driver.scheduler.busy:
        driver.step()
        waiting = driver.scheduler.waiting
        restoring = sum(job.restoring is not None for job in waiting)
        most = max(most, restoring)
        assert restoring + driver.scheduler.active <= 3
        assert not restoring or driver.scheduler.load.reserved_bytes > 0
    assert 1 <= most <= 2
    usages = [list(handle)[-1].usage for handle in handles]
    assert all(usage is not None and usage.cached_tokens > 40 for usage in usages)
    driver.scheduler.prefix.close()  # type: ignore[union-attr]


def test_a_match_never_waits_for_the_disk(
    model: Qwen3VL, drive: Callable[..., Driver], tmp_path: Path, monkeypatch: Patch
) -> None:
    (prompt,) = long_prompts(model, 1)
    driver = drive(model, cache_folder=tmp_path)
    driver.finish(driver.ask(prompt, 1))
    cache = driver.scheduler.prefix
    assert cache is not None
    assert cache.disk is not None
    cache.disk.flush()
    cache.shrink(0)
    monkeypatch.setattr(DiskTier, "read", lambda *_: pytest.fail("it reads"))
    assert cache.match(engine_job.prompt_key(prompt)).length == 0
    cache.close()


def test_the_engine_wakes_when_the_disk_is_read(
    serve: Callable[..., Qwen3VL], tmp_path: Path, monkeypatch: Patch
) -> None:
    text = "word " * 60
    first = serve(cache_folder=tmp_path)
    law = first.generate(text, max_tokens=3).text
    first.close()
    slow, read = Event(), DiskTier._read
    monkeypatch.setattr(DiskTier, "_read", lambda *args: (slow.wait(), read(*args))[1])
    model = serve(cache_folder=tmp_path)
    stream = model.stream(text, max_tokens=3)
    late = model.stream(text + "?", max_tokens=3, timeout=0.1)
    assert list(late)[-1].finish_reason == "timeout"
    assert model.engine.stats.load.steps < 50  # it does not turn round and round
    slow.set()
    assert "".join(chunk.text for chunk in stream) == law


# The queue.


def test_requests_that_start_at_once_are_not_queued(serve: Callable[..., Qwen3VL]) -> None:
    model = serve(max_batch=8, max_queue=4)
    entered, go_on = Event(), Event()

    def hold() -> None:
        entered.set()
        go_on.wait()

    thread = Thread(target=model.engine.call, args=(hold,))
    thread.start()
    entered.wait()
    streams = [model.stream("What is 3 + 4?") for _ in range(12)]
    streams[0].handle.cancel()  # one more message, which is no request
    with pytest.raises(QueueFullError, match="4"):
        model.stream("Hello")
    go_on.set()
    thread.join()
    said = ["".join(chunk.text for chunk in stream) for stream in streams[1:]]
    assert said == ["7"] * 11
    assert model.generate("What is 3 + 4?").text == "7"


def test_a_limit_below_the_weights_is_refused(serve: Callable[..., Qwen3VL]) -> None:
    with pytest.raises(InputError, match="memory_limit"):
        serve(memory_limit=1000)


def test_an_engine_closes_only_when_idle(serve: Callable[..., Qwen3VL]) -> None:
    model = serve()
    engine = model.engine
    stream = model.stream("Hello", logit_bias={1000: -1e9, 998: -1e9}, max_tokens=1500)
    assert not engine.close_if_idle()
    next(stream)
    assert not engine.close_if_idle()
    stream.close()
    engine.call(lambda: None)
    assert engine.close_if_idle()
    assert engine.close_if_idle()
    with pytest.raises(EngineClosedError):
        model.generate("Hello")


def test_a_closed_engine_leaves_nothing_for_the_end(
    serve: Callable[..., Qwen3VL], monkeypatch: Patch
) -> None:
    gone: list[Any] = []
    monkeypatch.setattr("atexit.unregister", gone.append)
    model = serve()
    model.generate("Hello", max_tokens=2)
    model.close()
    assert model.engine._at_exit in gone


# Reading.


def test_pictures_seen_before_wait_for_nobodys_encoding(
    model: Qwen3VL, drive: Callable[..., Driver]
) -> None:
    driver = drive(model, interleave=4, prefill_chunk=4, prefix_cache_bytes=0)
    driver.finish(driver.ask(asked(model, picture(1), "And?"), 1))
    slow = driver.ask(asked(model, picture(2, 512, 256), "And?"), 1)
    driver.step()
    known = driver.ask(asked(model, "So?", picture(1)), 1)
    driver.step()
    (job,) = [job for job in driver.scheduler.reader.jobs if job.handle is known]
    driver.until(lambda: job.prefill is not None and job.prefill.ready, 3)
    assert driver.scheduler.reader._encoding is not None
    driver.finish(known, slow)
    driver.drain()


def test_who_waits_for_a_reader_is_decided_once(
    model: Qwen3VL, drive: Callable[..., Driver], monkeypatch: Patch
) -> None:
    from qwen3vl_mlx.engine import soon

    calls: list[int] = []
    compare = soon.shared_prefix
    monkeypatch.setattr(soon, "shared_prefix", lambda *a: (calls.append(1), compare(*a))[1])
    driver = drive(model, interleave=2, prefill_chunk=2)
    prompt = asked(model, "word " * 60)
    handles = [driver.ask(prompt, 2) for _ in range(4)]
    for _ in range(20):
        driver.step()
    assert isinstance(driver.scheduler.reader, PromptReader)
    assert len(calls) == 3
    driver.finish(*handles)


def test_a_failed_draw_leaves_rows_as_they_were(
    model: Qwen3VL, drive: Callable[..., Driver]
) -> None:
    """Two rows are drawn for together; one of them cannot be, and both are tried again alone."""
    from qwen3vl_mlx.engine import batch

    driver = drive(model)
    law = driver.ask(asked(model, "Hi"), 6)
    driver.finish(law)
    chosen = batch.chosen_logprobs
    handles = [driver.ask(asked(model, text), 6, logprobs=True) for text in ("Hi", "Ho")]
    driver.until(lambda: all(len(handle.tokens) == 2 for handle in handles))
    calls: list[int] = []

    def second_fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("logprobs")
        return chosen(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "chosen_logprobs", second_fails)
        driver.step()
        drawn = [job.row.drawn for job in driver.scheduler.running.values() if job.row]
        steps = [job.row.sampler_state.step for job in driver.scheduler.running.values() if job.row]
    assert drawn == steps == [4, 4]
    driver.finish(*handles)
    assert handles[0].tokens == law.tokens
