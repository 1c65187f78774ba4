"""config.json in every dialect gives one `ModelConfig`; what cannot be honoured is named."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from layouts import AFFINE4, AFFINE8, Config, as_resaved

from qwen3vl_mlx.errors import CheckpointError, ConfigError
from qwen3vl_mlx.models.config import (
    ModelConfig,
    Quantization,
    QuantizationConfig,
    YarnConfig,
    parse_config,
    read_config,
)

CHECKPOINTS = Path(__file__).parent / "data" / "checkpoints"
RELEASED = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))
MISSING = object()


def load(name: str) -> Config:
    if name in tiny.VARIANTS:
        return tiny.tiny_config(name)
    return json.loads((CHECKPOINTS / name / "config.json").read_text())


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """A copy with values at dotted paths replaced, or taken away where MISSING."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        if value is MISSING:
            section.pop(key, None)
        else:
            section[key] = value
    return config


def theta_inside(config: Config) -> Config:
    theta = config["text_config"]["rope_theta"]
    return changed(
        config,
        {"text_config.rope_theta": MISSING, "text_config.rope_scaling.rope_theta": theta},
    )


def tie_at(level: str) -> Callable[[Config], Config]:
    """The tie flag at one level only; both have it in the released dense models."""
    other = {"": "text_config.", "text_config.": ""}[level]
    key = "tie_word_embeddings"
    return lambda config: changed(config, {level + key: config[key], other + key: MISSING})


DIALECTS: dict[str, Callable[[Config], Config]] = {
    "transformers 5": lambda config: as_resaved(config, {})[0],
    "transformers 5 over 4.57": lambda config: changed(
        as_resaved(config, {})[0],
        {
            f"text_config.{key}": config["text_config"][key]
            for key in ("rope_theta", "rope_scaling")
        },
    ),
    "theta inside": theta_inside,
    "legacy rope": lambda config: changed(
        config,
        {"text_config.rope_scaling.rope_type": MISSING, "text_config.rope_scaling.type": "mrope"},
    ),
    "tie on top": tie_at(""),
    "tie in text": tie_at("text_config."),
    "class default in text": lambda config: changed(
        config, {"text_config.tie_word_embeddings": not config["tie_word_embeddings"]}
    ),
    "both expert counts": lambda config: changed(
        config, {"text_config.num_local_experts": config["text_config"].get("num_experts")}
    ),
    "no defaults": lambda config: changed(
        config,
        {
            "text_config.attention_bias": MISSING,
            "text_config.hidden_act": MISSING,
            "text_config.rms_norm_eps": MISSING,
            "text_config.model_type": MISSING,
            "text_config.decoder_sparse_step": MISSING,
            "text_config.mlp_only_layers": None,
            "vision_config.hidden_act": MISSING,
            "vision_config.in_channels": MISSING,
            "vision_config.model_type": MISSING,
        },
    ),
}


@pytest.mark.parametrize("name", [*RELEASED, *tiny.VARIANTS])
def test_dialects(name: str) -> None:
    config = load(name)
    expected = parse_config(config)
    assert expected.tie_word_embeddings == config["tie_word_embeddings"]
    for dialect, write in DIALECTS.items():
        assert parse_config(write(config)) == expected, dialect


@pytest.mark.parametrize("name", RELEASED)
def test_released_values(name: str) -> None:
    config = read_config(CHECKPOINTS / name)
    sparse = "-A" in name
    assert config.text.head_dim == 128
    assert config.vision.head_dim == (64 if name.split("-")[2] in ("2B", "4B") else 72)
    assert config.tie_word_embeddings == (name.split("-")[2] in ("2B", "4B"))
    assert config.text.rope.theta == 5e6
    assert config.text.rope.mrope_section == (24, 20, 20)
    assert config.text.rope.yarn is None
    assert (config.text.moe is not None) == sparse
    if config.text.moe is not None:
        assert (config.text.moe.num_experts, config.text.moe.num_experts_per_tok) == (128, 8)
        assert config.text.moe.sparse_layers == set(range(config.text.num_hidden_layers))
    assert config.quantization is None
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (151652, 151653)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("Qwen3-VL-2B-Instruct", 128), ("Qwen3-VL-235B-A22B-Instruct", 64), ("moe", 12)],
)
def test_missing_head_dim_is_that_of_the_class(name: str, head_dim: int) -> None:
    half = head_dim // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    without = changed(
        load(name),
        {"text_config.head_dim": MISSING, "text_config.rope_scaling.mrope_section": sections},
    )
    assert parse_config(without).text.head_dim == head_dim


