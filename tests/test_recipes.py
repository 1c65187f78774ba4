"""Names of quantizations, the policies they stand for, and what both weigh and become."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from layouts import wide_config
from mlx.utils import tree_flatten

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.loading import module_quantization
from qwen3vl_mlx.models.config import ModelConfig, Quantization, parse_config, read_config
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.quant import apply, recipes
from qwen3vl_mlx.quant.recipes import (
    MIXED,
    Recipe,
    affine,
    default_recipe,
    parse_preset,
    parse_recipe,
    uniform_recipe,
)

CHECKPOINTS = sorted((Path(__file__).parent / "data" / "checkpoints").glob("Qwen3-VL-*"))
PRESETS = ("2bit", "3bit", "4bit", "5bit", "6bit", "8bit", "mxfp4", "mxfp8", "nvfp4")
FIXED = {
    "mxfp4": Quantization(32, 4, "mxfp4"),
    "mxfp8": Quantization(32, 8, "mxfp8"),
    "nvfp4": Quantization(16, 4, "nvfp4"),
}
SETTINGS = [
    *(Quantization(group, bits) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *FIXED.values(),
]
DECODER = "language_model.model.layers.0"


@cache
def real_config(name: str) -> ModelConfig:
    return read_config(Path(__file__).parent / "data" / "checkpoints" / name)


def small_config(variant: str) -> ModelConfig:
    return parse_config(wide_config(variant))


# Names.


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    "spelling",
    [
        *("{}bit", "{}", "{}-bit", "{}bits", " {}bit\n", "afq{}", "AFQ{}"),
        *("q{}k", "Q{}K", "Q{}_K", "q{}_k_m", "q{}_0", "Q{}_1"),
    ],
)
def test_every_spelling_of_bits(spelling: str, bits: int) -> None:
    assert parse_preset(spelling.format(bits)) == Quantization(64, bits, "affine")
    assert parse_preset(spelling.format(bits), 32) == Quantization(32, bits, "affine")


@pytest.mark.parametrize("mode", FIXED)
def test_modes_with_groups_of_their_own(mode: str) -> None:
    own = FIXED[mode].group_size
    assert parse_preset(mode) == parse_preset(mode.upper(), own) == FIXED[mode]
    with pytest.raises(InputError, match=f"{mode} has groups of {own}, not 128"):
        parse_preset(mode, 128)


@pytest.mark.parametrize(
    "name",
    [
        *("7bit", "afq7", "q7k", "1", "16", "bf16", "none", "fp8", "f8q8", "hqq4", "hqq8"),
        *("q4", "4k", "q4k_xl", "iq4_xs", "mxfp6", "nvfp8"),
        *("", "4.5", "-4", "4 bit", "04bit", "\uff14bit"),
        pytest.param("9" * 5000, id="5000 digits"),
    ],
)
def test_other_names_are_refused_with_the_valid_ones(name: str) -> None:
    for parse in (parse_preset, lambda name: parse_recipe(name, 28)):
        with pytest.raises(InputError) as raised:
            parse(name)
        listed = str(raised.value).partition("valid names: ")[2].split(", ")
        assert listed == [*PRESETS, *MIXED]


@pytest.mark.parametrize("name", [*PRESETS, *MIXED])
def test_every_listed_name_is_taken(name: str) -> None:
    assert parse_recipe(name, 28).name == parse_recipe(f" {name.upper()} ", 28).name == name


@given(st.one_of(st.text(max_size=12), st.from_regex(r"(afq|q|mixed_|mxfp)?\d{1,5}[_k]?\w?")))
def test_a_name_is_settings_or_an_input_error(name: str) -> None:
    try:
        recipe = parse_recipe(name, 28)
    except InputError:
        return
    assert recipe.base in SETTINGS


@pytest.mark.parametrize("group", [-32, 0, 1, 16, 48, 63, 256])
def test_groups_mlx_does_not_have(group: int) -> None:
    for name in ("4bit", "mixed_3_6"):
        with pytest.raises(InputError, match=rf"32, 64 or 128 weights, not {group}$"):
            parse_recipe(name, 28, group_size=group)


@pytest.mark.parametrize("bits", [-4, 0, 1, 7, 16])
def test_bits_mlx_does_not_have(bits: int) -> None:
    with pytest.raises(InputError, match=rf"2, 3, 4, 5, 6 or 8 bits, not {bits}$"):
        affine(bits)


# Policies.


@pytest.mark.parametrize(
    ("name", "embeddings", "router"),
    [
        ("2bit", affine(6), affine(8)),
        ("3bit", affine(6), affine(8)),
        ("4bit", affine(6), affine(8)),
        ("5bit", affine(6), affine(8)),
        ("6bit", affine(6), affine(8)),
        ("8bit", affine(8), affine(8)),
        ("mxfp4", affine(6), affine(8)),
        ("nvfp4", affine(6), affine(8)),
        ("mxfp8", FIXED["mxfp8"], FIXED["mxfp8"]),
        ("mixed_2_6", affine(6), affine(8)),
        ("mixed_3_4", affine(6), affine(8)),
        ("mixed_3_5", affine(6), affine(8)),
        ("mixed_4_8", affine(8), affine(8)),
    ],
)
def test_what_a_name_makes_of_each_module(
    name: str, embeddings: Quantization, router: Quantization
) -> None:
    recipe = parse_recipe(name, 28)
    low = name.removeprefix("mixed_").split("_")[0]
    assert recipe.choose(f"{DECODER}.self_attn.q_proj") == parse_preset(low)
    assert recipe.choose("language_model.model.embed_tokens") == embeddings
    assert recipe.choose("language_model.lm_head") == embeddings
    assert recipe.choose(f"{DECODER}.mlp.gate") == router
    assert recipe.choose(f"{DECODER}.mlp.switch_mlp.gate_proj") == parse_preset(low)
    for path in ("blocks.3.attn.qkv", "merger.linear_fc1", "pos_embed"):
        assert recipe.choose(f"vision_tower.{path}") is None


@pytest.mark.parametrize("group", [32, 128])
def test_promoted_modules_keep_the_group_size(group: int) -> None:
    recipe = parse_recipe("3bit", 28, group_size=group)
    assert recipe.embeddings == affine(6, group)
    assert recipe.router == affine(8, group)


def test_the_tower_is_quantized_on_request_but_never_its_position_table() -> None:
    for name, chosen in (("4bit", affine(4)), ("mixed_3_6", affine(6))):
        recipe = parse_recipe(name, 28, vision=True)
        assert recipe.choose("vision_tower.blocks.3.mlp.linear_fc2") == chosen
        assert recipe.choose("vision_tower.deepstack_merger_list.0.linear_fc1") == chosen
        assert recipe.choose("vision_tower.pos_embed") is None


def test_a_uniform_recipe_promotes_nothing() -> None:
    shapes = apply.quantizable_shapes(small_config("moe"))
    assignment = apply.assign(uniform_recipe(affine(3, 32)), shapes)
    text = {path for path in shapes if path.startswith("language_model.")}
    assert dict(assignment.modules) == dict.fromkeys(text, affine(3, 32))


def test_overrides_come_before_every_rule() -> None:
    paths = ["vision_tower.pos_embed", "language_model.lm_head", f"{DECODER}.mlp.gate"]
    recipe = Recipe("x", affine(4), affine(6), affine(8), overrides=dict.fromkeys(paths, affine(2)))
    assert [recipe.choose(path) for path in paths] == [affine(2)] * 3
    whole = Recipe("x", affine(4), affine(6), affine(8), overrides={f"{DECODER}.mlp.gate": None})
    assert whole.choose(f"{DECODER}.mlp.gate") is None


@pytest.mark.parametrize(
    ("layers", "high"),
    [
        (4, [2, 3]),
        (8, [0, 3, 6, 7]),
        (28, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]),
        (36, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 31, 32, 33, 34, 35]),
    ],
)
def test_which_layers_of_a_mixed_recipe_get_more_bits(layers: int, high: list[int]) -> None:
    recipe = parse_recipe("mixed_3_6", layers)
    for i in range(layers):
        layer = f"language_model.model.layers.{i}"
        expected = affine(6) if i in high else affine(3)
        for finer in ("self_attn.v_proj", "mlp.down_proj", "mlp.switch_mlp.down_proj"):
            assert recipe.choose(f"{layer}.{finer}") == expected
        for coarse in ("self_attn.k_proj", "mlp.up_proj", "mlp.switch_mlp.gate_proj"):
            assert recipe.choose(f"{layer}.{coarse}") == affine(3)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
@pytest.mark.parametrize("checkpoint", ["Qwen3-VL-2B-Instruct", "Qwen3-VL-235B-A22B-Instruct"])
def test_mixed_recipes_give_layers_what_mlx_lm_gives(name: str, checkpoint: str) -> None:
    pytest.importorskip("transformers")
    from mlx_lm.convert import mixed_quant_predicate_builder

    config = real_config(checkpoint)
    layers = config.text.num_hidden_layers
    paths = [p for p in apply.quantizable_shapes(config) if ".layers." in p]
    modules = [(path, None) for path in paths]
    model: Any = SimpleNamespace(layers=[None] * layers, named_modules=lambda: modules)
    predicate: Any = mixed_quant_predicate_builder(name, model)
    recipe = parse_recipe(name, layers)
    for path in paths:
        if path.endswith(".mlp.gate"):
            continue  # mlx-lm knows no router
        chosen = recipe.choose(path)
        assert chosen is not None
        assert apply.as_dict(chosen) == predicate(path, None)


# What they weigh, against MLX's own arrays.


@pytest.mark.parametrize("settings", SETTINGS, ids=recipes.preset_name)
@pytest.mark.parametrize("shape", [(6, 256), (2, 5, 128)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_packed_shapes_and_bytes_are_those_of_mlx(
    settings: Quantization, shape: tuple[int, ...], dtype: mx.Dtype
) -> None:
    weight = mx.array(np.random.RandomState(0).standard_normal(shape)).astype(dtype)
    parts = apply.pack(weight, settings)
    assert {key: part.shape for key, part in parts.items()} == apply.packed_shapes(shape, settings)
    for key, part in parts.items():
        assert part.dtype == apply.packed_dtype(key, settings, dtype)
    nbytes = sum(part.nbytes for part in parts.values())
    assert apply.packed_bytes(shape, settings, dtype.size) == nbytes


@pytest.mark.parametrize("settings", SETTINGS, ids=recipes.preset_name)
def test_unpack_inverts_pack_to_within_a_step(settings: Quantization) -> None:
    weight = mx.array(np.random.RandomState(1).standard_normal((64, 256)), mx.float32)
    parts = apply.pack(weight, settings)
    back = apply.unpack(parts, settings, mx.float32)
    assert back.dtype == mx.float32
    error = mx.abs(back - weight).reshape(-1, settings.group_size)
    groups = weight.reshape(-1, settings.group_size)
    if settings.mode == "affine":  # a group's range in 2^bits - 1 steps
        step = (groups.max(axis=1) - groups.min(axis=1)) / (2**settings.bits - 1)
    else:  # floating point: half the gap below the largest code, twice where scales are powers of 2
        step = mx.abs(groups).max(axis=1) / (4 if settings.bits == 4 else 16)
    assert bool(mx.all(error <= 1.01 * step[:, None]))
    assert apply.unpack(parts, settings, mx.bfloat16).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("name", "group", "bits_per_weight"),
    [
        ("2bit", None, 2.5),
        ("3bit", None, 3.5),
        ("4bit", None, 4.5),
        ("5bit", None, 5.5),
        ("6bit", None, 6.5),
        ("8bit", None, 8.5),
        ("4bit", 32, 5.0),
        ("4bit", 128, 4.25),
        ("mxfp4", None, 4.25),
        ("mxfp8", None, 8.25),
        ("nvfp4", None, 4.5),
    ],
)
def test_bits_per_weight(name: str, group: int | None, bits_per_weight: float) -> None:
    path, shape = "language_model.model.layers.0.mlp.up_proj", (12288, 4096)
    weight = apply.weigh({f"{path}.weight": shape}, {path: parse_preset(name, group)})
    assert weight.parameters == 12288 * 4096
    assert weight.bits_per_weight == bits_per_weight


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("name", [*PRESETS, "mixed_3_6"])
@pytest.mark.parametrize("vision", [False, True])
def test_weigh_equals_a_quantized_model(variant: str, name: str, vision: bool) -> None:
    config = small_config(variant)
    recipe = parse_recipe(name, config.text.num_hidden_layers, vision=vision)
    assignment = apply.assign(recipe, apply.quantizable_shapes(config))
    model = Model(config)

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        chosen = assignment.modules.get(path)
        return apply.as_dict(chosen) if chosen else False

    nn.quantize(model, class_predicate=settings)
    nbytes = sum(tensor.nbytes for _, tensor in tree_flatten(model.parameters()))
    weight = apply.weigh(apply.parameter_shapes(config), assignment.modules, itemsize=4)
    assert weight.nbytes == nbytes
    assert weight.bits_per_weight < 32


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_parameters_of_the_released_checkpoints(folder: Path) -> None:
    shapes = tiny.hub_shapes(json.loads((folder / "config.json").read_text()))
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    weight = apply.weigh(apply.parameter_shapes(read_config(folder)), {})
    assert (weight.parameters, weight.nbytes) == (count, 2 * count)
    assert weight.bits_per_weight == 16


# What they become.


def test_a_width_that_no_group_divides_is_left_whole_and_reported() -> None:
    config = parse_config(tiny.tiny_config("dense72"))  # a tower of widths 144 and 208
    shapes = apply.quantizable_shapes(config)
    assignment = apply.assign(default_recipe(affine(4, 32), vision=True), shapes)
    assert assignment.whole["vision_tower.blocks.1.mlp.linear_fc2"] == (
        "groups of 32 do not divide its width, 208"
    )
    assert assignment.modules.keys().isdisjoint(assignment.whole)
    for path, shape in shapes.items():
        if path != "vision_tower.pos_embed":
            assert (path in assignment.modules) == (shape[-1] % 32 == 0)
            assert (path in assignment.whole) == (shape[-1] % 32 != 0)


@pytest.mark.parametrize(
    ("name", "left"), [("4bit", 27), ("mxfp4", 27), ("mxfp8", 27), ("nvfp4", 0)]
)
def test_the_4304_wide_layers_of_the_large_tower(name: str, left: int) -> None:
    config = real_config("Qwen3-VL-8B-Instruct")
    recipe = parse_recipe(name, config.text.num_hidden_layers, vision=True)
    assignment = apply.assign(recipe, apply.quantizable_shapes(config))
    wanted = [f"vision_tower.blocks.{i}.mlp.linear_fc2" for i in range(left)]
    assert sorted(assignment.whole) == sorted(wanted)
    assert all("4304" in reason for reason in assignment.whole.values())


def test_nothing_but_the_tower_is_left_whole_by_default() -> None:
    for folder in CHECKPOINTS:
        config = read_config(folder)
        shapes = apply.quantizable_shapes(config)
        recipe = parse_recipe("4bit", config.text.num_hidden_layers)
        assignment = apply.assign(recipe, shapes)
        assert not assignment.whole
        assert set(assignment.modules) == {p for p in shapes if p.startswith("language_model.")}


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("name", [*PRESETS, "mixed_3_8"])
def test_config_json_gives_every_module_its_settings_back(variant: str, name: str) -> None:
    raw = wide_config(variant)
    config = parse_config(raw)
    recipe = parse_recipe(name, config.text.num_hidden_layers, vision=True)
    odd = {f"{DECODER}.self_attn.{kind}_proj": affine(4, 32) for kind in "qk"}
    odd[f"{DECODER}.self_attn.v_proj"] = FIXED["mxfp4"]
    recipe = replace(recipe, overrides=odd)
    assignment = apply.assign(recipe, apply.quantizable_shapes(config))
    section = json.loads(json.dumps(apply.config_section(assignment)))
    read = parse_config({**raw, "quantization": section, "quantization_config": section})
    assert read.quantization is not None
    assert read.quantization.default == assignment.default
    for path, settings in assignment.modules.items():
        assert module_quantization(read.quantization, path) == settings
    exceptions = {p for p, s in assignment.modules.items() if s != assignment.default}
    assert set(read.quantization.overrides) == exceptions
