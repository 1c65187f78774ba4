"""Which responses are kept, and for how long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefixes import SETTINGS

pytest.importorskip("fastapi")

from qwen3vl_mlx.processing.image import VisualInput
from qwen3vl_mlx.server.response_store import ResponseStore, StoredResponse, Turn, _num_bytes


def picture(size: int) -> VisualInput:
    return VisualInput("image", np.zeros((size, 1), np.uint8), (1, 1, size), SETTINGS)


def turn(size: int = 0) -> Turn:
    said, answered = ({"id": f"{name}_{size}", "type": "message"} for name in ("in", "out"))
    part = {"type": "image", "image": picture(size)}
    return Turn([said], [answered], [{"role": "user", "content": [part]}])


def response(name: str, *turns: Turn) -> StoredResponse:
    return StoredResponse({"id": name}, turns)


def test_the_store_forgets_what_was_not_used_for_longest() -> None:
    store = ResponseStore(max_responses=2, max_bytes=10**6)
    store.put(response("a", turn()))
    store.put(response("b", turn()))
    assert store.get("a") is not None
    store.put(response("c", turn()))
    assert [name for name in "abc" if store.get(name)] == ["a", "c"]


def test_the_store_holds_its_bytes_and_counts_a_shared_turn_once() -> None:
    store = ResponseStore(max_responses=100, max_bytes=150_000)
    first = turn(100_000)
    store.put(response("a", first))
    once = store.num_bytes
    assert 100_000 < once < 110_000
    store.put(response("b", first, turn(1)))
    assert store.num_bytes < once + 10_000
    store.remove("a")
    assert store.num_bytes > 100_000, "b goes on from it"
    assert store.item("out_100000") is not None
    assert store.item("in_100000") is None, "a client's own id, which another may use too"
    store.put(response("c", turn(90_000)))
    assert store.get("b") is None
    assert store.item("out_100000") is None
    store.remove("c")
    assert (len(store), store.num_bytes) == (0, 0)


def test_what_is_too_large_makes_no_room_for_itself() -> None:
    store = ResponseStore(max_responses=100, max_bytes=150_000)
    kept = turn(90_000)
    assert store.put(response("a", kept))
    before = store.num_bytes
    assert not store.put(response("b", turn(200_000)))
    assert not store.put(response("c", kept, turn(70_000)))
    assert (len(store), store.num_bytes) == (1, before)
    assert store.item("out_200000") is None
    assert not ResponseStore(max_responses=0, max_bytes=10**6).put(response("a"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sets(st.integers(0, 5)), st.booleans())))
def test_the_stores_count_is_what_it_holds(
    steps: list[tuple[str, set[int], bool]],
) -> None:
    turns = [turn(size * 1000) for size in range(6)]
    store = ResponseStore(max_responses=3, max_bytes=12_000)
    for name, which, removes in steps:
        if removes:
            store.remove(name)
        else:
            store.put(response(name, *(turns[index] for index in sorted(which))))
        kept = [found for name in "abcdef" if (found := store.get(name))]
        held = {turn for found in kept for turn in found.turns}
        bodies = sum(_num_bytes(found.body) for found in kept)
        assert store.num_bytes == bodies + sum(turn.num_bytes for turn in held)
        assert store.num_bytes <= store.max_bytes
        assert len(store) == len(kept) <= 3
