"""Every layout of a checkpoint converts to the tensors that plain numpy makes of it, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import fp8
import mlx.core as mx
import numpy as np
import pytest
import stages
import tiny
from converting import (
    convert,
    differing,
    parameters,
    read_json,
    tensors_of,
    write_source,
)
from layouts import (
    AFFINE4,
    AFFINE8,
    Config,
    Tensors,
    as_hub,
    as_mlx,
    as_resaved,
    is_text,
    quantize,
    split,
    uniform,
    wide,
    wide_config,
    write,
)

from qwen3vl_mlx import stream
from qwen3vl_mlx.api import load
from qwen3vl_mlx.errors import Qwen3VLError, WeightsError
from qwen3vl_mlx.layout import dequantize_fp8
from qwen3vl_mlx.loading import load_model
from qwen3vl_mlx.models.config import Quantization
from qwen3vl_mlx.quant.apply import Assignment

Source: TypeAlias = "Callable[[Config, Tensors], tuple[Config, fp8.Stored, Tensors]]"
BLOCK_BYTES = 9000  # some rows: no divisor of tensors, nor of FP8's 128


def bigger(variant: str) -> tuple[Config, Tensors]:
    """Widths of one block of FP8 and a half; gate and up of an expert share a block."""
    config = wide_config(variant, hidden_size=192, intermediate_size=320, vocab_size=256)
    if variant == "moe":
        config["text_config"]["moe_intermediate_size"] = 160
    config["text_config"]["num_hidden_layers"] = 2
    odd = {"hidden_size": 40, "intermediate_size": 52}
    config["vision_config"] |= {"depth": 2, "deepstack_visual_indexes": [0, 1], "patch_size": 4}
    config["vision_config"] |= (
        odd if variant == "dense72" else {"hidden_size": 32, "intermediate_size": 64}
    )
    return config, tiny.tiny_weights(config)


def plain(layout: Any) -> Source:
    def source(config: Config, tensors: Tensors) -> tuple[Config, fp8.Stored, Tensors]:
        written, renamed = layout(config, tensors)
        return written, renamed, tensors

    return source


def in_fp8(layout: Any) -> Source:
    """The decoder's projections in FP8, in the blocks of the layout they are stored in."""

    def source(config: Config, tensors: Tensors) -> tuple[Config, fp8.Stored, Tensors]:
        written, renamed = layout(config, tensors)
        stored, whole = fp8.to_fp8(renamed, fp8.in_decoder)
        back = {name: whole[name] for name in whole}
        if layout is as_resaved:
            back = {n: t.swapaxes(1, 2) if ".experts." in n else t for n, t in whole.items()}
        if layout is one_by_one:
            back = fused(whole)
        return {**written, "quantization_config": fp8.CONFIG}, stored, back

    return source


