"""A batch's keys and values against a plain list of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from caches import BITS, nbytes, parse, taken_out
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.kv_cache import BatchLayer

HEADS, WIDTH = 2, 32


def vectors(rng: np.random.RandomState, rows: int, count: int) -> mx.array:
    return mx.array(rng.standard_normal((rows, HEADS, count, WIDTH)).astype(np.float32))


def row_layer(bits: int | None, keys: mx.array, values: mx.array) -> Any:
    config = replace(parse("dense64"), head_dim=WIDTH, num_hidden_layers=1)
    layer = kv_cache.new_layers(config, bits)[0]
    layer.update_and_fetch(keys, values)
    return layer


@dataclass
class Rows:
    """What a batch should hold: keys and values (1, H, n, d) of every row, unpacked."""

    bits: int | None
    rng: np.random.RandomState
    held: list[list[mx.array]] = field(default_factory=list)
    batch: BatchLayer | None = None

    def join(self, count: int) -> None:
        keys, values = vectors(self.rng, 1, count), vectors(self.rng, 1, count)
        layer = row_layer(self.bits, keys, values)
        if self.batch is None:
            self.batch = kv_cache.merge([layer])
        else:
            self.batch.join([layer])
        self.held.append([keys, values])

    def feed(self, count: int) -> None:
        assert self.batch is not None
        pair = [vectors(self.rng, len(self.held), count) for _ in range(2)]
        before = list(self.batch.lengths)
        mask = self.batch.make_mask(count, return_array=True)
        fetched = self.batch.update_and_fetch(*pair)
        longest = max(before) + count
        first = fetched[0] if self.bits is None else fetched[0][0]
        assert first.shape[2] == longest
        expected = np.arange(longest) <= np.add.outer(before, np.arange(count))[..., None]
        shown = np.broadcast_to(np.array(mask), expected[:, None].shape)
        assert np.array_equal(shown[:, 0], expected)
        for i, row in enumerate(self.held):
            joined = zip(row, pair, strict=True)
            row[:] = [mx.concatenate([x, new[i : i + 1]], axis=2) for x, new in joined]

    def leave(self, index: int) -> None:
        assert self.batch is not None
        kept = [i for i in range(len(self.held)) if i != index % len(self.held)]
        self.batch.filter(kept)
        self.held = [self.held[i] for i in kept]

    def again(self, index: int) -> None:
        """One row out and in again, at the end."""
        assert self.batch is not None
        index %= len(self.held)
        layer, row = taken_out(self.batch, index), self.held[index]
        self.leave(index)
        self.batch.join([layer])
        self.held.append(row)

    def trim(self, counts: list[int]) -> None:
        assert self.batch is not None
        asked = [counts[i % len(counts)] for i in range(len(self.held))]
        lengths = [row[0].shape[2] for row in self.held]
        asked = [min(count, length - 1) for count, length in zip(asked, lengths, strict=True)]
        self.batch.trim(asked)
        for row, count in zip(self.held, asked, strict=True):
            row[:] = [x[:, :, : x.shape[2] - count] for x in row]

    def check(self) -> None:
        assert self.batch is not None
        assert self.batch.lengths == [row[0].shape[2] for row in self.held]
        assert self.batch.offset.tolist() == self.batch.lengths
        for i, (keys, values) in enumerate(self.held):
            packing = self.batch.packing
            expected = (keys, values) if packing is None else packing.pack(keys, values)
            for got, wanted in zip(self.batch.rows(i), expected, strict=True):
                assert mx.array_equal(got, wanted)


STEPS = st.one_of(
    st.tuples(st.just("join"), st.sampled_from([1, 5, 255, 256, 300])),
    st.tuples(st.just("feed"), st.sampled_from([1, 1, 1, 4, 256])),
    st.tuples(st.just("leave"), st.integers(0, 7)),
    st.tuples(st.just("again"), st.integers(0, 7)),
    st.tuples(st.just("trim"), st.lists(st.integers(0, 6), min_size=1, max_size=4)),
)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(STEPS, max_size=12), seed=st.integers(0, 99))
def test_a_batch_is_its_rows(bits: int | None, steps: list[tuple[str, Any]], seed: int) -> None:
    rows = Rows(bits, np.random.RandomState(seed))
    for name, argument in [("join", 3), ("join", 40), *steps]:
        if rows.held or name == "join":
            getattr(rows, name)(argument)
            rows.check()


@pytest.mark.parametrize("bits", BITS)
def test_nothing_waits_for_the_device(bits: int | None) -> None:
    """MLX refuses to evaluate inside mx.compile: whatever waited would raise."""
    rng = np.random.RandomState(0)
    new = vectors(rng, 1, 1)

    def steps(long: mx.array, short: mx.array) -> list[mx.array]:
        batch = kv_cache.merge([row_layer(bits, x, x) for x in (long, short)])
        batch.make_mask(1)
        batch.update_and_fetch(mx.concatenate([new, new]), mx.concatenate([new, new]))
        batch.join([row_layer(bits, short, short)])
        batch.trim([0, 1, 2])
        batch.filter([2, 1])
        return kv_cache.arrays([batch, taken_out(batch, 0)])

    long, short = vectors(rng, 1, 300), vectors(rng, 1, 9)
    expected = steps(long, short)
    for traced, eager in zip(mx.compile(steps)(long, short), expected, strict=True):
        assert mx.allclose(traced, eager)


def test_rows_of_one_length_need_no_mask() -> None:
    rng = np.random.RandomState(0)
    x, y = vectors(rng, 1, 9), vectors(rng, 1, 10)
    batch = kv_cache.merge([row_layer(None, x, x), row_layer(None, x, x)])
    assert (batch.make_mask(1), batch.make_mask(5)) == (None, "causal")
    batch.join([row_layer(None, y, y)])
    mask = batch.make_mask(1)
    assert isinstance(mask, mx.array)
    assert mask[:, 0, 0].sum(axis=-1).tolist() == [10, 10, 11]
    batch.filter([2])
    assert batch.make_mask(1) is None


def test_a_long_row_gives_its_slots_back() -> None:
    rng = np.random.RandomState(0)
    long, short = vectors(rng, 1, 1000), vectors(rng, 1, 9)
    batch = kv_cache.merge([row_layer(None, x, x) for x in (long, short, short)])
    assert batch.capacity == 1024
    batch.filter([1, 2])
    assert batch.capacity == 256
    assert nbytes([batch]) == 2 * 2 * HEADS * 256 * WIDTH * 4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("way", ["row", "batch", "join"])
def test_what_was_handed_in_stays_as_it_is(bits: int | None, way: str) -> None:
    rng = np.random.RandomState(0)
    x, other = vectors(rng, 1, 300), vectors(rng, 1, 3)
    given = kv_cache.layer_rows(row_layer(bits, x, x))
    before = [np.array(a) for a in given]
    layer = kv_cache.layer_from_rows(given, bits)
    if way == "batch":
        layer = kv_cache.merge([layer])
    elif way == "join":
        layer = kv_cache.merge([kv_cache.layer_from_rows(given, bits)] * 2)
        layer.join([row_layer(bits, other, other)])
    layer.trim(200 if way == "row" else [200] * len(layer.lengths))
    new = mx.repeat(other, layer.slots[0].shape[0] if way != "row" else 1, axis=0)
    layer.update_and_fetch(new, new)
    mx.eval(kv_cache.arrays([layer]))
    assert all(np.array_equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_a_merged_row_is_left_as_it_is(bits: int | None) -> None:
    x = vectors(np.random.RandomState(0), 1, 300)
    row = row_layer(bits, x, x)
    before = [np.array(a) for a in kv_cache.layer_rows(row)]
    batch = kv_cache.merge([row])
    batch.trim([200])
    batch.update_and_fetch(-x, -x)
    mx.eval(kv_cache.arrays([batch]))
    after = kv_cache.layer_rows(row)
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
    assert {a.shape[2] for a in after} == {300}  # no slot that is not filled yet


def test_an_empty_row_cannot_join() -> None:
    with pytest.raises(ValueError, match="no token"):
        kv_cache.merge(kv_cache.new_layers(parse("dense64")))
    assert kv_cache.layer_rows(kv_cache.new_layers(parse("dense64"))[0]) == ()


def test_rows_packed_differently_cannot_join() -> None:
    x = vectors(np.random.RandomState(0), 1, 3)
    with pytest.raises(ValueError, match="alike"):
        kv_cache.merge([row_layer(8, x, x), row_layer(4, x, x)])
