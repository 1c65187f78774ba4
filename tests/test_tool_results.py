"""Results of parallel tool calls reach the model in the order of the calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.processing.tool_results import results_in_order


def turns(calls: str, results: str) -> list[dict[str, Any]]:
    """A question, calls with the ids `calls`, and results for the ids `results`."""
    asked = [{"id": id_, "function": {"name": "look", "arguments": "{}"}} for id_ in calls]
    return [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": None, "tool_calls": asked},
        *({"role": "tool", "tool_call_id": id_, "content": f"seen by {id_}"} for id_ in results),
        {"role": "user", "content": "and now?"},
    ]


@pytest.mark.parametrize(
    ("calls", "results", "read"),
    [
        ("ab", "ba", "ab"),
        ("abc", "cab", "abc"),
        ("ab", "ab", "ab"),
        ("ab", "xa", "xa"),  # of another call: left for the reader to see
        ("ab", "bab", "bab"),
        ("ab", "b", "b"),
        ("a", "ba", "ba"),
        ("", "ba", "ba"),
    ],
)
def test_results_follow_their_calls(calls: str, results: str, read: str) -> None:
    assert results_in_order(turns(calls, results)) == turns(calls, read)


def test_every_turn_is_ordered_by_its_own_calls() -> None:
    twice = [*turns("ab", "ba"), *turns("ba", "ab")]
    assert results_in_order(twice) == [*turns("ab", "ab"), *turns("ba", "ba")]


@pytest.mark.parametrize("messages", ["text", None, [None, 1, {"tool_calls": 3}], [{"role": []}]])
def test_what_is_malformed_stays_for_the_check_to_name(messages: Any) -> None:
    assert results_in_order(messages) == messages


def test_pictures_move_with_their_results(demo: Qwen3VL, scene: Image, other_scene: Image) -> None:
    def asked(order: str) -> list[dict[str, Any]]:
        messages = turns("ab", order)
        for message in messages:
            if message["role"] == "tool":
                picture = scene if message["tool_call_id"] == "a" else other_scene
                message["content"] = [{"type": "image", "image": picture}]
        return messages

    (right, swapped) = (demo.processor.prompt(asked(order)) for order in ("ab", "ba"))
    assert np.array_equal(right.token_ids, swapped.token_ids)
    assert [m.identity for m in right.media] == [m.identity for m in swapped.media]
