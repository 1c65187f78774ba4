"""The cache of vision features: who is kept, what it counts, what it holds in memory."""

from __future__ import annotations

from collections import OrderedDict

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_mlx.engine.feature_cache import FeatureCache, FeatureCacheStats
from qwen3vl_mlx.models.vision import VisionFeatures

ROW = 3 * 4 * 16  # bytes of one visual token below: embeds and two DeepStack levels


def features(tokens: int, value: float = 0.0) -> VisionFeatures:
    levels = [mx.full((tokens, 16), value + i) for i in range(3)]
    return VisionFeatures(levels[0], tuple(levels[1:]))


def test_what_was_put_comes_back_with_its_deepstack() -> None:
    cache = FeatureCache(10**6)
    assert cache.get("a") is None
    cache.put("a", features(4, 1.0))
    cache.put("b", features(4, 5.0))
    for identity, value in (("a", 1.0), ("b", 5.0)):
        found = cache.get(identity)
        assert found is not None
        for i, x in enumerate(found.arrays):
            np.testing.assert_array_equal(np.array(x), np.full((4, 16), value + i))
    assert cache.stats == FeatureCacheStats(entries=2, bytes=8 * ROW, hits=2, misses=1, evictions=0)


def test_the_least_recently_used_goes_first() -> None:
    cache = FeatureCache(9 * ROW)
    for identity in "abc":
        cache.put(identity, features(3))
    cache.get("a")
    cache.put("b", features(3))  # held already: a use
    cache.put("d", features(3))
    assert [identity in cache for identity in "abcd"] == [True, True, False, True]
    cache.put("e", features(6))  # takes two places
    assert [identity in cache for identity in "abde"] == [False, False, True, True]
    assert cache.stats.evictions == 3


def test_looking_without_a_use_changes_nothing() -> None:
    cache = FeatureCache(6 * ROW)
    cache.put("a", features(3))
    cache.put("b", features(3))
    assert "a" in cache
    assert "c" not in cache
    cache.put("c", features(3))
    assert "a" not in cache
    assert (cache.stats.hits, cache.stats.misses) == (0, 0)


def test_what_is_larger_than_the_budget_is_not_kept_and_drops_nothing() -> None:
    cache = FeatureCache(4 * ROW)
    cache.put("a", features(4))
    cache.put("b", features(5))
    assert "a" in cache
    assert "b" not in cache
    none = FeatureCache(0)
    none.put("a", features(1))
    assert none.get("a") is None


def test_shrink_lends_memory_and_the_budget_stays() -> None:
    cache = FeatureCache(9 * ROW)
    for identity in "abc":
        cache.put(identity, features(3))
    cache.shrink(6 * ROW)
    assert [identity in cache for identity in "abc"] == [False, True, True]
    cache.shrink(0)
    assert cache.stats.bytes == cache.stats.entries == 0
    for identity in "abc":
        cache.put(identity, features(3))
    assert cache.stats.entries == 3


def test_clear_keeps_the_counts() -> None:
    cache = FeatureCache(9 * ROW)
    cache.put("a", features(3))
    cache.get("a")
    cache.clear()
    assert cache.get("a") is None
    assert cache.stats == FeatureCacheStats(entries=0, bytes=0, hits=1, misses=1, evictions=0)
    cache.put("a", features(3))
    assert "a" in cache


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_slice_is_kept_without_what_it_was_cut_from(evaluated: bool) -> None:
    cache = FeatureCache(10**8)
    mx.synchronize()
    before = mx.get_active_memory()
    whole = features(20_000)
    if evaluated:
        mx.eval(*whole.arrays)
    cache.put("a", whole[5000:5500])
    del whole
    mx.synchronize()
    assert cache.stats.bytes == 500 * ROW
    assert mx.get_active_memory() - before <= 2 * 500 * ROW  # the whole is 40 times as much


def test_what_was_handed_out_outlives_its_eviction() -> None:
    cache = FeatureCache(3 * ROW)
    cache.put("a", features(3, 7.0))
    found = cache.get("a")
    assert found is not None
    cache.put("b", features(3, 1.0))
    assert "a" not in cache
    np.testing.assert_array_equal(np.array(found.embeds), np.full((3, 16), 7.0))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 5), st.integers(1, 8)),
            st.tuples(st.just("get"), st.integers(0, 5), st.just(0)),
            st.tuples(st.just("shrink"), st.just(0), st.integers(0, 12)),
        ),
        max_size=30,
    )
)
def test_any_use_follows_a_plain_model(operations: list[tuple[str, int, int]]) -> None:
    """Against an ordered list of sizes."""
    budget = 12
    cache = FeatureCache(budget * ROW)
    known: OrderedDict[str, int] = OrderedDict()
    evictions = 0

    def evict(limit: int) -> None:
        nonlocal evictions
        while sum(known.values()) > limit:
            known.popitem(last=False)
            evictions += 1

    for what, key, size in operations:
        identity = str(key)
        if what == "shrink":
            cache.shrink(size * ROW)
            evict(size)
        elif what == "get":
            found = cache.get(identity)
            assert (found is None) == (identity not in known)
            if found is not None:
                assert len(found.embeds) == known[identity]
                known.move_to_end(identity)
        else:
            cache.put(identity, features(size))
            if identity in known:
                known.move_to_end(identity)
            else:
                evict(budget - size)
                known[identity] = size
        assert cache.stats.bytes == sum(known.values()) * ROW <= budget * ROW
        assert cache.stats.entries == len(known)
        assert cache.stats.evictions == evictions
        assert all(identity in cache for identity in known)
