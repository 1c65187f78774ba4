"""Drafters that know the answer, and pass on more or less of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from driving import Driver

from qwen3vl_mlx.engine.batch import Decoding
from qwen3vl_mlx.engine.output import Usage
from qwen3vl_mlx.engine.request import Handle, Request
from qwen3vl_mlx.engine.speculative import (
    MOST_DRAFTED,
    Speculation,
)

Guess: TypeAlias = Callable[[list[int]], list[int]]  # from what will be said to what is guessed

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


class Told:
    """A drafter that was told the answers, by seed, and passes on what `guess` makes of them."""

    def __init__(self, answers: dict[int, list[int]], guess: Guess):
        self.answers = answers
        self.guess = guess
        self.caches: Sequence[Any] = ()

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
