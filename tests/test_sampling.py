"""Sampling parameters and their defaults, and what one request's sampler may and may not draw."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from drawing import check_distribution, make, many, reference

from qwen3vl_mlx.engine.sampling import (
    Row,
    SamplerState,
    SamplingParams,
    asked_params,
    default_params,
    draw,
    nucleus,
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
    "dry_sequence_breakers": ([""], ["a", ""], [1], 5, {"a": 1}, ["a"] * 65, ["a" * 257]),
    "top_logprobs": (-1, 21, 1.0, True, "3"),
    "logprobs": (1, 0, "true", 5),
    "ignore_eos": (1, "yes"),
    "loop_guard": (1, "on"),
    "thinking_budget": (-1, 1.5, 10.0, math.inf, "10", True),
    "max_tokens": (0, -1, 1.5, 10.0, math.inf, "10"),
    "seed": (-1, 2**64, 1.5, 7.0, "7"),
    "stop": ([""], ["a", ""], [1], 5, {"a": 1}, ["a"] * 65, ["a" * 257]),
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
        {"dry_sequence_breakers": ("a" * 256,) * 64},
        {"stop": ("a" * 256,) * 64},
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
    thinking = path.parent.name.endswith("Thinking")
    expected = THINKING if thinking else INSTRUCT.updated({"presence_penalty": 1.5})
    if path.parent.name == "Qwen3-VL-235B-A22B-Thinking":
        expected = expected.updated({"temperature": 0.8})
    assert default_params(json.loads(path.read_text()), thinking=thinking) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SamplingParams(temperature=0)),
        ({"temperature": 0.7, "top_p": 0.8}, SamplingParams(temperature=0, top_p=0.8)),
        (
            {"do_sample": False, "temperature": 0.7, "top_k": 5},
            SamplingParams(temperature=0, top_k=5),
        ),
        (
            {"do_sample": True, "temperature": None, "min_p": 0.1},
            SamplingParams(min_p=0.1, presence_penalty=1.5),
        ),
        ({"do_sample": True, "presence_penalty": 0.5}, SamplingParams(presence_penalty=0.5)),
    ],
)
def test_defaults(values: Mapping[str, Any], expected: SamplingParams) -> None:
    assert default_params(values) == expected


CARD = default_params({"do_sample": True, "temperature": 0.7})


@pytest.mark.parametrize(
    ("sampling", "named", "penalty"),
    [
        (None, {}, 1.5),
        (None, {"temperature": 0.2}, 1.5),
        (None, {"temperature": 0}, 0.0),  # greedy answers are those of the model's own logits
        (None, {"temperature": 0, "presence_penalty": 1.5}, 1.5),
        ({"temperature": 0}, {"presence_penalty": None}, 0.0),
        ({"temperature": 0, "presence_penalty": 1.5}, {}, 1.5),
        ({"temperature": 0.5}, {"temperature": 0}, 0.0),
    ],
)
def test_the_card_s_penalty_leaves_greedy_answers_alone(
    sampling: Mapping[str, Any] | None, named: Mapping[str, Any], penalty: float
) -> None:
    assert asked_params(CARD, sampling, named).presence_penalty == penalty


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


@pytest.mark.parametrize(("top_p", "kept"), [(1e-6, 1), (0.25, 1), (0.26, 2), (0.5, 2), (1, 4)])
def test_the_nucleus_ends_where_its_mass_is_reached(top_p: float, kept: int) -> None:
    assert nucleus(mx.zeros((1, 4)), mx.array([[top_p]])).sum().item() == kept


def test_all_of_the_mass_is_all_tokens() -> None:
    """Added up in float32 the small ones would vanish beside the first."""
    logits = mx.array([[0.0] + [-17.0] * 5])
    assert nucleus(logits, mx.array([[1.0]])).all()
    assert nucleus(logits, mx.array([[0.999999]])).sum().item() == 1


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
    pytest.importorskip("torch")
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
