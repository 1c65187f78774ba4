"""Seeds and rows: what a request draws depends on its seed and its own logits, on nothing else."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from drawing import make, run
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.engine.sampling import (
    Row,
    SamplerState,
    draw,
)

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
