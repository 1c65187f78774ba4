"""The prefix cache in memory: what it finds, what it returns, what it drops."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prefixes import (
    IMAGE,
    LATE,
    A,
    B,
    Naive,
    Part,
    V,
    cut,
    key,
    nbytes,
    rows,
    same,
    spelled,
)

from qwen3vl_mlx.engine.prefix_cache import Key, PrefixCache, PrefixStats
from qwen3vl_mlx.engine.radix import Node

PLENTY = 2**40
KINDS = ("float32", "bfloat16", "quantized")


def filled(*prompts: list[Part], budget: int = PLENTY, kind: str = "float32") -> PrefixCache:
    cache = PrefixCache(budget)
    for parts in prompts:
        cache.insert(key(parts), rows(parts, kind))
    return cache


def found(cache: PrefixCache, parts: list[Part], kind: str = "float32") -> int:
    """How much of `parts` the cache holds; it must be the right rows."""
    match = cache.match(key(parts))
    if match.length:
        assert same(match.layers, rows(parts, kind, match.length))
    else:
        assert match.layers == ()
    return match.length


# Each: what was asked before, what is asked now, how many tokens need no computing.
CASES: dict[str, tuple[list[list[Part]], list[Part], int]] = {
    "nothing held": ([], [1, 2, 3], 0),
    "another beginning": ([[1, 2, 3]], [2, 2, 3], 0),
    "the same prompt": ([[1, 2, 3]], [1, 2, 3], 2),
    "a longer prompt": ([[1, 2, 3]], [1, 2, 3, 4], 3),
    "a shorter prompt": ([[1, 2, 3]], [1, 2], 1),
    "one token": ([[1, 2, 3]], [1], 0),
    "another end": ([[1, 2, 3, 4]], [1, 2, 5, 4], 2),
    "the longest of several": ([[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 6]], [1, 2, 3, 4, 7], 4),
    "the same image": ([[1, A, 2]], [1, A, 3], 7),
    "another image of the same grid": ([[1, A, 2]], [1, B, 2], 1),
    "both images of one grid": ([[1, A, 2], [1, B, 2]], [1, B, 2, 3], 8),
    "a second image appended": ([[1, A, 2]], [1, A, 2, B, 3], 8),
    "a second image changed": ([[1, A, 2, A, 3]], [1, A, 2, B, 3], 8),
    "images swapped": ([[1, A, B, 2]], [1, B, A, 2], 1),
    "an image elsewhere": ([[1, A, 2]], [1, 1, A, 2], 1),
    "an image as the last thing": ([[1, A]], [1, A], 1),
    "a video": ([[1, V, 2]], [1, V, 3], 15),
    "a video as the last thing": ([[1, V]], [1, V], 2),
    "the same frames at other times": ([[1, V, 2]], [1, LATE, 2], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str) -> None:
    before, now, expected = CASES[name]
    cache = filled(*before)
    assert cache.peek(key(now)) == expected
    assert cache.stats.hits + cache.stats.misses == 0
    assert found(cache, now) == expected
    stats = cache.stats
    assert (stats.hits, stats.misses) == (int(expected > 0), int(expected == 0))
    assert stats.hit_tokens == expected


def test_images_of_one_grid_differ_from_their_first_row_on() -> None:
    first, second = key([1, A, 2]), key([1, B, 2])
    assert (first.values != second.values).tolist() == [False, *[True] * 6, False]
    assert (first.values[1:7] < 0).all()
    assert first.media == second.media == ((1, 7),)
    assert len(np.unique(first.values)) == len(first.values)


def test_a_video_is_one_medium_and_its_times_count() -> None:
    early, late = key([1, V, 2]), key([1, LATE, 2])
    assert early.media == ((2, 15),)
    frames = [*range(2, 8), *range(9, 15)]
    assert (early.values[frames] != late.values[frames]).all()
    assert (early.values < 0).nonzero()[0].tolist() == frames


def test_an_answer_continues_the_key() -> None:
    assert key([1, A], [7, 8]).values.tolist() == key([1, A, 7, 8]).values.tolist()
    assert key([1, A], [7, 8]).media == key([1, A]).media
    cache = PrefixCache(PLENTY)  # a placeholder that was generated is no image
    cache.insert(key([1], [IMAGE] * 6), rows([1, *[IMAGE] * 6]))
    assert cache.peek(key([1, A, 2])) == 1


@pytest.mark.parametrize("count", range(1, 18))
def test_media_computed_in_part_are_not_kept(count: int) -> None:
    parts: list[Part] = [1, A, 2, 3, V]
    cache = PrefixCache(PLENTY)
    kept = cache.insert(key(parts), rows(parts, count=count))
    assert kept == cut(parts, count) == cache.stats.tokens
    assert found(cache, [*parts, 4]) == kept


def test_rows_held_already_are_not_kept_twice() -> None:
    cache = filled([1, 2, 3, 4], [1, 2, 3, 4], [1, 2])
    assert cache.stats.tokens == 4
    assert cache.insert(key([1, 2, 3, 4, 5]), rows([1, 2, 3, 4, 5])) == 1
    assert cache.insert(key([1, 2, 6]), rows([1, 2, 6])) == 1
    assert cache.stats.tokens == 6
    assert cache.stats.entries == 4  # 1 2 | 3 4 | 5 | 6
    assert cache.stats.bytes == nbytes(rows([1] * 6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [[1, 2, 3, 4, 9], [1, 2, 9], [1, 2, 3, 4, 5, 6, 9]])
def test_writing_into_a_match_changes_no_later_one(kind: str, again: list[Part]) -> None:
    cache = filled([1, 2, 3, 4], [1, 2, 3, 4, 5, 6], kind=kind)
    for _ in range(2):
        match = cache.match(key(again))
        assert match.length == len(again) - 1
        assert same(match.layers, rows(again, kind, match.length))
        for layer in match.layers:
            for array in layer:
                array[:, :, :2, :] = mx.zeros_like(array[:, :, :2, :])
        mx.eval(match.layers)


def test_writing_into_what_was_given_changes_nothing() -> None:
    cache = PrefixCache(PLENTY)
    given = rows([1, 2, 3])
    cache.insert(key([1, 2, 3]), given)
    given[0][0][:, :, 1:, :] = mx.zeros((1, 2, 2, 4))
    mx.eval(given)
    assert found(cache, [1, 2, 3, 4]) == 3


def test_entries_keep_no_larger_array_alive() -> None:
    width = 64
    held = PrefixCache(PLENTY)
    big = mx.zeros((1, 1, 4096, width))
    mx.eval(big)
    before = mx.get_active_memory()
    held.insert(Key(np.arange(32, dtype=np.int64)), [[big[:, :, :32, :]]])
    held.insert(Key(np.arange(16, dtype=np.int64)), [[big[:, :, :16, :]]])
    big = mx.zeros((1,))
    mx.synchronize()
    assert mx.get_active_memory() - before < 0
    assert held.stats.bytes == 32 * width * 4


ROW = nbytes(rows([1]))


def test_least_recently_used_goes_first() -> None:
    cache = filled([1, 1], [2, 2], [3, 3], budget=6 * ROW)
    found(cache, [1, 1, 5])
    cache.insert(key([4, 4]), rows([4, 4]))
    assert [cache.peek(key([i, i, 5])) for i in (1, 2, 3, 4)] == [2, 0, 2, 2]
    cache.insert(key([3, 3]), rows([3, 3]))  # held: used
    cache.insert(key([2, 2]), rows([2, 2]))
    assert [cache.peek(key([i, i, 5])) for i in (1, 2, 3, 4)] == [0, 2, 2, 2]
    assert cache.stats.evictions == 2


def test_leaves_go_before_what_they_hang_on() -> None:
    cache = filled([1, 2, 3, 4], [1, 2, 5, 6], [7], budget=7 * ROW)
    assert cache.stats.evictions == 0
    assert cache.shrink(6 * ROW) == 2 * ROW
    assert cache.peek(key([1, 2, 3, 4, 9])) == 2  # 3 4 gone
    cache.shrink(4 * ROW)
    assert [cache.peek(key([1, 2, 5, 6, 9])), cache.peek(key([7, 9]))] == [2, 1]
    cache.shrink(ROW)
    assert [cache.peek(key([1, 2, 9])), cache.peek(key([7, 9]))] == [0, 1]
    assert cache.shrink(0) == ROW
    assert cache.stats == PrefixStats(0, 0, 0, 0, 0, 0, 4, 0, None)


def test_the_unused_half_of_a_split_entry_goes_first() -> None:
    cache = filled([1, 2, 3, 4], [5], [1, 2, 6], budget=6 * ROW)  # 5 is newer than 3 4
    cache.shrink(4 * ROW)
    assert cache.peek(key([1, 2, 3, 9])) == 2
    assert cache.peek(key([5, 9])) == 1


def test_what_does_not_fit_displaces_nothing() -> None:
    cache = filled([1, 2], [3], budget=3 * ROW)
    for parts in ([4, 4, 4, 4], [1, 2, 5, 6], [1, 7, 8, 9]):
        assert cache.insert(key(parts), rows(parts)) == 0
    assert (cache.stats.tokens, cache.stats.evictions, cache.stats.refused) == (3, 0, 3)
    assert cache.stats.entries == 2  # nothing was split in vain
    assert cache.insert(key([1, 7, 8]), rows([1, 7, 8])) == 2  # beside the 1 it needs
    assert found(cache, [1, 7, 8, 9]) == 3


def test_clear_forgets_everything() -> None:
    cache = filled([1, 2], [1, 3])
    cache.clear()
    assert cache.peek(key([1, 2, 3])) == 0
    assert (cache.stats.entries, cache.stats.tokens, cache.stats.bytes) == (0, 0, 0)
    cache.insert(key([1, 3]), rows([1, 3]))
    assert found(cache, [1, 3, 4]) == 2


@pytest.mark.parametrize("change", [lambda v: v, lambda v: v % 7, lambda v: v - 2**60])
def test_a_long_prompt_is_found_fast(change: Callable[[np.ndarray], np.ndarray]) -> None:
    values = change(np.arange(30_000))
    array = mx.zeros((1, 1, 30_000, 2))
    cache = PrefixCache(PLENTY)
    for stop in range(5000, 30_001, 5000):
        cache.insert(Key(values[:stop]), [[array[:, :, :stop]] * 2])
    assert cache.stats.entries == 6
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        assert cache.match(Key(values)).length == 29_999
        best = min(best, time.perf_counter() - start)
    assert best < 6 * 0.001


PARTS = st.lists(st.sampled_from([0, 1, A, B, V, LATE]), min_size=1, max_size=6)


class Machine(RuleBasedStateMachine):
    """Any order of insertions and matches finds what a list of all insertions says."""

    kind = "float32"
    budget = PLENTY

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(self.budget)
        self.naive = Naive()
        self.lost = False  # something was dropped: less may be found

    @rule(parts=PARTS, data=st.data())
    def insert(self, parts: list[Part], data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(spelled(parts))))
        self.cache.insert(key(parts), rows(parts, self.kind, count))
        self.naive.insert(parts, count)

    @rule(parts=PARTS, spoil=st.booleans())
    def match(self, parts: list[Part], spoil: bool) -> None:
        length, expected = self.cache.peek(key(parts)), self.naive.match(parts)
        match = self.cache.match(key(parts))
        assert match.length == length
        dropped = self.lost or self.cache.stats.evictions + self.cache.stats.refused
        assert length <= expected if dropped else length == expected
        if length:
            assert same(match.layers, rows(parts, self.kind, length))
        if spoil:
            for layer in match.layers:
                for array in layer:
                    array[:, :, -1:, :] = mx.zeros_like(array[:, :, -1:, :])

    @rule(rows_left=st.integers(0, 12))
    def shrink(self, rows_left: int) -> None:
        before, left = self.cache.stats.bytes, rows_left * nbytes(rows([1], self.kind))
        freed = self.cache.shrink(left)
        assert self.cache.stats.bytes == before - freed <= max(left, 0)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.naive.kept.clear()

    @invariant()
    def adds_up(self) -> None:
        nodes, todo = [], list(self.cache._root.children.values())
        while todo:
            node: Node = todo.pop()
            nodes.append(node)
            todo += node.children.values()
            assert len(node.values) == node.data.layers[0][0].shape[2]
        stats = self.cache.stats
        assert stats.entries == len(nodes)
        assert stats.tokens == sum(len(node.values) for node in nodes)
        assert stats.bytes == sum(nbytes(node.data.layers) for node in nodes) <= self.budget
        assert set(nodes) == set(self.cache._order)


def machine(kind: str, budget: int) -> type[Machine.TestCase]:
    made = type(f"Machine_{kind}", (Machine,), {"kind": kind, "budget": budget})
    test: type[Machine.TestCase] = made.TestCase
    test.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
    return test


TestUnbounded = machine("float32", PLENTY)
TestTight = machine("bfloat16", 25 * nbytes(rows([1], "bfloat16")))
TestQuantized = machine("quantized", 40 * nbytes(rows([1], "quantized")))
