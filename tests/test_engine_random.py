"""Requests that come, go and are given up at random: each is answered as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from driving import Driver, recording
from hypothesis import given, settings
from hypothesis import strategies as st
from law import TOLERANCE, Messages, Run, film, picture, said, user

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.draft_model import DraftCheckpoint
from qwen3vl_mlx.engine.request import Handle
from qwen3vl_mlx.processing.prompt import Prompt

MOST = 8  # tokens of an answer
A, B = picture(1, 96), picture(2, 96)
ASKED: dict[str, Messages] = {
    "short": [user("So?")],
    "long": [user("Tell me of the sea, the wind and the old stone house on the hill, at length.")],
    "one": [user(A, "And?")],
    "other of its size": [user(B, "And?")],
    "both": [user(A, "or", B)],
    "both, turned": [user(B, "or", A)],
    "a turn later": [user(A, "And?"), said("So it is."), user(picture(3), "Well?")],
    "film": [user("See:", film(10), "And?")],
    "film and picture": [user(film(10), A)],
}


@dataclass(frozen=True)
class Asking:
    """A request, in steps of the scheduler."""

    name: str
    arrival: int
    max_tokens: int
    cancelled: int | None  # steps after its arrival


ASKINGS = st.builds(
    Asking,
    name=st.sampled_from(sorted(ASKED)),
    arrival=st.integers(0, 25),
    max_tokens=st.integers(1, MOST),
    cancelled=st.none() | st.none() | st.integers(0, 25),
)
OPTIONS = st.fixed_dictionaries(
    {
        "max_batch": st.integers(1, 5),
        "interleave": st.sampled_from([1, 2, 5, 16, 512]),
        "prefill_chunk": st.sampled_from([1, 7, 16, 2048]),
        # Nothing, less than one prompt, about two prompts, all: a token has 2 KiB here.
        "prefix_cache_bytes": st.sampled_from([0, 60_000, 200_000, 2**30]),
        # Nothing, one picture, all: a picture of six tokens has 4.6 kB.
        "feature_cache_bytes": st.sampled_from([0, 5_000, 2**30]),
        "guess": st.sampled_from(["", "", "lookup", "draft"]),
    }
)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Qwen3VL]) -> Qwen3VL:
    return tiny_model("dense64")


@pytest.fixture(scope="module")
def alone(model: Qwen3VL) -> Callable[[str], tuple[Prompt, Run]]:
    """A prompt, and its answer by an engine that nobody else asks and that remembers nothing."""

    @cache
    def answered(name: str) -> tuple[Prompt, Run]:
        prompt = model.processor.prompt(ASKED[name])
        with recording() as drawn:
            driver = Driver(model, drawn, prefix_cache_bytes=0, feature_cache_bytes=0)
            handle = driver.ask(prompt, MOST)
            driver.finish(handle)
            return prompt, Run(handle.tokens, driver.logits(handle))

    return answered


@settings(max_examples=30, deadline=None)
@given(askings=st.lists(ASKINGS, min_size=1, max_size=7), options=OPTIONS)
def test_everyone_is_answered_as_if_alone(
    model: Qwen3VL,
    alone: Callable[[str], tuple[Prompt, Run]],
    askings: list[Asking],
    options: dict[str, Any],
) -> None:
    for asking in askings:
        alone(asking.name)  # before anything is recorded
    guess = options.pop("guess")
    if guess == "draft":  # the model guesses for itself
        options["draft"] = DraftCheckpoint(model.model, model.processor.tokenizer)
    elif guess:
        options["speculative"] = guess
    with recording() as drawn:
        driver = Driver(model, drawn, **options)
        handles = play(driver, askings, {asking: alone(asking.name)[0] for asking in askings})
        for asking, handle in zip(askings, handles, strict=True):
            check(driver, asking, handle, alone(asking.name)[1])
        load = driver.scheduler.load
        assert (load.finished, load.failed) == (len(askings), 0)
        prefix, features = driver.scheduler.prefix, driver.scheduler.features.stats
        assert features.bytes <= options["feature_cache_bytes"]
        assert prefix is None or prefix.stats.bytes <= options["prefix_cache_bytes"]
        driver.drain()


def play(driver: Driver, askings: list[Asking], prompts: dict[Asking, Prompt]) -> list[Handle]:
    """Step until all have come and gone."""
    handles: dict[int, Handle] = {}
    for step in range(3000):
        for i, asking in enumerate(askings):
            if asking.arrival == step:
                handles[i] = driver.ask(prompts[asking], asking.max_tokens)
            if asking.cancelled is not None and asking.arrival + asking.cancelled == step:
                handles[i].cancel()
        if len(handles) == len(askings) and not driver.scheduler.busy:
            break
        driver.step()
    return [handles[i] for i in range(len(askings))]


def check(driver: Driver, asking: Asking, handle: Handle, law: Run) -> None:
    assert handle.phase == "done"
    last = list(handle)[-1]
    assert last.usage is not None
    count = len(handle.tokens)
    assert last.usage.completion_tokens == count
    if last.finish_reason == "cancelled":
        assert asking.cancelled is not None
        assert count < asking.max_tokens
    else:
        assert last.finish_reason == "length"
        assert count == asking.max_tokens
    assert handle.tokens == law.tokens[:count]
    if count:
        largest = np.abs(law.logits).max()
        assert np.abs(driver.logits(handle) - law.logits[:count]).max() <= TOLERANCE * largest
