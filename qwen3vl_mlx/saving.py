"""A live model written as a checkpoint, quantized or not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

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
from qwen3vl_mlx.quant.apply import Assignment, parameter_shapes
from qwen3vl_mlx.quant.recipes import preset_name
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
    stored = DTYPES.get(str(source.values.get("dtype") or source.values.get("torch_dtype")))
    dtypes = {name: _smallest(tensor, stored) for name, tensor in flat.items()}
    groups = [[Slot(name, dtypes[name], tensor.shape)] for name, tensor in flat.items()]
    assignment = live_assignment(model)
    facts = card_facts(source, target, assignment, groups, parameter_shapes(model.config), None)

    def write(writer: ShardWriter) -> None:
        _write(writer, flat, dtypes, progress)

    write_checkpoint(Output(source, target, groups, assignment), facts, write)


def _write(writer: ShardWriter, flat: Weights, dtypes: dict[str, mx.Dtype], progress: bool) -> None:
    with progress_bar(writer.nbytes, "Saving", progress) as bar:
        for name, tensor in flat.items():
            data = raw_bytes(tensor.astype(dtypes[name]))
            writer.write(name, data)
            bar.update(data.nbytes)
            mx.clear_cache()
    verify(writer, progress)


def _smallest(tensor: mx.array, stored: mx.Dtype | None) -> mx.Dtype:
    """`stored` where it holds every value of a floating-point tensor, else the tensor's own."""
    if stored is None or not mx.issubdtype(tensor.dtype, mx.floating):
        return tensor.dtype
    if mx.all(tensor.astype(stored).astype(tensor.dtype) == tensor).item():
        return stored
    return tensor.dtype


def live_assignment(model: Model) -> Assignment | None:
    """The settings of a model's quantized modules; None where there are none."""
    modules = {
        path: Quantization(module.group_size, module.bits, module.mode)
        for path, module in model.named_modules()  # type: ignore[no-untyped-call]
        if "scales" in module
    }
    if not modules:
        return None
    default = Counter(modules.values()).most_common(1)[0][0]
    name = preset_name(default) + (", mixed" if len(set(modules.values())) > 1 else "")
    return Assignment(name, default, modules)
