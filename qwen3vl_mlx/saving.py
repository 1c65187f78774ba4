"""A live model written as a checkpoint, quantized or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from qwen3vl_mlx.conversion import (
    DTYPES,
    Output,
    card_facts,
    open_source,
    verify,
    write_checkpoint,
)
from qwen3vl_mlx.hub import Snapshot
from qwen3vl_mlx.layout import Weights
from qwen3vl_mlx.loading import progress_bar
from qwen3vl_mlx.models.config import Quantization
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.publish import check_target
from qwen3vl_mlx.quant.apply import Assignment, as_assignment, parameter_shapes
from qwen3vl_mlx.tensorfile import ShardWriter, Slot, raw_bytes


def save_model(model: Model, snapshot: Snapshot, target: Path, force: bool, progress: bool) -> None:
    """Write `model`, loaded from `snapshot`, to the folder `target`.

    Floating-point tensors are stored in the source's type where that holds them exactly, so what
    is loaded again is bit-equal. Raises InputError or OutputError; then `target` is as it was.
    """
    check_target(target, snapshot.folder, force=force)
    source = open_source(snapshot)
    flat = tree_flatten(model.parameters(), destination={})  # type: ignore[no-untyped-call]
    assert isinstance(flat, dict)
    stored = _stored_dtype(source.values)
    dtypes = {name: _smallest(tensor, stored) for name, tensor in flat.items()}
    groups = [[Slot(name, dtypes[name], tensor.shape)] for name, tensor in flat.items()]
    assignment = live_assignment(model)
    facts = card_facts(source, target, assignment, groups, parameter_shapes(model.config), None)

    def write(writer: ShardWriter) -> None:
        _write(writer, flat, dtypes, progress)

    tied = model.config.tie_word_embeddings
    output = Output(source, target, groups, assignment, tied=tied, force=force)
    write_checkpoint(output, facts, write)


def _write(writer: ShardWriter, flat: Weights, dtypes: dict[str, mx.Dtype], progress: bool) -> None:
    with progress_bar(writer.nbytes, "Saving", progress) as bar:
        for name, tensor in flat.items():
            data = raw_bytes(tensor.astype(dtypes[name]))
            writer.write(name, data)
            bar.update(data.nbytes)
            mx.clear_cache()
    verify(writer, progress)


def _stored_dtype(values: Mapping[str, Any]) -> mx.Dtype | None:
    """The type config.json names, at the top or, as on the Hub, in text_config."""
    sections = (values, values["text_config"])
    named = [section.get(key) for section in sections for key in ("dtype", "torch_dtype")]
    return next((DTYPES[name] for name in named if name in DTYPES), None)


def _smallest(tensor: mx.array, stored: mx.Dtype | None) -> mx.Dtype:
    """`stored` if that is smaller and holds every value, else the tensor's own type."""
    if stored is None or tensor.dtype != mx.float32:
        return tensor.dtype
    if mx.all(tensor.astype(stored).astype(tensor.dtype) == tensor).item():
        return stored
    return tensor.dtype


def live_assignment(model: Model) -> Assignment | None:
    """The settings of a model's quantized modules; None where there are none."""
    return as_assignment(
        {
            path: Quantization(module.group_size, module.bits, module.mode)
            for path, module in model.named_modules()  # type: ignore[no-untyped-call]
            if "scales" in module
        }
    )
