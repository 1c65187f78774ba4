"""`python -m qwen3vl_mlx.convert`: the contract of its output, its options, its memory."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from converting import (
    assignment,
    convert,
    differing,
    parameters,
    read_json,
    tensors_of,
    tree,
    write_source,
)
from huggingface_hub import metadata_load
from layouts import LAYOUTS, as_mlx, wide, wide_config, write

from qwen3vl_mlx import cli, hub_upload, stream
from qwen3vl_mlx.api import load
from qwen3vl_mlx.convert import main
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import HubError, InputError
from qwen3vl_mlx.jsonfiles import read_generation_config
from qwen3vl_mlx.loading import load_model, load_quantized
from qwen3vl_mlx.models.config import Quantization, parse_config, read_config
from qwen3vl_mlx.quant.apply import Assignment

GENERATION = {
    "bos_token_id": 998,
    "do_sample": True,
    "eos_token_id": [1000, 998],
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.0,
}
BESIDE = {  # files of real checkpoints
    "merges.txt": b"#version: 0.2\n\xc4\xa0 t\n",
    "vocab.json": b'{"a":0}',
    "added_tokens.json": b"{}\n",
    "chat_template.json": b'{ "chat_template": "" }',
    "LICENSE": b"Apache",
    "NOTICE.md": b"Thanks",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of the Hub with all that may be in one."""
    root = tmp_path_factory.mktemp("sources")

    @cache
    def folder(variant: str) -> Path:
        path = write_source(root / variant, variant, mx.bfloat16)
        for name, content in BESIDE.items():
            (path / name).write_bytes(content)
        (path / "generation_config.json").write_text(json.dumps(GENERATION))
        (path / "README.md").write_text("---\nlicense: mit\n---\n# The source\n")
        (path / "pytorch_model.bin").write_bytes(b"old")
        (path / ".gitattributes").write_bytes(b"*")
        config = read_json(path / "config.json")
        changed = {"_name_or_path": "/home/me/secret", "torch_dtype": "float16", **config}
        (path / "config.json").write_text(json.dumps(changed))
        return path

    return folder


# The contract.


