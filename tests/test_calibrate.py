"""Calibration: scales that change nothing, rounding that costs less, and bits where they matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import layouts
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from passes import forward
from safetensors.numpy import save_file

from qwen3vl_mlx import Qwen3VL, load
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.config import Quantization, read_config
from qwen3vl_mlx.quant import apply, recipes
from qwen3vl_mlx.quant.calibrate import Calibration, calibrate
from qwen3vl_mlx.quant.examples import (
    CALIBRATION_SEED,
    EVALUATION_SEED,
    Example,
    demo_examples,
)
from qwen3vl_mlx.quant.rounding import (
    Sensitivity,
    block_width,
    pack_codes,
    round_rows,
    sensitivity,
)
from qwen3vl_mlx.quant.sensitivity import Option, Part, allocate

SETTINGS = (
    *(Quantization(64, bits) for bits in recipes.AFFINE_BITS),
    Quantization(32, 4),
    Quantization(128, 4),
    *(Quantization(*shape, mode) for mode, shape in recipes.FIXED_MODES.items()),
)
Q3 = Quantization(64, 3)
Widths = dict[str, int]

# -- rounding ----------------------------------------------------------------------------------


def weights(rows: int = 40, width: int = 256) -> mx.array:
    draws = np.random.default_rng(1).standard_normal((rows, width), np.float32)
    return mx.array(draws).astype(mx.bfloat16)


def moments(
    width: int = 256, block: int = 256
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Of inputs whose channels go together and differ in size."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((4 * width, width)) @ (
        np.eye(width) + 0.5 * rng.standard_normal((width, width)) / width**0.5
    )
    x *= np.exp(0.5 * rng.standard_normal(width))
    parts = x.reshape(len(x), -1, block)
    return np.einsum("tni,tnj->nij", parts, parts) / len(x)


def cost(packed: Mapping[str, mx.array], rows: mx.array, settings: Quantization) -> float:
    """The mean squares that rounding adds to the outputs."""
    error = np.array(apply.unpack(packed, settings, mx.float32) - rows.astype(mx.float32))
    return float(np.einsum("ri,ij,rj->", error, moments()[0], error))


@pytest.mark.parametrize("settings", SETTINGS, ids=recipes.preset_name)
def test_rounding_keeps_the_format_and_costs_less(settings: Quantization) -> None:
    rows, known = weights(), sensitivity(moments(), 0.01)
    plain = apply.pack(rows, settings)
    ours = round_rows(rows, settings, mx.bfloat16, known)
    alone = round_rows(rows, settings, mx.bfloat16, replace(known, feedback=None))
    for packed in (ours, alone):
        assert {key: (part.shape, part.dtype) for key, part in packed.items()} == {
            key: (part.shape, part.dtype) for key, part in plain.items()
        }
    assert cost(ours, rows, settings) < 0.8 * cost(plain, rows, settings)
    assert cost(ours, rows, settings) < 0.9 * cost(alone, rows, settings)


@pytest.mark.parametrize("mode", recipes.FIXED_MODES)
def test_small_floats_stay_as_they_are(mode: str) -> None:
    settings = Quantization(*recipes.FIXED_MODES[mode], mode)
    stored = apply.unpack(apply.pack(weights(), settings), settings, mx.float32)
    packed = round_rows(stored, settings, mx.bfloat16, sensitivity(moments(), 0.01))
    assert mx.array_equal(apply.unpack(packed, settings, mx.float32), stored)


@pytest.mark.parametrize("bits", recipes.AFFINE_BITS)
def test_codes_are_packed_as_mlx_reads_them(bits: int) -> None:
    codes = mx.array(np.random.default_rng(5).integers(0, 2**bits, (3, 64)).astype(np.float32))
    ones, none = mx.ones((3, 1)), mx.zeros((3, 1))
    words = pack_codes(codes, bits)
    assert mx.array_equal(mx.dequantize(words, ones, none, group_size=64, bits=bits), codes)


@pytest.mark.parametrize("settings", SETTINGS, ids=recipes.preset_name)
def test_equal_weights_and_zeros(settings: Quantization) -> None:
    rows = mx.concatenate([mx.zeros((1, 128)), mx.full((1, 128), 0.5)])
    known = Sensitivity(mx.ones((1, 128)))
    packed = round_rows(rows, settings, mx.float32, known)
    got = apply.unpack(packed, settings, mx.float32)
    np.testing.assert_allclose(np.array(got), np.array(rows), atol=1e-6)


@pytest.mark.parametrize(
    ("width", "limit", "expected"),
    [(2048, 512, 512), (9728, 512, 512), (9728, 300, 256), (192, 128, 64), (96, 512, 96),
     (384, 4096, 384), (128, 64, 128), (40, 512, 40)],
)  # fmt: skip
def test_blocks_divide_the_width_and_hold_whole_groups(
    width: int, limit: int, expected: int
) -> None:
    assert block_width(width, limit) == expected


# -- allocation --------------------------------------------------------------------------------


def parts(count: int = 12) -> list[Part]:
    rng = np.random.default_rng(3)
    made = []
    for index in range(count):
        size, loss = int(rng.integers(100, 5000)), float(np.exp(3 * rng.standard_normal()))
        options = tuple(
            Option(Quantization(64, bits), size * bits, loss * 4.0**-bits)
            for bits in recipes.AFFINE_BITS
        )
        made.append(Part((str(index),), options))
    return made


def test_more_bytes_never_cost_more_and_are_never_overspent() -> None:
    least = sum(min(option.nbytes for option in part.options) for part in parts())
    most = sum(max(option.nbytes for option in part.options) for part in parts())
    losses = []
    for budget in np.linspace(least, most, 30).astype(int):
        chosen = allocate(parts(), int(budget))
        assert sum(option.nbytes for option in chosen) <= budget
        losses.append(sum(option.loss for option in chosen))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.01 * losses[0]


def test_bits_go_where_the_loss_is() -> None:
    budget = sum(part.options[2].nbytes for part in parts())  # four bits each
    even = sum(part.options[2].loss for part in parts())
    assert sum(option.loss for option in allocate(parts(), budget)) < 0.5 * even


def test_a_target_below_the_smallest_is_refused() -> None:
    with pytest.raises(InputError, match="at least"):
        allocate(parts(), 100)


# -- whole models ------------------------------------------------------------------------------

VARIANTS: dict[str, Widths] = {
    "dense64": {},
    "dense72": {},
    "moe": {"moe_intermediate_size": 64},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`wide(variant)`: a tiny checkpoint whose decoder takes groups of 64."""

    def write(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("wide") / variant
        tiny.write_tiny(folder, variant)
        config = layouts.wide_config(variant, **VARIANTS[variant])
        layouts.write(folder, config)
        save_file(
            tiny.tiny_weights(config), folder / "model.safetensors", metadata={"format": "pt"}
        )
        return folder

    return cache(write)


@pytest.fixture(scope="module")
def calibrated(wide: Callable[[str], Path]) -> Callable[[str], Calibration]:
    def make(variant: str) -> Calibration:
        folder = wide(variant)
        return calibrate(folder, examples(load(folder), 4), uniform(folder, Q3))

    return cache(make)


def examples(model: Qwen3VL, count: int, seed: int = CALIBRATION_SEED) -> list[Example]:
    return demo_examples(model.processor, count, first_seed=seed)


def uniform(folder: Path, settings: Quantization) -> Mapping[str, Quantization]:
    shapes = apply.quantizable_shapes(read_config(folder))
    return apply.assign(recipes.uniform_recipe(settings), shapes).modules


def parameters(model: Qwen3VL) -> dict[str, mx.array]:
    flat = tree_flatten(model.model.parameters(), destination={})
    assert isinstance(flat, dict)
    return flat


def predictions(model: Qwen3VL, asked: list[Example]) -> list[mx.array]:
    """Log-probabilities after each of an example's tokens, (L, vocab_size)."""
    found = []
    for example in asked:
        (hidden,) = forward(model.model, example.prompt)
        logits = model.model.language_model.logits(hidden[0])
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    mx.eval(found)
    return found


def with_weights(folder: Path, changed: Mapping[str, mx.array]) -> Qwen3VL:
    model = load(folder)
    model.model.load_weights(list(changed.items()), strict=False)
    return model


def divergence(expected: list[mx.array], got: list[mx.array]) -> float:
    kl = [(mx.exp(p) * (p - q)).sum(axis=-1) for p, q in zip(expected, got, strict=True)]
    return float(mx.concatenate(kl).mean())


@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_alone_change_nothing(
    variant: str, wide: Callable[[str], Path], calibrated: Callable[[str], Calibration]
) -> None:
    folder, found = wide(variant), calibrated(variant)
    model = load(folder)
    asked = examples(model, 2, EVALUATION_SEED)
    expected = predictions(model, asked)
    whole = parameters(model)
    applied = {name: found.apply(name, rows, 0) for name, rows in whole.items()}
    changed = {name for name in whole if not mx.array_equal(whole[name], applied[name])}
    layer = "language_model.model.layers.0."
    assert {f"{layer}self_attn.v_proj.weight", f"{layer}input_layernorm.weight"} <= changed
    assert not any("embed_tokens" in name or "vision" in name for name in changed)
    for got, want in zip(predictions(with_weights(folder, applied), asked), expected, strict=True):
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_of_rows_are_the_whole(
    variant: str, wide: Callable[[str], Path], calibrated: Callable[[str], Calibration]
) -> None:
    found, modules = calibrated(variant), uniform(wide(variant), Q3)
    for name, rows in parameters(load(wide(variant))).items():
        step = max(1, rows.shape[0] // 3)
        starts = range(0, rows.shape[0], step)
        applied = found.apply(name, rows, 0)
        blocks = [found.apply(name, rows[start : start + step], start) for start in starts]
        assert mx.array_equal(mx.concatenate(blocks), applied), name
        if (path := name.removesuffix(".weight")) in modules:
            whole = found.pack(path, applied, Q3, 0)
            packed = [
                found.pack(path, block, Q3, start)
                for start, block in zip(starts, blocks, strict=True)
            ]
            for key, part in whole.items():
                assert mx.array_equal(mx.concatenate([p[key] for p in packed]), part), (name, key)


@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_a_saved_calibration_works_alike(
    variant: str,
    tmp_path: Path,
    wide: Callable[[str], Path],
    calibrated: Callable[[str], Calibration],
) -> None:
    found = calibrated(variant)
    found = replace(found, overrides={"language_model.lm_head": Quantization(32, 4, "mxfp4")})
    found.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert again.overrides == found.overrides
    modules = uniform(wide(variant), Q3)
    again.check(read_config(wide(variant)))
    for name, rows in parameters(load(wide(variant))).items():
        assert mx.array_equal(again.apply(name, rows, 0), found.apply(name, rows, 0)), name
        if (path := name.removesuffix(".weight")) in modules:
            got, want = again.pack(path, rows, Q3, 0), found.pack(path, rows, Q3, 0)
            assert all(mx.array_equal(got[key], want[key]) for key in want), name


def test_another_model_is_refused(
    wide: Callable[[str], Path], calibrated: Callable[[str], Calibration]
) -> None:
    found = calibrated("dense64")
    with pytest.raises(InputError, match=r"hidden_size is 64, not 128"):
        found.check(read_config(CHECKPOINT))
    with pytest.raises(InputError, match="num_experts"):
        found.check(read_config(wide("moe")))
    norm = parameters(load(wide("dense64")))["language_model.model.norm.weight"]
    with pytest.raises(InputError, match="other weights"):
        found.apply("language_model.model.norm.weight", norm + 1, 0)
    path = "language_model.model.layers.0.mlp.down_proj"
    with pytest.raises(InputError, match="64 wide, not 128"):
        found.apply(f"{path}.weight", mx.zeros((4, 64)), 0)
    with pytest.raises(InputError, match="64 wide, not 128"):
        found.pack(path, mx.zeros((4, 64)), Q3, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.safetensors", None, "no calibration"),
        ("c.safetensors", b"{}", "not a calibration"),
        ("c.json", b"{}", ".safetensors file"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Calibration.load(tmp_path / name)


def test_a_calibration_needs_examples(wide: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="at least one example"):
        calibrate(wide("dense64"), [], {})


@pytest.mark.parametrize("variant", ["dense72", "moe"])
def test_mixed_precision_meets_its_target(variant: str, wide: Callable[[str], Path]) -> None:
    folder = wide(variant)
    config = read_config(folder)
    modules = uniform(folder, Quantization(32, 4, "mxfp4"))
    target = apply.weigh(apply.parameter_shapes(config), modules, 4).bits_per_weight  # float32
    found = calibrate(
        folder, examples(load(folder), 2), modules, target_bits_per_weight=target, scales=False
    )
    assert found.overrides.keys() == modules.keys()
    reached = apply.weigh(apply.parameter_shapes(config), found.overrides, 4).bits_per_weight
    assert target - 0.2 < reached <= target
    assert all(
        chosen.bits >= recipes.ROUTER_BITS
        for path, chosen in found.overrides.items()
        if path.endswith(".mlp.gate")
    )
    with pytest.raises(InputError, match="bits per weight must be"):
        calibrate(folder, examples(load(folder), 2), modules, target_bits_per_weight=1.0)


# -- the demo: what it is for ------------------------------------------------------------------


def quantized(
    demo: Qwen3VL, modules: Mapping[str, Quantization], found: Calibration | None = None
) -> Qwen3VL:
    """The demo with weights as a converted checkpoint holds them."""
    changed = {}
    for name, rows in parameters(demo).items():
        scaled = rows if found is None else found.apply(name, rows, 0)
        if settings := modules.get(name.removesuffix(".weight")):
            path = name.removesuffix(".weight")
            parts = (
                apply.pack(rows, settings)
                if found is None
                else found.pack(path, scaled, settings, 0)
            )
            scaled = apply.unpack(parts, settings, mx.float32)
        changed[name] = scaled
    return with_weights(CHECKPOINT, changed)


@pytest.fixture(scope="module")
def held_out(demo: Qwen3VL) -> tuple[list[Example], list[mx.array]]:
    asked = examples(demo, 12, EVALUATION_SEED)
    return asked, predictions(demo, asked)


def bits_per_weight(modules: Mapping[str, Quantization]) -> float:
    shapes = apply.parameter_shapes(read_config(CHECKPOINT))
    return apply.weigh(shapes, modules).bits_per_weight


def test_three_bits_of_the_demo_lose_far_less(
    demo: Qwen3VL, held_out: tuple[list[Example], list[mx.array]]
) -> None:
    asked, expected = held_out
    modules = uniform(CHECKPOINT, Q3)
    target = bits_per_weight(modules)
    known = examples(demo, 10)
    found = calibrate(CHECKPOINT, known, modules, scales=False)
    mixed = calibrate(CHECKPOINT, known, modules, target_bits_per_weight=target, scales=False)
    chosen = {**modules, **mixed.overrides}
    assert target - 0.01 < bits_per_weight(chosen) <= target
    assert len(set(chosen.values())) > 2

    def loss(modules: Mapping[str, Quantization], calibration: Calibration | None) -> float:
        return divergence(expected, predictions(quantized(demo, modules, calibration), asked))

    plain, same, best = loss(modules, None), loss(modules, found), loss(chosen, mixed)
    assert same < 0.75 * plain
    assert best < 0.3 * plain
    assert loss(modules, shuffled(found)) > 1.4 * same


def shuffled(found: Calibration) -> Calibration:
    """The same numbers for other channels: what rounding costs is then told wrongly."""
    rng = np.random.default_rng(4)

    def mix(array: mx.array) -> mx.array:
        order = rng.permutation(array.shape[-1])
        return array[..., mx.array(order)]

    return replace(
        found,
        importance={site: mix(array) for site, array in found.importance.items()},
        feedback={site: mix(array) for site, array in found.feedback.items()},
    )
