"""A recipe laid over a model: what each module becomes, what that weighs, and the packing itself.

Knows module paths, shapes and arrays; nothing of files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from qwen3vl_mlx.models.config import ModelConfig, Quantization
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.quant.recipes import Recipe, check_settings, preset_name

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """What a recipe makes of one model.

    modules: settings by path; every other module stays whole. whole: modules the recipe wanted
    quantized that cannot be, with the reason. default: what most have, for config.json. pinned:
    paths whose settings were asked for one by one.
    """

    name: str
    default: Quantization
    modules: Mapping[str, Quantization]
    whole: Mapping[str, str] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Weight:
    """Size of a model's parameters when stored: all of them, and what is quantizable's share."""

    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the unquantized model, by name. Takes no memory."""
    flat = tree_flatten(Model(config).parameters(), destination={})  # type: ignore[no-untyped-call]
    assert isinstance(flat, dict)
    return {name: tensor.shape for name, tensor in flat.items()}


def quantizable_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of the weights that can be quantized, (..., out, in), by module path."""
    modules = Model(config).named_modules()  # type: ignore[no-untyped-call]
    return {path: m.weight.shape for path, m in modules if hasattr(m, "to_quantized")}


def assign(recipe: Recipe, shapes: Mapping[str, Shape]) -> Assignment:
    """Lay `recipe` over modules with weights of `shapes` (see `quantizable_shapes`)."""
    modules: dict[str, Quantization] = {}
    whole: dict[str, str] = {}
    for path, shape in shapes.items():
        chosen = recipe.choose(path)
        if chosen is None:
            continue
        check_settings(chosen)
        if shape[-1] % chosen.group_size:
            whole[path] = f"groups of {chosen.group_size} do not divide its width, {shape[-1]}"
        else:
            modules[path] = chosen
    pinned = frozenset(recipe.overrides) & shapes.keys()
    return Assignment(recipe.name, recipe.base, modules, whole, pinned)


def as_assignment(modules: Mapping[str, Quantization]) -> Assignment | None:
    """Settings by path, as a recipe would have assigned them; None where there are none."""
    if not modules:
        return None
    default = _most_common(modules)
    name = preset_name(default) + (", mixed" if len(set(modules.values())) > 1 else "")
    return Assignment(name, default, modules)


def _most_common(modules: Mapping[str, Quantization]) -> Quantization:
    return Counter(modules.values()).most_common(1)[0][0]


def overridden(
    assignment: Assignment, overrides: Mapping[str, Quantization], name: str
) -> Assignment:
    """The same modules, other settings for those that are not pinned, under another name."""
    free = assignment.modules.keys() - assignment.pinned
    modules = {
        path: overrides.get(path, settings) if path in free else settings
        for path, settings in assignment.modules.items()
    }
    return Assignment(name, _most_common(modules), modules, assignment.whole, assignment.pinned)


def packed_shapes(shape: Shape, settings: Quantization) -> dict[str, Shape]:
    """Shapes of `weight`, `scales` and, in affine mode, `biases` of a weight (..., out, in)."""
    *rows, width = shape
    shapes = {
        "weight": (*rows, width * settings.bits // 32),
        "scales": (*rows, width // settings.group_size),
    }
    if settings.mode == "affine":
        shapes["biases"] = shapes["scales"]
    return shapes


def packed_dtype(suffix: str, settings: Quantization, dtype: mx.Dtype) -> mx.Dtype:
    """Type of a packed tensor: codes, and scales in the model's type or a byte of their own."""
    if suffix == "weight":
        return mx.uint32
    return dtype if settings.mode == "affine" else mx.uint8


def pack(weight: mx.array, settings: Quantization) -> dict[str, mx.array]:
    """Quantize weight rows (..., in): `weight`, `scales` and, in affine mode, `biases`."""
    packed = mx.quantize(
        weight, group_size=settings.group_size, bits=settings.bits, mode=settings.mode
    )
    return dict(zip(("weight", "scales", "biases"), packed, strict=False))


def unpack(parts: Mapping[str, mx.array], settings: Quantization, dtype: mx.Dtype) -> mx.array:
    """The inverse of `pack`, in `dtype`."""
    return mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts.get("biases"),
        group_size=settings.group_size,
        bits=settings.bits,
        mode=settings.mode,
    ).astype(dtype)


def packed_bytes(shape: Shape, settings: Quantization, itemsize: int = 2) -> int:
    """Bytes of a weight (..., out, in) after packing, with scales of `itemsize` bytes."""
    shapes = packed_shapes(shape, settings)
    scale = itemsize if settings.mode == "affine" else 1
    return sum(math.prod(s) * (4 if key == "weight" else scale) for key, s in shapes.items())


def weigh(
    shapes: Mapping[str, Shape], modules: Mapping[str, Quantization], itemsize: int = 2
) -> Weight:
    """Size of parameters of `shapes` (see `parameter_shapes`) with `modules` quantized."""
    total = 0
    for name, shape in shapes.items():
        settings = modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if settings is None:
            total += math.prod(shape) * itemsize
        else:
            total += packed_bytes(shape, settings, itemsize)
    return Weight(sum(map(math.prod, shapes.values())), total)


def config_section(assignment: Assignment) -> dict[str, Any]:
    """config.json's `quantization`: the default, and every module that differs from it."""
    section: dict[str, Any] = as_dict(assignment.default)
    for path, settings in assignment.modules.items():
        if settings != assignment.default:
            section[path] = as_dict(settings)
    return section


def as_dict(settings: Quantization) -> dict[str, Any]:
    """Keywords of `mx.quantize`, as config.json spells them."""
    return {"group_size": settings.group_size, "bits": settings.bits, "mode": settings.mode}
