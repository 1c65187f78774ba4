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
from qwen3vl_mlx.layout import Column, Weights, hub_name, pieces
from qwen3vl_mlx.models.config import (
    ModelConfig,
    Quantization,
    QuantizationConfig,
    read_config,
)
from qwen3vl_mlx.models.qwen3_vl import Model

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
    turned = matrices(model) if mx.default_device() == mx.Device(mx.cpu) else frozenset()
    total = sum(tensor.nbytes for tensor in weights.values())
    with _bar(total, progress) as bar:
        for group in list(_groups(weights, _READ_BYTES)):
            tensors = {name: _cast(weights.pop(name), dtype) for name in group}
            for name in tensors.keys() & turned:
                tensors[name] = column_major(tensors[name])
                mx.eval(tensors[name])  # one by one: there are three copies until then
            mx.eval(tensors)
            model.load_weights(list(tensors.items()), strict=False)
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
            tensors.clear()
    model.eval()
    return model


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


def build_model(config: ModelConfig, weights: Mapping[str, mx.array]) -> Model:
    """An unevaluated `Model` whose modules are quantized wherever `weights` holds `.scales`."""
    if "language_model.lm_head.weight" in weights and config.tie_word_embeddings:
        config = config.untied()  # the file has a head of its own: use it
    model = Model(config)
    quantized = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    if not quantized:
        return model
    if config.quantization is None:
        raise ConfigError(f"config.json: quantization is missing, but {min(quantized)} has scales")
    quantization = config.quantization

    def settings(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        if path not in quantized or not hasattr(module, "to_quantized"):
            return False
        chosen = module_quantization(quantization, path)
        return {"group_size": chosen.group_size, "bits": chosen.bits, "mode": chosen.mode}

    try:
        nn.quantize(model, class_predicate=settings)
    except ValueError as error:
        raise ConfigError(f"config.json: quantization does not fit the model: {error}") from error
    return model


def module_quantization(quantization: QuantizationConfig, path: str) -> Quantization:
    """The settings of one quantized module: an override under any of its names, or the default."""
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
def _bar(total: int, wanted: bool) -> Iterator[Any]:
    if not wanted or total < _BAR_BYTES or not sys.stderr.isatty():
        yield _NoBar()
        return
    from tqdm import tqdm

    with tqdm(
        total=total, desc="Loading", unit="B", unit_scale=True, delay=1.0, leave=False
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
