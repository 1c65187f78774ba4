"""Every layout of a checkpoint loads to the same model, in the type asked for, within memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from layouts import (
    AFFINE4,
    AFFINE8,
    LAYOUTS,
    Tensors,
    as_mlx,
    is_text,
    quantize,
    split,
    uniform,
    wide,
    wide_config,
    write,
)
from mlx.utils import tree_flatten
from passes import forward

from qwen3vl_mlx import loading
from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.layout import hub_name, module_name
from qwen3vl_mlx.loading import build_model, check_weights, load_model, rename_weights
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.prompt import Prompt

CHECKPOINTS = Path(__file__).parent / "data" / "checkpoints"
Logits: TypeAlias = npt.NDArray[np.float32]


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tree_flatten(model.parameters())}


@pytest.fixture(scope="module")
def prompt(tiny_model: Callable[[str], Qwen3VL]) -> Prompt:
    """Two pictures and text. The same for every variant, whatever its widths."""
    pixels = np.random.RandomState(0).randint(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    content = [{"image": pixels[0]}, {"text": "or"}, {"image": pixels[1]}, {"text": "Which?"}]
    return tiny_model("dense64").processor.prompt([{"role": "user", "content": content}])


@pytest.fixture(scope="module")
def logits_of(prompt: Prompt) -> Callable[[Path], Logits]:
    def logits(folder: Path) -> Logits:
        model = load_model(folder)
        (hidden,) = forward(model, prompt)
        return np.array(model.language_model.logits(hidden)[0])

    return logits


def distance(got: Logits, expected: Logits) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# One model, many layouts.


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_layouts_give_equal_logits(
    variant: str, logits_of: Callable[[Path], Logits], tmp_path: Path
) -> None:
    config, tensors = wide(variant)
    expected = logits_of(write(tmp_path / "hub", config, tensors))
    assert np.isfinite(expected).all()
    for name, layout in LAYOUTS.items():
        for count in (1, 3):
            written, renamed = layout(config, tensors)
            folder = write(tmp_path / f"{name} {count}", written, *split(renamed, count))
            assert np.array_equal(logits_of(folder), expected), (name, count)


@pytest.mark.parametrize("inner", [32, 64], ids=["2I = H", "I = H"])
def test_square_experts_are_told_apart(
    inner: int, logits_of: Callable[[Path], Logits], tmp_path: Path
) -> None:
    config = wide_config("moe", moe_intermediate_size=inner)
    tensors = tiny.tiny_weights(config)
    shapes = {tensors[name].shape for name in tensors if "layers.0.mlp.experts" in name}
    assert any(shape[1] == shape[2] for shape in shapes)
    hub, resaved, mlx = (
        logits_of(write(tmp_path / name, *layout(config, tensors)))
        for name, layout in LAYOUTS.items()
    )
    assert np.array_equal(hub, mlx)
    assert np.array_equal(resaved, mlx)


def test_a_head_of_its_own_is_used_though_config_ties(
    logits_of: Callable[[Path], Logits], tmp_path: Path
) -> None:
    config, tensors = wide("dense64")
    head = np.random.RandomState(1).standard_normal((1024, 64)).astype(np.float32)
    with_head = {**tensors, "lm_head.weight": head}
    untied = {**config, "tie_word_embeddings": False}
    untied["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    got = logits_of(write(tmp_path / "tied", config, with_head))
    assert np.array_equal(got, logits_of(write(tmp_path / "untied", untied, with_head)))
    assert distance(got, logits_of(write(tmp_path / "plain", config, tensors))) > 0.1


# Quantized checkpoints.


def short(path: str) -> str:
    return path.removeprefix("language_model.")


def at_hub(path: str) -> str:
    return path.replace("language_model.model.", "model.language_model.")


def mixed(path: str) -> Mapping[str, Any] | None:
    """8-bit router, embeddings and first down projection; the last layer's attention whole."""
    if path.endswith((".mlp.gate", "embed_tokens", "layers.0.mlp.down_proj")):
        return AFFINE8
    if path.endswith("layers.3.self_attn.q_proj"):
        return None
    return AFFINE4 if is_text(path) else None


def overrides(tensors: Tensors, name: Callable[[str], str]) -> dict[str, Any]:
    paths = [
        key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.ndim in (2, 3)
    ]
    special = {name(path): mixed(path) for path in paths if is_text(path)}
    return {path: chosen or False for path, chosen in special.items() if chosen != AFFINE4}


