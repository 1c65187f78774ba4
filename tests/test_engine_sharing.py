"""Work that many requests have in common is done once, and is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from driving import Driver
from law import picture
from law import user as turn
from serving import end

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.vision import Encoding
from qwen3vl_mlx.processing.prompt import Prompt


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
