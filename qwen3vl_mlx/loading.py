"""A checkpoint folder to a `Model`, strictly: every tensor must be wanted, found and well shaped.

Layouts read: the Hub's, the one transformers 5 re-saves (expert tensors transposed), and MLX's own
(mlx-vlm, mlx-community), quantized or not. Tensors are read a few at a time, so peak memory is the
model plus one tensor.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwen3vl_mlx.errors import CheckpointError, ConfigError, WeightsError
from qwen3vl_mlx.layout import Column, Weights, hub_name, module_name, pieces
from qwen3vl_mlx.models.config import (
    ModelConfig,
    Quantization,
    QuantizationConfig,
    read_config,
)
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.stream import Plan, Scaling, blocks, lazily, stored_bytes
from qwen3vl_mlx.tensorfile import TensorReader

_READ_BYTES = 64 * 2**20  # tensors are evaluated in groups of about this size
_BAR_BYTES = 512 * 2**20  # less is read within a second


def default_dtype() -> mx.Dtype | None:
    """None (the checkpoint's own) on a GPU; float32 on a CPU, which has no fast bfloat16."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else None


def load_model(
    folder: Path,
    dtype: mx.Dtype | None = None,
    *,
    config: ModelConfig | None = None,
    progress: bool = False,
) -> Model:
    """Read the checkpoint in `folder` into an evaluated `Model`.

    dtype: type of all floating-point weights and scales; None keeps the checkpoint's own.
    config: what config.json says, where it has been read already.
    progress: a bar on stderr, where that is a terminal and the work takes over a second.
    Raises ConfigError or WeightsError naming the key or tensor.
    """
    config = config or read_config(folder)
    weights = rename_weights(read_tensors(folder), config)
    model = build_model(config, weights)
    check_weights(weights, _shapes(model))
    turned = _turned(model)
    total = sum(tensor.nbytes for tensor in weights.values())
    with progress_bar(total, "Loading", progress) as bar:
        for group in list(_groups(weights, _READ_BYTES)):
            tensors = {name: weights.pop(name) for name in group}
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
            _install(model, tensors, dtype, turned)
            tensors.clear()
    model.eval()
    return model


def load_quantized(
    folder: Path,
    modules: Mapping[str, Quantization],
    dtype: mx.Dtype | None = None,
    *,
    config: ModelConfig | None = None,
    progress: bool = False,
) -> Model:
    """`load_model` with `modules`, settings by path, quantized as their rows are read.

    The whole model is never held: peak memory is the result, twice its largest tensor and a few
    blocks. The result is what `load_model` reads from a checkpoint converted alike, bit by bit.
    """
    config = config or read_config(folder)
    with TensorReader(weight_files(folder)) as reader:
        work = plan(reader, config, modules)
        model = quantized_model(effective_config(config, reader.shapes), modules)
        expected, turned = _shapes(model), _turned(model)
        waiting: dict[str, list[mx.array]] = {}
        with progress_bar(stored_bytes(work, reader), "Quantizing", progress) as bar:
            for block in blocks(work, reader):
                mx.eval(block.parameters)
                bar.update(block.read_bytes)
                for name, rows in block.parameters.items():
                    waiting.setdefault(name, []).append(rows)
                whole = [
                    name
                    for name in block.parameters
                    if sum(part.shape[0] for part in waiting[name]) == expected[name][0]
                ]
                for name in whole:  # one by one: the parts and the whole are there together
                    _install(model, {name: _joined(waiting.pop(name))}, dtype, turned)
                del block
                mx.clear_cache()
    model.eval()
    return model


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _install(
    model: Model, tensors: Weights, dtype: mx.Dtype | None, turned: frozenset[str]
) -> None:
    """Evaluate tensors and hand them to the model."""
    tensors = {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
    for name in tensors.keys() & turned:
        tensors[name] = column_major(tensors[name])
        mx.eval(tensors[name])  # one by one: there are three copies until then
    mx.eval(tensors)
    model.load_weights(list(tensors.items()), strict=False)


def _turned(model: Model) -> frozenset[str]:
    return matrices(model) if mx.default_device() == mx.Device(mx.cpu) else frozenset()


def plan(
    reader: TensorReader,
    config: ModelConfig,
    modules: Mapping[str, Quantization],
    dtype: mx.Dtype | None = None,
    scaling: Scaling | None = None,
) -> Plan:
    """How the tensors of `reader` become a model with `modules` quantized and the rest whole.

    Modules stored with the very settings asked for are passed on as they are, unless `scaling`
    is to change them. Raises WeightsError where the tensors are not exactly the model's.
    """
    stored = stored_settings(reader.shapes, config)
    same = {p for p, settings in stored.items() if modules.get(p) == settings and scaling is None}
    unpacked = {path: settings for path, settings in stored.items() if path not in same}
    made = pieces(reader.shapes, config, unpacked, model_dtype(reader))
    weights: Weights = {}
    for piece in made:
        weights.update(lazily(piece, reader))
    model = quantized_model(effective_config(config, weights), {p: modules[p] for p in same})
    check_weights(weights, _shapes(model))
    kept = {path: settings for path, settings in modules.items() if path not in same}
    return Plan(made, kept, dtype, scaling)


def model_dtype(reader: TensorReader) -> mx.Dtype:
    """The floating-point type of what is never quantized."""
    norms = (n for n in reader.tensors if module_name(n) == "language_model.model.norm.weight")
    return next(map(reader.dtype, norms), mx.bfloat16)


def model_itemsize(folder: Path) -> int:
    """Bytes of what is not quantized, and of scales."""
    with TensorReader(weight_files(folder)) as reader:
        return model_dtype(reader).size


def stored_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """`effective_config` of the tensors in `folder`, by their headers."""
    with TensorReader(weight_files(folder)) as reader:
        return effective_config(config, reader.shapes)


def stored_modules(folder: Path, config: ModelConfig) -> dict[str, Quantization]:
    """`stored_settings` of the tensors in `folder`, by their headers."""
    with TensorReader(weight_files(folder)) as reader:
        return stored_settings(reader.shapes, config)


def stored_settings(names: Iterable[str], config: ModelConfig) -> dict[str, Quantization]:
    """Settings of the modules that are stored quantized, by path."""
    paths = [module_name(n).removesuffix(".scales") for n in names if n.endswith(".scales")]
    return {path: module_quantization(config.quantization, path) for path in paths}


def read_tensors(folder: Path) -> Weights:
    """All tensors of a folder's safetensors files by name, not yet read from disk.

    Raises WeightsError for missing, damaged or truncated files.
    """
    from safetensors import SafetensorError, safe_open

    weights: Weights = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy"):  # checks header, offsets and file size
                pass
            tensors = mx.load(str(path))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise WeightsError(
                f"{path} is damaged or incomplete ({error}); download or convert it again"
            ) from error
        assert isinstance(tensors, dict)
        if twice := weights.keys() & tensors.keys():
            raise WeightsError(f"{path} repeats tensor {min(twice)} of another file")
        weights.update(tensors)
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, by its index where it has one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({os.fspath(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{index} is not a safetensors index: {error!r}") from error
        if missing := [name for name in names if not (folder / name).exists()]:
            raise WeightsError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files, first "
                f"{missing[0]}; download it again"
            )
        return [folder / name for name in names]
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no model*.safetensors files")
    return files


def rename_weights(weights: Weights, config: ModelConfig) -> Weights:
    """Names and axes of any layout to the module tree's. Lazy: nothing is read here."""
    renamed: Weights = {}
    for piece in pieces({name: tensor.shape for name, tensor in weights.items()}, config):
        renamed.update(piece.make([_column(column, weights) for column in piece.columns], 0))
    return renamed


def _column(column: Column, weights: Weights) -> mx.array:
    tensors = [weights[name] for name in column.names]
    return mx.stack(tensors) if column.kind == "stack" else tensors[0]


def effective_config(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """`config`, but a file that has an output head of its own has it used."""
    head = any(module_name(name).startswith("language_model.lm_head.") for name in names)
    return config.untied() if head and config.tie_word_embeddings else config


def build_model(config: ModelConfig, weights: Mapping[str, mx.array]) -> Model:
    """An unevaluated `Model` whose modules are quantized wherever `weights` holds `.scales`."""
    return quantized_model(effective_config(config, weights), stored_settings(weights, config))


def quantized_model(config: ModelConfig, modules: Mapping[str, Quantization]) -> Model:
    """An unevaluated `Model` with `modules`, settings by path, quantized."""
    model = Model(config)
    if not modules:
        return model

    def settings(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        if path not in modules or not hasattr(module, "to_quantized"):
            return False
        chosen = modules[path]
        return {"group_size": chosen.group_size, "bits": chosen.bits, "mode": chosen.mode}

    try:
        nn.quantize(model, class_predicate=settings)
    except ValueError as error:
        raise ConfigError(f"config.json: quantization does not fit the model: {error}") from error
    return model


def module_quantization(quantization: QuantizationConfig | None, path: str) -> Quantization:
    """The settings of one quantized module: an override under any of its names, or the default."""
    if quantization is None:
        raise ConfigError(f"config.json: quantization is missing, but {path} has scales")
    short = path.removeprefix("language_model.")
    for name in (path, short, hub_name(path + ".").rstrip(".")):
        if name in quantization.overrides:
            chosen = quantization.overrides[name]
            if chosen is None:
                raise ConfigError(
                    f"config.json: quantization says {name} is not quantized, but it has scales"
                )
            return chosen
    return quantization.default


def check_weights(weights: Mapping[str, mx.array], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError unless names and shapes agree exactly."""
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not part of the model" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {weights[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    problems += [
        f"{name} has type {tensor.dtype}, expected floating point"
        for name, tensor in weights.items()
        if not mx.issubdtype(tensor.dtype, mx.floating) and not _is_packed(name, weights)
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise WeightsError(f"weights do not fit config.json: {'; '.join(problems[:5])}{more}")


def _is_packed(name: str, weights: Mapping[str, mx.array]) -> bool:
    """Whether a quantized tensor's integers are expected here."""
    return name.endswith(".scales") or name.removesuffix("weight") + "scales" in weights


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    flat = tree_flatten(model.parameters(), destination={})  # type: ignore[no-untyped-call]
    assert isinstance(flat, dict)
    return {name: tensor.shape for name, tensor in flat.items()}


def matrices(model: Model) -> frozenset[str]:
    """Names of the unquantized weights that a pass multiplies by their transpose."""
    modules = model.named_modules()  # type: ignore[no-untyped-call]
    return frozenset(f"{path}.weight" for path, module in modules if isinstance(module, nn.Linear))


def column_major(tensor: mx.array) -> mx.array:
    """The same values, laid out so that the transpose is contiguous.

    MLX's CPU backend for Linux multiplies two row-major matrices more than twice as fast as a
    row-major one by a transpose, which is what every linear layer does.
    """
    return mx.contiguous(tensor.T).T


def _cast(tensor: mx.array, dtype: mx.Dtype | None) -> mx.array:
    if dtype is None or not mx.issubdtype(tensor.dtype, mx.floating):
        return tensor
    return tensor.astype(dtype)


class _NoBar:
    def update(self, size: int) -> None:
        """Nothing to show."""


@contextmanager
def progress_bar(total: int, label: str, wanted: bool, *, counts: bool = False) -> Iterator[Any]:
    """A bar of bytes, or of steps, on stderr, where that is a terminal and the work takes time."""
    if not wanted or (total < _BAR_BYTES and not counts) or not sys.stderr.isatty():
        yield _NoBar()
        return
    from tqdm import tqdm

    unit = "it" if counts else "B"
    with tqdm(
        total=total, desc=label, unit=unit, unit_scale=not counts, delay=1.0, leave=False
    ) as bar:
        yield bar


def _groups(weights: Mapping[str, mx.array], limit: int) -> Iterator[Iterable[str]]:
    """Names in runs of at most `limit` bytes, or of one tensor."""
    names = list(weights)
    group: list[str] = []
    size = 0
    for name in names:
        if group and size + weights[name].nbytes > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += weights[name].nbytes
    if group:
        yield group
