"""Keys and values of prompts seen before, shared by all requests: a radix tree over tokens.

A token is its id; a visual token is a negative number made of its medium's identity and its row,
so two images of one grid differ from their first row on. A medium is matched whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.engine.prefix_disk import DiskStats, DiskTier, Segment
from qwen3vl_mlx.engine.prefix_file import as_rows
from qwen3vl_mlx.engine.radix import Node, Values, add, remove, split, walk
from qwen3vl_mlx.processing.prompt import Prompt

# Per decoder layer its arrays (1, H, n, d), tokens on axis 2: two for plain keys and values, six
# for quantized ones (weights, scales and biases of both).
Layers: TypeAlias = tuple[tuple[mx.array, ...], ...]
_TOKENS = 2  # the axis


@dataclass(frozen=True, eq=False)
class Key:
    """What L tokens are, as far as their keys and values depend on it."""

    values: Values  # (L,)
    media: tuple[tuple[int, int], ...] = ()  # first token and the one after the last, rising

    def __len__(self) -> int:
        return len(self.values)

    def cut(self, length: int) -> int:
        """The longest prefix of at most `length` tokens that ends inside no medium."""
        for start, stop in self.media:
            if start < length < stop:
                return start
        return min(length, len(self.values))


@dataclass(frozen=True)
class Match:
    """The first `length` tokens of a prompt, computed before."""

    length: int
    layers: Layers  # arrays (1, H, length, d), lazy; empty where length is 0


@dataclass(frozen=True)
class PrefixStats:
    """What is held, and what happened since the start."""

    entries: int
    tokens: int
    bytes: int
    hits: int  # matches of one token or more
    misses: int
    hit_tokens: int
    evictions: int  # entries dropped for room
    refused: int  # entries larger than the budget
    disk: DiskStats | None


def prompt_key(prompt: Prompt, answer: Sequence[int] = ()) -> Key:
    """The key of a prompt and of the tokens generated after it.

    A video is one medium from its first frame to its last, the timestamps between them included.
    """
    tokens = prompt.token_ids
    values = np.concatenate([tokens, np.asarray(answer, tokens.dtype)]).astype(np.int64)  # (L,)
    media = []
    for medium, spans in zip(prompt.media, prompt.media_spans, strict=True):
        start, stop = spans[0].start, spans[-1].stop
        rows = np.concatenate([np.arange(span.start, span.stop) for span in spans])  # (N,)
        # What stands between frames is hashed too: media differ at their first row or nowhere.
        digest = hashlib.sha256(medium.identity.encode() + tokens[start:stop].tobytes()).digest()
        values[rows] = _visual_values(digest, len(rows))
        media.append((start, stop))
    return Key(values, tuple(media))


def _visual_values(digest: bytes, count: int) -> Values:
    """Negative numbers (count,) of rows: all 256 bits of the digest within the first four."""
    words = np.frombuffer(digest, "<u8")  # (4,)
    rows = np.arange(count, dtype=np.uint64)
    mixed: npt.NDArray[np.uint64] = (words[rows % 4] + rows) & np.uint64(2**63 - 1)
    return -1 - mixed.astype(np.int64)


@dataclass(frozen=True)
class Restoring:
    """Rows on their way from the disk."""

    future: Future[list[Segment]]

    @property
    def done(self) -> bool:
        return self.future.done()


@dataclass(frozen=True)
class _Rows:
    """The keys and values of one node's tokens."""

    layers: Layers  # arrays (1, H, n, d)
    nbytes: int


_Path: TypeAlias = list[tuple[Node[_Rows], int]]  # as `walk` gives it


@dataclass
class _Counts:
    tokens: int = 0
    nbytes: int = 0
    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    refused: int = 0


