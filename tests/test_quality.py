"""Calibration and evaluation as commands: what `convert` and `evaluate` make and say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from converting import read_json, tensors_of

from qwen3vl_mlx import convert, evaluate
from qwen3vl_mlx.demo import CHECKPOINT, EXAMPLE
from qwen3vl_mlx.loading import module_quantization
from qwen3vl_mlx.models.config import read_config

FEW = ["--examples", "4"]


def report(main: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated checkpoint, `made`, and its calibration, `kept.safetensors`."""
    folder = tmp_path_factory.mktemp("calibrated")
    argv = ["--model", "demo", "-q", "3bit", "--calibrate", *FEW, "-o", str(folder / "made")]
    argv += ["--save-calibration", str(folder / "kept.safetensors"), "--evaluate"]
    assert convert.main(argv) == 0
    return folder


def test_a_kept_calibration_gives_the_same_checkpoint(calibrated: Path, tmp_path: Path) -> None:
    kept = calibrated / "kept.safetensors"
    argv = ["--model", "demo", "-q", "3bit", "-o", str(tmp_path / "again")]
    assert convert.main([*argv, "--calibration", str(kept)]) == 0
    assert convert.main([*argv[:-1], str(tmp_path / "rounded")]) == 0
    names = (calibrated / "made", tmp_path / "again", tmp_path / "rounded")
    made, again, rounded = ((name / "model.safetensors").read_bytes() for name in names)
    assert made == again
    assert made != rounded
    assert len(made) == len(rounded)


def test_a_kept_calibration_is_of_one_model(
    calibrated: Path, tmp_path: Path, tiny_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(tiny_folder("dense64")), "-q", "3bit", "-o", str(tmp_path / "a")]
    assert convert.main([*argv, "--calibration", str(calibrated / "kept.safetensors")]) == 2
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_what_was_measured_stands_in_the_card(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = calibrated / "made" / "README.md"
    assert "Over 4 examples" in card.read_text() or "of 4 examples" in card.read_text()
    argv = [str(calibrated / "made"), "--source", "demo", "--examples", "6", "--card"]
    found = report(evaluate.main, argv, capsys)["checkpoints"][0]
    text = card.read_text()
    assert "of 6 examples" in text
    assert "of 4 examples" not in text
    assert f"{found['kl']:.4g}" in text
    assert text.count("## Measured") == 1


def test_pictures_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model itself says what is compared, and a file that is no picture is named."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(EXAMPLE.read_bytes())
        (tmp_path / name / "broken.jpg").write_bytes(EXAMPLE.read_bytes()[:99])
    argv = ["--model", "demo", "-q", "4bit", *FEW, "-o", str(tmp_path / "made")]
    argv += ["--calibrate", str(tmp_path / "here"), "--evaluate", str(tmp_path / "there")]
    assert convert.main([*argv, "--json"]) == 0
    printed = capsys.readouterr()
    quality = json.loads(printed.out)["quality"]
    assert quality["examples"] == 4
    assert 0 < quality["kl"] < 0.2
    assert printed.err.count("skipped") == 2


def test_bits_where_they_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "demo", "-q", "4bit", "--calibrate", *FEW, "-o", str(tmp_path / "made")]
    made = report(convert.main, [*argv, "--bits-per-weight", "11.6"], capsys)
    assert 11.5 < made["bits_per_weight"] <= 11.6
    section = read_json(tmp_path / "made" / "config.json")["quantization"]
    settings = [value for value in section.values() if isinstance(value, dict)]
    assert len({(value["bits"], value["group_size"]) for value in settings}) > 1


def test_more_bits_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "demo", "-q", "4bit", "--calibrate", *FEW, "-o", str(tmp_path / "made")]
    assert convert.main([*argv, "--bits-per-weight", "9"]) == 2
    assert "bits per weight must be 11" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_settings_asked_for_one_by_one_stay(tmp_path: Path) -> None:
    topology = tmp_path / "topology.yaml"
    topology.write_text("embed_tokens: 8bit\n0: 8bit\n/layers.1.*o_proj/: none\n")
    argv = ["--model", "demo", "-q", "4bit", "--topology", str(topology), "--calibrate", *FEW]
    kept = str(tmp_path / "kept.safetensors")
    argv += ["--bits-per-weight", "12.2", "--save-calibration", kept, "-o", str(tmp_path / "made")]
    assert convert.main(argv) == 0
    # A kept calibration's own settings do not go before them either.
    again = [*argv[:6], "--calibration", kept, "-o", str(tmp_path / "again")]
    assert convert.main(again) == 0
    for name in ("made", "again"):
        quantization = read_config(tmp_path / name).quantization
        assert quantization is not None
        text = "language_model.model."
        for path in (f"{text}embed_tokens", f"{text}layers.0.mlp.up_proj"):
            assert module_quantization(quantization, path).bits == 8, (name, path)
        tensors = tensors_of(tmp_path / name)
        assert f"{text}layers.1.self_attn.o_proj.scales" not in tensors


def test_a_head_of_its_own_is_calibrated(tmp_path: Path) -> None:
    """Though config.json ties it."""
    folder = tmp_path / "source"
    shutil.copytree(CHECKPOINT, folder)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    head = mx.random.normal((1024, 128), key=mx.random.key(0)).astype(mx.bfloat16) / 8
    mx.save_safetensors(str(folder / "model.safetensors"), {**tensors, "lm_head.weight": head})
    argv = ["--model", str(folder), "-q", "3bit", "--calibrate", *FEW, "-o", str(tmp_path / "a")]
    kept = tmp_path / "kept.safetensors"
    argv += ["--bits-per-weight", "11.9", "--save-calibration", str(kept)]
    assert convert.main(argv) == 0
    known = {name.rpartition(".")[0] for name in mx.load(str(kept))}
    assert "language_model.lm_head" in known
    assert "language_model.model.embed_tokens" not in known


def test_bits_of_a_float32_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tmp_path / "wide"
    assert convert.main(["--model", "demo", "--dtype", "float32", "-o", str(wide)]) == 0
    argv = ["--model", str(wide), "-q", "4bit", "--calibrate", *FEW, "-o", str(tmp_path / "a")]
    made = report(convert.main, [*argv, "--bits-per-weight", "23"], capsys)
    assert 22.8 < made["bits_per_weight"] <= 23


def test_a_sweep_compares_methods_at_one_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("qwen3vl_mlx.quant.sweep.CALIBRATION_EXAMPLES", 32)
    plot = tmp_path / "quality.png"
    argv = ["--sweep", "3bit", "--source", "demo", "--examples", "16", "--plot", str(plot)]
    rounded, better = report(evaluate.main, argv, capsys)["checkpoints"]
    assert (rounded["method"], better["method"]) == ("round to nearest", "calibrated")
    assert better["bits_per_weight"] <= rounded["bits_per_weight"] + 1e-3
    assert better["kl"] < rounded["kl"] / 2
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give checkpoints to compare, or --sweep"),
        (["demo", "--card"], "not the Hub's or the demo"),
        (["demo", "--sweep"], "--sweep makes its own"),
        (["--sweep", "--card"], "nor --card"),
        (["--sweep", "4bit,9bit"], "no quantization '9bit'"),
        (["demo", "--compare-mlx-vlm", "python"], "--compare-mlx-vlm is for --sweep"),
    ],
)
def test_options_that_contradict(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([*argv, "--source", "demo"]) == 2
    assert words in capsys.readouterr().err
