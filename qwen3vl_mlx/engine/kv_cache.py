"""Keys and values of one row or many, plain or quantized, one layer of the decoder each.

A row alone lives in mlx-lm's caches. Running rows share a `BatchLayer`: every row starts at slot
0, so rows of any lengths join, leave and step back without moving a neighbour's, and their lengths
are plain numbers on the host. Quantized rows are so from their first token on: however a prompt is
cut, batched or cached, the answer is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx

from qwen3vl_mlx._mlx_lm.models.cache import KVCache, QuantizedKVCache
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.config import TextConfig

KV_BITS = (4, 8)
STEP = 256  # slots are made this many at a time, like mlx-lm's
_GROUP_SIZES = (64, 32)

RowLayer: TypeAlias = Any  # mlx-lm's KVCache or QuantizedKVCache, which are untyped
Layer: TypeAlias = "RowLayer | BatchLayer"
Arrays: TypeAlias = "tuple[mx.array, ...]"  # (B, H, n, width) each: 2 plain, 6 quantized


@dataclass(frozen=True)
class KVQuantization:
    """How keys and values are packed along head_dim: `mx.quantize`, affine."""

    bits: int
    group_size: int

    @classmethod
    def of(cls, bits: int, head_dim: int) -> KVQuantization:
        """Raises InputError for bits other than 4 and 8, or a head_dim no group divides."""
        if bits not in KV_BITS:
            raise InputError(f"kv_bits is {bits!r}, expected 4, 8 or None")
        for size in _GROUP_SIZES:
            if head_dim % size == 0:
                return cls(bits, size)
        raise InputError(
            f"kv_bits needs a head_dim that {_GROUP_SIZES[-1]} divides, and this model's is "
            f"{head_dim}: leave kv_bits unset"
        )

    def pack(self, keys: mx.array, values: mx.array) -> Arrays:
        packed = [
            mx.quantize(x, group_size=self.group_size, bits=self.bits) for x in (keys, values)
        ]
        return (*packed[0], *packed[1])

    def bytes_per_row(self, head_dim: int, itemsize: int) -> int:
        """Bytes of one head's keys, or values, of one token; itemsize: of scale and of bias."""
        return head_dim * self.bits // 8 + 2 * itemsize * head_dim // self.group_size


def new_layers(config: TextConfig, kv_bits: int | None = None) -> list[RowLayer]:
    """An empty cache for one row: a layer for each of the decoder's.

    kv_bits: None (the model's own type), 8 or 4. Raises InputError for what cannot be quantized.
    """
    count = config.num_hidden_layers
    if kv_bits is None:
        return [KVCache() for _ in range(count)]
    packing = KVQuantization.of(kv_bits, config.head_dim)
    return [QuantizedKVCache(packing.group_size, packing.bits) for _ in range(count)]


def layer_rows(layer: RowLayer) -> Arrays:
    """The tokens a row's layer holds: (1, H, n, width) each, keys before values; () if none.

    Views: what is to outlive the layer's next token must be copied.
    """
    return tuple(x[:, :, : layer.offset] for x in _slots(layer))


def layer_from_rows(arrays: Sequence[mx.array], kv_bits: int | None = None) -> RowLayer:
    """A layer that holds what `layer_rows` gave. Writing into it leaves `arrays` as they are."""
    length = arrays[0].shape[2]
    own = [x[...] for x in arrays]  # other Python objects: slots are assigned to in place
    if kv_bits is None:
        layer = KVCache()
        layer.keys, layer.values = own
    else:
        head_dim = own[0].shape[-1] * 32 // kv_bits
        layer = QuantizedKVCache(head_dim // own[1].shape[-1], kv_bits)
        layer.keys, layer.values = tuple(own[:3]), tuple(own[3:])
    layer.offset = length
    return layer


def layers_with(
    held: Sequence[Sequence[mx.array]], config: TextConfig, kv_bits: int | None = None
) -> list[RowLayer]:
    """A cache for one row that holds what `layer_rows` gave, layer by layer; empty for ()."""
    return [layer_from_rows(rows, kv_bits) for rows in held] or new_layers(config, kv_bits)


def merge(rows: Sequence[Layer]) -> BatchLayer:
    """One batch of one or more rows' layers (of the same decoder layer), in order.

    The rows' own layers stay as they are; a row alone is taken over without a copy. Raises
    ValueError for rows that hold nothing yet.
    """
    batches = [row if isinstance(row, BatchLayer) else _batch_of(row) for row in rows]
    merged = BatchLayer(batches[0].slots, batches[0].lengths, batches[0].packing)
    merged.join(batches[1:])
    return merged


def arrays(layers: Iterable[Layer]) -> list[mx.array]:
    """Everything the layers hold, for `mx.async_eval`."""
    return [x for layer in layers for x in _slots(layer)]


class BatchLayer:
    """One decoder layer's keys and values of B rows, each from slot 0 on.

    Slots behind a row's end hold anything; `make_mask` hides them. Nothing here waits for the
    device: lengths are host numbers, and joining, leaving and trimming are queued at most.
    """

    def __init__(self, slots: Arrays, lengths: Sequence[int], packing: KVQuantization | None):
        self.slots: Arrays = tuple(x[...] for x in slots)  # see layer_from_rows
        self.lengths = list(lengths)
        self.packing = packing

    @property
    def offset(self) -> mx.array:
        """Tokens each row holds, (B,) int32. The same on the host: `lengths`."""
        return mx.array(self.lengths, mx.int32)

    @property
    def capacity(self) -> int:
        return self.slots[0].shape[2]

    def size(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def make_mask(
        self,
        N: int,  # noqa: N803
        return_array: bool = False,
        window_size: int | None = None,
    ) -> mx.array | str | None:
        """What N more tokens of each row may look at, once they are written.

        None (one token) or "causal" where all rows are equally long, else (B, 1, N, K) bool.
        """
        if window_size is not None:
            raise ValueError("a batch of rows has no sliding window")
        if len(set(self.lengths)) <= 1 and not return_array:
            return None if N == 1 else "causal"
        reach = self.offset[:, None] + mx.arange(N)  # (B, N) the slot each query sits in
        return (mx.arange(self.size() + N) <= reach[..., None])[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append keys and values (B, H, L, head_dim); all of them up to the longest row's end.

        Returns arrays (B, H, K, head_dim), or triples (packed, scales, biases) where quantized.
        """
        count = keys.shape[2]
        self._reserve(self.size() + count)
        self._write((keys, values) if self.packing is None else self.packing.pack(keys, values))
        self.lengths = [length + count for length in self.lengths]
        filled = tuple(x[:, :, : self.size()] for x in self.slots)
        return filled if self.packing is None else (filled[:3], filled[3:])  # type: ignore[return-value]

    def _write(self, new: Arrays) -> None:
        count, first = new[0].shape[2], self.lengths[0]
        if len(set(self.lengths)) == 1:
            for held, x in zip(self.slots, new, strict=True):
                held[:, :, first : first + count] = x
            return
        at = (self.offset[:, None] + mx.arange(count))[:, None, :, None]  # (B, 1, L, 1)
        self.slots = tuple(
            mx.put_along_axis(held, mx.broadcast_to(at, x.shape), x, axis=2)
            for held, x in zip(self.slots, new, strict=True)
        )

    def _reserve(self, length: int) -> None:
        if length > self.capacity:
            self.slots = _fit(self.slots, _rounded(length))

    def filter(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; slots nobody needs any more are given back."""
        if list(rows) == list(range(len(self.lengths))):
            return
        self.lengths = [self.lengths[i] for i in rows]
        room = min(self.capacity, _rounded(self.size() + 1))
        chosen = mx.array(list(rows), mx.int32)
        self.slots = tuple(mx.take(x[:, :, :room], chosen, axis=0) for x in self.slots)

    def join(self, others: Sequence[Layer]) -> None:
        """Add several batches' or rows' layers at once: one copy."""
        if not others:
            return
        batches = [self, *(x if isinstance(x, BatchLayer) else _batch_of(x) for x in others)]
        if any(batch.packing != self.packing for batch in batches):
            raise ValueError("rows of one batch must be quantized alike")
        room = _rounded(max(batch.size() for batch in batches) + 1)
        fitted = [_fit(batch.slots, room) for batch in batches if batch.lengths]
        self.slots = tuple(mx.concatenate([*parts]) for parts in zip(*fitted, strict=True))
        self.lengths = [length for batch in batches for length in batch.lengths]

    def rows(self, index: int) -> Arrays:
        """The tokens of one row, as `layer_rows` gives them: views."""
        return tuple(x[index : index + 1, :, : self.lengths[index]] for x in self.slots)

    def trim(self, counts: Sequence[int]) -> None:
        """Forget each row's last tokens, so many of each."""
        pairs = zip(self.lengths, counts, strict=True)
        self.lengths = [max(length - count, 0) for length, count in pairs]


def _slots(layer: Layer) -> Arrays:
    if isinstance(layer, BatchLayer):
        return layer.slots
    if layer.keys is None:
        return ()
    if isinstance(layer, QuantizedKVCache):
        return (*layer.keys, *layer.values)
    return (layer.keys, layer.values)


def _batch_of(row: RowLayer) -> BatchLayer:
    slots = _slots(row)
    if not slots:
        raise ValueError("a row that holds no token cannot join a batch")
    quantized = isinstance(row, QuantizedKVCache)
    packing = KVQuantization(row.bits, row.group_size) if quantized else None
    return BatchLayer(slots, [row.offset] * slots[0].shape[0], packing)


def _rounded(length: int) -> int:
    return -(-length // STEP) * STEP


def _fit(slots: Arrays, room: int) -> Arrays:
    """The same rows with `room` slots each."""
    held = slots[0].shape[2]
    if held >= room:
        return tuple(x[:, :, :room] for x in slots)
    return tuple(mx.pad(x, [(0, 0), (0, 0), (0, room - held), (0, 0)]) for x in slots)
