"""The key-value cache of one sequence that is computed by itself, outside the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qwen3vl_mlx._mlx_lm.models.cache import KVCache
from qwen3vl_mlx.engine import kv_cache


@dataclass
class CacheState:
    """Keys and values of the tokens so far."""

    layers: list[Any]  # one per decoder layer, see kv_cache.new_layers

    @classmethod
    def empty(cls, num_layers: int) -> CacheState:
        return cls([KVCache() for _ in range(num_layers)])

    @property
    def length(self) -> int:
        """Tokens whose keys and values are held."""
        return int(self.layers[0].offset)

    def arrays(self) -> list[mx.array]:
        return kv_cache.arrays(self.layers)
