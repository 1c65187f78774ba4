"""Checkpoints on disk in every layout there is, spelled out apart from the package's own code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy.typing as npt
import tiny

Config: TypeAlias = dict[str, Any]
Array: TypeAlias = "npt.NDArray[Any] | mx.array"
Tensors: TypeAlias = Mapping[str, Array]
Layout: TypeAlias = "Callable[[Config, Tensors], tuple[Config, Tensors]]"
Choice: TypeAlias = "Callable[[str], Mapping[str, Any] | None]"  # module path to its settings

AFFINE4 = {"group_size": 32, "bits": 4, "mode": "affine"}
AFFINE8 = {"group_size": 32, "bits": 8, "mode": "affine"}


def write(folder: Path, config: Config, *shards: Tensors) -> Path:
    """One file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        mx.save_safetensors(
            str(folder / name), {key: mx.array(tensor) for key, tensor in tensors.items()}
        )
        index |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def wide_config(variant: str, **text: int) -> Config:
    """A tiny variant whose widths, but for `dense72`'s tower, quantization groups divide."""
    config = tiny.tiny_config(variant)
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 128, **text}
    if variant == "moe":
        config["text_config"]["moe_intermediate_size"] = text.get("moe_intermediate_size", 96)
        config["vision_config"] |= {"hidden_size": 128, "intermediate_size": 192}
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    return config


@cache
def wide(variant: str) -> tuple[Config, Tensors]:
    config = wide_config(variant)
    return config, tiny.tiny_weights(config)


def split(tensors: Tensors, count: int) -> list[Tensors]:
    names = list(tensors)
    return [{name: tensors[name] for name in names[i::count]} for i in range(count)]


def as_hub(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return config, tensors


def as_resaved(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """What transformers 5 writes after loading the Hub's layout."""
    text = dict(config["text_config"])
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    text.pop("tie_word_embeddings", None)
    if "num_experts" in text:
        text["num_local_experts"] = text.pop("num_experts")
    vision = {**config["vision_config"], "model_type": config["model_type"] + "_vision"}
    swapped = {
        name: tensor.swapaxes(1, 2) if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }
    return {**config, "text_config": text, "vision_config": vision}, swapped


def as_mlx(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """What mlx-vlm's converter writes."""
    renamed: dict[str, Array] = {}
    for name, tensor in tensors.items():
        new = name.replace("model.visual.", "vision_tower.")
        new = new.replace("model.language_model.", "language_model.model.")
        new = new.replace("lm_head.", "language_model.lm_head.")
        if name.endswith("patch_embed.proj.weight"):
            renamed[new] = tensor.transpose(0, 2, 3, 4, 1)
        elif name.endswith("experts.gate_up_proj"):
            half = tensor.shape[2] // 2
            path = new.replace("experts.gate_up_proj", "switch_mlp.")
            renamed[f"{path}gate_proj.weight"] = tensor[:, :, :half].swapaxes(1, 2)
            renamed[f"{path}up_proj.weight"] = tensor[:, :, half:].swapaxes(1, 2)
        elif name.endswith("experts.down_proj"):
            path = new.replace("experts.down_proj", "switch_mlp.")
            renamed[f"{path}down_proj.weight"] = tensor.swapaxes(1, 2)
        else:
            renamed[new] = tensor
    return config, renamed


LAYOUTS: dict[str, Layout] = {"hub": as_hub, "transformers 5": as_resaved, "mlx": as_mlx}


def is_text(path: str) -> bool:
    return path.startswith("language_model.")


def uniform(settings: Mapping[str, Any]) -> Choice:
    return lambda path: settings if is_text(path) else None


def quantize(tensors: Tensors, chosen: Choice) -> tuple[Tensors, Tensors]:
    """MLX-layout tensors quantized as `chosen(module path)` says, and the same made whole again."""
    packed: dict[str, Array] = {}
    whole: dict[str, Array] = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        matrix = name.endswith(".weight") and tensor.ndim in (2, 3)
        settings = chosen(path) if matrix else None
        if settings is None:
            packed[name] = whole[name] = tensor
            continue
        weight, scales, *biases = mx.quantize(mx.array(tensor), **settings)
        packed |= {name: weight, f"{path}.scales": scales}
        packed |= {f"{path}.biases": array for array in biases}
        whole[name] = mx.dequantize(weight, scales, *biases, **settings)
    return packed, whole