@dataclass
class PrefixCache:
    """Keys and values of at most `max_bytes`, least recently used dropped first.

    Arrays given and taken are never written to here, so entries in use need no pin. Call from the
    thread that owns the model.
    """

    max_bytes: int
    disk: DiskTier | None = None
    _root: Node[_Rows] = field(init=False, repr=False)
    # All nodes, least recently used first; a parent always comes after its children.
    _order: OrderedDict[Node[_Rows], None] = field(default_factory=OrderedDict, repr=False)
    _counts: _Counts = field(default_factory=_Counts, repr=False)

    def __post_init__(self) -> None:
        self._root = Node(np.zeros((0,), np.int64), _Rows((), 0), None)

    def peek(self, key: Key) -> int:
        """What `match` would find in memory; changes nothing."""
        return _usable(key, sum(count for _, count in walk(self._root, key.values)))

    def restore(self, key: Key) -> Restoring | None:
        """Start to read what only the disk holds of `key`; None where that is not worth it.

        Give it to `match` once it is `done`; dropping it drops what was read.
        """
        if self.disk is None:
            return None
        start = self.peek(key)
        future = self.disk.read(key.values[: _usable(key, len(key))], start)
        return Restoring(future) if future is not None else None

    def match(self, key: Key, restored: Restoring | None = None) -> Match:
        """The longest prefix held: it ends inside no medium and leaves one token to compute.

        Its arrays are lazy, and the caller's to write into by slice assignment. What only the disk
        holds is found with `restored` alone, which it waits for.
        """
        path = walk(self._root, key.values)
        held = length = _usable(key, sum(count for _, count in path))
        own = _pieces(path, held)
        pieces = [rows for _, rows in own]
        if restored is not None:
            more = _restored(restored.future.result(), held)
            length = _usable(key, held + sum(stop - start for start, stop, _ in more))
            pieces += [_slice(rows, start, stop) for start, stop, rows in more]
        counts = self._counts
        if not length:
            counts.misses += 1
            return Match(0, ())
        counts.hits += 1
        counts.hit_tokens += length
        layers = _slice(_concatenate(pieces), 0, length)
        if length > held:
            self.insert(key, layers)
        else:
            self._touch(own[-1][0])
        return Match(length, layers)

    def insert(self, key: Key, layers: Sequence[Sequence[mx.array]]) -> int:
        """Keep the first n = `layers[0][0].shape[2]` tokens of `key`; returns how many are new.

        Copies the rows not held yet, without waiting for it. An entry ends inside no medium; one
        that does not fit the budget beside the prefix it needs is not kept.
        """
        stop = key.cut(layers[0][0].shape[_TOKENS])
        path = walk(self._root, key.values[:stop])
        start = sum(count for _, count in path)
        if key.cut(start) != start:  # media that differ share a first value: once in 2**63
            return 0
        if start < stop:
            new = _slice(layers, start, stop)
            nbytes = sum(array.nbytes for layer in new for array in layer)
            if nbytes + sum(_share(node, count) for node, count in path) > self.max_bytes:
                self._counts.refused += 1
                return 0
            self._add(key.values[start:stop].copy(), new, nbytes, path)
        elif path:
            self._touch(path[-1][0])
        self._write(key.values[:stop])
        return stop - start

    def _add(self, values: Values, new: Layers, nbytes: int, path: _Path) -> None:
        """Hang a new entry below `path`, after what it displaces is dropped."""
        parent = self._root
        if path:
            parent, count = path[-1]
            if count < len(parent.values):
                parent = split(parent, count, _divide)
            self._touch(parent)
        self.shrink(self.max_bytes - nbytes)
        self._touch(add(parent, values, _Rows(_copied(new), nbytes)))
        self._counts.nbytes += nbytes
        self._counts.tokens += len(values)

    def _write(self, values: Values) -> None:
        """Give the disk what it lacks of a prefix."""
        if self.disk is None:
            return
        start = self.disk.held(values)
        path = walk(self._root, values)
        if start < len(values) == sum(count for _, count in path):
            rows = _concatenate([rows for _, rows in _pieces(path, len(values), start)])
            self.disk.write(values, start, rows)

    def shrink(self, max_bytes: int) -> int:
        """Drop entries from memory until they hold at most `max_bytes`; returns bytes freed."""
        before = self._counts.nbytes
        while self._order and self._counts.nbytes > max_bytes:
            node, _ = self._order.popitem(last=False)
            remove(node)
            self._counts.nbytes -= node.data.nbytes
            self._counts.tokens -= len(node.values)
            self._counts.evictions += 1
        return before - self._counts.nbytes

    def clear(self) -> None:
        """Forget every entry, on disk too (`shrink(0)`: in memory only)."""
        for node in self._order:
            node.parent = None  # a ring of nodes would keep its memory until a garbage collection
        self._root.children.clear()
        self._order.clear()
        self._counts.nbytes = self._counts.tokens = 0
        if self.disk is not None:
            self.disk.clear()

    def close(self) -> None:
        """Write to disk what is still on its way there."""
        if self.disk is not None:
            self.disk.close()

    @property
    def stats(self) -> PrefixStats:
        counts = self._counts
        return PrefixStats(
            entries=len(self._order),
            tokens=counts.tokens,
            bytes=counts.nbytes,
            hits=counts.hits,
            misses=counts.misses,
            hit_tokens=counts.hit_tokens,
            evictions=counts.evictions,
            refused=counts.refused,
            disk=self.disk.stats if self.disk else None,
        )

    def _touch(self, node: Node[_Rows]) -> None:
        for each in node.path():
            self._order[each] = None
            self._order.move_to_end(each)


