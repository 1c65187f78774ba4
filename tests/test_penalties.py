"""Penalties and bias: over what they count, in which order, and DRY against its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from drawing import check_distribution, make, run
from hypothesis import given
from hypothesis import strategies as st

import qwen3vl_mlx
from qwen3vl_mlx import Qwen3VL, asking
from qwen3vl_mlx.engine.penalties import breaker_tokens, dry_penalties
from qwen3vl_mlx.engine.sampling import Row, SamplerState, SamplingParams, draw
from qwen3vl_mlx.processing.tokenizer import Tokenizer

DEMO = Path(qwen3vl_mlx.__file__).parent / "demo" / "checkpoint"

# Penalties, greedy so that every step is decided. Logits, prompt, parameters, tokens.
PENALTIES: dict[str, tuple[tuple[float, ...], list[int], dict[str, Any], list[int]]] = {
    "presence once": ((3, 2.5, 0), [], {"presence_penalty": 1.0}, [0, 1, 0, 0]),
    "frequency adds up": ((3, 2.5, 0), [], {"frequency_penalty": 1.0}, [0, 1, 0, 1, 0]),
    "both": ((3, 2.5, 0.25), [], {"presence_penalty": 1, "frequency_penalty": 1}, [0, 1, 0, 1, 2]),
    "presence not of the prompt": ((3, 2.5), [0], {"presence_penalty": 1.0}, [0, 1, 0]),
    "frequency not of the prompt": ((3, 2.5), [0, 0, 0], {"frequency_penalty": 1.0}, [0, 1, 0]),
    "negative presence": ((3, 3.5, 0), [], {"presence_penalty": -1.0}, [1, 1, 1]),
    "repetition of the prompt": ((3, 2.5, 0), [0], {"repetition_penalty": 2.0}, [1, 0, 0]),
    "repetition of the output": ((3, 2.5, 0), [], {"repetition_penalty": 2.0}, [0, 1, 0, 0]),
    "repetition once": ((3, 2.5, 0), [0, 0, 0], {"repetition_penalty": 1.1}, [0, 0]),
    "repetition below zero": ((-3, -4, -9), [0], {"repetition_penalty": 2.0}, [1, 0, 0]),
    "bias up": ((3, 2.5, 0), [], {"logit_bias": {2: 4.0}}, [2, 2]),
    "bias down": ((3, 2.5, 0), [], {"logit_bias": {0: -1.0, 1: -0.25}}, [1, 1]),
    "bias forbids": ((3, 2.5, 0), [], {"logit_bias": {0: -math.inf, 1: -100}}, [2, 2]),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name: str) -> None:
    logits, prompt, params, expected = PENALTIES[name]
    sampler = make(len(logits), prompt, temperature=0, **params)
    assert run(sampler, mx.array(logits, mx.float32), len(expected)) == expected


def penalised(
    logits: Sequence[float],
    prompt: Sequence[int],
    history: Sequence[int],
    breakers: Sequence[int] = (),
    **params: Any,
) -> list[float]:
    """Logits as the filters see them, `history` drawn."""
    sampler = make(len(logits), prompt, breakers, **params)
    state = sampler.start()
    for token in history:
        state = sampler.after(state, token)
    return sampler.adjusted(mx.array(logits, mx.float32), state, history).tolist()


# Logits, prompt, output, parameters, logits. Another order gives other numbers.
ORDERS: dict[str, tuple[list[float], list[int], list[int], dict[str, Any], list[float]]] = {
    "frequency and presence, then repetition": (
        [8.0, 8.0],
        [],
        [0, 0],
        {"frequency_penalty": 1.0, "presence_penalty": 2.0, "repetition_penalty": 2.0},
        [2.0, 8.0],
    ),
    "repetition of what became negative": (
        [1.0, 8.0],
        [1],
        [0],
        {"presence_penalty": 2.0, "repetition_penalty": 2.0},
        [-2.0, 4.0],
    ),
    "repetition, then bias": (
        [4.0, 4.0],
        [0],
        [],
        {"repetition_penalty": 2.0, "logit_bias": {0: 4.0, 1: 1.0}},
        [6.0, 5.0],
    ),
    "DRY, then repetition": (
        [1.0, 8.0, 8.0],
        [],
        [0, 1, 0],
        {"dry_multiplier": 2.0, "dry_allowed_length": 1, "repetition_penalty": 2.0},
        [0.5, 3.0, 8.0],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_penalties(name: str) -> None:
    logits, prompt, history, params, expected = ORDERS[name]
    assert penalised(logits, prompt, history, **params) == expected


def test_penalties_come_before_temperature() -> None:
    """Token 0 drawn once: 3 - 2 over 0.5, not 3 / 0.5 - 2."""
    sampler = make(2, seed=4, temperature=0.5, presence_penalty=2.0)
    counts = sampler.after(sampler.start(), 0).counts
    rows = [Row(sampler, SamplerState(step, counts)) for step in range(600)]
    tokens, _ = draw(mx.broadcast_to(mx.array([2.0, 0.5]), (600, 2)), rows)
    check_distribution(tokens.tolist(), (math.exp(0), math.exp(1)))


def test_penalties_of_bfloat16_logits_are_not_rounded_away() -> None:
    logits = mx.array([9.9375, 10.0]).astype(mx.bfloat16)  # one step of bfloat16 apart
    # 10 / 1.004 = 9.96 is the larger still; in bfloat16 it would be the first one's equal.
    assert run(make(2, [1], temperature=0, repetition_penalty=1.004), logits, 1) == [1]


@pytest.mark.parity
@pytest.mark.parametrize("penalty", [0.7, 1.1, 1.5])
def test_repetition_is_that_of_transformers(penalty: float) -> None:
    pytest.importorskip("torch")
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(1)
    prompt, history = rng.integers(0, 40, 9).tolist(), rng.integers(0, 40, 6).tolist()
    logits = rng.normal(0, 3, 40).astype(np.float32)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([prompt + history]), torch.tensor(logits)[None])[0]
    ours = penalised(logits.tolist(), prompt, history, repetition_penalty=penalty)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


@pytest.mark.parity
def test_bias_is_that_of_transformers() -> None:
    pytest.importorskip("torch")
    import torch
    from transformers import SequenceBiasLogitsProcessor

    logits = np.random.default_rng(2).normal(0, 3, 10).astype(np.float32)
    bias = {3: 2.5, 7: -100.0}
    processor = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = processor(torch.tensor([[1, 2]]), torch.tensor(logits)[None])[0]
    ours = penalised(logits.tolist(), [], [], logit_bias=bias)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


# DRY.


def plain_dry(
    tokens: list[int], multiplier: float, base: float, allowed: int, breakers: frozenset[int]
) -> dict[int, float]:
    """The definition, for each token and each length of repeat."""
    penalties = {}
    for token in set(tokens) - breakers:
        longest = 0
        for length in range(1, min(len(tokens) - 1, 50) + 1):
            repeat = tokens[-length:]
            places = range(len(tokens) - length)
            followed = [i for i in places if tokens[i : i + length + 1] == [*repeat, token]]
            if followed and not breakers & set(repeat):
                longest = length
        if longest >= allowed:
            penalties[token] = min(multiplier * base ** (longest - allowed), 1e6)
    return penalties


def dry(tokens: Sequence[int], *options: Any) -> dict[int, float]:
    ids, penalties = dry_penalties(np.array(tokens, np.int32), *options)
    return dict(zip(ids.tolist(), penalties.tolist(), strict=True))


@given(
    tokens=st.one_of(
        st.lists(st.integers(0, 2), min_size=1, max_size=40),
        st.lists(st.integers(0, 9), min_size=1, max_size=9).map(lambda part: (part * 9)[:60]),
        st.integers(1, 120).map(lambda count: [3] * count),
    ),
    multiplier=st.sampled_from([0.8, 5.0]),
    base=st.sampled_from([1.0, 1.1, 1.75]),
    allowed=st.integers(1, 5),
    breakers=st.frozensets(st.integers(0, 9), max_size=2),
)
def test_dry_is_what_it_is_defined_to_be(
    tokens: list[int], multiplier: float, base: float, allowed: int, breakers: frozenset[int]
) -> None:
    options = (multiplier, base, allowed, breakers)
    assert dry(tokens, *options) == pytest.approx(plain_dry(tokens, *options), rel=1e-5)


A, B, C, D, END = range(5)
DRY: dict[str, tuple[list[int], dict[int, float]]] = {
    "no repeat": ([A, B, C], {}),
    "shorter than allowed": ([A, B, C, D, A], {}),
    "as long as allowed": ([A, B, C, D, A, B], {C: 1.0}),
    "one longer": ([A, B, C, D, A, B, C], {D: 2.0}),
    "the longer of two": ([B, C, D, A, B, C, D, C, A, B, C], {D: 2.0}),
    "the longer of two comes first": ([A, B, C, D, B, C, D, C, A, B, C], {D: 2.0}),
    "two ways to go on": ([A, B, C, A, B, D, A, B], {C: 1.0, D: 1.0}),
    "a repeat of itself": ([A, A, A, A], {A: 2.0}),
    "cut by a breaker": ([A, END, B, C, A, END, B], {}),
    "a breaker goes on": ([A, B, END, A, B], {}),
    "the last is a breaker": ([A, END, B, A, END], {}),
}


@pytest.mark.parametrize("name", DRY)
def test_dry_by_example(name: str) -> None:
    tokens, expected = DRY[name]
    assert dry(tokens, 1.0, 2.0, 2, frozenset({END})) == expected


@pytest.mark.parametrize("base", [1.75, 1e300])
def test_a_very_long_repeat_stays_finite(base: float) -> None:
    assert dry([A] * 5000, 0.8, base, 2, frozenset()) == {A: 1e6}
    mask = mx.array([True, False])
    sampler = make(2, temperature=0, dry_multiplier=0.8, dry_base=base)
    token, _ = draw(mx.array([[1.0, 2.0]]), [Row(sampler, sampler.start(), [0] * 5000, mask)])
    assert token.item() == 0


def test_dry_counts_prompt_and_output() -> None:
    logits, options = [5.0] * 5, {"dry_multiplier": 3.0, "dry_base": 2.0}
    assert penalised(logits, [A, B, C], [], **options) == logits
    assert penalised(logits, [A, B, C], [A, B], **options)[C] == 2.0
    assert penalised(logits, [], [A, B, C, A, B], **options)[C] == 2.0
    assert penalised(logits, [A, B, C], [A, B], breakers=[B], **options) == logits


def test_dry_breaks_a_loop() -> None:
    logits = mx.array([1.0, 0.5, 0.0, -8.0])
    plain = run(make(4, temperature=0), logits, 12)
    dried = run(make(4, temperature=0, dry_multiplier=0.8), logits, 12)
    assert plain == [0] * 12
    assert dried[:3] == [0, 0, 0]
    assert len(set(dried)) == 3


def test_the_vocabulary_is_read_once_for_a_set_of_breakers_and_few_are_kept(
    demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, ...]] = []

    def counted(tokenizer: Tokenizer, texts: tuple[str, ...]) -> frozenset[int]:
        read.append(texts)
        return breaker_tokens(tokenizer, texts)

    monkeypatch.setattr(asking, "breaker_tokens", counted)
    fresh = replace(demo.asking)

    def found(*texts: str) -> frozenset[int]:
        return fresh.breakers(SamplingParams(dry_multiplier=1, dry_sequence_breakers=texts))

    assert found("a") == found("a") == breaker_tokens(demo.processor.tokenizer, ("a",))
    assert len(read) == 1
    for at in range(40):
        found(str(at))
    found("39")
    assert len(read) == 41
    found("a")
    assert len(read) == 42


def test_dry_without_a_history_is_an_error() -> None:
    sampler = make(4, temperature=0, dry_multiplier=0.8)
    with pytest.raises(ValueError, match="history"):
        draw(mx.zeros((1, 4)), [Row(sampler, sampler.start())])


def test_breakers_are_all_tokens_that_hold_one() -> None:
    tokenizer = Tokenizer.from_folder(DEMO)
    found = breaker_tokens(tokenizer, ("\n", '"', "é", "un mot long"))
    special = {tokenizer.added_tokens[name] for name in tokenizer.special_tokens}
    expected = {
        id_
        for id_ in range(tokenizer.vocab_size)
        if any(part in tokenizer.token_bytes(id_) for part in (b"\n", b'"', "é".encode()))
    }
    assert tokenizer.encode('{"')[-1] in found
    assert tokenizer.added_tokens["<|im_end|>"] in found
    assert found >= expected | special | {tokenizer.encode("un mot long")[-1]}
    missing = {tokenizer.encode(text)[-1] for text in ("é", "un mot long")}
    assert found <= expected | special | missing
    assert breaker_tokens(tokenizer, ()) == special
