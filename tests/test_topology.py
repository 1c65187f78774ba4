"""Topology files: what their entries match, which of them wins, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import wide_config

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.config import Quantization, parse_config, read_config
from qwen3vl_mlx.quant import apply
from qwen3vl_mlx.quant.recipes import parse_recipe
from qwen3vl_mlx.quant.topology import read_topology

CHECKPOINTS = Path(__file__).parent / "data" / "checkpoints"
Overrides: TypeAlias = "dict[str, Quantization | None]"
Read: TypeAlias = Callable[..., Overrides]
LAYERS = "language_model.model.layers"
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
DENSE = (*KINDS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SPARSE = (*KINDS, "mlp.gate", *(f"mlp.switch_mlp.{k}_proj" for k in ("gate", "up", "down")))


@cache
def shapes_of(variant: str) -> Mapping[str, apply.Shape]:
    return apply.quantizable_shapes(parse_config(wide_config(variant)))


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """`read(text)`: a file of that text, for a tiny model of four layers."""

    def read(text: str, variant: str = "dense64", group_size: int | None = None) -> Overrides:
        path = tmp_path / "topology.yml"
        path.write_text(text, encoding="utf-8")
        return read_topology(path, shapes_of(variant), group_size)

    return read


def bits(overrides: Overrides, kind: str = "mlp.up_proj") -> list[int | None]:
    """Of one module of each of the four layers; 0: left whole, None: not mentioned."""
    found = (overrides.get(f"{LAYERS}.{i}.{kind}", Quantization(0, -1)) for i in range(4))
    return [0 if q is None else None if q.bits < 0 else q.bits for q in found]


# What an entry matches.


@pytest.mark.parametrize(
    ("key", "layers"),
    [
        ("0", [0]),
        ("3", [3]),
        ("0-1", [0]),
        ("1-3", [1, 2]),
        ("0-4", [0, 1, 2, 3]),
        ("2 - 4", [2, 3]),
    ],
)
def test_layers_are_the_decoders_and_ends_are_exclusive(
    read: Read, key: str, layers: list[int]
) -> None:
    for variant, kinds in (("dense64", DENSE), ("moe", SPARSE)):
        overrides = read(f"{key}: 8bit", variant)
        assert overrides.keys() == {f"{LAYERS}.{i}.{kind}" for i in layers for kind in kinds}
        assert set(overrides.values()) == {Quantization(64, 8)}


@pytest.mark.parametrize(
    ("variant", "key", "paths"),
    [
        ("dense64", "embed_tokens", ["language_model.model.embed_tokens"]),
        ("dense64", "model.embed_tokens.weight", ["language_model.model.embed_tokens"]),
        ("dense72", "lm_head", ["language_model.lm_head"]),
        ("dense64", "self_attn.q_proj", [f"{LAYERS}.{i}.self_attn.q_proj" for i in range(4)]),
        ("dense64", "q_proj", [f"{LAYERS}.{i}.self_attn.q_proj" for i in range(4)]),
        ("dense64", "layers.2.mlp.down_proj", [f"{LAYERS}.2.mlp.down_proj"]),
        ("dense64", "model.language_model.layers.2.mlp.down_proj", [f"{LAYERS}.2.mlp.down_proj"]),
        ("moe", "down_proj", [f"{LAYERS}.{i}.mlp.switch_mlp.down_proj" for i in range(4)]),
        ("moe", "layers.1.mlp.gate", [f"{LAYERS}.1.mlp.gate"]),
        (
            "moe",
            "3.mlp.experts.gate_up_proj",
            [f"{LAYERS}.3.mlp.switch_mlp.{kind}_proj" for kind in ("gate", "up")],
        ),
        ("dense64", "vision_tower.blocks.0.attn.qkv", ["vision_tower.blocks.0.attn.qkv"]),
        ("dense64", "model.visual.merger.linear_fc1", ["vision_tower.merger.linear_fc1"]),
    ],
)
def test_names(read: Read, variant: str, key: str, paths: list[str]) -> None:
    found = read(f"'{key}': 8bit", variant, group_size=32)
    assert found == dict.fromkeys(paths, Quantization(32, 8))


@pytest.mark.parametrize(
    "key", ["roj", "proj.q_proj", "4.0", "blocks.0.attn.qkv", "mlp", "layers", "norm"]
)
def test_names_are_whole_parts_of_text_modules(read: Read, key: str) -> None:
    with pytest.raises(InputError, match="no module that can be quantized matches"):
        read(f"{key}: 8bit")


@pytest.mark.parametrize(
    ("variant", "key", "paths"),
    [
        ("dense64", r"/q_proj$/", [f"{LAYERS}.{i}.self_attn.q_proj" for i in range(4)]),
        ("dense64", r"/q_proj\.weight$/", [f"{LAYERS}.{i}.self_attn.q_proj" for i in range(4)]),
        ("dense64", r"/layers\.1\..*down/", [f"{LAYERS}.1.mlp.down_proj"]),
        (
            "dense64",
            r"/^model\.language_model\.layers\.(0|3)\.mlp\.up_proj/",
            [f"{LAYERS}.0.mlp.up_proj", f"{LAYERS}.3.mlp.up_proj"],
        ),
        (
            "dense64",
            r"/^language_model\.model\.layers\.2\.self_attn\.[kv]_proj$/",
            [f"{LAYERS}.2.self_attn.k_proj", f"{LAYERS}.2.self_attn.v_proj"],
        ),
        ("dense72", r"/^lm_head\./", ["language_model.lm_head"]),
        ("dense64", r"/visual\.merger\.linear_fc2/", ["vision_tower.merger.linear_fc2"]),
        ("dense64", r"/vision_tower\.pos/", ["vision_tower.pos_embed"]),
        (
            "moe",
            r"/layers\.0\.mlp\.experts\.gate_up_proj$/",
            [f"{LAYERS}.0.mlp.switch_mlp.{kind}_proj" for kind in ("gate", "up")],
        ),
        (
            "moe",
            r"/2\.mlp\.switch_mlp\.up_proj\.weight$/",
            [f"{LAYERS}.2.mlp.switch_mlp.up_proj"],
        ),
        (
            "moe",
            r"/0\.mlp\.switch_mlp/",
            [f"{LAYERS}.0.mlp.switch_mlp.{kind}_proj" for kind in ("gate", "up", "down")],
        ),
    ],
)
def test_patterns_match_both_spellings(
    read: Read, variant: str, key: str, paths: list[str]
) -> None:
    overrides = read(f"'{key}': 8bit", variant)
    assert overrides.keys() == set(paths)


def test_the_empty_pattern_matches_everything(read: Read) -> None:
    assert read("//: none") == dict.fromkeys(shapes_of("dense64"))


# What an entry gives.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4", Quantization(64, 4)),
        ("'4'", Quantization(64, 4)),
        ("4bit", Quantization(64, 4)),
        ("Q6K", Quantization(64, 6)),
        ("MXFP4", Quantization(32, 4, "mxfp4")),
        ("none", None),
        ("None", None),
        ("null", None),
        ("~", None),
        ("", None),
        ("{isq: Q8_0}", Quantization(64, 8)),
        ("{isq: 3, group_size: 32}", Quantization(32, 3)),
        ("{isq: none}", None),
        ("{isq: nvfp4, group_size: 16}", Quantization(16, 4, "nvfp4")),
        ("{bits: 5}", Quantization(64, 5)),
        ("{bits: 5, group_size: 32, mode: affine}", Quantization(32, 5)),
        ("{mode: mxfp8}", Quantization(32, 8, "mxfp8")),
        ("{mode: mxfp8, bits: 8, group_size: 32}", Quantization(32, 8, "mxfp8")),
        ("\n  isq: afq2\n", Quantization(64, 2)),
    ],
)
def test_values(read: Read, value: str, expected: Quantization | None) -> None:
    assert set(read(f"1: {value}").values()) == {expected}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4", Quantization(32, 4)),
        ("{bits: 4}", Quantization(32, 4)),
        ("{isq: q4k}", Quantization(32, 4)),
        ("{bits: 4, group_size: 64}", Quantization(64, 4)),
        ("nvfp4", Quantization(16, 4, "nvfp4")),
        ("{mode: nvfp4}", Quantization(16, 4, "nvfp4")),
        ("none", None),
    ],
)
def test_a_default_group_size_is_for_affine_entries_without_one(
    read: Read, value: str, expected: Quantization | None
) -> None:
    assert set(read(f"1: {value}", group_size=32).values()) == {expected}


# Which entry wins.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-2: 4\n1-4: 6", [4, 6, 6, 6]),  # the higher end
        ("1-4: 6\n0-2: 4", [4, 6, 6, 6]),  # whatever the order
        ("0-4: 4\n1: 6", [4, 4, 4, 4]),  # a layer is a range: its end is lower
        ("0-4: 4\n3: 6", [4, 4, 4, 6]),
        ("0-4: 4\n2-4: 3", [4, 4, 3, 3]),  # equal ends: the later entry
        ("2-4: 3\n0-4: 4", [4, 4, 4, 4]),
        ("/mlp/: 4\n/up_proj/: 6", [6, 6, 6, 6]),  # patterns: the later entry
        ("/up_proj/: 6\n/mlp/: 4", [4, 4, 4, 4]),
        ("up_proj: 6\n/mlp/: 4", [4, 4, 4, 4]),  # and names among them
        ("/mlp/: 4\nup_proj: 6", [6, 6, 6, 6]),
        ("/layers.1.*up/: 2\n0-4: 8", [8, 2, 8, 8]),  # both beat ranges
        ("layers.2.mlp.up_proj: none\n0-3: 8", [8, 8, 0, None]),
    ],
)
def test_precedence(read: Read, text: str, expected: list[int | None]) -> None:
    assert bits(read(text)) == expected


def test_a_topology_beats_promotion_and_the_whole_tower_but_not_the_router(read: Read) -> None:
    text = "embed_tokens: 3\nlm_head: 2\n/merger.linear_fc1/: 4\n0-2: 4\nlayers.3.mlp.gate: 3"
    overrides = read(text + "\nlayers.2.mlp.gate: none", "moe")
    recipe = replace(parse_recipe("5bit", 4), overrides=overrides)
    modules = apply.assign(recipe, shapes_of("moe")).modules
    assert modules["language_model.model.embed_tokens"].bits == 3
    assert modules["language_model.lm_head"].bits == 2
    assert modules["vision_tower.merger.linear_fc1"].bits == 4
    assert "vision_tower.merger.linear_fc2" not in modules
    assert modules[f"{LAYERS}.1.mlp.switch_mlp.up_proj"].bits == 4
    assert modules[f"{LAYERS}.2.mlp.switch_mlp.up_proj"].bits == 5
    routers = [modules.get(f"{LAYERS}.{i}.mlp.gate") for i in range(4)]
    assert [q and q.bits for q in routers] == [8, 8, None, 8]


# Groups and widths.


def test_a_range_or_pattern_leaves_to_the_report_what_groups_do_not_divide(read: Read) -> None:
    overrides = read("0-4: {bits: 4, group_size: 128}\n/linear_fc2/: 4", "dense72")
    recipe = replace(parse_recipe("8bit", 4), overrides=overrides)
    assignment = apply.assign(recipe, shapes_of("dense72"))
    assert "width, 64" in assignment.whole[f"{LAYERS}.0.mlp.up_proj"]
    assert assignment.modules[f"{LAYERS}.0.mlp.down_proj"].group_size == 128
    assert "width, 208" in assignment.whole["vision_tower.blocks.0.mlp.linear_fc2"]


def test_a_name_does_not(read: Read) -> None:
    with pytest.raises(InputError, match=r"groups of 128 do not divide the width of .*, 64"):
        read("up_proj: {bits: 4, group_size: 128}")
    assert read("down_proj: {bits: 4, group_size: 128}")
    name = "vision_tower.blocks.0.mlp.linear_fc2"
    with pytest.raises(InputError, match=r"groups of 64 .* 208: give a group_size that does"):
        read(f"{name}: 4", "dense72")
    assert read(f"{name}: none", "dense72") == {name: None}
    assert read(f"{name}: nvfp4", "dense72")


# What is refused.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing in it"),
        ("# only a comment", "nothing in it"),
        ("- 0-8", "line 1: expected a mapping"),
        ("4bit", "line 1: expected a mapping"),
        ("0: [", "not YAML"),
        ("0: 4\n---\n1: 4", "not YAML"),
        ("a: &x 4\nb: *y", "not YAML"),
        ("[" * 3000, "not YAML"),
        ("0: 4\n1: 4\n0: 6", r"line 3: '0' stands in line 1 too"),
        ("0: {bits: 4, bits: 6}", "line 1: 'bits' stands in line 1 too"),
        ("0: [4]", "line 1: expected a mapping"),
        ("0: {bits: [4]}", "expected one word or number, not a list"),
        ("[0, 1]: 4", "expected one word or number, not a list"),
        ("0: &x {isq: *x}", "expected one word or number, not a list"),
        ("<<: {0: 4}", "no field '0'"),
        # Selectors.
        ("0: 4\n4: 4", r"line 2, '4': the model has 4 decoder layers, 0 to 3"),
        ("0-5: 4", r"'0-5': the model has 4 decoder layers"),
        ("2-2: 4", r"'2-2': the range is empty: its end, 2, is exclusive"),
        ("3-1: 4", "the range is empty"),
        ("-1: 4", "not a layer"),
        ("1-: 4", "not a layer"),
        ("1-2-3: 4", "not a layer"),
        ("1,2: 4", "not a layer"),
        ("'': 4", "not a layer"),
        ("/: 4", "not a layer"),
        ("'layers[0]': 4", "not a layer"),
        ("/(/: 4", r"line 1, '/\(/': not a regular expression"),
        ("/layers.9/: 4", "no module that can be quantized matches"),
        ("/norm/: 4", "no module that can be quantized matches"),
        ("lm_head: 4", "tied to its embeddings has no lm_head"),
        # Values.
        ("0: 7bit", "no quantization '7bit'; valid names: 2bit"),
        ("0: mixed_3_6", "a recipe for a whole model"),
        ("0: {}", "give 'isq', 'bits', or a mode"),
        ("0: {group_size: 32}", "give 'isq', 'bits', or a mode"),
        ("0: {mode: affine}", "give 'isq', 'bits', or a mode"),
        ("0: {device: 'metal[0]'}", "'device' has no meaning here: a Mac has one GPU"),
        ("0: {isq: Q4K, device: cpu}", "'device' has no meaning here"),
        ("0: {quant: 4}", "no field 'quant'; fields are isq, bits, group_size, mode"),
        ("0: {isq: 4, bits: 4}", "not both"),
        ("0: {isq: 4, mode: affine}", "not both"),
        ("0: {isq: none, group_size: 32}", "left whole"),
        ("0: {bits: 7}", "2, 3, 4, 5, 6 or 8 bits, not 7"),
        ("0: {bits: none}", "bits must be a whole number above 0, got 'none'"),
        ("0: {bits: 4.0}", "bits must be a whole number"),
        ("0: {bits: 0x4}", "bits must be a whole number"),
        ("0: {bits: 4, group_size: 0}", "group_size must be a whole number"),
        ("0: {bits: 4, group_size: 48}", "32, 64 or 128 weights, not 48"),
        ("0: {bits: 4, mode: mxfp8}", "mxfp8 has 8 bits, not 4"),
        ("0: {mode: mxfp8, group_size: 64}", "mxfp8 has groups of 32, not 64"),
        ("0: {bits: 4, mode: gguf}", "no mode 'gguf'; modes are affine, mxfp4, mxfp8, nvfp4"),
    ],
)
def test_refusals(read: Read, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read(text)
    assert "topology.yml" in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yml").write_bytes(b"0: \xff")
    for name in ("missing.yml", "latin.yml", "."):
        with pytest.raises(InputError, match="cannot be read"):
            read_topology(tmp_path / name, shapes_of("dense64"))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(
            st.tuples(
                st.from_regex(r"/?[0-9a-z._*()-]{0,8}/?", fullmatch=True),
                st.sampled_from(["4", "none", "{bits: 3}", "{isq: x}", "[", "&a", "*a", "!!int x"]),
            ).map(": ".join),
            max_size=4,
        ).map("\n".join),
    )
)
def test_any_text_is_overrides_or_an_input_error(read: Read, text: str) -> None:
    try:
        overrides = read(text)
    except InputError:
        return
    assert overrides
    assert overrides.keys() <= shapes_of("dense64").keys()


def test_a_file_for_the_released_model(tmp_path: Path) -> None:
    """The example of mistral.rs' documentation, on a model of as many layers."""
    path = tmp_path / "isq.yml"
    path.write_text(
        "0-8:\n  isq: Q3K\n8-16:\n  isq: Q4K\n16-24:\n  isq: Q6K\n28-32:\n  isq: Q8_0\n"
    )
    shapes = apply.quantizable_shapes(read_config(CHECKPOINTS / "Qwen3-VL-8B-Instruct"))
    found = read_topology(path, shapes)
    by_layer = [found.get(f"{LAYERS}.{i}.self_attn.q_proj") for i in range(36)]
    expected = [3] * 8 + [4] * 8 + [6] * 8 + [None] * 4 + [8] * 4 + [None] * 4
    assert [q and q.bits for q in by_layer] == expected
    assert len(found) == 28 * len(DENSE)
