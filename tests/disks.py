"""Prefix caches over one folder, and what they say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixes import A, Part, key, rows, same

from qwen3vl_mlx.engine import prefix_disk
from qwen3vl_mlx.engine.prefix_cache import PrefixCache
from qwen3vl_mlx.engine.prefix_disk import DiskTier

PLENTY = 2**40
LONG: list[Part] = [*range(20), A, *range(20)]


class Disk:
    """Caches over one folder, as processes come and go."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.open: list[PrefixCache] = []

    def __call__(
        self, memory: int = PLENTY, budget: int = PLENTY, name: str = "model"
    ) -> PrefixCache:
        self.open.append(PrefixCache(memory, DiskTier(self.folder, name, budget)))
        return self.open[-1]

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)

    def filled(self, *prompts: list[Part], kind: str = "float32", **options: Any) -> PrefixCache:
        cache = self(**options)
        for parts in prompts:
            cache.insert(key(parts), rows(parts, kind))
        flush(cache)
        return cache


def flush(cache: PrefixCache) -> None:
    assert cache.disk is not None
    cache.disk.flush()


def found(cache: PrefixCache, parts: list[Part], kind: str = "float32") -> int:
    match = cache.match(key(parts), cache.restore(key(parts)))
    if match.length:
        assert same(match.layers, rows(parts, kind, match.length))
    return match.length


def disk_stats(cache: PrefixCache) -> prefix_disk.DiskStats:
    assert cache.disk is not None
    return cache.disk.stats
