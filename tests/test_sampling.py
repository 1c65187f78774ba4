"""Sampling parameters and their defaults, and what one request's sampler may and may not draw."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from qwen3vl_mlx.engine.sampling import Sampler, SamplingParams, default_params
from qwen3vl_mlx.errors import InputError

CHECKPOINTS = Path(__file__).parent / "data" / "checkpoints"
INSTRUCT = SamplingParams(temperature=0.7, top_p=0.8, top_k=20)
THINKING = SamplingParams(temperature=1.0, top_p=0.95, top_k=20)
DRAWS = 400
NAN = math.nan

BAD: dict[str, Sequence[Any]] = {
    "temperature": (-0.1, NAN, math.inf, "1", True),
    "top_p": (0, -0.5, 1.01, NAN, "0.9"),
    "top_k": (-1, 0.5, 20.0, math.inf, NAN, "20", True),
    "min_p": (-0.01, 1.1, NAN),
    "repetition_penalty": (0, -1, NAN, math.inf),
    "frequency_penalty": (-2.1, 2.1, NAN),
    "presence_penalty": (-2.1, 2.1, NAN),
    "max_tokens": (0, -1, 1.5, 10.0, math.inf, "10"),
    "seed": (-1, 2**64, 1.5, 7.0, "7"),
    "stop": ([""], ["a", ""], [1], 5, {"a": 1}),
    "logit_bias": ({"5": 1.0}, {5: "1"}, {5: NAN}, {5: math.inf}, {5: None}, [5], {5.0: 1.0}),
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name in BAD for v in BAD[name]])
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        SamplingParams().updated({name: value})


@pytest.mark.parametrize(
    "good",
    [
        {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "seed": 0, "max_tokens": 1},
        {"temperature": 2.5, "top_p": 1e-6, "top_k": 10**6, "min_p": 1, "seed": 2**64 - 1},
        {"repetition_penalty": 0.5, "frequency_penalty": -2, "presence_penalty": 2},
        {"logit_bias": {5: -100, 6: -math.inf}, "stop": ("a", "b")},
    ],
)
def test_good_values_are_kept(good: Mapping[str, Any]) -> None:
    params = SamplingParams().updated(good)
    assert {name: getattr(params, name) for name in good} == good
    assert params == SamplingParams(**good)


def test_a_single_stop_string_is_one_string() -> None:
    assert SamplingParams().updated({"stop": "END"}).stop == ("END",)
    with pytest.raises(InputError, match="stop"):
        SamplingParams(stop="END")  # type: ignore[arg-type]


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


def make(vocab: int, prompt: Sequence[int] = (), **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), np.array(prompt, np.int32), vocab)


def draw(sampler: Sampler, logits: mx.array, count: int) -> list[int]:
    return mx.concatenate([sampler(logits) for _ in range(count)]).tolist()


def check_distribution(tokens: Sequence[int], expected: Sequence[float]) -> None:
    """Nothing outside the support, and a chi-square within its 99.9 % quantile."""
    counts = np.bincount(tokens, minlength=len(expected))
    wanted = np.array(expected) / sum(expected) * len(tokens)
    assert not counts[wanted == 0].any()
    support = wanted > 0
    chi_square = float((((counts - wanted) ** 2)[support] / wanted[support]).sum())
    quantile = {1: 0, 2: 10.83, 3: 13.82, 4: 16.27, 5: 18.47}[int(support.sum())]
    assert chi_square <= quantile


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
    check_distribution(draw(sampler, log(*weights), DRAWS), expected)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_greedy_takes_the_largest_whatever_else_is_asked(dtype: mx.Dtype) -> None:
    logits = mx.array([1.0, -2.0, 5.0, 4.0], dtype)
    sampler = make(4, temperature=0, top_p=0.1, top_k=3, min_p=0.5)
    assert draw(sampler, logits, 3) == [2, 2, 2]


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
    assert draw(sampler, mx.array(logits, mx.float32), len(expected)) == expected


def test_penalties_come_before_temperature() -> None:
    """Token 0 drawn once: 3 - 2 over 0.5, not 3 / 0.5 - 2. Each draw is a request's second."""
    second = []
    for seed in range(DRAWS // 2):
        sampler = make(2, seed=seed, temperature=0.5, presence_penalty=2.0)
        sampler(mx.array([50.0, 0.0]))
        second.append(sampler(mx.array([2.0, 0.5])))
    check_distribution(mx.concatenate(second).tolist(), (math.exp(0), math.exp(1)))


@pytest.mark.parametrize("bias", [{4: 1.0}, {-1: 1.0}])
def test_bias_of_a_token_that_is_not_there(bias: dict[int, float]) -> None:
    with pytest.raises(InputError, match="logit_bias"):
        make(4, logit_bias=bias)


# Seeds.

LOGITS = mx.random.normal((50,), key=mx.random.key(3))


def test_equal_seeds_draw_equal_tokens() -> None:
    tokens = draw(make(50, seed=5), LOGITS, 40)
    assert draw(make(50, seed=5), LOGITS, 40) == tokens
    assert draw(make(50, seed=6), LOGITS, 40) != tokens
    assert len(set(tokens)) > 10


def test_without_a_seed_requests_differ() -> None:
    assert draw(make(50), LOGITS, 40) != draw(make(50), LOGITS, 40)


def test_interleaved_samplers_do_not_disturb_each_other() -> None:
    alone = [draw(make(50, seed=seed, top_k=30), LOGITS, 40) for seed in (1, 2)]
    samplers = [make(50, seed=seed, top_k=30) for seed in (1, 2)]
    both = [[sampler(LOGITS).item() for sampler in samplers] for _ in range(40)]
    assert [list(tokens) for tokens in zip(*both, strict=True)] == alone


@pytest.mark.parametrize("seed", [None, 11])
def test_the_global_random_state_is_left_alone(seed: int | None) -> None:
    def draws(between: Callable[[], Any]) -> npt.NDArray[np.float32]:
        mx.random.seed(1)
        between()
        return np.array(mx.random.normal((4,)))

    sampler = make(50, seed=seed, top_p=0.9, min_p=0.01, presence_penalty=1.0)
    untouched = draws(lambda: None)
    assert np.array_equal(draws(lambda: draw(sampler, LOGITS, 5)), untouched)
    first = draw(make(50, seed=11), LOGITS, 5)
    mx.random.seed(2)
    assert draw(make(50, seed=11), LOGITS, 5) == first


def test_penalties_of_bfloat16_logits_are_not_rounded_away() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1.004)
    logits = mx.array([9.9375, 10.0]).astype(mx.bfloat16)  # one step of bfloat16 apart
    # 10 / 1.004 = 9.96 is the larger still; in bfloat16 it would be the first one's equal.
    assert Sampler(params, np.array([1], np.int32), 2)(logits).item() == 1
