"""Conversions in tests: one call to make them, and what they wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import tiny
from layouts import split, wide, write
from mlx.utils import tree_flatten

from qwen3vl_mlx import conversion
from qwen3vl_mlx.hub import Snapshot
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.quant import policy
from qwen3vl_mlx.quant.apply import Assignment


def convert(
    source: Path, target: Path, quantize: Assignment | str | None = None, **options: Any
) -> conversion.Report:
    """Convert; the name of a quantization goes through the policy."""
    if isinstance(quantize, str):
        quantize = assignment(source, quantize)
    opened = conversion.open_source(Snapshot(source))
    return conversion.convert(opened, target, quantize, **options)


def assignment(source: Path, name: str, **settings: Any) -> Assignment | None:
    return policy.choose(read_config(source), policy.Request(name, **settings))


def tensors_of(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder, each in one file only, and the index agrees."""
    found: dict[str, mx.array] = {}
    where: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = mx.load(str(path))
        assert not found.keys() & tensors.keys()
        found |= tensors
        where |= dict.fromkeys(tensors, path.name)
    index = read_json(folder / "model.safetensors.index.json")
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def parameters(model: Model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def differing(got: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Names of tensors that are not equal bit by bit, type and shape included."""
    names = got.keys() | expected.keys()
    return sorted(
        n for n in names if n not in got or n not in expected or not same(got, expected, n)
    )


def same(got: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> bool:
    a, b = mx.array(got[name]), mx.array(expected[name])
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(bits(a), bits(b)).item()


def bits(array: mx.array) -> mx.array:
    return mx.contiguous(array).reshape(-1).view(mx.uint8)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_source(folder: Path, variant: str, dtype: mx.Dtype = mx.float32, count: int = 2) -> Path:
    """A whole checkpoint folder in the Hub's layout, with widths that groups divide."""
    tiny.write_tiny(folder, variant)
    (folder / "model.safetensors").unlink()
    config, tensors = wide(variant)
    text = {**config["text_config"], "dtype": str(dtype).removeprefix("mlx.core.")}
    cast = {name: mx.array(tensor).astype(dtype) for name, tensor in tensors.items()}
    return write(folder, {**config, "text_config": text}, *split(cast, count))


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, hidden files too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
