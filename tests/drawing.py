"""Samplers at work on logits that are given, and the distributions they should follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.engine.sampling import Row, Sampler, SamplerState, SamplingParams, draw

Floats = npt.NDArray[np.float64]


def make(
    vocab: int, prompt: Sequence[int] = (), breakers: Sequence[int] = (), **params: Any
) -> Sampler:
    return Sampler(SamplingParams(**params), np.array(prompt, np.int32), vocab, frozenset(breakers))


def run(sampler: Sampler, logits: mx.array, steps: int) -> list[int]:
    """An answer of `steps` tokens; every step has the same logits (vocab_size,)."""
    state, history = sampler.start(), []
    for _ in range(steps):
        token, (state,) = draw(logits[None], [Row(sampler, state, tuple(history))])
        history.append(int(token.item()))
    return history


def many(sampler: Sampler, logits: mx.array, count: int) -> list[int]:
    """The draws of the first `count` steps, all from one history, in one batch."""
    start = sampler.start()
    rows = [Row(sampler, SamplerState(step, start.counts), ()) for step in range(count)]
    tokens, _ = draw(mx.broadcast_to(logits, (count, *logits.shape)), rows)
    return tokens.tolist()


def check_distribution(tokens: Sequence[int], expected: Sequence[float] | Floats) -> None:
    """Nothing outside the support; a chi-square within its 99.99 % quantile (Wilson-Hilferty).

    Outcomes expected fewer than five times count as one.
    """
    wanted = np.array(expected, np.float64) / np.sum(expected) * len(tokens)
    counts = np.bincount(tokens, minlength=len(wanted))
    assert not counts[wanted == 0].any()
    rare = wanted < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom:
        chi_square = float(((counts - wanted) ** 2 / wanted).sum())
        spread = 2 / (9 * freedom)
        assert chi_square <= freedom * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


def softmax(logits: Floats) -> Floats:
    weights: Floats = np.exp(logits - logits.max())
    return weights / weights.sum()


def reference(logits: Floats, params: SamplingParams) -> Floats:
    """Probabilities (n,) after temperature, top-k, top-p and min-p, one plain step after another.

    Logits without ties.
    """
    probs = softmax(logits / params.temperature)
    order = np.argsort(-probs)
    if params.top_k:
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    mass = 0.0
    for token in order:
        mass, before = mass + probs[token], mass
        if before >= params.top_p:
            probs[token] = 0
    probs /= probs.sum()
    probs[probs < params.min_p * probs.max()] = 0
    return probs / probs.sum()
