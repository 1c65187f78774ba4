"""Sampling parameters and their defaults, and what one request's sampler may and may not draw."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from drawing import check_distribution, make, many, reference, run
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.engine.sampling import (
    Row,
    SamplerState,
    SamplingParams,
    default_params,
    draw,
)
from qwen3vl_mlx.errors import InputError

CHECKPOINTS = Path(__file__).parent / "data" / "checkpoints"
INSTRUCT = SamplingParams(temperature=0.7, top_p=0.8, top_k=20)
THINKING = SamplingParams(temperature=1.0, top_p=0.95, top_k=20)
DRAWS = 600
NAN = math.nan

BAD: dict[str, Sequence[Any]] = {
    "temperature": (-0.1, NAN, math.inf, "1", True),
    "top_p": (0, -0.5, 1.01, NAN, "0.9"),
    "top_k": (-1, 0.5, 20.0, math.inf, NAN, "20", True),
    "min_p": (-0.01, 1.1, NAN),
    "repetition_penalty": (0, -1, NAN, math.inf),
    "frequency_penalty": (-2.1, 2.1, NAN),
    "presence_penalty": (-2.1, 2.1, NAN),
    "dry_multiplier": (-0.1, NAN, math.inf, "1", True),
    "dry_base": (0.99, 0, NAN, math.inf),
    "dry_allowed_length": (0, -1, 1.5, 2.0, math.inf, True),
    "dry_sequence_breakers": ([""], ["a", ""], [1], 5, {"a": 1}),
    "top_logprobs": (-1, 21, 1.0, True, "3"),
    "logprobs": (1, 0, "true", 5),
    "ignore_eos": (1, "yes"),
    "loop_guard": (1, "on"),
    "thinking_budget": (-1, 1.5, 10.0, math.inf, "10", True),
    "max_tokens": (0, -1, 1.5, 10.0, math.inf, "10"),
    "seed": (-1, 2**64, 1.5, 7.0, "7"),
    "stop": ([""], ["a", ""], [1], 5, {"a": 1}),
    "logit_bias": ({"5": 1.0}, {5: "1"}, {5: NAN}, {5: math.inf}, {5: None}, [5], {5.0: 1.0}),
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name in BAD for v in BAD[name]])
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} must"):
        SamplingParams(logprobs=name != "logprobs").updated({name: value})


def test_top_logprobs_need_logprobs() -> None:
    with pytest.raises(InputError, match="top_logprobs 3 needs logprobs"):
        SamplingParams(top_logprobs=3)


@pytest.mark.parametrize(
    "good",
    [
        {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "seed": 0, "max_tokens": 1},
        {"temperature": 2.5, "top_p": 1e-6, "top_k": 10**6, "min_p": 1, "seed": 2**64 - 1},
        {"repetition_penalty": 0.5, "frequency_penalty": -2, "presence_penalty": 2},
        {"logit_bias": {5: -100, 6: -math.inf}, "stop": ("a", "b")},
        {"dry_multiplier": 0.8, "dry_base": 1, "dry_allowed_length": 1},
        {"dry_sequence_breakers": ()},
        {"logprobs": True, "top_logprobs": 20, "ignore_eos": True, "loop_guard": True},
        {"logprobs": False, "top_logprobs": 0, "thinking_budget": 0},
    ],
)
def test_good_values_are_kept(good: Mapping[str, Any]) -> None:
    params = SamplingParams().updated(good)
    assert {name: getattr(params, name) for name in good} == good
    assert params == SamplingParams(**good)


def test_a_single_stop_string_is_one_string() -> None:
    assert SamplingParams().updated({"stop": "END"}).stop == ("END",)
    params = SamplingParams().updated({"dry_sequence_breakers": ["\n", "END"]})
    assert params.dry_sequence_breakers == ("\n", "END")
    for name in ("stop", "dry_sequence_breakers"):
        with pytest.raises(InputError, match=name):
            SamplingParams(**{name: "END"})  # type: ignore[arg-type]


def test_none_leaves_what_was() -> None:
    assert INSTRUCT.updated(dict.fromkeys(BAD)) == INSTRUCT
    assert INSTRUCT.updated({"top_k": 0}).top_k == 0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"'top_kk'.*top_k"):
        SamplingParams().updated({"top_kk": 3})
    with pytest.raises(InputError, match="max_new_tokens"):
        SamplingParams().updated({"max_new_tokens": None})


@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*/generation_config.json")), ids=str)
def test_defaults_of_released_models(path: Path) -> None:
    expected = THINKING if path.parent.name.endswith("Thinking") else INSTRUCT
    if path.parent.name == "Qwen3-VL-235B-A22B-Thinking":
        expected = expected.updated({"temperature": 0.8})
    assert default_params(json.loads(path.read_text())) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SamplingParams(temperature=0)),
        ({"temperature": 0.7, "top_p": 0.8}, SamplingParams(temperature=0, top_p=0.8)),
        (
            {"do_sample": False, "temperature": 0.7, "top_k": 5},
            SamplingParams(temperature=0, top_k=5),
        ),
        ({"do_sample": True, "temperature": None, "min_p": 0.1}, SamplingParams(min_p=0.1)),
    ],
)
def test_defaults(values: Mapping[str, Any], expected: SamplingParams) -> None:
    assert default_params(values) == expected


# Draws.


def log(*weights: float) -> mx.array:
    return mx.log(mx.array(weights)) + 3  # logits are known up to a constant


WEIGHTS = (0.1, 0.4, 0.2, 0.3)
FILTERS: list[tuple[dict[str, Any], tuple[float, ...], tuple[float, ...]]] = [
    ({}, WEIGHTS, WEIGHTS),
    ({"temperature": 2.0}, WEIGHTS, tuple(math.sqrt(w) for w in WEIGHTS)),
    ({"temperature": 0.5}, WEIGHTS, tuple(w * w for w in WEIGHTS)),
    ({"temperature": 0}, WEIGHTS, (0, 1, 0, 0)),
    ({"top_k": 1}, WEIGHTS, (0, 1, 0, 0)),
    ({"top_k": 2}, WEIGHTS, (0, 4, 0, 3)),
    ({"top_k": 3}, WEIGHTS, (0, 4, 2, 3)),
    ({"top_k": 4}, WEIGHTS, WEIGHTS),
    ({"top_k": 99}, WEIGHTS, WEIGHTS),
    ({"top_p": 0.3}, WEIGHTS, (0, 1, 0, 0)),
    ({"top_p": 0.6}, WEIGHTS, (0, 4, 0, 3)),
    ({"top_p": 0.8}, WEIGHTS, (0, 4, 2, 3)),
    ({"top_p": 0.95}, WEIGHTS, WEIGHTS),
    ({"min_p": 0.4}, WEIGHTS, (0, 4, 2, 3)),
    ({"min_p": 0.6}, WEIGHTS, (0, 4, 0, 3)),
    ({"min_p": 1.0}, WEIGHTS, (0, 1, 0, 0)),
    # The order: temperature, top_k, top_p, min_p. Another one leaves another set.
    ({"temperature": 0.25, "top_p": 0.75}, (0.5, 0.3, 0.15, 0.05), (1, 0, 0, 0)),
    ({"temperature": 10.0, "top_p": 0.7}, (0.5, 0.3, 0.15, 0.05), (1, 0.95, 0.89, 0)),
    ({"temperature": 0.25, "min_p": 0.5}, (0.5, 0.3, 0.15, 0.05), (1, 0, 0, 0)),
    ({"top_k": 2, "top_p": 0.5}, (0.3, 0.25, 0.2, 0.15, 0.1), (1, 0, 0, 0, 0)),
    ({"top_k": 3, "top_p": 0.7, "min_p": 0.9}, (0.35, 0.3, 0.2, 0.15), (1, 0, 0, 0)),
]


@pytest.mark.parametrize(("params", "weights", "expected"), FILTERS)
def test_draws(
    params: dict[str, Any], weights: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    sampler = make(len(weights), seed=7, **params)
    check_distribution(many(sampler, log(*weights), DRAWS), expected)


COMBINATIONS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.7},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.9, "min_p": 0.07},
    {"temperature": 1.5, "top_k": 64, "min_p": 0.03},
    {"temperature": 1.3, "top_k": 33, "top_p": 0.97, "min_p": 0.02},
    {"temperature": 2.0, "top_p": 0.6, "min_p": 0.2},
]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("params", COMBINATIONS, ids=str)
def test_draws_follow_the_reference(params: dict[str, Any], dtype: mx.Dtype) -> None:
    values = np.random.default_rng(5).permutation(np.linspace(-4, 2, 64))  # apart in bfloat16 too
    logits = mx.array(values).astype(dtype)
    sampler = make(64, seed=11, **params)
    expected = reference(np.array(logits.astype(mx.float32), np.float64), sampler.params)
    assert expected.min() == 0 or params == {"temperature": 1.7}
    check_distribution(many(sampler, logits, 3000), expected)


@pytest.mark.parity
@pytest.mark.parametrize("params", COMBINATIONS, ids=str)
def test_draws_follow_transformers(params: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    import torch
    from transformers.generation import logits_process as hf

    logits = np.random.default_rng(6).normal(0, 2, 64)
    chain: list[Any] = [hf.TemperatureLogitsWarper(params["temperature"])]
    if "top_k" in params:
        chain.append(hf.TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        chain.append(hf.TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        chain.append(hf.MinPLogitsWarper(params["min_p"]))
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    for processor in chain:
        scores = processor(torch.zeros((1, 1), dtype=torch.long), scores)
    probs = scores.softmax(-1)[0].numpy()
    sampler = make(64, seed=12, **params)
    np.testing.assert_allclose(reference(logits, sampler.params), probs, atol=1e-12)
    check_distribution(many(sampler, mx.array(logits.astype(np.float32)), 3000), probs)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_greedy_takes_the_largest_whatever_else_is_asked(dtype: mx.Dtype) -> None:
    logits = mx.array([1.0, -2.0, 5.0, 4.0], dtype)
    sampler = make(4, temperature=0, top_p=0.1, top_k=3, min_p=0.5)
    assert many(sampler, logits, 3) == [2, 2, 2]
    assert draw(logits[None], [Row(sampler, sampler.start())])[0].dtype == mx.int32


@pytest.mark.parametrize("bias", [{4: 1.0}, {-1: 1.0}])
def test_bias_of_a_token_that_is_not_there(bias: dict[int, float]) -> None:
    with pytest.raises(InputError, match="logit_bias"):
        make(4, logit_bias=bias)


# Grammars.

ONLY_1_AND_3 = mx.array([False, True, False, True])
MASKED: list[tuple[dict[str, Any], tuple[float, ...]]] = [
    ({"temperature": 0}, (0, 1, 0, 0)),
    ({}, (0, 4, 0, 3)),
    ({"top_k": 2}, (0, 4, 0, 3)),  # of what is allowed, not of all
    ({"top_k": 3}, (0, 4, 0, 3)),  # one survivor is not allowed, and never drawn
    ({"top_p": 0.57}, (0, 1, 0, 0)),
    ({"min_p": 0.8}, (0, 1, 0, 0)),
    ({"logit_bias": {1: -math.inf}}, (0, 0, 0, 1)),
    ({"logit_bias": {0: 100.0}}, (0, 4, 0, 3)),
    ({"logit_bias": {1: -math.inf, 3: -math.inf}}, (0, 1, 0, 1)),  # the grammar wins
    ({"logit_bias": {1: -math.inf, 3: -math.inf}, "temperature": 0}, (0, 1, 0, 0)),
]


@pytest.mark.parametrize(("params", "expected"), MASKED)
def test_grammars_have_the_last_word(params: dict[str, Any], expected: tuple[float, ...]) -> None:
    sampler = make(4, seed=3, **params)
    rows = [Row(sampler, SamplerState(i, None), None, ONLY_1_AND_3) for i in range(DRAWS)]
    tokens, _ = draw(mx.broadcast_to(log(0.5, 0.4, 0.6, 0.3), (DRAWS, 4)), rows)
    check_distribution(tokens.tolist(), expected)


def test_a_bias_of_minus_infinity_is_never_drawn() -> None:
    sampler = make(3, seed=1, temperature=50.0, logit_bias={0: -math.inf})
    check_distribution(many(sampler, mx.array([90.0, 0.0, 0.0]), DRAWS), (0, 1, 1))


# Seeds.

VOCAB = 50
LOGITS = mx.random.normal((VOCAB,), key=mx.random.key(3))


def test_equal_seeds_draw_equal_tokens() -> None:
    tokens = run(make(VOCAB, seed=5), LOGITS, 40)
    assert run(make(VOCAB, seed=5), LOGITS, 40) == tokens
    assert run(make(VOCAB, seed=6), LOGITS, 40) != tokens
    assert len(set(tokens)) > 10


def test_without_a_seed_requests_differ() -> None:
    assert run(make(VOCAB), LOGITS, 40) != run(make(VOCAB), LOGITS, 40)


def test_no_two_steps_of_no_two_seeds_share_a_key() -> None:
    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    states = [SamplerState(step, None) for step in (0, 1, 2, 3, 2**20)]
    keys = {tuple(make(4, seed=seed).key(state)) for seed in seeds for state in states}
    assert len(keys) == len(seeds) * len(states)


def test_neither_the_sampler_nor_a_state_changes_by_drawing() -> None:
    sampler = make(VOCAB, [1, 2], seed=5, repetition_penalty=1.3, frequency_penalty=0.5)
    state = sampler.start()
    first, (after,) = draw(LOGITS[None], [Row(sampler, state)])
    again, _ = draw(LOGITS[None], [Row(sampler, state)])
    assert first.item() == again.item()
    assert state.counts is not None
    assert not state.counts.any()
    assert after.step == 1
    assert after.counts is not None
    assert after.counts.tolist() == np.bincount([first.item()], minlength=VOCAB).tolist()


# What a step may ask for. Every kind of row meets every other.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "presence_penalty": 1.5, "repetition_penalty": 1.2},
    {"temperature": 0, "dry_multiplier": 0.8, "dry_allowed_length": 1},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.4, "top_k": 20, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "presence_penalty": 1.5},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0},
    {"temperature": 1.0, "logit_bias": {3: 2.0, 4: -math.inf}},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.7, "dry_multiplier": 0.5},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 10**6},
]
PROMPT = [1, 2, 3, 1, 2]
MASK = mx.arange(VOCAB) % 3 != 1


def asked(kind: int, seed: int, masked: bool, state: SamplerState | None = None) -> Row:
    sampler = make(VOCAB, PROMPT, seed=seed, **KINDS[kind])
    return Row(sampler, state or sampler.start(), (), MASK if masked else None)


def stepped(rows: Sequence[Row], logits: Sequence[mx.array]) -> list[list[int]]:
    """Tokens of each row, over one step for each of logits (B, vocab_size)."""
    rows, columns = list(rows), []
    for step in logits:
        tokens, states = draw(step, rows)
        columns.append(tokens.tolist())
        for i, (row, state) in enumerate(zip(rows, states, strict=True)):
            history = (*(row.history or ()), columns[-1][i])
            rows[i] = Row(row.sampler, state, history, row.allowed)
    return [list(tokens) for tokens in zip(*columns, strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    asks=st.lists(
        st.tuples(st.integers(0, len(KINDS) - 1), st.integers(0, 2), st.booleans()),
        min_size=1,
        max_size=9,
    ),
    key=st.integers(0, 2**32),
    dtype=st.sampled_from([mx.float32, mx.bfloat16]),
)
def test_a_row_draws_alone_what_it_draws_among_others(
    asks: list[tuple[int, int, bool]], key: int, dtype: mx.Dtype
) -> None:
    shape = (4, len(asks), VOCAB)
    logits = mx.random.normal(shape, key=mx.random.key(key)).astype(dtype)
    together = stepped([asked(*ask) for ask in asks], list(logits))
    for i, ask in enumerate(asks):
        assert together[i] == stepped([asked(*ask)], list(logits[:, i : i + 1]))[0], KINDS[ask[0]]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_large_vocabulary_has_no_neighbours_either(dtype: mx.Dtype) -> None:
    """Coarse logits: ties at every border of a filter must fall alike too."""
    vocab, kinds = 20_000, [3, 4, 5, 7, 9, 11, 0, 3]
    logits = mx.round(mx.random.normal((len(kinds), vocab), key=mx.random.key(1)) * 8) / 8
    logits = logits.astype(dtype)
    rows = [Row(s, s.start()) for s in (make(vocab, seed=1, **KINDS[kind]) for kind in kinds)]
    tokens = draw(logits, rows)[0].tolist()
    alone = [draw(logits[i : i + 1], [row])[0].item() for i, row in enumerate(rows)]
    assert tokens == alone


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=lambda kind: str(KINDS[kind]))
def test_several_steps_of_one_answer_can_be_drawn_at_once(kind: int) -> None:
    """As speculation does: each row of the batch is a later step of the same answer."""
    logits = mx.random.normal((6, VOCAB), key=mx.random.key(8))
    row = asked(kind, 4, False)
    answer = stepped([row], [line[None] for line in logits])[0]
    rows, state = [], row.state
    for i, token in enumerate(answer):
        rows.append(Row(row.sampler, state, answer[:i]))
        state = row.sampler.after(state, token)
    assert draw(logits, rows)[0].tolist() == answer


class TracedError(Exception):
    """Raised where a trace is complete: what it would compute is not wanted."""


def test_drawing_never_waits_for_the_device() -> None:
    """Under a trace there are no values: whoever looks at one fails."""
    rows = [asked(kind, 1, masked) for kind in range(len(KINDS)) for masked in (False, True)]

    def traced(logits: mx.array) -> mx.array:
        _, states = draw(logits, rows)
        assert len(states) == len(rows)
        raise TracedError

    def looking(logits: mx.array) -> mx.array:
        return mx.array(draw(logits, rows)[0].tolist())

    logits = mx.random.normal((len(rows), VOCAB), key=mx.random.key(2))
    with pytest.raises(TracedError):
        mx.compile(traced)(logits)
    with pytest.raises(ValueError, match="eval"):
        mx.compile(looking)(logits)


@pytest.mark.parametrize(
    ("params", "plain", "needs_history"),
    [
        ({"temperature": 0, "top_p": 0.5, "min_p": 0.5}, True, False),
        ({"temperature": 1e-7}, True, False),
        ({"top_k": 1}, True, False),
        ({"temperature": 1e-3}, False, False),
        ({"temperature": 0, "logit_bias": {1: 1.0}}, False, False),
        ({"temperature": 0, "repetition_penalty": 0.9}, False, False),
        ({"temperature": 0, "presence_penalty": -1.0}, False, False),
        ({"temperature": 0, "frequency_penalty": 0.1}, False, False),
        ({"temperature": 0, "dry_multiplier": 0.1}, False, True),
        ({"dry_multiplier": 0.1}, False, True),
    ],
)
def test_what_a_sampler_needs(params: dict[str, Any], plain: bool, needs_history: bool) -> None:
    sampler = make(4, **params)
    assert (sampler.plain_greedy, sampler.needs_history) == (plain, needs_history)


def test_a_request_may_be_set_up_on_another_thread() -> None:
    rows: list[Row] = []

    def set_up() -> None:
        rows.extend(asked(kind, 2, masked=False) for kind in range(len(KINDS)))

    thread = threading.Thread(target=set_up)
    thread.start()
    thread.join()
    here = [asked(kind, 2, masked=False) for kind in range(len(KINDS))]
    logits = list(mx.random.normal((3, len(KINDS), VOCAB), key=mx.random.key(9)))
    assert stepped(rows, logits) == stepped(here, logits)


@pytest.mark.parametrize("seed", [None, 11])
def test_the_global_random_state_is_left_alone(seed: int | None) -> None:
    def draws(between: Callable[[], Any]) -> npt.NDArray[np.float32]:
        mx.random.seed(1)
        between()
        return np.array(mx.random.normal((4,)))

    sampler = make(VOCAB, seed=seed, top_p=0.9, min_p=0.01, presence_penalty=1.0)
    untouched = draws(lambda: None)
    assert np.array_equal(draws(lambda: run(sampler, LOGITS, 5)), untouched)
    first = run(make(VOCAB, seed=11), LOGITS, 5)
    mx.random.seed(2)
    assert run(make(VOCAB, seed=11), LOGITS, 5) == first