def one_by_one(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Experts as modules of their own, (out, in) each, in an order that helps nobody."""
    split_up: dict[str, Any] = {}
    for name, tensor in tensors.items():
        mlp, _, kind = name.rpartition(".experts.")
        if not mlp:
            split_up[name] = tensor
            continue
        for i in reversed(range(len(tensor))):
            parts = {"down_proj": tensor[i].T}
            if kind == "gate_up_proj":
                half = tensor.shape[2] // 2
                parts = {"up_proj": tensor[i, :, half:].T, "gate_proj": tensor[i, :, :half].T}
            split_up |= {f"{mlp}.experts.{i}.{k}.weight": part for k, part in parts.items()}
    return config, split_up


def fused(tensors: Tensors) -> Tensors:
    """`one_by_one` undone."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    mlps = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for mlp in mlps:
        kinds = {
            kind: mx.stack(
                [mx.array(tensors[f"{mlp}.experts.{i}.{kind}_proj.weight"]).T for i in range(8)]
            )
            for kind in ("gate", "up", "down")
        }
        found[f"{mlp}.experts.gate_up_proj"] = mx.concatenate([kinds["gate"], kinds["up"]], axis=2)
        found[f"{mlp}.experts.down_proj"] = kinds["down"]
    return found


SOURCES: dict[str, Source] = {
    "hub": plain(as_hub),
    "transformers 5": plain(as_resaved),
    "mlx": plain(as_mlx),
    "one by one": plain(one_by_one),
    "FP8": in_fp8(as_hub),
    "FP8, transformers 5": in_fp8(as_resaved),
    "FP8, one by one": in_fp8(one_by_one),
}


def write_layout(folder: Path, variant: str, name: str, count: int) -> tuple[Path, Tensors]:
    """A checkpoint, and the MLX tensors it stands for."""
    config, tensors = bigger(variant)
    written, stored, whole = SOURCES[name](config, tensors)
    return fp8.write(folder, written, *split(stored, count)), as_mlx(config, whole)[1]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_layout_becomes_the_same_tensors(
    variant: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = write_layout(tmp_path / "source", variant, name, 3)
    convert(source, tmp_path / "mlx")
    assert differing(tensors_of(tmp_path / "mlx"), expected) == []
    monkeypatch.setattr(stream, "BLOCK_BYTES", BLOCK_BYTES)
    convert(source, tmp_path / "small blocks")
    assert differing(tensors_of(tmp_path / "small blocks"), expected) == []
    assert differing(parameters(load_model(source)), expected) == []


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_one_file_or_many(variant: str, tmp_path: Path) -> None:
    config, tensors = bigger(variant)
    _, expected = as_mlx(config, tensors)
    source = write(tmp_path / "source", config, tensors)
    for size, count in ((2**40, 1), (500_000, None), (1, None)):
        target = tmp_path / str(size)
        convert(source, target, shard_bytes=size)
        assert differing(tensors_of(target), expected) == []
        names = sorted(path.name for path in target.glob("*.safetensors"))
        total = len(names)
        if count == 1:
            assert names == ["model.safetensors"]
            continue
        assert total > 3
        assert names == [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
        largest = max(np.prod(shape) * 4 for shape in tiny.hub_shapes(config).values())
        assert all((target / shard).stat().st_size < max(size, largest) + 20_000 for shard in names)


@pytest.mark.parametrize("name", ["hub", "FP8", "FP8, one by one"])
@pytest.mark.parametrize("variant", ["dense72", "moe"])
def test_quantizing_any_layout_is_quantizing_the_oracle(
    variant: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the type it is stored in; in blocks or whole."""
    source, whole = write_layout(tmp_path / "source", variant, name, 2)
    expected, _ = quantize(whole, uniform(AFFINE4))
    settings = Quantization(32, 4)
    paths = [key.removesuffix(".scales") for key in expected if key.endswith(".scales")]
    chosen = Assignment("4", settings, dict.fromkeys(paths, settings))
    for size in (BLOCK_BYTES, 2**25):
        monkeypatch.setattr(stream, "BLOCK_BYTES", size)
        convert(source, tmp_path / str(size), chosen)
        assert differing(tensors_of(tmp_path / str(size)), expected) == []


# Sources that MLX quantized.


def mixed(path: str) -> Any:
    if path.endswith((".mlp.gate", "embed_tokens", "layers.0.mlp.down_proj")):
        return AFFINE8
    return AFFINE4 if is_text(path) and not path.endswith("layers.1.self_attn.q_proj") else None


def with_vision(path: str) -> Any:
    return None if path.endswith(("patch_embed.proj", "norm")) else AFFINE4


def fixed(mode: str, group: int, bits: int) -> dict[str, Any]:
    return {"group_size": group, "bits": bits, "mode": mode}


MODES = {
    "2 bits": fixed("affine", 32, 2),
    "3 bits": fixed("affine", 32, 3),
    "5 bits": fixed("affine", 32, 5),
    "6 bits": fixed("affine", 32, 6),
    "mxfp4": fixed("mxfp4", 32, 4),
    "mxfp8": fixed("mxfp8", 32, 8),
    "nvfp4": fixed("nvfp4", 16, 4),
}
QUANTIZED: dict[str, tuple[Callable[[str], Any], dict[str, Any]]] = {
    "mixed": (mixed, AFFINE4),
    "vision too": (with_vision, AFFINE4),
} | {name: (uniform(settings), settings) for name, settings in MODES.items()}


def write_quantized(folder: Path, variant: str, name: str) -> tuple[Path, Tensors, Tensors]:
    """A checkpoint that MLX quantized in bfloat16, its tensors, and the same made whole."""
    config, tensors = as_mlx(*bigger(variant))
    chosen, default = QUANTIZED[name]
    stored = {key: mx.array(tensor).astype(mx.bfloat16) for key, tensor in tensors.items()}
    packed, whole = quantize(stored, chosen)
    section: dict[str, Any] = dict(default)
    for key in (key.removesuffix(".scales") for key in packed if key.endswith(".scales")):
        if chosen(key) != default:
            section[key] = chosen(key)
    keys = ("quantization", "quantization_config")
    return write(folder, config | dict.fromkeys(keys, section), *split(packed, 2)), packed, whole


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_quantized_sources_are_made_whole(
    variant: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, packed, whole = write_quantized(tmp_path / "source", variant, name)
    assert len(packed) > len(whole)
    for size in (BLOCK_BYTES, 2**25):
        monkeypatch.setattr(stream, "BLOCK_BYTES", size)
        convert(source, tmp_path / str(size))
        assert differing(tensors_of(tmp_path / str(size)), whole) == []
    config = read_json(tmp_path / str(size) / "config.json")
    assert not {"quantization", "quantization_config"} & config.keys()
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["mixed", "6 bits", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_quantized_sources_are_quantized_again(variant: str, name: str, tmp_path: Path) -> None:
    """From what their bits stand for; what has the settings asked for stays as it is."""
    source, packed, whole = write_quantized(tmp_path / "source", variant, name)
    kept = "language_model.model.layers.1.self_attn.v_proj"
    settings = Quantization(32, 3)
    same = Quantization(**QUANTIZED[name][0](kept))
    paths = [key.removesuffix(".scales") for key in packed if key.endswith(".scales")]
    chosen = Assignment("3", settings, {**dict.fromkeys(paths, settings), kept: same})
    convert(source, tmp_path / "again", chosen)
    again = fixed("affine", 32, 3)
    expected, _ = quantize(whole, lambda path: again if path in paths else None)
    parts = [f"{kept}.{part}" for part in ("weight", "scales", "biases")]
    expected = {key: tensor for key, tensor in expected.items() if key not in parts}
    expected |= {key: packed[key] for key in parts if key in packed}
    assert differing(tensors_of(tmp_path / "again"), expected) == []


# FP8's numbers.


def test_fp8_values() -> None:
    """All codes, the scales of all blocks, and rows that start within one."""
    codes = np.arange(256, dtype=np.uint8)
    got = np.array(mx.from_fp8(mx.array(codes), mx.float32))
    assert np.array_equal(got, fp8.VALUES, equal_nan=True)
    tensor = np.random.RandomState(0).standard_normal((3, 300, 200)).astype(np.float32)
    stored, scales = fp8.encode(tensor)
    assert scales.shape == (3, 3, 2)
    assert len(np.unique(scales)) == scales.size
    expected = fp8.decode(stored, scales)
    assert np.abs(np.array(expected.astype(mx.float32)) - tensor).max() < 0.2
    given = mx.array(stored.bytes), mx.array(scales)
    assert mx.array_equal(dequantize_fp8(*given), expected)
    assert mx.array_equal(dequantize_fp8(given[0][:, 77:], given[1], 77), expected[:, 77:])


@pytest.mark.parity
def test_fp8_values_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert np.array_equal(codes.float().numpy(), fp8.VALUES, equal_nan=True)


# Back to the Hub.


@pytest.mark.parametrize(
    "name", ["hub", "transformers 5", "mlx", "one by one", "FP8", "FP8, one by one"]
)
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_the_hubs_layout_comes_back(
    variant: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, by way of MLX files or directly, in blocks or whole."""
    config, tensors = bigger(variant)
    written, stored, whole = SOURCES[name](config, tensors)
    source = fp8.write(tmp_path / "source", written, *split(stored, 3))
    convert(source, tmp_path / "mlx")
    for folder, size in ((source, 2**25), (source, BLOCK_BYTES), (tmp_path / "mlx", BLOCK_BYTES)):
        monkeypatch.setattr(stream, "BLOCK_BYTES", size)
        target = tmp_path / f"{folder.name} {size}"
        convert(folder, target, to_hf=True)
        assert differing(tensors_of(target), whole) == []
        for path in target.glob("*.safetensors"):
            assert mx.load(str(path), return_metadata=True)[1] == {"format": "pt"}
        assert "for transformers" in (target / "README.md").read_text()
        back = read_json(target / "config.json")
        assert "quantization_config" not in back
        text = {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"]}
        if "dtype" in back:  # FP8 leaves two types
            text["dtype"] = "float32"
        assert back == {**config, "text_config": text} | (
            {"dtype": "float32"} if "dtype" in back else {}
        )


@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_a_quantized_model_goes_back_to_the_hub(variant: str, tmp_path: Path) -> None:
    source, _, whole = write_quantized(tmp_path / "source", variant, "mixed")
    convert(source, tmp_path / "hub", to_hf=True)
    tensors = tensors_of(tmp_path / "hub")
    assert tensors.keys() == tiny.hub_shapes(bigger(variant)[0]).keys()
    assert differing(as_mlx(bigger(variant)[0], tensors)[1], whole) == []


@pytest.mark.parity
@pytest.mark.parametrize("road", ["whole", "4bit", "mxfp4", "FP8"])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_transformers_reads_it_to_the_same_logits(variant: str, road: str, tmp_path: Path) -> None:
    """What a checkpoint of ours, or one in FP8, says here, its way back says there."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import hf

    source = write_source(tmp_path / "source", variant)
    if road == "FP8":
        config, tensors = wide(variant)
        stored, _ = fp8.to_fp8(tensors, fp8.in_decoder)
        fp8.write(source, {**config, "quantization_config": fp8.CONFIG}, *split(stored, 2))
    else:
        convert(source, tmp_path / "mlx", None if road == "whole" else road)
        source = tmp_path / "mlx"
    convert(source, tmp_path / "hub", to_hf=True)
    ours, theirs = load(source), hf.load_hf(tmp_path / "hub")
    scene = stages.make_scene("between")
    prompt = stages.make_prompt(scene, ours.processor)
    inputs = hf.model_inputs(theirs, tmp_path / "hub", [scene], [prompt.token_ids])
    expected = hf.run(theirs, inputs)[0]
    assert stages.beyond_tolerance(stages.stages(ours.model, prompt), expected) == {}


# Tensors that do not fit.

LAYER = "model.language_model.layers.1"
Q = f"{LAYER}.self_attn.q_proj.weight"
EXPERT = f"{LAYER}.mlp.experts.3.up_proj.weight"
FUSED = f"{LAYER}.mlp.experts.gate_up_proj"


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def resized(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: tensors[name][..., :1]})


def retyped(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: mx.array(tensors[name]).astype(mx.bfloat16)})


def surplus(name: str, like: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: tensors[like]})


NORM, OURS = "model.language_model.norm", "language_model.model.norm"
SWITCH = f"{LAYER}.mlp.switch_mlp.up_proj.weight"
DAMAGE: dict[str, tuple[str, str, Callable[[dict[str, Any]], Any], str]] = {
    "no scales": ("dense64", "FP8", without(f"{Q}_scale_inv"), "self_attn.q_proj.weight"),
    "scales of nothing": ("dense64", "FP8", without(Q), f"{Q}_scale_inv"),
    "scales misshapen": ("dense64", "FP8", resized(f"{Q}_scale_inv"), Q),
    "experts' scales misshapen": ("moe", "FP8", resized(f"{FUSED}_scale_inv"), FUSED),
    "no experts' scales": ("moe", "FP8", without(f"{FUSED}_scale_inv"), "layers.1.mlp.switch_mlp"),
    "an expert missing": ("moe", "one by one", without(EXPERT), "up_proj.* 3"),
    "an expert too many": ("moe", "one by one", surplus(EXPERT.replace("3", "8"), EXPERT), "8"),
    "an expert misshapen": ("moe", "one by one", resized(EXPERT), "up_proj"),
    "experts of two types": ("moe", "one by one", retyped(EXPERT), "up_proj.*type"),
    "one expert's scales": ("moe", "FP8, one by one", without(f"{EXPERT}_scale_inv"), "up_proj"),
    "bad expert's scales": ("moe", "FP8, one by one", resized(f"{EXPERT}_scale_inv"), EXPERT),
    "half of a fused pair": ("moe", "hub", without(FUSED), "gate_up_proj is missing"),
    "fused and not": ("moe", "hub", surplus(SWITCH, FUSED), "switch_mlp.up_proj.*twice"),
    "experts of a dense model": ("dense64", "hub", surplus(FUSED, Q), "no experts"),
    "twice": ("dense64", "hub", surplus(f"{OURS}.weight", f"{NORM}.weight"), "norm.*twice"),
    "unknown": ("dense64", "hub", surplus(f"{NORM}.bias", f"{NORM}.weight"), "norm.bias"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_tensors_that_do_not_fit(name: str, tmp_path: Path) -> None:
    variant, layout, damage, words = DAMAGE[name]
    config, tensors = bigger(variant)
    written, stored, _ = SOURCES[layout](config, tensors)
    copy = dict(stored)
    damage(copy)
    source = fp8.write(tmp_path / "source", written, copy)
    with pytest.raises(WeightsError, match=words):
        convert(source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


BESIDE = "language_model.model.layers.0.self_attn.q_proj"
PACKED_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "scales missing": (without(f"{BESIDE}.scales"), f"{BESIDE}"),
    "biases missing": (without(f"{BESIDE}.biases"), f"{BESIDE}"),
    "weight missing": (without(f"{BESIDE}.weight"), f"{BESIDE}.weight is missing"),
    "scales misshapen": (resized(f"{BESIDE}.scales"), f"{BESIDE}.*scales"),
    "a part too many": (surplus(f"{BESIDE}.g_idx", f"{BESIDE}.scales"), f"{BESIDE}.g_idx"),
}


@pytest.mark.parametrize("name", PACKED_DAMAGE)
@pytest.mark.parametrize("again", [False, True], ids=["whole", "kept"])
def test_packed_tensors_that_do_not_fit(name: str, again: bool, tmp_path: Path) -> None:
    """Whether the module is made whole or passed on."""
    damage, words = PACKED_DAMAGE[name]
    source, packed, _ = write_quantized(tmp_path / "source", "dense64", "mixed")
    paths = [key.removesuffix(".scales") for key in packed if key.endswith(".scales")]
    copy = dict(packed)
    damage(copy)
    write(tmp_path / "source", read_json(source / "config.json"), *split(copy, 2))
    settings = {path: Quantization(**mixed(path)) for path in paths}
    chosen = Assignment("kept", Quantization(32, 4), settings) if again else None
    with pytest.raises(Qwen3VLError, match=words):
        convert(source, tmp_path / "target", chosen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