def _usable(key: Key, length: int) -> int:
    return key.cut(max(min(length, len(key) - 1), 0))


def _share(node: Node[_Rows], count: int) -> int:
    """Bytes of a node's first rows. All rows of an array are of one size."""
    return node.data.nbytes * count // len(node.values)


def _slice(layers: Sequence[Sequence[mx.array]], start: int, stop: int) -> Layers:
    return tuple(tuple(array[:, :, start:stop, :] for array in layer) for layer in layers)


def _pieces(path: _Path, stop: int, start: int = 0) -> list[tuple[Node[_Rows], Layers]]:
    """Rows [start, stop) of a path, node by node. Lazy."""
    pieces, at = [], 0
    for node, count in path:
        first, last = max(start - at, 0), min(stop - at, count)
        if first < last:
            pieces.append((node, _slice(node.data.layers, first, last)))
        at += count
    return pieces


def _restored(segments: Sequence[Segment], held: int) -> list[tuple[int, int, Layers]]:
    """Rows from `held` on, as what is to be sliced from where to where; none if some are missing.

    Memory may hold less or more than when reading began.
    """
    more: list[tuple[int, int, Layers]] = []
    for segment in segments:
        start = max(segment.start, held)
        if segment.start > held and not more:
            return []
        if start < segment.stop:
            offset = segment.raw.start
            more.append((start - offset, segment.stop - offset, as_rows(segment.raw)))
    return more


def _divide(rows: _Rows, at: int) -> tuple[_Rows, _Rows]:
    """Both parts as copies: neither keeps the other's bytes alive."""
    total = rows.layers[0][0].shape[_TOKENS]
    head, tail = _copied(_slice(rows.layers, 0, at)), _copied(_slice(rows.layers, at, total))
    nbytes = rows.nbytes * at // total
    return _Rows(head, nbytes), _Rows(tail, rows.nbytes - nbytes)


def _copied(layers: Layers) -> Layers:
    """Copies that keep no larger array alive, begun but not waited for."""
    copies = tuple(tuple(mx.contiguous(array) for array in layer) for layer in layers)
    mx.async_eval(*(array for layer in copies for array in layer))
    return copies


def _concatenate(pieces: Sequence[Layers]) -> Layers:
    """One run of rows; with a single piece, its own handles: what is written there stays there."""
    if len(pieces) == 1:
        return pieces[0]
    return tuple(
        tuple(mx.concatenate(list(parts), axis=_TOKENS) for parts in zip(*layer, strict=True))
        for layer in zip(*pieces, strict=True)
    )
