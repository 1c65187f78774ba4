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
from hypothesis import given, settings
from hypothesis import strategies as st
from law import INPUTS, extended, user
from PIL.Image import Image
from tiny import write_tiny

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.engine.batch import Batch, Decoding, draw_rows
from qwen3vl_mlx.engine.draft_model import DraftCheckpoint
from qwen3vl_mlx.engine.engine import Engine, EngineOptions
from qwen3vl_mlx.engine.grammar import parse_grammar
from qwen3vl_mlx.engine.output import Completion, Usage
from qwen3vl_mlx.engine.request import Handle, Request
from qwen3vl_mlx.engine.sampling import Sampler, SamplingParams
from qwen3vl_mlx.engine.speculative import (
    MOST_DRAFTED,
    Drafter,
    Either,
    Lookup,
    PromptLookup,
    Speculation,
)
from qwen3vl_mlx.errors import InputError

TOLERANCE = 1e-4
Drive: TypeAlias = Callable[..., Driver]
Models: TypeAlias = Callable[[str], Qwen3VL]
Guess: TypeAlias = Callable[[list[int]], list[int]]  # from what will be said to what is guessed


class Told:
    """A drafter that was told the answers, by seed, and passes on what `guess` makes of them."""

    def __init__(self, answers: dict[int, list[int]], guess: Guess):
        self.answers = answers
        self.guess = guess

    def begin(self, row: Decoding, request: Request) -> None:
        assert not row.tokens

    def keep(self, rows: Sequence[Decoding]) -> None:
        pass

    def waits(self, row: Decoding) -> bool:
        return True

    def draft(self, rows: Sequence[Decoding], counts: Sequence[int]) -> list[Sequence[int]]:
        rest = [self.answers[row.sampler.seed][len(row.tokens) :] for row in rows]
        return [self.guess(tokens)[:n] for tokens, n in zip(rest, counts, strict=True)]

    def advance(self, budget: int) -> int:
        return 0


def wrong(rest: list[int]) -> list[int]:
    return [(token + 1) % 900 for token in rest]


def wrong_at(place: int) -> Guess:
    return lambda rest: rest[:place] + wrong(rest[place:])


def random_guess(rest: list[int]) -> list[int]:
    """Of a length, and right up to a place, that follow from what is left."""
    random = np.random.RandomState(len(rest))
    return wrong_at(random.randint(0, 8))(rest[: random.randint(0, 8)])


GUESSES: dict[str, Guess] = {
    "right": list,
    "wrong": wrong,
    "right and wrong": random_guess,
    "none": lambda rest: [],
}


def usage(handle: Handle) -> Usage:
    (found,) = [chunk.usage for chunk in handle if chunk.usage is not None]
    return found


def told(driver: Driver, answers: dict[int, list[int]], guess: Guess) -> None:
    config = driver.model.model.config.text
    driver.scheduler.speculation = Speculation(Told(answers, guess), config, MOST_DRAFTED)


# The same answers.

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "top_k": 30},
    "penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.4,
        "min_p": 0.01,
    },
    "dry": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "logit_bias": {5: 4.0, 6: 5.0}},
}
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
    params = replace(demo.default_params, seed=1).updated(ENDS[end])

    def run(drafter: Drafter | None) -> Completion:
        engine = Engine(demo.model, demo.processor.tokenizer, demo.compiler, EngineOptions())
        if drafter is not None:
            config = demo.model.config.text
            engine.scheduler.speculation = Speculation(drafter, config, MOST_DRAFTED)
        prompt = demo.processor.prompt(asked("Hello"))
        request = demo.request(prompt, params, tools=False, started=time.perf_counter())
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
@pytest.mark.parametrize("guess", [*GUESSES, "lookup"])
def test_a_grammar_holds(demo: Qwen3VL, scene: Image, rules: str, guess: str) -> None:
    prompt = demo.processor.prompt(about(scene))
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=48)
    grammar = parse_grammar(
        RULES[rules].get("response_format"), RULES[rules].get("grammar"), None, None
    )

    def run(drafter: Drafter | None, thinking: bool) -> tuple[list[int], Completion]:
        engine = Engine(demo.model, demo.processor.tokenizer, demo.compiler, EngineOptions())
        if drafter is not None:
            config = demo.model.config.text
            engine.scheduler.speculation = Speculation(drafter, config, MOST_DRAFTED)
        request = demo.request(prompt, params, tools=False, grammar=grammar, started=0.0)
        request = replace(request, thinking=thinking)
        if thinking:
            request = replace(request, params=params.updated({"thinking_budget": 7}))
        handle = engine.submit(request)
        answer = handle.result()
        engine.close()
        return handle.tokens, answer

    for thinking in (False, True):
        tokens, expected = run(None, thinking)
        drafter = Lookup() if guess == "lookup" else Told({5: tokens}, GUESSES[guess])
        got_tokens, got = run(drafter, thinking)
        assert got_tokens == tokens
        assert (got.text, got.reasoning) == (expected.text, expected.reasoning)
        assert got.finish_reason == expected.finish_reason
        if guess == "right":
            assert got.usage.accepted_tokens == got.usage.drafted_tokens > 0


