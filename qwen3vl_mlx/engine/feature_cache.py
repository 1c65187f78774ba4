"""Vision features by image identity: a picture seen before skips the tower."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import mlx.core as mx

from qwen3vl_mlx.models.vision import VisionFeatures


@dataclass(frozen=True)
class FeatureCacheStats:
    """What a FeatureCache holds now (entries, bytes) and has done since it was made."""

    entries: int
    bytes: int
    hits: int
    misses: int
    evictions: int


class FeatureCache:
    """`VisualInput.identity` -> features, the least recently used dropped beyond `max_bytes`.

    For one thread. Arrays are immutable: what `get` returned stays whole after an eviction, and
    its memory counts here no longer. `max_bytes` of 0 keeps nothing.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, VisionFeatures] = OrderedDict()  # oldest use first
        self._bytes = 0
        self._hits = self._misses = self._evictions = 0

    def __contains__(self, identity: str) -> bool:
        """Whether it is held. Counts as no use, unlike `get`."""
        return identity in self._entries

    def get(self, identity: str) -> VisionFeatures | None:
        features = self._entries.get(identity)
        if features is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(identity)
        return features

    def put(self, identity: str, features: VisionFeatures) -> None:
        """Keep features, dropping others for them. Larger than the whole budget: not kept.

        They are queued for evaluation, without waiting for it; slices of a larger array are copied.
        """
        if identity in self._entries:
            self._entries.move_to_end(identity)
            return
        if features.nbytes > self.max_bytes:
            return
        self.shrink(self.max_bytes - features.nbytes)
        kept = features.compact()
        mx.async_eval(*kept.arrays)
        self._entries[identity] = kept
        self._bytes += kept.nbytes

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used until at most `max_bytes` are held. The budget stays."""
        while self._entries and self._bytes > max_bytes:
            _, features = self._entries.popitem(last=False)
            self._bytes -= features.nbytes
            self._evictions += 1

    def clear(self) -> None:
        """Drop all. Counts as no eviction."""
        self._entries.clear()
        self._bytes = 0

    @property
    def stats(self) -> FeatureCacheStats:
        return FeatureCacheStats(
            entries=len(self._entries),
            bytes=self._bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )
