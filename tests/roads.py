"""Roads from a prompt to its answer: alone, and through the engine. See test_law.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from driving import Driver
from law import INPUTS, STEPS, Messages, Run, extended, one_shot, user

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.draft_model import DraftCheckpoint
from qwen3vl_mlx.engine.output import Usage
from qwen3vl_mlx.engine.prefix_cache import prompt_key
from qwen3vl_mlx.engine.request import Handle
from qwen3vl_mlx.processing.prompt import Prompt


@dataclass(frozen=True)
class Case:
    """A prompt to a model, and the answer of one full pass."""

    model: Qwen3VL
    kv_bits: int | None
    messages: Messages
    prompt: Prompt
    law: Run
    drive: Callable[..., Driver]

    def driver(self, **options: Any) -> Driver:
        return self.drive(self.model, kv_bits=self.kv_bits, **options)

    def part_of_law(self, steps: int) -> Run:
        """The first steps of the answer alone."""
        begin = len(self.law.logits) - STEPS
        return Run(self.law.tokens[:steps], self.law.logits[begin : begin + steps])

    def run(self, driver: Driver, handle: Handle) -> Run:
        driver.finish(handle)
        return Run(handle.tokens, driver.logits(handle))


# Roads of one sequence.


def in_chunks(chunk: int) -> Road:
    return lambda case, _: one_shot(case.model, case.prompt, chunk, case.kv_bits)


def fused_rope(case: Case, folder: Path) -> Run:
    rope = case.model.model.language_model.model.rope
    was, rope.fused = rope.fused, True
    try:
        return one_shot(case.model, case.prompt, 7, case.kv_bits)
    finally:
        rope.fused = was


# Roads through the engine.


def engine_alone(case: Case, folder: Path) -> Run:
    driver = case.driver()
    run = case.run(driver, driver.ask(case.prompt))
    driver.drain()
    return run


def in_small_pieces(case: Case, folder: Path) -> Run:
    """Beside a row that decodes: a block of the tower, or up to three tokens, at a time."""
    driver = case.driver(interleave=3, prefill_chunk=3, prefix_cache_bytes=0)
    neighbour = driver.ask(case.model.processor.prompt([user("And?")]), 1000)
    driver.until(lambda: len(neighbour.tokens) > 1)
    handle = driver.ask(case.prompt)
    steps = driver.until(lambda: handle.phase == "running")
    assert steps >= len(case.prompt.token_ids) // 3 + 2 * bool(case.prompt.media)
    return case.run(driver, handle)


def asked_twice(case: Case, folder: Path) -> Run:
    driver = case.driver()
    driver.finish(driver.ask(case.prompt, 4))
    handle = driver.ask(case.prompt)
    run = case.run(driver, handle)
    assert usage(handle).cached_tokens == len(case.prompt.token_ids) - 1
    return run


def given_up_and_asked(case: Case, folder: Path) -> Run:
    half = len(case.prompt.token_ids) // 2
    driver = case.driver(prefill_chunk=half)
    first = driver.ask(case.prompt)
    driver.until(lambda: any(job.prefill.done >= half for job in driver.scheduler.reader.jobs))
    done = driver.scheduler.reader.jobs[0].prefill.done
    first.cancel()
    handle = driver.ask(case.prompt)
    run = case.run(driver, handle)
    assert usage(handle).cached_tokens == prompt_key(case.prompt).cut(done)
    return run


def features_held(case: Case, folder: Path) -> Run:
    """Every picture was seen before, in another order and behind other words."""
    driver = case.driver(prefix_cache_bytes=0)
    parts = [part for turn in case.messages if turn["role"] == "user" for part in turn["content"]]
    media = [part for part in parts if part["type"] != "text"]
    seen = [{"type": "text", "text": "Good day to you."}, *reversed(media)]
    other = case.model.processor.prompt([{"role": "user", "content": seen}])
    driver.finish(driver.ask(other, 2))
    before = driver.scheduler.features.stats
    handle = driver.ask(case.prompt)
    run = case.run(driver, handle)
    after = driver.scheduler.features.stats
    assert (after.misses, after.hits - before.hits) == (before.misses, len(media))
    return run


def restored_from_disk(case: Case, folder: Path) -> Run:
    """Half of the answer, and the rest after a restart."""
    driver = case.driver(cache_folder=folder)
    first = case.run(driver, driver.ask(case.prompt, STEPS // 2))
    driver.scheduler.close()
    longer = extended(case.model, case.prompt, first.tokens)
    fresh = case.driver(cache_folder=folder)
    handle = fresh.ask(longer, STEPS // 2)
    second = case.run(fresh, handle)
    assert usage(handle).cached_tokens == len(longer.token_ids) - 1
    return Run(first.tokens + second.tokens, np.concatenate([first.logits, second.logits]))


def guessed_by_lookup(case: Case, folder: Path) -> Run:
    driver = case.driver(speculative="lookup")
    return case.run(driver, driver.ask(case.prompt))


def guessed_by_a_model(case: Case, folder: Path) -> Run:
    """The model drafts for itself, so that nearly every guess is right; then it begins anew."""
    driver = case.driver(draft=own_draft(case.model))
    handle = driver.ask(case.prompt)
    run = case.run(driver, handle)
    assert usage(handle).decode_steps < STEPS // 2
    return run


def own_draft(model: Qwen3VL) -> DraftCheckpoint:
    return DraftCheckpoint(model.model, model.processor.tokenizer)


def usage(handle: Handle) -> Usage:
    (found,) = [chunk.usage for chunk in handle if chunk.usage is not None]
    return found


# Single tokens are slow; 64 make a second chunk for the longest prompts only.
ONLY_FOR = {
    "chunks of 1": ("text", "image", "same grid", "later turn", "image and video"),
    "chunks of 64": ("text", "video", "image and video"),
    "features held": tuple(name for name in INPUTS if name != "text"),
}
Road: TypeAlias = Callable[[Case, Path], Run]
ROADS: dict[str, Road] = {
    "one shot": in_chunks(2048),
    "chunks of 1": in_chunks(1),
    "chunks of 7": in_chunks(7),
    "chunks of 64": in_chunks(64),
    "fused rope": fused_rope,
    "engine": engine_alone,
    "read in small pieces": in_small_pieces,
    "asked twice": asked_twice,
    "given up and asked": given_up_and_asked,
    "features held": features_held,
    "restored from disk": restored_from_disk,
    "guessed by lookup": guessed_by_lookup,
    "guessed by a model": guessed_by_a_model,
}