@pytest.mark.parametrize("quantize", [None, "4bit", "mixed_3_6", "mxfp4"])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_tensors_and_config_of_the_contract(
    variant: str, quantize: str | None, source: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, target = source(variant), tmp_path / "target"
    convert(folder, target, quantize)
    tensors = tensors_of(target)
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    assert mx.load(str(target / "model.safetensors"), return_metadata=True)[1] == {"format": "mlx"}

    names = as_mlx(*wide(variant))[1].keys()
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    parts = {f"{path}.{part}" for path in packed for part in ("weight", "scales", "biases")}
    assert tensors.keys() - parts == names - parts
    assert ("language_model.lm_head.weight" in tensors) == (variant != "dense64")
    width = wide(variant)[0]["vision_config"]["hidden_size"]
    assert tensors["vision_tower.patch_embed.proj.weight"].shape == (width, 2, 16, 16, 3)
    if variant == "moe":
        mlp = "language_model.model.layers.1.mlp"
        assert tensors[f"{mlp}.gate.weight"].shape[0] == 8
        if quantize is None:
            assert tensors[f"{mlp}.switch_mlp.up_proj.weight"].shape == (8, 96, 64)
            assert tensors[f"{mlp}.switch_mlp.down_proj.weight"].shape == (8, 64, 96)

    text = (target / "config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    assert not {"_name_or_path", "torch_dtype"} & config.keys()
    assert config.get("quantization") == config.get("quantization_config")
    assert ("quantization" in config) == bool(packed) == (quantize is not None)
    assert not any(path.startswith("vision_tower.") for path in packed)
    for path in packed:  # the section says of each module what its tensors say
        settings = config["quantization"]
        own = settings.get(path, settings)
        weight, scales = tensors[f"{path}.weight"], tensors[f"{path}.scales"]
        inner = scales.shape[-1] * own["group_size"]
        assert weight.dtype == mx.uint32
        assert weight.shape[-1] * 32 == inner * own["bits"]
        assert (f"{path}.biases" in tensors) == (own["mode"] == "affine")
        assert scales.dtype == (mx.bfloat16 if own["mode"] == "affine" else mx.uint8)
        assert set(own) == {"group_size", "bits", "mode"} | (set(own) if own is settings else set())
    exceptions = {
        key for key, value in config.get("quantization", {}).items() if isinstance(value, dict)
    }
    assert exceptions <= packed
    assert parse_config(config).vision == read_config(folder).vision
    assert parse_config(config).text == read_config(folder).text


@pytest.mark.parametrize("options", [{}, {"to_hf": True}], ids=["mlx", "hub"])
def test_files_beside_the_weights(
    options: dict[str, bool], source: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = source("dense64")
    convert(folder, tmp_path / "target", **options)
    made = {"config.json", "model.safetensors", "model.safetensors.index.json"}
    kept = tree(folder).keys() - made - {
        "README.md", "pytorch_model.bin", ".gitattributes",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    found = tree(tmp_path / "target")
    assert {"merges.txt", "tokenizer.json", "chat_template.jinja", *BESIDE} <= kept
    assert found.keys() == kept | made | {"README.md"}
    assert {name: found[name] for name in kept} == {name: tree(folder)[name] for name in kept}


def test_generation_settings_are_where_everyone_looks(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    """In a file of their own, in config.json, and there at the top too, for mlx-vlm."""
    convert(source("dense64"), tmp_path / "mlx", "4bit")
    config = read_json(tmp_path / "mlx" / "config.json")
    assert config["generation_config"] == GENERATION
    hoisted = ("eos_token_id", "temperature", "top_p", "top_k", "do_sample")
    assert {key: config[key] for key in hoisted} == {key: GENERATION[key] for key in hoisted}
    assert load(tmp_path / "mlx").default_params.temperature == 0.7
    (tmp_path / "mlx" / "generation_config.json").unlink()
    convert(tmp_path / "mlx", tmp_path / "again")
    again = read_json(tmp_path / "again" / "config.json")
    assert {k: v for k, v in again.items() if "quant" not in k} == {
        k: v for k, v in config.items() if "quant" not in k
    } | {"dtype": "bfloat16"}
    assert read_generation_config(tmp_path / "again") == GENERATION
    convert(tmp_path / "mlx", tmp_path / "hub", to_hf=True)
    back = read_json(tmp_path / "hub" / "config.json")
    assert not {*hoisted, "generation_config"} & back.keys()
    assert read_json(tmp_path / "hub" / "generation_config.json") == GENERATION


def test_generation_settings_that_cannot_be_read(
    source: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_source(tmp_path / "source", "dense64")
    (folder / "generation_config.json").write_text("{")
    assert main(["--model", str(folder), "-o", str(tmp_path / "target")]) == 1
    assert "generation_config.json cannot be read as JSON" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_card(source: Callable[[str], Path], tmp_path: Path) -> None:
    report = convert(source("moe"), tmp_path / "target", "4bit", name="me/mine")
    card = tmp_path / "target" / "README.md"
    metadata = metadata_load(card)
    assert metadata is not None
    assert (metadata["library_name"], metadata["license"]) == ("mlx", "mit")
    text = card.read_text()
    assert "# me/mine" in text
    assert f"{report.bits_per_weight:.2f}" in text
    assert "4bit" in text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("variant", "tied"), [(v, t) for v in tiny.VARIANTS for t in (False, True)]
)
@pytest.mark.parametrize("options", [{}, {"to_hf": True}], ids=["mlx", "hub"])
def test_config_in_the_dialect_of_the_hub(
    variant: str, tied: bool, layout: str, options: dict[str, bool], tmp_path: Path
) -> None:
    """Whatever dialect the source has; transformers 4 and mlx-vlm know no other."""
    config = wide_config(variant)
    config["tie_word_embeddings"] = tied
    if variant != "moe":
        config["text_config"]["tie_word_embeddings"] = tied
    if variant == "dense72":
        config["text_config"]["rope_scaling"] |= {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512,
        }  # fmt: skip
    config["text_config"]["torch_dtype"] = "float16"  # wrong, and not to be handed on
    written, tensors = LAYOUTS[layout](config, tiny.tiny_weights(config))
    source = write(tmp_path / "source", written, tensors)
    convert(source, tmp_path / "target", **options)
    got = read_json(tmp_path / "target" / "config.json")
    assert parse_config(got) == read_config(source)
    text, vision = got["text_config"], got["vision_config"]
    for key in ("rope_theta", "rope_scaling", *(["num_experts"] if variant == "moe" else [])):
        assert text[key] == config["text_config"][key]
    assert not {"rope_parameters", "num_local_experts", "torch_dtype"} & text.keys()
    assert vision["model_type"] == got["model_type"] == config["model_type"]
    assert text["tie_word_embeddings"] == got["tie_word_embeddings"] == tied
    assert text["dtype"] == got["dtype"] == "float32"


@pytest.mark.parametrize("options", [{}, {"to_hf": True}], ids=["mlx", "hub"])
def test_a_head_of_its_own_unties_the_config(options: dict[str, bool], tmp_path: Path) -> None:
    """Readers that believe config.json would ignore the head."""
    config, tensors = wide("dense64")
    head = np.random.RandomState(1).standard_normal((1024, 64)).astype(np.float32)
    source = write(tmp_path / "source", config, {**tensors, "lm_head.weight": head})
    convert(source, tmp_path / "target", **options)
    got = read_json(tmp_path / "target" / "config.json")
    assert config["tie_word_embeddings"] is True
    assert got["tie_word_embeddings"] is got["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quantize", [None, "4bit", "mxfp4"])
def test_types(
    dtype: str, quantize: str | None, source: Callable[[str], Path], tmp_path: Path
) -> None:
    wanted = getattr(mx, dtype)
    convert(source("dense64"), tmp_path / "target", quantize, dtype=wanted)
    for name, tensor in tensors_of(tmp_path / "target").items():
        assert tensor.dtype in (wanted, mx.uint32, mx.uint8), name
    config = read_json(tmp_path / "target" / "config.json")
    assert config["dtype"] == config["text_config"]["dtype"] == dtype
    whole = parameters(load_model(source("dense64"), wanted))
    got = tensors_of(tmp_path / "target")
    plain = {name: whole[name] for name in whole if got[name].dtype == wanted}
    assert differing({name: got[name] for name in plain}, plain) == []


# The command.

REFUSED = [
    (["--to-hf", "-q", "4bit"], "--to-hf writes whole weights"),
    (["--dequantize", "-q", "4bit"], "--dequantize writes whole weights"),
    (["--group-size", "32"], "--group-size.*needs --quantize"),
    (["--topology", "file.yaml"], "--topology.*needs --quantize"),
    (["--quantize-vision"], "--quantize-vision.*needs --quantize"),
    (["--memory", "16GB"], "--memory is for --plan"),
    (["-q", "4bit", "--context", "9"], "--context is for --plan"),
    (["-q", "4bit", "--image-tokens", "9"], "--image-tokens is for --plan"),
    (["-q", "auto", "--group-size", "32"], "auto chooses the group size"),
    (["--private"], "--private is for --upload"),
    (["--calibrate"], "--calibrate.*needs --quantize"),
    (["--calibration", "c.safetensors"], "--calibration.*needs --quantize"),
    (["-q", "3bit", "--calibrate", "--calibration", "c"], "give one"),
    (["-q", "3bit", "--bits-per-weight", "4"], "--bits-per-weight needs --calibrate"),
    (["-q", "3bit", "--save-calibration", "c"], "--save-calibration needs --calibrate"),
    (["-q", "3bit", "--calibrate", ".", "--evaluate", "."], "says nothing: give others"),
    (["-q", "3bit", "--calibrate", "..", "--evaluate", "./"], "says nothing: give others"),
    (["-q", "3bit", "--examples", "4"], "--examples is for"),
    (["-q", "3bit", "--calibrate", "--bits-per-weight", "nan"], "--bits-per-weight must be"),
    (["-q", "3bit", "--calibrate", "--bits-per-weight", "1"], "bits per weight must be 11"),
    (["-q", "3bit", "--calibrate", "--save-calibration", "c.npz"], "takes a .safetensors"),
    (["-q", "3bit", "-o", "."], "current folder"),
    (["-q", "3bit", "--calibrate", "--answers", "demo"], "--answers.*give one"),
    (["-q", "3bit", "--calibrate", "none-such"], "--calibrate: no folder none-such"),
    (["-q", "3bit", "--calibrate", "--examples", "1"], "--examples must be at least 2"),
    (["-q", "3bit", "--calibration", "none-such.safetensors"], "no calibration none-such"),
    (["-q", "auto", "--calibrate"], "auto leaves this model whole"),
    (["--upload", "mine"], "'mine' is not the name of a Hub repository"),
    (["--shard-size", "0"], "--shard-size.*0"),
    (["--shard-size", "-1"], "--shard-size.*-1"),
    (["--shard-size", "nan"], "--shard-size.*nan"),
    (["--shard-size", "inf"], "--shard-size.*inf"),
    (["-q", "7bit"], "no quantization '7bit'; valid names: 2bit, .*mxfp4.*mixed_3_6"),
    (["-q", "Q4_K_XXL"], "no quantization"),
    (["-q", "iq4_xs"], "valid names"),
    (["-q", ""], "valid names"),
    (["-q", "4bit", "--group-size", "48"], "32, 64 or 128"),
    (["-q", "mxfp4", "--group-size", "64"], "mxfp4 has groups of 32"),
    (["-q", "mixed_3_6", "--group-size", "16"], "32, 64 or 128"),
    (["--plan", "--memory", "lots"], "lots"),
    (["-q", "4bit", "--topology", "nowhere.yaml"], "nowhere.yaml"),
    (["-q", "auto", "--memory", "1MB"], "1"),
]


@pytest.mark.parametrize(
    ("options", "words"),
    REFUSED,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_contradict(
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "demo", *options]) == 2
    printed = capsys.readouterr()
    assert re.search(words, printed.err)
    assert "error:" in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--dtype", "int8"], ["--nonsense"], ["--shard-size", "big"]])
def test_options_that_are_none(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", "demo", *options])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen3", "Qwen3"), ("qwen2_5_vl", "Qwen2.5-VL"), ("qwen3_5", "Qwen3.5")],
)
def test_other_families_are_refused_by_name(
    family: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": 8}))
    assert main(["--model", str(source), "-o", str(tmp_path / "target")]) == 1
    assert name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


NAMES = [
    (["-q", "4bit"], "demo-4bit"),
    (["-q", "q4k"], "demo-4bit"),
    (["-q", "AFQ8"], "demo-8bit"),
    (["-q", "4bit", "--group-size", "32"], "demo-4bit-g32"),
    (["-q", "mixed_3_6"], "demo-mixed_3_6"),
    (["-q", "mxfp4", "--quantize-vision"], "demo-mxfp4-vision"),
    (["--to-hf"], "demo-hf"),
    ([], "demo-mlx"),
    (["--dequantize"], "demo-mlx"),
    (["--dtype", "float16"], "demo-float16"),
]


@pytest.mark.parametrize(
    ("options", "name"), NAMES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_name_of_the_output(
    options: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "demo", *options]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert name in capsys.readouterr().out
    assert main(["--model", "demo", *options]) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("quantize", [None, "4bit", "mxfp8"])
def test_json(
    quantize: str | None,
    source: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, target = source("dense72"), tmp_path / "target"
    options = ["-q", quantize] if quantize else []
    assert main(["--model", str(folder), *options, "-o", str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    nbytes = sum(tensor.nbytes for tensor in tensors_of(target).values())
    count = sum(map(math.prod, tiny.hub_shapes(wide_config("dense72")).values()))
    assert (report["source"], report["output"]) == ("dense72", str(target))
    assert (report["nbytes"], report["parameters"]) == (nbytes, count)
    assert report["bits_per_weight"] == pytest.approx(8 * nbytes / count, abs=1e-4)
    assert (report["commit"], report["uploaded"]) == (None, None)
    assert report["seconds"] > 0
    scales = [name for name in tensors_of(target) if name.endswith(".scales")]
    assert report["quantized"] == len(scales)
    assert quantize is None or quantize in report["recipe"]


def test_a_home_and_links(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source as the Hub's cache has it, all links; an output that is named by its home."""
    monkeypatch.setenv("HOME", str(tmp_path / "höme 1"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in source("moe").iterdir():
        (linked / path.name).symlink_to(path)
    assert main(["--model", str(linked), "-q", "4bit", "--output=~/a b"]) == 0
    target = tmp_path / "höme 1" / "a b"
    assert not any(path.is_symlink() for path in target.iterdir())
    convert(source("moe"), tmp_path / "expected", "4bit")
    card = "README.md"
    found, expected = tree(target), tree(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert [name for name in found if name != card and found[name] != expected[name]] == []


def test_what_was_left_whole_is_told(
    source: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dense72` has a vision MLP that no group divides."""
    argv = ["--model", str(source("dense72")), "-q", "4bit", "--quantize-vision"]
    assert main([*argv, "-o", str(tmp_path / "text")]) == 0
    assert "groups of 64 do not divide its width" in capsys.readouterr().out
    assert main([*argv, "-o", str(tmp_path / "json"), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["whole"]
    assert whole["vision_tower.blocks.0.mlp.linear_fc2"].endswith("208")
    tensors = tensors_of(tmp_path / "json")
    assert not {f"{path}.scales" for path in whole} & tensors.keys()
    assert "vision_tower.merger.linear_fc1.scales" in tensors
    assert "vision_tower.pos_embed.scales" not in tensors


def test_the_plan_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "demo", "--plan", "--memory", "16GB", "--context", "512"]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert "bits/weight" in table
    assert "4bit" in table
    assert main([*argv, "--json", "-o", "target"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert not list(tmp_path.iterdir())


def test_auto_prints_its_table_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "demo", "-q", "auto", "--memory", "64GB"]) == 0
    printed = capsys.readouterr()
    assert "bits/weight" in printed.err
    assert "bits/weight" not in printed.out
    (made,) = tmp_path.iterdir()
    assert "quantization" not in read_json(made / "config.json")


@pytest.mark.parametrize(
    ("asked", "became"),
    [("4", "4bit"), ("afq4", "4bit"), ("q4k", "4bit"), ("Q8_0", "8bit"), ("q5_k_m", "5bit")],
)
def test_other_names_are_explained(
    asked: str, became: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real bits per weight."""
    target = tmp_path / "target"
    assert main(["--model", "demo", "-q", asked, "-o", str(target), "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert f"{asked} is {became} here: affine {became[0]}-bit, groups of 64" in printed.err
    assert f"{report['bits_per_weight']:.2f} bits per weight" in printed.err
    convert(CHECKPOINT, tmp_path / "expected", became)
    assert differing(tensors_of(target), tensors_of(tmp_path / "expected")) == []


def test_through_qwen3vl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert cli.main(["convert", "--model", "demo", "-q", "4bit", "-o", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    assert cli.main(["convert", "--model", "demo", "-q", "4bit", "-o", str(target)]) == 2


@pytest.mark.parametrize("quantize", ["4bit", "mixed_3_6", "nvfp4"])
@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_weights_stay_as_they_are_unless_asked(
    variant: str,
    quantize: str,
    source: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A quantized checkpoint stays quantized; `--dequantize` is for the other."""
    convert(source(variant), tmp_path / "packed", quantize)
    packed = tensors_of(tmp_path / "packed")
    for options, name in (([], "kept"), (["--dequantize"], "whole"), (["-q", quantize], "same")):
        argv = ["--model", str(tmp_path / "packed"), *options, "-o", str(tmp_path / name)]
        assert main(argv) == 0
        assert ("quantized already" in capsys.readouterr().err) == (name == "same")
    assert differing(tensors_of(tmp_path / "kept"), packed) == []
    assert differing(tensors_of(tmp_path / "same"), packed) == []
    configs = [read_config(tmp_path / name) for name in ("packed", "kept", "same")]
    settings = [
        {
            path: config.quantization.overrides.get(path, config.quantization.default)
            for path in modules(packed)
        }
        for config in configs
        if config.quantization is not None
    ]
    assert settings[0] == settings[1] == settings[2]
    whole = tensors_of(tmp_path / "whole")
    assert not modules(whole)
    for path in modules(packed):
        own = settings[0][path]
        parts = [packed[f"{path}.{part}"] for part in ("weight", "scales")]
        made = mx.dequantize(
            *parts,
            packed.get(f"{path}.biases"),
            group_size=own.group_size,
            bits=own.bits,
            mode=own.mode,
        )
        assert mx.array_equal(whole[f"{path}.weight"], made), path


def modules(tensors: dict[str, mx.array]) -> set[str]:
    return {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}


def test_uploading_without_a_login_ends_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    target = tmp_path / "a"
    assert main(["--model", "demo", "-q", "4bit", "--upload", "me/mine", "-o", str(target)]) == 1
    assert "hf auth login" in capsys.readouterr().err
    assert not target.exists()


def test_uploading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the output is complete; where it fails, the output stays."""
    sent: list[tuple[Path, str, bool]] = []

    def upload(folder: Path, repo_id: str, *, private: bool) -> str:
        assert (folder / "model.safetensors").exists()
        sent.append((folder, repo_id, private))
        if len(sent) > 1:
            raise HubError("not logged in")
        return "https://huggingface.co/me/mine/commit/1"

    monkeypatch.setattr(hub_upload, "upload", upload)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    argv = ["--model", "demo", "-q", "4bit", "--upload", "me/mine", "--private", "-o"]
    assert main([*argv, str(tmp_path / "a"), "--json"]) == 0
    assert sent == [(tmp_path / "a", "me/mine", True)]
    assert json.loads(capsys.readouterr().out)["uploaded"].endswith("commit/1")
    assert "# me/mine" in (tmp_path / "a" / "README.md").read_text()
    assert main([*argv, str(tmp_path / "b")]) == 1
    assert "not logged in" in capsys.readouterr().err
    assert load(tmp_path / "b").model.config.quantization is not None


def test_the_hubs_layout_is_never_quantized(source: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="whole"):
        convert(source("dense64"), tmp_path / "target", "4bit", to_hf=True)
    assert not list(tmp_path.iterdir())


# Memory.


def write_sparse(folder: Path, config: dict[str, Any], shards: int) -> int:
    """A checkpoint of bfloat16 zeros that takes no room on disk. Returns its size."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = list(tiny.hub_shapes(config).items())
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for key, shape in shapes[number::shards]:
            start, end = end, end + 2 * math.prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / name, 8 + len(text) + end)
        weight_map |= dict.fromkeys(header, name)
        total += end
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


PEAK = """
import resource, sys
from pathlib import Path
from qwen3vl_mlx import stream
from qwen3vl_mlx.convert import main
from qwen3vl_mlx.jsonfiles import read_generation_config
stream.BLOCK_BYTES = int(sys.argv[1])
status = main(sys.argv[2:])
proc = Path("/proc/self/status")
if proc.exists():  # Linux counts what the parent held before this program began
    peak = int(proc.read_text().split("VmHWM:")[1].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("PEAK", peak)
sys.exit(status)
"""


@pytest.mark.parametrize("options", [["-q", "4bit"], []], ids=["4bit", "whole"])
def test_peak_memory_does_not_grow_with_the_model(options: list[str], tmp_path: Path) -> None:
    """The same widths with 3 layers and with 32: 25 and 215 MB, of experts to turn mostly."""
    config = wide_config("moe", hidden_size=256, moe_intermediate_size=512, vocab_size=1024)
    peaks, sizes = [], []
    for layers in (3, 32):
        config["text_config"]["num_hidden_layers"] = layers
        source, target = tmp_path / f"{layers}", tmp_path / f"{layers}-out"
        sizes.append(write_sparse(source, config, shards=3))
        argv = ["--model", str(source), "-o", str(target), "--shard-size", "0.05", *options]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(2**20), *argv],
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        peaks.append(int(done.stdout.split("PEAK")[1]))
    assert sizes[1] - sizes[0] > 150e6
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_peak_memory_of_quantized_loading(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result, twice its largest tensor, and some blocks."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", block := 2**20)
    config = wide_config(variant, hidden_size=512, intermediate_size=1024, vocab_size=8192)
    if variant == "moe":
        config["text_config"]["moe_intermediate_size"] = 512
    config["text_config"]["num_hidden_layers"] = 6 if variant == "moe" else 20
    total = write_sparse(tmp_path / "source", config, shards=2)
    chosen = assignment(tmp_path / "source", "4bit")
    assert chosen is not None
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_quantized(tmp_path / "source", chosen.modules)
    peak = mx.get_peak_memory() - before
    weights = parameters(model)
    held = sum(tensor.nbytes for tensor in weights.values())
    largest = max(2 * math.prod(shape) for shape in tiny.hub_shapes(config).values())
    assert total > 80e6
    assert held < total / 2
    assert peak < held + 2 * largest + 4 * block
    assert peak < (held + total) / 2  # half of the file beside the model would be seen


def test_a_wide_recipe_object(source: Callable[[str], Path], tmp_path: Path) -> None:
    """The settings of the assignment, not names, decide."""
    path = "language_model.model.layers.0.self_attn.q_proj"
    only = Assignment("one", Quantization(32, 5), {path: Quantization(32, 5)})
    report = convert(source("moe"), tmp_path / "target", only)
    assert modules(tensors_of(tmp_path / "target")) == {path}
    assert report.quantized == 1


def test_auto_keeps_what_is_quantized_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "demo", "-q", "4bit", "-o", str(tmp_path / "a")]) == 0
    assert main(["--model", str(tmp_path / "a"), "-q", "auto", "-o", str(tmp_path / "b")]) == 0
    names = ("a", "b")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in names)
    assert one == other
    assert "errors stay" not in capsys.readouterr().err


def test_a_plan_that_fits_nowhere_says_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(__file__).parent / "data" / "checkpoints" / "Qwen3-VL-235B-A22B-Instruct"
    assert main(["--model", str(folder), "--plan", "--memory", "32GB"]) == 2
    printed = capsys.readouterr()
    assert "does not fit" in printed.out
    assert "even 2bit needs" in printed.err
