"""A smaller checkpoint guesses: it sees what the large one sees, and changes no answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import pytest
from asking import about
from driving import Driver
from guessing import SAMPLING, Told, usage
from law import INPUTS
from PIL.Image import Image
from tiny import write_tiny

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.batch import Decoding
from qwen3vl_mlx.engine.draft_model import DraftCheckpoint, DraftModel
from qwen3vl_mlx.engine.engine import EngineOptions
from qwen3vl_mlx.engine.feature_cache import FeatureCache
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.sampling import Sampler, SamplingParams
from qwen3vl_mlx.engine.speculative import (
    Either,
)
from qwen3vl_mlx.engine.vision import encode
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.processing.prompt import Prompt

TOLERANCE = 1e-4
Drive: TypeAlias = Callable[..., Driver]
Models: TypeAlias = Callable[[str], Qwen3VL]


@pytest.mark.parametrize(
    ("draft", "kind"),
    [*(("dense64", kind) for kind in SAMPLING), ("dense72", "sampled"), ("moe", "greedy")],
)
def test_a_draft_model_changes_no_answer(
    tiny_model: Models, drive: Drive, draft: str, kind: str
) -> None:
    """Itself, and others that know as little, with pictures; rows come and go."""
    model, small = tiny_model("dense64"), tiny_model(draft)
    prompts = [model.processor.prompt(INPUTS[n]) for n in ("text", "image", "video", "text")]
    runs = []
    for checkpoint in (None, DraftCheckpoint(small.model, small.processor.tokenizer)):
        driver = drive(model, draft=checkpoint, interleave=64)
        handles = []
        for i, prompt in enumerate(prompts):
            handles.append(driver.ask(prompt, 12 + 9 * i, seed=50 + i, **SAMPLING[kind]))
            for _ in range(3):
                driver.scheduler.step()
        driver.finish(*handles)
        driver.drain()
        runs.append([handle.tokens for handle in handles])
        total = [usage(handle) for handle in handles]
    assert runs[0] == runs[1]
    drafted = sum(each.drafted_tokens for each in total)
    accepted = sum(each.accepted_tokens for each in total)
    assert drafted > 0
    if draft == "dense64" and kind != "dry":  # drafts cannot know what DRY will do
        assert accepted > 0.6 * drafted  # the drafts are not kept from special tokens


def test_a_draft_model_sees_the_pictures(demo: Qwen3VL, scene: Image, other_scene: Image) -> None:
    checkpoint = DraftCheckpoint(demo.model, demo.processor.tokenizer)
    model = load("demo", engine=EngineOptions(draft=checkpoint, speculative="lookup"))
    pictures = (scene, other_scene, scene)
    streams = [model.stream(about(picture), temperature=0) for picture in pictures]
    ours = [stream.handle.result() for stream in streams]
    kept = model.engine.scheduler.caches
    assert [cache.stats.bytes > 0 for cache in kept] == [True] * 4  # two of either model
    model.engine.clear_caches()
    assert [cache.stats.bytes for cache in kept] == [0] * 4
    model.close()
    for answer, picture in zip(ours, pictures, strict=True):
        assert answer.text == demo.generate(about(picture), temperature=0).text
        assert answer.usage.accepted_tokens > 0.8 * answer.usage.drafted_tokens > 0
        assert answer.usage.completion_tokens > 2 * answer.usage.decode_steps


def test_either_asks_the_second_where_the_first_has_nothing(demo: Qwen3VL) -> None:
    sampler = Sampler(SamplingParams(seed=1), np.zeros(1, np.int32), 9)
    rows = [Decoding(sampler, sampler.start(), None, 0, 9, None, 1) for _ in range(2)]
    first = Told({1: [5, 6, 7]}, list)
    second = Told({1: [8, 8, 8]}, list)
    assert Either(first, second).draft(rows, [2, 3]) == [[5, 6], [5, 6, 7]]
    first.guess = lambda rest: []
    assert Either(first, second).draft(rows, [2, 0]) == [[8, 8], []]


def test_drafts_of_another_family_are_refused(demo: Qwen3VL, tmp_path: Path) -> None:
    tokenizer = demo.processor.tokenizer
    other = load(write_tiny(tmp_path / "other", "dense64", vocab_size=1088))
    with pytest.raises(InputError, match="vocab_size"):
        DraftCheckpoint(other.model, tokenizer).check(demo.model, tokenizer)
    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    backend.add_tokens(["<new>"])
    renamed = DraftCheckpoint(demo.model, replace(tokenizer, backend=backend))
    with pytest.raises(InputError, match="tokenizer"):
        load("demo", engine=EngineOptions(draft=renamed))


@pytest.mark.parametrize("bits", [None, 8])
def test_guesses_follow_what_was_said(tiny_model: Models, bits: int | None) -> None:
    """Whatever the model made of earlier guesses, the next ones continue the answer as it is."""
    model = tiny_model("dense64")
    prompts = [model.processor.prompt(INPUTS[name]) for name in ("same grid", "text", "video")]
    drafter = DraftModel(model.model, FeatureCache(2**20), kv_bits=bits)
    rows: list[Decoding] = []
    random = np.random.RandomState(0)
    for step in range(12):
        if step % 3 == 0 and len(rows) < len(prompts):  # rows join
            prompt = prompts[len(rows)]
            sampler = Sampler(SamplingParams(temperature=0.0), prompt.token_ids, 1024)
            row = Decoding(
                sampler, sampler.start(), None, prompt.rope_delta, 99, None, len(prompt.token_ids)
            )
            request = model.asking.request(prompt, sampler.params, tools=False, started=0.0)
            rows.append(row)
            drafter.begin(row, request)
            while not drafter.waits(row):
                drafter.advance(40)
        if step == 10:  # and leave
            del rows[1], prompts[1]
            drafter.keep(rows)
        counts = random.randint(0, 5, len(rows)).tolist()
        for row in rows:
            row.tokens += random.randint(0, 900, random.randint(1, 4)).tolist()
        guesses = drafter.draft(rows, counts)
        for prompt, row, guess, count in zip(prompts, rows, guesses, counts, strict=False):
            assert list(guess) == continuation(model, prompt, row.tokens, count, bits)
            row.tokens += guess[: random.randint(0, 5)]  # some are right


def continuation(
    model: Qwen3VL, prompt: Prompt, tokens: list[int], count: int, bits: int | None
) -> list[int]:
    """`count` greedy tokens after prompt and tokens, read at once."""
    prefill = Prefill(model.model, prompt, kv_cache.new_layers(model.model.config.text, bits))
    if prompt.media:
        prefill.give(encode(model.model.vision_tower, prompt.media))
    prefill.step(10**6)
    found: list[int] = []
    fed = tokens
    start = len(prompt.token_ids) + prompt.rope_delta
    while len(found) < count:
        hidden = model.model.language_model(mx.array([fed]), mx.array([start]), prefill.layers)
        start += len(fed)
        fed = [int(mx.argmax(model.model.language_model.logits(hidden[0, -1])).item())]
        found += fed
    return found


def test_memory_counts_the_draft_model(tiny_model: Models, drive: Drive) -> None:
    model, small = tiny_model("dense64"), tiny_model("dense72")
    checkpoint = DraftCheckpoint(small.model, small.processor.tokenizer)
    alone = drive(model).scheduler.admission
    both = drive(model, draft=checkpoint).scheduler.admission
    theirs = drive(small).scheduler.admission
    prompt = model.processor.prompt(INPUTS["image"])
    assert both.available == alone.available - theirs.weights
    cost, own, other = (each.cost(prompt, 500) for each in (both, alone, theirs))
    assert cost.cache == own.cache + other.cache
    assert cost.answering.total > own.answering.total + other.answering.cache


def test_a_draft_model_that_is_never_right_is_asked_seldom(
    tiny_model: Models, drive: Drive
) -> None:
    model, small = tiny_model("dense64"), tiny_model("dense72")
    checkpoint = DraftCheckpoint(small.model, small.processor.tokenizer)
    driver = drive(model, draft=checkpoint)
    handle = driver.ask(model.processor.prompt(INPUTS["text"]), 200, temperature=1.0)
    driver.finish(handle)
    seen = usage(handle)
    assert 0 < seen.drafted_tokens < 200  # and not 7 on each of some 200 steps
    assert seen.accepted_tokens < 20
