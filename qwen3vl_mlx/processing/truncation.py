"""A conversation that has outgrown the context, without its oldest turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from qwen3vl_mlx.errors import TooLongError
from qwen3vl_mlx.processing.lengths import least_tokens
from qwen3vl_mlx.processing.prompt import Prompt

_KEPT_ROLES = ("system", "developer")

Message = TypeVar("Message", bound=Mapping[str, Any])


def shorten(
    messages: Sequence[Message], layout: Callable[[Sequence[Message]], Prompt], limit: int
) -> list[Message]:
    """`messages` without as few of the oldest turns as it takes to fit `limit` tokens.

    A turn is a user's message and all that follows it up to the next: answers, tool calls and
    their results go together, and a message keeps all its pictures or goes whole. System messages
    and the last turn stay. layout makes the prompt that is measured; give media that are read
    already, since it is called several times. Raises TooLongError where what stays is too long.
    """
    if limit < 1:
        raise TooLongError(
            f"max_tokens leaves {limit} tokens of the context for the prompt; lower max_tokens"
        )
    turns = _turns(messages)

    def without(dropped: int) -> list[Message]:
        pairs = zip(messages, turns, strict=True)
        return [m for m, turn in pairs if turn >= dropped or m.get("role") in _KEPT_ROLES]

    def length(dropped: int) -> int:
        kept = without(dropped)
        least = least_tokens(kept)
        return least if least > limit else len(layout(kept).token_ids)

    if length(0) <= limit:
        return list(messages)
    low, high = 1, max(turns, default=0)  # the fewest dropped turns that fit lie in low .. high
    shortest = length(high)
    if shortest > limit:
        what = "the system message and the last turn" if high else "the only turn"
        raise TooLongError(
            f"prompt is too long: {what} alone take {shortest:,} tokens, and {limit:,} of the "
            "context are left for the prompt; shorten the text, send fewer or smaller pictures "
            "(max_pixels), or lower max_tokens"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if length(middle) <= limit else (middle + 1, high)
    return without(low)


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The turn of each message, counted from 0. What comes before any user belongs to the first."""
    turns: list[int] = []
    turn, asked = 0, False
    for message in messages:
        if message.get("role") == "user":
            turn, asked = turn + asked, True
        turns.append(turn)
    return turns