# Looking up.


def test_lookup_answers_as_without(demo: Qwen3VL, scene: Image) -> None:
    ours = load("demo", engine=EngineOptions(speculative="lookup"))
    for question in ("Describe the image.", "Locate all objects, as JSON.", "Say it: a a a b b."):
        for temperature in (0.0, 1.0):
            pair = [
                model.generate(about(scene, question), temperature=temperature, seed=2)
                for model in (demo, ours)
            ]
            assert pair[0].text == pair[1].text
    ours.close()


def test_a_copying_answer_takes_half_the_steps(
    monkeypatch: pytest.MonkeyPatch, demo: Qwen3VL
) -> None:
    text = (
        "Invoice 4711, 3 boxes of red paint at 12.50 each, 2 brushes at 4.20 each, 1 ladder at "
        "89.00, total 134.90, to be paid within 30 days to the account given above."
    )
    model = load("demo", engine=EngineOptions(speculative="lookup"))
    script(monkeypatch, model, f"Here it is: {text}")
    answer = model.generate(f"Copy this: {text}", max_tokens=400)
    model.close()
    assert answer.text.endswith(text)
    assert answer.usage.completion_tokens > 2 * answer.usage.decode_steps
    assert answer.usage.accepted_tokens > 0.8 * answer.usage.drafted_tokens


tokens_of = st.lists(st.integers(0, 3), max_size=60)


@settings(max_examples=200, deadline=None)
@given(prompt=tokens_of, answer=tokens_of, count=st.integers(1, 7))
def test_lookup_guesses_what_came_before(prompt: list[int], answer: list[int], count: int) -> None:
    """Whatever is guessed has stood somewhere behind the same token, and is never forbidden."""
    lookup = PromptLookup(np.array(prompt, np.int32), frozenset({3}))
    for i, token in enumerate(answer):
        lookup.push(token)
        assert lookup.answered == i + 1
        guess = lookup.draft(count)
        assert len(guess) <= count
        assert 3 not in guess
        assert not guess or lookup.sure
        text = [*prompt, *answer[: i + 1], *guess]
        for at in range(len(text) - len(guess), len(text)):
            earlier = [text[j] for j in range(1, at) if text[j - 1] == text[at - 1]]
            assert text[at] in earlier


@settings(max_examples=100, deadline=None)
@given(prompt=tokens_of, answer=tokens_of)
def test_lookup_finds_the_latest_place(prompt: list[int], answer: list[int]) -> None:
    lookup = PromptLookup(np.array(prompt, np.int32))
    for i, token in enumerate(answer):
        expected = lookup._source
        broken = expected is None or lookup.tokens[expected] != token
        lookup.push(token)
        if not broken:
            continue
        text = [*prompt, *answer[: i + 1]]
        # What ends the prompt is known as a place only once the answer has gone on.
        places = [
            [e for e in range(n, len(text)) if text[e - n : e] == text[-n:] and e != len(prompt)]
            for n in (3, 2)
        ]
        latest = next((found[-1] for found in places if found and len(text) >= 3), None)
        assert lookup._source == latest


def test_a_row_that_copies_nothing_never_waits() -> None:
    lookup = PromptLookup(np.arange(500, dtype=np.int32))
    for token in np.random.RandomState(0).permutation(900)[:400].tolist():
        lookup.push(token)
        assert not lookup.sure


def test_lookup_gives_up_for_a_while_on_what_deceives() -> None:
    """Each four tokens come back, and go on in another way each time."""
    lookup = PromptLookup(np.array([1, 2, 3, 4] * 2, np.int32))
    drafts, new = 0, iter(range(100, 1000))
    for _ in range(60):
        for token in (1, 2, 3, 4, next(new), next(new)):
            lookup.push(token)
            drafts += bool(lookup.draft(7)) and token == 4
    assert drafts < 6


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "longest"),
    [(16, 8, 1, 7), (32, 8, 4, 7), (64, 8, 1, 3), (64, 4, 1, 1), (16, 8, 8, 3), (16, 8, 32, 0)],
)
def test_passes_stay_within_the_fast_kernels(
    demo: Qwen3VL, heads: int, kv_heads: int, rows: int, longest: int
) -> None:
    config = replace(
        demo.model.config.text, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    assert Speculation(Lookup(), config, MOST_DRAFTED).longest(rows) == longest


# A draft model.


@pytest.mark.parametrize("draft", ["dense64", "dense72", "moe"])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "penalties", "dry"])
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
    streams = [model.stream(about(picture), seed=1) for picture in (scene, other_scene, scene)]
    ours = [stream.handle.result() for stream in streams]
    model.close()
    for answer, picture in zip(ours, (scene, other_scene, scene), strict=True):
        assert answer.text == demo.generate(about(picture), seed=1).text
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


@pytest.mark.parametrize(
    "changes", [{"speculative": "ngram"}, {"draft_tokens": 0}, {"draft_tokens": 8}]
)
def test_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        EngineOptions(**changes)
