"""Many requests on one model: who waits for whom, and what is refused.

Steps are counted, not timed: a `Driver` steps the scheduler in the test's own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from asking import user
from driving import Driver
from law import INPUTS, picture
from law import user as turn
from serving import busy

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.errors import InputError, QueueFullError
from qwen3vl_mlx.models.vision import Block
from qwen3vl_mlx.processing.prompt import Prompt

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


# Refused, or queued.


def test_a_full_queue_refuses(serve: Callable[..., Qwen3VL]) -> None:
    model = serve(max_batch=2, max_queue=2)
    with busy(model):
        streams = [model.stream("What is 3 + 4?") for _ in range(4)]
        with pytest.raises(QueueFullError, match="2"):
            model.stream("Hello")
    assert ["".join(chunk.text for chunk in stream) for stream in streams] == ["7"] * 4
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
    assert limited.engine.stats.load.failed == 0


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