@pytest.mark.parametrize(
    ("step", "dense", "sparse"), [(1, [], {0, 1, 2, 3}), (2, [], {1, 3}), (1, [0, 3], {1, 2})]
)
def test_which_layers_are_sparse(step: int, dense: list[int], sparse: set[int]) -> None:
    config = changed(
        load("moe"),
        {"text_config.decoder_sparse_step": step, "text_config.mlp_only_layers": dense},
    )
    moe = parse_config(config).text.moe
    assert moe is not None
    assert moe.sparse_layers == sparse


@pytest.mark.parametrize(
    ("extra", "attention_factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
    ],
)
def test_yarn(extra: dict[str, float], attention_factor: float) -> None:
    rope = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1024, **extra}
    base = load("dense64")
    config = changed(base, {f"text_config.rope_scaling.{key}": rope[key] for key in rope})
    yarn = parse_config(config).text.rope.yarn
    assert yarn is not None
    assert yarn.attention_factor == pytest.approx(attention_factor)
    assert replace(yarn, attention_factor=1.0) == YarnConfig(4, 1024, 1.0, 32.0, 1.0, True)
    assert parse_config(as_resaved(config, {})[0]) == parse_config(config)


def with_quantization(keys: tuple[str, ...], section: Any) -> ModelConfig:
    return parse_config(load("dense64") | dict.fromkeys(keys, section))


@pytest.mark.parametrize(
    "keys", [("quantization",), ("quantization_config",), ("quantization", "quantization_config")]
)
def test_quantization(keys: tuple[str, ...]) -> None:
    router, left = "language_model.model.layers.0.mlp.gate", "language_model.lm_head"
    section = {**AFFINE4, router: AFFINE8, left: False}
    expected = QuantizationConfig(
        Quantization(32, 4, "affine"), {router: Quantization(32, 8, "affine"), left: None}
    )
    assert with_quantization(keys, section).quantization == expected
    old = {"group_size": 32, "bits": 4, router: {"group_size": 32, "bits": 8}, left: False}
    assert with_quantization(keys, old).quantization == expected
    assert replace(with_quantization(keys, section), quantization=None) == parse_config(
        load("dense64")
    )


def test_what_the_peer_adds_changes_nothing() -> None:
    config = load("Qwen3-VL-30B-A3B-Thinking")
    added = {
        "generation_config": {"do_sample": True, "eos_token_id": [151645, 151643]},
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "temperature": 0.7,
        "vision_config.skip_vision": False,
        "text_config.new_key_of_tomorrow": {"a": 1},
    }
    assert parse_config(changed(config, added)) == parse_config(config)


