"""A damaged checkpoint is refused, and the tensor, file or key at fault is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import pytest
from layouts import (
    AFFINE4,
    AFFINE8,
    Array,
    Config,
    Tensors,
    as_mlx,
    quantize,
    split,
    uniform,
    wide,
    write,
)

from qwen3vl_mlx.errors import CheckpointError, ConfigError, Qwen3VLError, WeightsError
from qwen3vl_mlx.loading import load_model

NORM = "model.language_model.norm.weight"
SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LAYER0 = "language_model.model.layers.0"
Damage: TypeAlias = "Callable[[Path], Any]"


def rewrite(folder: Path, config: Config, tensors: Tensors) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    write(folder, config, tensors)


def changed(change: Callable[[dict[str, Array]], Any], variant: str = "dense64") -> Damage:
    """Write the variant anew, in one file, with its tensors changed."""

    def damage(folder: Path) -> None:
        config, tensors = wide(variant)
        copy = dict(tensors)
        change(copy)
        rewrite(folder, config, copy)

    return damage


def quantized_as(section: Mapping[str, Any] | None) -> Damage:
    """4 bits, groups of 32, whatever config.json says."""

    def damage(folder: Path) -> None:
        config, tensors = as_mlx(*wide("dense64"))
        packed, _ = quantize(tensors, uniform(AFFINE4))
        rewrite(folder, config | ({"quantization": section} if section else {}), packed)

    return damage


def cut(name: str, size: Callable[[int], int]) -> Damage:
    return lambda folder: os.truncate(folder / name, size((folder / name).stat().st_size))


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def repeat_in_shard(folder: Path) -> None:
    for name in (SHARD, "model-00001-of-00002.safetensors"):
        tensors = mx.load(str(folder / name))
        mx.eval(tensors)
        tensors[NORM] = mx.zeros((64,))
        mx.save_safetensors(str(folder / name), tensors)


def swap_one_expert_tensor(tensors: dict[str, Array]) -> None:
    name = "model.language_model.layers.2.mlp.experts.down_proj"
    tensors[name] = tensors[name].swapaxes(1, 2)


DAMAGES: dict[str, tuple[Damage, type[Qwen3VLError], list[str]]] = {
    "missing": (
        changed(lambda t: t.pop(NORM)),
        WeightsError,
        ["language_model.model.norm.weight is missing"],
    ),
    "surplus": (
        changed(lambda t: t.update({"model.visual.blocks.9.norm1.weight": np.ones(3)})),
        WeightsError,
        ["vision_tower.blocks.9.norm1.weight is not part of the model"],
    ),
    "misshapen": (
        changed(lambda t: t.update({NORM: np.ones(63, np.float32)})),
        WeightsError,
        ["language_model.model.norm.weight", "(63,)", "(64,)"],
    ),
    "conv in neither layout": (
        changed(
            lambda t: t.update(
                {"model.visual.patch_embed.proj.weight": np.ones((128, 2, 3, 16, 16), np.float32)}
            )
        ),
        WeightsError,
        ["patch_embed.proj.weight", "(128, 2, 3, 16, 16)", "(128, 2, 16, 16, 3)"],
    ),
    "many": (
        changed(lambda t: [t.pop(name) for name in list(t) if "layers.1." in name]),
        WeightsError,
        ["layers.1.", "is missing", "(and 6 more)"],
    ),
    "no number": (
        changed(lambda t: t.update({NORM: np.ones(64, np.uint8)})),
        WeightsError,
        ["language_model.model.norm.weight", "uint8"],
    ),
    "two names": (
        changed(lambda t: t.update({"language_model.model.norm.weight": np.ones(64, np.float32)})),
        WeightsError,
        ["norm.weight", "twice"],
    ),
    "two files": (repeat_in_shard, WeightsError, [SHARD, NORM]),
    "experts of no layout": (
        changed(swap_one_expert_tensor, "moe"),
        WeightsError,
        ["layers.2.mlp.experts", "(8, 64, 192)", "(8, 64, 96)", "(8, 96, 64)", "(8, 192, 64)"],
    ),
    "half of the experts": (
        changed(lambda t: t.pop("model.language_model.layers.2.mlp.experts.down_proj"), "moe"),
        WeightsError,
        ["layers.2.mlp.experts.down_proj is missing"],
    ),
    "experts in a dense model": (
        changed(
            lambda t: t.update(
                {"model.language_model.layers.0.mlp.experts.down_proj": np.ones((2, 2, 2))}
            )
        ),
        WeightsError,
        ["layers.0.mlp.experts", "config.json describes no experts"],
    ),
    "cut short": (cut(SHARD, lambda size: size - 100), WeightsError, [SHARD, "again"]),
    "cut in the header": (cut(SHARD, lambda _: 100), WeightsError, [SHARD, "again"]),
    "cut in the length": (cut(SHARD, lambda _: 4), WeightsError, [SHARD, "again"]),
    "empty": (cut(SHARD, lambda _: 0), WeightsError, [SHARD, "again"]),
    "garbage": (content(SHARD, bytes(range(256)) * 40), WeightsError, [SHARD, "again"]),
    "web page": (content(SHARD, b"<!doctype html>" * 99), WeightsError, [SHARD, "again"]),
    "shard gone": (lambda folder: (folder / SHARD).unlink(), WeightsError, [SHARD, "1 of 2"]),
    "shard is a folder": (
        lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).mkdir()),
        WeightsError,
        [SHARD],
    ),
    "index not JSON": (content(INDEX, b"{"), WeightsError, [INDEX]),
    "index not an object": (content(INDEX, b"[]"), WeightsError, [INDEX]),
    "index without map": (content(INDEX, b"{}"), WeightsError, [INDEX]),
    "index of numbers": (content(INDEX, b'{"weight_map": {"a": 1}}'), WeightsError, [INDEX]),
    "index of nothing": (content(INDEX, b'{"weight_map": {}}'), WeightsError, ["is missing"]),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        CheckpointError,
        ["model*.safetensors"],
    ),
    "scales without config": (quantized_as(None), ConfigError, ["quantization", "scales"]),
    "other bits": (
        quantized_as(AFFINE8),
        WeightsError,
        ["embed_tokens.weight", "(1024, 8)", "(1024, 16)"],
    ),
    "other group": (
        quantized_as(AFFINE4 | {"group_size": 64}),
        WeightsError,
        ["embed_tokens.scales", "(1024, 2)", "(1024, 1)"],
    ),
    "group too wide": (
        quantized_as(AFFINE4 | {"group_size": 128}),
        ConfigError,
        ["quantization", "128"],
    ),
    "other mode": (quantized_as(AFFINE4 | {"mode": "mxfp4"}), WeightsError, ["biases"]),
    "bits MLX lacks": (quantized_as(AFFINE4 | {"bits": 7}), ConfigError, ["quantization", "7"]),
    "marked whole": (
        quantized_as(AFFINE4 | {f"{LAYER0}.mlp.up_proj": False}),
        ConfigError,
        [f"{LAYER0}.mlp.up_proj", "not quantized"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    damage, error, words = DAMAGES[name]
    config, tensors = wide("dense64")
    folder = write(tmp_path / "checkpoint", config, *split(tensors, 2))
    damage(folder)
    with pytest.raises(error) as caught:
        load_model(folder)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
