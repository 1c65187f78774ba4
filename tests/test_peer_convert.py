"""What is converted here says the same in mlx-vlm, and what mlx-vlm converts goes on here.

Needs mlx-vlm, in an environment of its own: see tests/test_peer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import fp8
import mlx.core as mx
import numpy as np
import pytest
from converting import assignment, convert, differing, parameters, read_json, write_source
from layouts import split, wide

pytestmark = pytest.mark.peer
mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.convert import convert as peer_convert  # noqa: E402
from test_peer import TOLERANCE, messages, our_logits, peer_logits  # noqa: E402

from qwen3vl_mlx.api import load  # noqa: E402
from qwen3vl_mlx.convert import main  # noqa: E402

TEXT = [{"role": "user", "content": "Tell me of the sea and the old stone house."}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")
    return cache(lambda variant: write_source(root / variant, variant))


def agree(folder: Path, tolerance: float = TOLERANCE) -> None:
    """mlx-vlm loads the folder, and its logits are those here, with pictures and without."""
    ours = load(folder)
    for asked in (TEXT, messages()):
        expected = peer_logits(folder, ours, asked)
        got = our_logits(ours, ours.processor.prompt(asked))
        assert np.abs(got - expected).max() / np.abs(expected).max() <= tolerance
        assert tolerance > TOLERANCE or (got.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("quantize", [None, "4bit", "3bit", "mixed_3_6", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("variant", ["dense64", "dense72", "moe"])
def test_ours_in_mlx_vlm(
    variant: str, quantize: str | None, source: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(source(variant), tmp_path / "ours", quantize, shard_bytes=500_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    if variant == "moe" and quantize is not None:
        section = read_json(tmp_path / "ours" / "config.json")["quantization"]
        assert section["language_model.model.layers.0.mlp.gate"]["bits"] == 8
    agree(tmp_path / "ours")


def test_calibrated_in_mlx_vlm(tmp_path: Path) -> None:
    """Scaled norms, error feedback and settings of every module's own."""
    argv = ["--model", "demo", "-q", "3bit", "--calibrate", "--examples", "4"]
    argv += ["--bits-per-weight", "11.5", "--dtype", "float32"]
    assert main([*argv, "-o", str(tmp_path / "ours")]) == 0
    section = read_json(tmp_path / "ours" / "config.json")["quantization"]
    assert len({str(value) for value in section.values() if isinstance(value, dict)}) > 1
    agree(tmp_path / "ours")


def test_a_quantized_tower_in_mlx_vlm(source: Callable[[str], Path], tmp_path: Path) -> None:
    """Where groups fit: `dense72` has an MLP that stays whole."""
    for variant in ("dense64", "dense72"):
        chosen = assignment(source(variant), "4bit", vision=True)
        assert chosen is not None
        assert "vision_tower.merger.linear_fc1" in chosen.modules
        convert(source(variant), tmp_path / variant, chosen)
        agree(tmp_path / variant)


@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_fp8_in_mlx_vlm(variant: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", variant)
    config, tensors = wide(variant)
    stored, _ = fp8.to_fp8(tensors, fp8.in_decoder)
    fp8.write(folder, {**config, "quantization_config": fp8.CONFIG}, *split(stored, 2))
    convert(folder, tmp_path / "ours", "6bit", dtype=mx.float32)
    agree(tmp_path / "ours")


@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_saved_models_in_mlx_vlm(
    variant: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(source(variant), quantize="5bit")
    model.save(tmp_path / "saved")
    agree(tmp_path / "saved")
    model.requantize("mixed_4_8")
    model.save(tmp_path / "saved", force=True)
    agree(tmp_path / "saved")


def test_a_head_of_its_own_in_mlx_vlm(tmp_path: Path) -> None:
    """Though the source's config ties it."""
    folder = write_source(tmp_path / "source", "dense64", count=1)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    tensors["lm_head.weight"] = mx.random.normal((1024, 64), key=mx.random.key(0)) / 8
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    convert(folder, tmp_path / "ours", "4bit")
    agree(tmp_path / "ours")


PEERS = {
    "4bit": {"q_group_size": 32, "q_bits": 4},
    "8bit": {"q_group_size": 64, "q_bits": 8},
    "mxfp4": {"q_mode": "mxfp4", "q_group_size": 32, "q_bits": 4},
    "mixed_3_6": {"quant_predicate": "mixed_3_6", "q_group_size": 32},
}


@pytest.mark.parametrize("settings", PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_theirs_goes_on_here(
    variant: str, settings: dict[str, int | str], source: Callable[[str], Path], tmp_path: Path
) -> None:
    """It loads, is kept bit by bit, and is quantized again, for both."""
    theirs = tmp_path / "theirs"
    peer_convert(str(source(variant)), str(theirs), quantize=True, **settings)
    # Embeddings in mxfp4 come out in bfloat16, in which mlx-vlm then turns queries and keys.
    loose = 2e-2 if "q_mode" in settings else TOLERANCE
    agree(theirs, loose)
    again = load(theirs, quantize="6bit")
    assert any(name.endswith(".scales") for name in parameters(load(theirs).model))
    convert(theirs, tmp_path / "float32", "6bit", dtype=mx.float32)
    agree(tmp_path / "float32")
    convert(theirs, tmp_path / "as stored", "6bit")
    made = load(tmp_path / "as stored")
    assert differing(parameters(made.model), parameters(again.model)) == []
    load(theirs).save(tmp_path / "kept")
    kept = parameters(load(tmp_path / "kept").model)
    assert differing(kept, parameters(load(theirs).model)) == []
    agree(tmp_path / "kept", loose)
