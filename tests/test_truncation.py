"""Conversations that outgrow the context lose whole turns, oldest first, as few as needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.errors import PromptError
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.processing.processor import Processor
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.processing.truncation import shorten

Messages: TypeAlias = "list[dict[str, Any]]"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(tiny.DEMO, read_config(tiny.DEMO))


def measured(messages: Sequence[dict[str, Any]]) -> Prompt:
    """A stand-in for the processor: every message says how long it is."""
    length = sum(message["length"] for message in messages)
    return Prompt(np.zeros((length,), np.int32), None, ())  # type: ignore[arg-type]


def size(messages: Sequence[dict[str, Any]]) -> int:
    return len(measured(messages).token_ids)


def groups(messages: Messages) -> list[Messages]:
    """User turns, without system messages; what comes before the first user is part of it."""
    found: list[Messages] = [[]]
    for message in messages:
        if message["role"] == "user" and any(m["role"] == "user" for m in found[-1]):
            found.append([])
        if message["role"] not in ("system", "developer"):
            found[-1].append(message)
    return found


conversations = st.lists(
    st.tuples(
        st.sampled_from(["user", "user", "assistant", "tool", "system", "developer"]),
        st.integers(1, 50),
    ),
    max_size=12,
).map(lambda pairs: [{"role": r, "length": n, "id": i} for i, (r, n) in enumerate(pairs)])


@settings(max_examples=300, deadline=None)
@given(messages=conversations, limit=st.integers(1, 300))
def test_the_fewest_oldest_turns_go(messages: Messages, limit: int) -> None:
    turns = groups(messages)
    system = [m for m in messages if m["role"] in ("system", "developer")]
    # size after dropping 0, 1, ... turns, the last of which always stays
    sizes = [size(system) + sum(map(size, turns[n:])) for n in range(len(turns))]
    if sizes[-1] > limit:
        with pytest.raises(PromptError) as caught:
            shorten(messages, measured, limit)
        assert f"{sizes[-1]:,} tokens" in str(caught.value)
        assert f"{limit:,} of the context" in str(caught.value)
        return
    dropped = next(n for n, held in enumerate(sizes) if held <= limit)
    gone = [m["id"] for turn in turns[:dropped] for m in turn]
    expected = [m for m in messages if m["id"] not in gone]
    assert shorten(messages, measured, limit) == expected


@pytest.mark.parametrize("limit", [0, -5])
def test_an_answer_that_takes_the_whole_context_is_refused(limit: int) -> None:
    with pytest.raises(PromptError, match="lower max_tokens"):
        shorten([{"role": "user", "length": 1}], measured, limit)


def picture(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.RandomState(seed).randint(0, 256, (64, 96, 3), dtype=np.uint8)


def user(text: str, *seeds: int) -> dict[str, Any]:
    images = [{"type": "image", "image": picture(seed)} for seed in seeds]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CONVERSATION: Messages = [
    {"role": "system", "content": "Be brief."},
    user("What are these?", 1, 2),
    {"role": "assistant", "content": "Two boxes."},
    user("How is the weather?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "Rain."},
    {"role": "assistant", "content": "It rains."},
    user("And this?", 3),
]


def test_real_prompts_keep_whole_turns(processor: Processor) -> None:
    messages = processor.read(CONVERSATION, processor.image_budget())
    whole = len(processor.prompt(messages).token_ids)
    kept: dict[tuple[int, ...], int] = {}
    for limit in range(whole, 0, -1):
        try:
            left = shorten(messages, processor.prompt, limit)
        except PromptError:
            break
        prompt = processor.prompt(left)
        assert len(prompt.token_ids) <= limit
        seen = [part for m in left if not isinstance(m["content"], str) for part in m["content"]]
        assert len(prompt.media) == sum(part["type"] == "image" for part in seen)
        kept[tuple(messages.index(message) for message in left)] = limit
    assert list(kept) == [(0, 1, 2, 3, 4, 5, 6, 7), (0, 3, 4, 5, 6, 7), (0, 7)]


def test_a_conversation_that_fits_stays_as_it_is(processor: Processor) -> None:
    messages = processor.read(CONVERSATION, processor.image_budget())
    assert shorten(messages, processor.prompt, 10**6) == messages


def test_the_only_turn_too_long_is_named_with_numbers(processor: Processor) -> None:
    messages = processor.read([user("Look", 1, 2, 3)], processor.image_budget())
    length = len(processor.prompt(messages).token_ids)
    with pytest.raises(PromptError, match=rf"the only turn.* {length} tokens.* 20 of the context"):
        shorten(messages, processor.prompt, 20)
