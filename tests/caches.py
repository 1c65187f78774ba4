"""Layers of keys and values, for the tests that look into them."""

from __future__ import annotations

from typing import Any, TypeAlias

import mlx.core as mx
import tiny

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.kv_cache import BatchLayer
from qwen3vl_mlx.models.config import TextConfig, parse_config

BITS = (None, 8, 4)
Layers: TypeAlias = "list[Any]"


def parse(variant: str) -> TextConfig:
    return parse_config(tiny.tiny_config(variant)).text


def taken_out(batch: BatchLayer, index: int) -> Any:
    """A copy of one row, as a layer of its own."""
    rows = [mx.contiguous(x) for x in batch.rows(index)]
    return kv_cache.layer_from_rows(rows, batch.packing.bits if batch.packing else None)


def nbytes(layers: Layers) -> int:
    return sum(x.nbytes for x in kv_cache.arrays(layers))
