"""What stood before is guessed again, and nobody waits for it who copies nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import pytest
from asking import about, script
from driving import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from law import user
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.engine import batch
from qwen3vl_mlx.engine.engine import EngineOptions
from qwen3vl_mlx.engine.sampling import Row, SamplerState
from qwen3vl_mlx.engine.speculative import (
    MOST_DRAFTED,
    Lookup,
    PromptLookup,
    Speculation,
)

TOLERANCE = 1e-4
Drive: TypeAlias = Callable[..., Driver]
Models: TypeAlias = Callable[[str], Qwen3VL]


def test_lookup_answers_as_without(demo: Qwen3VL, scene: Image) -> None:
    ours = load("demo", engine=EngineOptions(speculative="lookup"))
    for question in ("Describe the image.", "Locate all objects, as JSON.", "Say it: a a a b b."):
        for temperature in (0.0, 1.0):
            pair = [
                model.generate(
                    about(scene, question), max_tokens=60, temperature=temperature, seed=2
                )
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
    answer = model.generate(f"Copy this: {text}", max_tokens=400, temperature=0)
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


def test_nobody_waits_for_an_answer_that_copies_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Models, drive: Drive
) -> None:
    """Its steps are queued one ahead, as without."""
    model = tiny_model("dense64")
    driver = drive(model, speculative="lookup")
    said = np.random.RandomState(0).permutation(900).tolist()

    def scripted(_: mx.array, rows: Sequence[Row]) -> tuple[mx.array, list[SamplerState]]:
        tokens = [said[row.state.step] for row in rows]
        states = [row.sampler.after(row.state, t) for row, t in zip(rows, tokens, strict=True)]
        return mx.array(tokens, mx.int32), states

    verified: list[int] = []
    monkeypatch.setattr(batch, "draw", scripted)
    monkeypatch.setattr(batch.Batch, "verify", lambda *_: verified.append(1))
    handle = driver.ask(model.processor.prompt([user("Tell me of the sea.")]), 100)
    driver.until(lambda: handle.phase == "done" or bool(verified))
    assert handle.tokens == said[:100]
