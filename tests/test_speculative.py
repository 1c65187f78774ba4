"""Answers with guessed tokens are the answers without; only how fast they come may differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import pytest
from asking import about, script
from asking import user as asked
from driving import Driver
from guessing import GUESSES, SAMPLING, Told, random_guess, told, usage
from law import INPUTS, extended, user
from PIL.Image import Image
from tiny import write_tiny

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.engine.batch import Batch, Decoding, draw_rows
from qwen3vl_mlx.engine.engine import Engine, EngineOptions
from qwen3vl_mlx.engine.grammar import parse_grammar
from qwen3vl_mlx.engine.output import Completion, Usage
from qwen3vl_mlx.engine.request import Handle
from qwen3vl_mlx.engine.sampling import Sampler, SamplingParams
from qwen3vl_mlx.engine.speculative import (
    MOST_DRAFTED,
    Drafter,
    Lookup,
    Speculation,
)
from qwen3vl_mlx.errors import InputError

TOLERANCE = 1e-4
Drive: TypeAlias = Callable[..., Driver]
Models: TypeAlias = Callable[[str], Qwen3VL]

ROADS = [
    *[("dense64", None, "greedy", guess) for guess in GUESSES],
    *[("dense64", None, kind, "right and wrong") for kind in SAMPLING],
    *[(variant, None, "sampled", "right and wrong") for variant in ("dense72", "moe")],
    *[("dense64", bits, "sampled", "right and wrong") for bits in (8, 4)],
]


@pytest.mark.parametrize(("variant", "kv_bits", "kind", "guess"), ROADS)
def test_a_batch_answers_as_without(
    tiny_model: Models, drive: Drive, variant: str, kv_bits: int | None, kind: str, guess: str
) -> None:
    """Four rows of other lengths and pictures, which come and go at other steps."""
    model = tiny_model(variant)
    prompts = [model.processor.prompt(INPUTS[n]) for n in ("text", "image", "same grid", "video")]
    params = {**SAMPLING[kind], "logprobs": True, "top_logprobs": 2}

    def run(driver: Driver) -> list[Handle]:
        handles = []
        for i, prompt in enumerate(prompts):
            handles.append(driver.ask(prompt, 9 + 5 * i, seed=100 + i, **params))
            for _ in range(2):
                driver.scheduler.step()
        driver.finish(*handles)
        return handles

    plain = drive(model, kv_bits=kv_bits)
    expected = run(plain)
    logits = [plain.logits(handle) for handle in expected]
    ours = drive(model, kv_bits=kv_bits)
    told(ours, {100 + i: handle.tokens for i, handle in enumerate(expected)}, GUESSES[guess])
    got = run(ours)
    for mine, theirs, rows in zip(got, expected, logits, strict=True):
        assert mine.tokens == theirs.tokens
        difference = np.abs(ours.logits(mine) - rows).max() / np.abs(rows).max()
        assert difference < TOLERANCE
        mine_said, theirs_said = mine.result(), theirs.result()
        assert [x.token_id for x in mine_said.logprobs] == [
            x.token_id for x in theirs_said.logprobs
        ]
        assert np.allclose(
            [x.logprob for x in mine_said.logprobs],
            [x.logprob for x in theirs_said.logprobs],
            atol=1e-3,
        )
        check_statistics(mine_said.usage, guess)
    ours.drain()


def check_statistics(seen: Usage, guess: str) -> None:
    assert seen.completion_tokens == 1 + seen.decode_steps + seen.accepted_tokens
    if guess == "right":
        assert seen.drafted_tokens == seen.accepted_tokens > 0
        assert seen.completion_tokens > 2 * seen.decode_steps
    elif guess == "wrong":
        assert seen.drafted_tokens > seen.accepted_tokens == 0
    elif guess == "none":
        assert seen.drafted_tokens == 0
    else:
        assert seen.drafted_tokens > seen.accepted_tokens > 0


def test_the_cache_holds_what_was_said(tiny_model: Models, drive: Drive) -> None:
    """After every read, rows are as long as they say, whatever was guessed."""
    model = tiny_model("dense64")
    prompts = [model.processor.prompt(INPUTS[name]) for name in ("text", "image")]
    plain = drive(model)
    expected = [plain.ask(prompt, 24, seed=7 + i) for i, prompt in enumerate(prompts)]
    plain.finish(*expected)
    driver = drive(model)
    answers = {7 + i: handle.tokens for i, handle in enumerate(expected)}
    told(driver, answers, random_guess)
    handles = [driver.ask(prompt, 24, seed=7 + i) for i, prompt in enumerate(prompts)]
    seen = 0
    while driver.scheduler.busy:
        driver.scheduler.step()
        batch = driver.scheduler.batch
        for i, row in enumerate(batch.rows):
            said = len(row.tokens) + len(handles[row.sampler.seed - 7].request.prompt.token_ids)
            if row.tokens and not (batch.unread and batch.unread.drafted):
                assert row.length == said == batch.layers[0].lengths[i]
                seen += 1
    assert seen
    assert [handle.tokens for handle in handles] == list(answers.values())


@pytest.mark.parametrize("name", ["text", "same grid"])
@pytest.mark.parametrize("guess", ["right", "wrong", "right and wrong"])
def test_what_the_prefix_cache_keeps_is_right(
    tiny_model: Models, drive: Drive, name: str, guess: str
) -> None:
    model = tiny_model("dense64")
    prompt = model.processor.prompt(INPUTS[name])
    plain = drive(model, prefix_cache_bytes=0)
    first = plain.ask(prompt, 20, seed=1)
    plain.finish(first)
    driver = drive(model)
    told(driver, {1: first.tokens}, GUESSES[guess])
    driver.finish(driver.ask(prompt, 20, seed=1))
    driver.scheduler.speculation = None
    longer = extended(model, prompt, [*first.tokens, 5, 6, 7])
    expected, got = plain.ask(longer, 10), driver.ask(longer, 10)
    plain.finish(expected)
    driver.finish(got)
    assert got.tokens == expected.tokens
    assert np.abs(driver.logits(got) - plain.logits(expected)).max() < 1e-3
    assert usage(got).cached_tokens >= len(prompt.token_ids) + 19


def test_sampled_tokens_follow_the_distribution() -> None:
    """Pairs of tokens over many seeds, where the first was guessed: as likely as they should be."""
    count, size, guess = 4000, 4, 1
    weights = np.random.RandomState(0).dirichlet(np.ones(size), 3)  # next, and after a guess
    params = SamplingParams(temperature=0.5)
    logits = np.log(weights[:2]) * 0.5
    rows = []
    for seed in range(count):
        sampler = Sampler(params.updated({"seed": seed}), np.zeros(1, np.int32), size)
        rows.append(Decoding(sampler, sampler.start(), None, 0, 9, None, 1))
    drawn = draw_rows(
        mx.array(np.tile(logits, (count, 1)).astype(np.float32)), rows, [(guess,)] * count
    )
    answers = Batch(None).read(drawn)  # type: ignore[arg-type]
    firsts = np.bincount([answer.tokens[0] for answer in answers], minlength=size)
    seconds = np.bincount([a.tokens[1] for a in answers if len(a.tokens) == 2], minlength=size)
    assert seconds.sum() == firsts[guess] == sum(answer.accepted for answer in answers)
    for seen, expected in ((firsts, weights[0]), (seconds, weights[1])):
        chi_square = ((seen - seen.sum() * expected) ** 2 / (seen.sum() * expected)).sum()
        assert chi_square < 21.1  # 3 degrees of freedom, one in 10,000
    plain = draw_rows(mx.array(np.tile(logits[0], (count, 1)).astype(np.float32)), fresh(rows))
    assert plain.tokens.tolist() == [answer.tokens[0] for answer in answers]


def fresh(rows: Sequence[Decoding]) -> list[Decoding]:
    return [Decoding(row.sampler, row.sampler.start(), None, 0, 9, None, 1) for row in rows]


# Ends inside an accepted draft.

SPEECH = "The red box stands on the table. The red box stands on the table. And so on and so on."
ENDS: dict[str, dict[str, Any]] = {
    "its own end": {},
    **{f"max_tokens {n}": {"max_tokens": n} for n in range(1, 14)},
    "stop string": {"stop": ["ble. The"]},
    "stop inside a token": {"stop": ["stan"]},
    "loop guard": {"loop_guard": True},
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("guess", ["right", "right and wrong"])
def test_ends_inside_a_draft(
    monkeypatch: pytest.MonkeyPatch, demo: Qwen3VL, end: str, guess: str
) -> None:
    speech = "same same " * 120 if end == "loop guard" else SPEECH
    tokens = demo.processor.tokenizer.encode(speech + "<|im_end|>")
    script(monkeypatch, demo, speech)
    params = SamplingParams(temperature=0.0, seed=1).updated(ENDS[end])

    def run(drafter: Drafter | None) -> Completion:
        engine = Engine(demo.model, demo.processor.tokenizer, demo.asking.compiler, EngineOptions())
        if drafter is not None:
            config = demo.model.config.text
            engine.scheduler.speculation = Speculation(drafter, config, MOST_DRAFTED)
        prompt = demo.processor.prompt(asked("Hello"))
        request = demo.asking.request(prompt, params, tools=False, started=time.perf_counter())
        answer = engine.submit(request).result()
        engine.close()
        return answer

    expected, got = run(None), run(Told({1: tokens}, GUESSES[guess]))
    assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)
    assert got.usage.completion_tokens == expected.usage.completion_tokens
    assert got.usage.accepted_tokens <= max(0, got.usage.completion_tokens - 1)
    if end == "loop guard":
        assert got.finish_reason == "repetition"
    elif end.startswith("max_tokens"):
        assert got.finish_reason == "length"
        assert got.usage.completion_tokens == params.max_tokens


def test_the_context_ends_inside_a_draft(tmp_path: Path, drive: Drive) -> None:
    model = load(write_tiny(tmp_path / "short", "dense64", max_position_embeddings=64))
    prompt = model.processor.prompt([user("Tell me of the sea.")])
    room = 64 - len(prompt.token_ids)
    plain, driver = drive(model), drive(model)
    expected = plain.ask(prompt, 1000, seed=1)
    plain.finish(expected)
    told(driver, {1: [*expected.tokens, *range(9)]}, list)
    got = driver.ask(prompt, 1000, seed=1)
    driver.finish(got)
    assert got.tokens == expected.tokens
    assert len(got.tokens) == room


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["red", "blue"]}, "sizes": {"type": "array", "maxItems": 5}},
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
RULES: dict[str, dict[str, Any]] = {
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    "regex": {"grammar": {"type": "regex", "value": "[a-c]{3,30}x"}},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("guess", [*GUESSES, "forbidden", "lookup"])
def test_a_grammar_holds(demo: Qwen3VL, scene: Image, rules: str, guess: str) -> None:
    guesses = {**GUESSES, "forbidden": lambda rest: [0] * len(rest)}
    prompt = demo.processor.prompt(about(scene))
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=48)
    grammar = parse_grammar(
        RULES[rules].get("response_format"), RULES[rules].get("grammar"), None, None
    )

    def run(drafter: Drafter | None, thinking: bool) -> tuple[list[int], Completion]:
        engine = Engine(demo.model, demo.processor.tokenizer, demo.asking.compiler, EngineOptions())
        if drafter is not None:
            config = demo.model.config.text
            engine.scheduler.speculation = Speculation(drafter, config, MOST_DRAFTED)
        request = demo.asking.request(prompt, params, tools=False, grammar=grammar, started=0.0)
        request = replace(request, thinking=thinking)
        if thinking:
            request = replace(request, params=params.updated({"thinking_budget": 7}))
        handle = engine.submit(request)
        answer = handle.result()
        engine.close()
        return handle.tokens, answer

    for thinking in (False, True):
        tokens, expected = run(None, thinking)
        drafter = Lookup() if guess == "lookup" else Told({5: tokens}, guesses[guess])
        got_tokens, got = run(drafter, thinking)
        assert got_tokens == tokens
        assert (got.text, got.reasoning) == (expected.text, expected.reasoning)
        assert got.finish_reason == expected.finish_reason
        if guess == "right":
            assert got.usage.accepted_tokens == got.usage.drafted_tokens > 0
        elif guess == "forbidden" and rules == "regex" and not thinking:
            assert got.usage.drafted_tokens == 0  # what the grammar forbids is not verified


@pytest.mark.parametrize(
    "changes", [{"speculative": "ngram"}, {"draft_tokens": 0}, {"draft_tokens": 8}]
)
def test_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        EngineOptions(**changes)