# Changes to tiny moe's config, and the words of the error.
ERRORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "other model": ({"model_type": "qwen2_5_vl"}, ["model_type", "qwen2_5_vl", "qwen3_vl_moe"]),
    "text model": ({"model_type": "qwen3"}, ["model_type", "'qwen3'"]),
    "no model type": ({"model_type": MISSING}, ["model_type"]),
    "text type": ({"text_config.model_type": "qwen3_moe"}, ["text_config.model_type"]),
    "vision type": ({"vision_config.model_type": "siglip"}, ["vision_config.model_type", "siglip"]),
    "no text": ({"text_config": MISSING}, ["text_config", "missing"]),
    "no vision": ({"vision_config": MISSING}, ["vision_config", "missing"]),
    "text a list": ({"text_config": []}, ["text_config", "object"]),
    "rope type": (
        {"text_config.rope_scaling.rope_type": "longrope"},
        ["text_config.rope_scaling.rope_type", "longrope", "yarn"],
    ),
    "rope legacy type": (
        {
            "text_config.rope_scaling.rope_type": MISSING,
            "text_config.rope_scaling.type": "linear",
        },
        ["text_config.rope_scaling.type", "linear"],
    ),
    "no rope": ({"text_config.rope_scaling": MISSING}, ["rope_scaling", "missing"]),
    "no theta": ({"text_config.rope_theta": MISSING}, ["text_config.rope_theta", "missing"]),
    "two thetas": (
        {"text_config.rope_scaling.rope_theta": 1000},
        ["text_config.rope_theta", "text_config.rope_scaling.rope_theta", "contradict"],
    ),
    "theta no number": ({"text_config.rope_theta": "5e6"}, ["text_config.rope_theta", "'5e6'"]),
    "two sections": (
        {"text_config.rope_parameters": {"mrope_section": [8, 4, 4], "rope_theta": 5000000}},
        ["mrope_section", "contradict"],
    ),
    "section sum": (
        {"text_config.rope_scaling.mrope_section": [24, 20, 20]},
        ["text_config.rope_scaling.mrope_section", "[24, 20, 20]", "16"],
    ),
    "two axes": ({"text_config.rope_scaling.mrope_section": [8, 8]}, ["mrope_section", "three"]),
    "section too wide": (
        {"text_config.rope_scaling.mrope_section": [2, 7, 7]},
        ["mrope_section", "interleaved"],
    ),
    "Qwen2-VL's layout": (
        {"text_config.rope_scaling.mrope_interleaved": False},
        ["mrope_interleaved"],
    ),
    "yarn without factor": (
        {"text_config.rope_scaling.rope_type": "yarn"},
        ["text_config.rope_scaling.factor"],
    ),
    "expert counts": (
        {"text_config.num_local_experts": 16},
        ["text_config.num_experts", "num_local_experts"],
    ),
    "too few experts": (
        {"text_config.num_experts_per_tok": 9},
        ["text_config.num_experts_per_tok", "9", "8"],
    ),
    "no expert width": (
        {"text_config.moe_intermediate_size": MISSING},
        ["text_config.moe_intermediate_size"],
    ),
    "widths": (
        {"vision_config.out_hidden_size": 64},
        ["vision_config.out_hidden_size", "64", "text_config.hidden_size", "48"],
    ),
    "deepstack out of range": (
        {"vision_config.deepstack_visual_indexes": [0, 2, 5]},
        ["vision_config.deepstack_visual_indexes", "[0, 2, 5]", "4"],
    ),
    "deepstack falls": (
        {"vision_config.deepstack_visual_indexes": [2, 0, 3]},
        ["vision_config.deepstack_visual_indexes", "rise"],
    ),
    "deepstack twice": (
        {"vision_config.deepstack_visual_indexes": [0, 2, 2]},
        ["vision_config.deepstack_visual_indexes"],
    ),
    "deepstack negative": (
        {"vision_config.deepstack_visual_indexes": [-1, 2, 3]},
        ["vision_config.deepstack_visual_indexes"],
    ),
    "no deepstack": (
        {"vision_config.deepstack_visual_indexes": MISSING},
        ["vision_config.deepstack_visual_indexes", "list of integers"],
    ),
    "deepstack too long": (
        {"text_config.num_hidden_layers": 2},
        ["vision_config.deepstack_visual_indexes", "text_config.num_hidden_layers"],
    ),
    "text activation": ({"text_config.hidden_act": "gelu"}, ["text_config.hidden_act", "silu"]),
    "vision activation": (
        {"vision_config.hidden_act": "quick_gelu"},
        ["vision_config.hidden_act", "quick_gelu", "gelu_pytorch_tanh"],
    ),
    "kv heads": (
        {"text_config.num_key_value_heads": 3},
        ["text_config.num_key_value_heads", "3", "4"],
    ),
    "vision heads": ({"vision_config.num_heads": 5}, ["vision_config.hidden_size", "num_heads"]),
    "position table": (
        {"vision_config.num_position_embeddings": 60},
        ["vision_config.num_position_embeddings", "square"],
    ),
    "no image token": ({"image_token_id": MISSING}, ["image_token_id"]),
    "no width": ({"text_config.hidden_size": MISSING}, ["text_config.hidden_size"]),
    "no depth": ({"vision_config.depth": MISSING}, ["vision_config.depth"]),
    "zero layers": ({"text_config.num_hidden_layers": 0}, ["text_config.num_hidden_layers"]),
    "a text": ({"text_config.vocab_size": "1024"}, ["text_config.vocab_size", "'1024'"]),
    "a boolean": ({"text_config.head_dim": True}, ["text_config.head_dim", "True"]),
    "tie no flag": ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'"]),
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ["quantization_config.quant_method", "gptq"],
    ),
    "fp8 in other blocks": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        ["quantization_config.weight_block_size", "64", "[128, 128]"],
    ),
    "no bits": ({"quantization": {"group_size": 64}}, ["quantization.bits"]),
    "mode": (
        {"quantization": {**AFFINE4, "mode": "int4"}},
        ["quantization.mode", "int4", "affine"],
    ),
    "override without group": (
        {"quantization": {**AFFINE4, "lm_head": {"bits": 8}}},
        ["quantization.lm_head.group_size"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_key(name: str) -> None:
    changes, words = ERRORS[name]
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        parse_config(changed(load("moe"), changes))
    for word in words:
        assert word in str(caught.value)


def test_yarn_beside_what_transformers_5_wrote() -> None:
    """As the model cards tell users to extend the context, in a file saved anew since."""
    yarn = {"rope_type": "yarn", "factor": 2, "mrope_section": [6, 5, 5]}
    config = changed(as_resaved(load("dense64"), {})[0], {"text_config.rope_scaling": yarn})
    with pytest.raises(ConfigError, match="contradict"):
        parse_config(config)


# A model_type of config.json, and what the error says of it.
FAMILIES: dict[Any, list[str]] = {
    "qwen3": ["this is Qwen3, text only", "mlx-lm runs it"],
    "qwen3_moe": ["this is Qwen3, text only", "mlx-lm runs it"],
    "qwen3_next": ["this is Qwen3-Next, text only", "mlx-lm runs it"],
    "qwen2": ["this is Qwen2 or Qwen2.5, text only", "mlx-lm runs it"],
    "qwen2_moe": ["this is Qwen2 or Qwen2.5, text only", "mlx-lm runs it"],
    "qwen2_vl": ["this is Qwen2-VL;", "mlx-vlm runs it"],
    "qwen2_5_vl": ["this is Qwen2.5-VL;", "mlx-vlm runs it"],
    "qwen2_5_vl_text": ["this is Qwen2.5-VL;", "mlx-vlm runs it"],
    "qwen3_5": ["this is Qwen3.5;", "mlx-vlm runs it"],
    "qwen3_5_text": ["this is Qwen3.5;", "mlx-vlm runs it"],
    "qwen3_5_moe": ["this is Qwen3.5;", "mlx-vlm runs it"],
    "qwen3_5_moe_text": ["this is Qwen3.5;", "mlx-vlm runs it"],
    "qwen3_omni_moe": ["this is Qwen3-Omni;", "mlx-vlm runs it"],
    "qwen3_omni_moe_thinker": ["this is Qwen3-Omni;", "mlx-vlm runs it"],
    "qwen2_5_omni": ["this is Qwen2.5-Omni"],
    "qwen3_asr": ["this is Qwen3-ASR"],
    "qwen3_vl_text": ["one half of such a checkpoint"],
    "qwen3_vl_moe_vision": ["one half of such a checkpoint"],
    "qwen3_vlx": ["mlx-lm runs text models, mlx-vlm other models that see"],
    "llama": ["mlx-lm runs text models, mlx-vlm other models that see"],
    None: ["mlx-lm runs text models, mlx-vlm other models that see"],
    7: ["mlx-lm runs text models, mlx-vlm other models that see"],
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_another_family_is_refused_by_name(model_type: Any) -> None:
    config = changed(load("dense64"), {"model_type": model_type})
    with pytest.raises(ConfigError, match=r"model_type is .* Qwen3-VL checkpoints only") as caught:
        parse_config(config)
    assert repr(model_type) in str(caught.value)
    for words in FAMILIES[model_type]:
        assert words in str(caught.value)
    assert ("runs it" in str(caught.value)) == any("runs it" in w for w in FAMILIES[model_type])


@pytest.mark.parity
def test_the_other_families_are_spelled_as_transformers_spells_them() -> None:
    transformers = pytest.importorskip("transformers")
    known = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    told = {name for name in FAMILIES if "this is" in FAMILIES[name][0]}
    tops = {name for name in told if not name.endswith(("_text", "_thinker"))}
    assert tops <= known


@pytest.mark.parametrize(
    ("content", "error", "word"),
    [
        (None, CheckpointError, "no config.json"),
        (b"", CheckpointError, "JSON"),
        (b"{'a': 1}", CheckpointError, "JSON"),
        (b"\xff\xfe{}", CheckpointError, "JSON"),
        (b"[]", ConfigError, "object"),
        (b"null", ConfigError, "object"),
    ],
)
def test_files(content: bytes | None, error: type[Exception], word: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(error, match=word) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value) or error is ConfigError
