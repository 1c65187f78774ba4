"""The demo's recipe: its rows are what transformers makes of them, and a run can be taken up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("transformers")

TINY = ("--see-steps=1", "--learn-steps=2", "--batch=4", "--warmup=1", "--no-compile")


@pytest.fixture(scope="module")
def reference() -> Any:
    from qwen3vl_mlx.demo.reference import Reference

    return Reference()


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_rows_have_the_patches_and_positions_of_transformers(pairs: float, reference: Any) -> None:
    import numpy as np
    import torch

    from qwen3vl_mlx.demo.rows import Mix, make_row
    from qwen3vl_mlx.demo.scenes import make_scene

    mix = Mix(wide=1, text=0, pairs=pairs, none=0, dialogues=0, system=0, retouched=0, fonts=0)
    for seed in range(0, 12, 2):
        row, patches, grids, _ = make_row(Random(seed), seed, mix)
        scenes = [make_scene(seed + i, kind="shapes", wide=True) for i in range(len(grids))]
        start, _, question = row.questions[0]
        made = reference.inputs([scene.draw() for scene in scenes], question.question)
        assert row.ids[:start] == made["input_ids"][0].tolist()
        assert [(1, *grid) for grid in grids] == [tuple(g) for g in made["image_grid_thw"].tolist()]
        pixels = torch.from_numpy(np.concatenate(patches)).float() / 127.5 - 1
        frames = made["pixel_values"].view(len(pixels), 3, 2, -1)  # both frames are the picture
        assert torch.allclose(frames[:, :, 0].flatten(1), pixels, atol=1e-5)
        positions, _ = reference.model.model.get_rope_index(
            made["input_ids"], made["mm_token_type_ids"], made["image_grid_thw"]
        )
        assert row.positions[:start] == [tuple(p) for p in positions[:, 0].T.tolist()]


def test_questions_of_a_row_do_not_see_each_other(reference: Any) -> None:
    import torch

    from qwen3vl_mlx.demo.learner import answer_logits, make_model, see
    from qwen3vl_mlx.demo.rows import Mix, make_batch
    from qwen3vl_mlx.demo.scenes import make_scene

    model, _ = make_model(0)
    model.load_state_dict(reference.model.state_dict())
    mix = Mix(wide=0, text=0, pairs=0, none=0, dialogues=0, system=0, retouched=0, fonts=0)
    batch: Any = make_batch(3, 0, range(1), mix)
    [questions] = batch["questions"]
    assert len(questions) > 4
    batch = {k: v if k == "questions" else torch.from_numpy(v) for k, v in batch.items()}
    with torch.no_grad():
        logits = answer_logits(model, batch, see(model, batch))
    image = make_scene(1003 * 10**8, kind="shapes").draw()
    place = 0
    for start, end, question in questions:
        inputs = reference.inputs([image], question.question)
        answer = batch["ids"][:, start:end]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (
            inputs["input_ids"] == reference.model.config.image_token_id
        ).int()
        with torch.no_grad():
            alone = reference.model(**inputs).logits[0, -answer.shape[1] - 1 : -1]
        assert_close(logits[place : place + end - start], alone)
        place += end - start
    assert place == len(logits)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max()) < 2e-3 * float(wanted.abs().max())


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen3vl_mlx.demo.train", "--out", str(out), *TINY, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def weights(out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(out / "checkpoint" / "model.safetensors")


def test_a_run_is_the_same_again_and_after_a_stop(tmp_path: Path) -> None:
    import torch

    from qwen3vl_mlx import load

    whole = tmp_path / "whole"
    assert run(whole).returncode == 0
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert log[0]["recipe"]["learn_steps"] == 2
    parts = tmp_path / "parts"
    for _ in range(6):  # each takes at least one step
        assert run(parts, "--minutes=0.0001").returncode == 0
        state = torch.load(parts / "state.pt", weights_only=False)
        if state["step"] == 3:
            break
    assert state["step"] == 3
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(parts.glob("*.part"))
    answer = load(whole / "checkpoint").generate("What is 1 + 1?", max_tokens=4, temperature=0)
    assert answer.usage.completion_tokens >= 1


def test_ctrl_c_saves_and_a_folder_has_one_trainer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwen3vl_mlx.demo.train", "--out", str(tmp_path), *TINY]
    command[-4] = "--learn-steps=100000"
    process = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        second = run(tmp_path)
        assert second.returncode != 0
        assert f"another process is training in {tmp_path}" in second.stderr
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "state.pt").exists()
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()