def without_mode(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: without_mode(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if key != "mode"
    }


def everything(path: str) -> Mapping[str, Any] | None:
    return None if path.endswith(("patch_embed.proj", "norm")) else AFFINE4


# What is quantized how, and the config's section, from the tensors.
QUANTIZED: dict[str, tuple[Callable[[str], Any], Callable[[Tensors], dict[str, Any]]]] = {
    "4 bits": (uniform(AFFINE4), lambda _: AFFINE4),
    "8 bits": (uniform(AFFINE8), lambda _: AFFINE8),
    "old file": (uniform(AFFINE4), lambda _: without_mode(AFFINE4)),
    "vision too": (everything, lambda _: AFFINE4),
    "mixed": (mixed, lambda t: AFFINE4 | overrides(t, str)),
    "mixed, old file": (mixed, lambda t: without_mode(AFFINE4 | overrides(t, str))),
    "mixed, short names": (mixed, lambda t: AFFINE4 | overrides(t, short)),
    "mixed, the Hub's names": (mixed, lambda t: AFFINE4 | overrides(t, at_hub)),
} | {
    mode: (uniform(section), lambda _, section=section: section)
    for mode, section in {
        "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    }.items()
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_quantized_equals_its_dequantized_self(
    variant: str, name: str, logits_of: Callable[[Path], Logits], tmp_path: Path
) -> None:
    config, tensors = as_mlx(*wide(variant))
    chosen, section = QUANTIZED[name]
    packed, whole = quantize(tensors, chosen)
    keys = ("quantization", "quantization_config")  # mlx-vlm writes both
    quantized = config | dict.fromkeys(keys, section(tensors))
    got = logits_of(write(tmp_path / "packed", quantized, *split(packed, 2)))
    assert distance(got, logits_of(write(tmp_path / "whole", config, whole))) < 2e-5
    assert "language_model.model.layers.0.self_attn.k_proj.scales" in packed
    assert ("vision_tower.pos_embed.scales" in packed) == (name == "vision too")


# Types and memory.


@pytest.mark.parametrize("stored", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("wanted", [None, mx.float32, mx.bfloat16, mx.float16])
def test_dtype(stored: mx.Dtype, wanted: mx.Dtype | None, tmp_path: Path) -> None:
    config, tensors = as_mlx(*wide("dense64"))
    packed, _ = quantize(
        {name: mx.array(tensor).astype(stored) for name, tensor in tensors.items()},
        uniform(AFFINE4),
    )
    folder = write(tmp_path, config | {"quantization": AFFINE4}, packed)
    model = load_model(folder, wanted)
    parameters = dict(tree_flatten(model.parameters()))
    for name, tensor in parameters.items():
        packed_weight = name.removesuffix("weight") + "scales" in parameters
        is_packed = name.endswith(".weight") and packed_weight
        assert tensor.dtype == (mx.uint32 if is_packed else wanted or stored), name


def test_peak_memory_is_the_model_and_little_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 MB of bfloat16 in four files, experts to transpose, cast to float32 while it is read."""
    group = 16 * 2**20
    monkeypatch.setattr(loading, "_READ_BYTES", group)
    config = wide_config("moe", hidden_size=512, moe_intermediate_size=512, vocab_size=2048)
    config["text_config"] |= {"num_hidden_layers": 7}
    shapes = tiny.hub_shapes(config)
    zeros = {name: mx.zeros(shape, mx.bfloat16) for name, shape in shapes.items()}
    folder = write(tmp_path, config, *split(zeros, 4))
    del zeros
    sizes = [2 * math.prod(shape) for shape in shapes.values()]
    assert sum(sizes) > 100e6
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(folder, mx.float32)
    peak = mx.get_peak_memory() - before
    held = sum(tensor.nbytes for _, tensor in tree_flatten(model.parameters()))
    assert held == 2 * sum(sizes)
    # A group as it is on disk and once more transposed, and what a fused tensor leaves waiting.
    assert peak < held + 2 * group + max(sizes) + 2**20
    assert peak < held + sum(sizes) / 2  # the file beside the model would be seen


# The released models, on shapes alone.

COUNTS = {  # all parameters, the vision tower's
    "2B": (2_127_532_032, 406_957_056),
    "4B": (4_437_815_808, 415_347_712),
    "8B": (8_767_123_696, 576_388_336),
    "32B": (33_357_390_064, 595_266_800),
    "30B-A3B": (31_070_754_032, 538_631_408),
    "235B-A22B": (235_670_022_896, 576_388_336),
}


@pytest.mark.parametrize("kind", ["Instruct", "Thinking"])
@pytest.mark.parametrize("size", COUNTS)
def test_released_models(size: str, kind: str) -> None:
    folder = CHECKPOINTS / f"Qwen3-VL-{size}-{kind}"
    config = read_config(folder)
    shapes = shapes_of(Model(config))
    total, vision = COUNTS[size]
    assert sum(map(math.prod, shapes.values())) == total
    assert sum(math.prod(s) for n, s in shapes.items() if n.startswith("vision_tower.")) == vision
    at_the_hub = tiny.hub_shapes(json.loads((folder / "config.json").read_text()))
    if size == "32B":
        assert len(at_the_hub) == 1058
    weights = {name: mx.zeros(shape, mx.bfloat16) for name, shape in at_the_hub.items()}
    renamed = rename_weights(weights, config)
    check_weights(renamed, shapes)
    build_model(config, renamed)
    plain = {name for name in at_the_hub if ".experts." not in name}
    assert {hub_name(module_name(name)) for name in plain} == plain
    ours = {module_name(name) for name in plain}
    assert len(ours) == len(plain)
    rest = {name.rpartition(".switch_mlp.")[0] for name in shapes.keys() - ours}
    assert rest == {module_name(n).rpartition(".experts.")[0] for n in at_the_hub.keys() - plain}
    assert len(shapes) == len(plain) + 3 * len(rest)


def test_a_model_takes_no_memory_before_its_weights() -> None:
    config = read_config(CHECKPOINTS / "Qwen3-VL-235B-A22B-Instruct")
    before = mx.get_active_memory()
    Model(config)
    assert mx.get_active_memory() - before < 2**20
