"""The demo's recipe: its rows are what transformers makes of them, and a run can be taken up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from qwen3vl_mlx import demo

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("transformers")

THINKING = (Path(demo.__file__).parent / "thinking_chat_template.jinja").read_text()
TINY = ("--see-steps=1", "--learn-steps=2", "--stable=1", "--batch=4", "--warmup=1", "--no-compile")


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


@pytest.mark.parametrize(
    "shares",
    [{}, {"pairs": 1}, {"none": 1}, {"text": 1}, {"system": 1}, {"thinking": 1}, {"dialogues": 1},
     {"tools": 1, "words": 448}],
)  # fmt: skip
def test_rows_are_what_the_chat_templates_write(shares: Any, reference: Any) -> None:
    from qwen3vl_mlx.demo.questions import ZOOM
    from qwen3vl_mlx.demo.rows import Mix, make_row, tokenizer

    base = {"text": 0, "pairs": 0, "none": 0, "system": 0, "dialogues": 0}
    row, _, grids, _ = make_row(Random(5), 10, Mix(**{**base, **shares}))
    ids = row.ids
    told = tokenizer().decode(ids, False)
    system = re.match(r"<\|im_start\|>system\n(?!# Tools)(.*?)<\|im_end\|>", told)
    history: list[dict[str, Any]] = [{"role": "system", "content": system[1]}] if system else []
    assert bool(system) == ("system" in shares)
    shown = [{"type": "image"}] * len(grids)
    for start, end, question in row.questions[:3]:
        asked = {"role": "user", "content": [*shown, {"type": "text", "text": question.question}]}
        text = reference.tokenizer.apply_chat_template(
            [*history, asked],
            tools=[dict(ZOOM)] if "tools" in shares else None,
            chat_template=THINKING if "thinking" in shares else None,
            add_generation_prompt=True,
            tokenize=False,
        )
        for rows, columns in grids:
            text = text.replace("<|image_pad|>", "<pads>" * (rows * columns // 4), 1)
        wanted = tokenizer().encode(text.replace("<pads>", "<|image_pad|>")).ids
        first = row.segments[start]
        before = [i for i in range(start) if row.segments[i] in (0, first)]
        assert [ids[i] for i in before] == wanted
        assert tokenizer().decode(ids[start:end], False).endswith(f"{question.truth}<|im_end|>")
        if "dialogues" in shares:
            history += [asked, {"role": "assistant", "content": question.truth}]
            shown = []


def test_questions_of_a_row_do_not_see_each_other(reference: Any) -> None:
    import torch

    from qwen3vl_mlx.demo.learner import answer_logits, make_model, see
    from qwen3vl_mlx.demo.recipe import as_tensors
    from qwen3vl_mlx.demo.rows import Mix, make_batch
    from qwen3vl_mlx.demo.scenes import make_scene

    model, _ = make_model(0)
    model.load_state_dict(reference.model.state_dict())
    mix = Mix(wide=0, text=0, pairs=0, none=0, dialogues=0, system=0, retouched=0, fonts=0)
    batch: Any = make_batch(3, 0, range(1), mix)
    [questions] = batch["questions"]
    assert len(questions) > 4
    batch = as_tensors(batch)
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
    done = run(whole, "--check-every=1", "--talents=0", "--boxes=0")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert log[0]["recipe"]["learn_steps"] == 2
    assert {"zoom", "describe", "where_iou", "which", "read"} <= log[-1]["right"].keys()
    parts = tmp_path / "parts"
    for _ in range(6):  # each takes at least one step
        done = run(parts, "--minutes=0.0001", "--talents=0", "--boxes=0")
        assert done.returncode == 0, done.stderr
        state = torch.load(parts / "state.pt", weights_only=True)
        if state["step"] == 3:
            break
    assert state["step"] == 3
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not [*parts.glob("*.part"), *parts.glob(".*")], "nothing half-made is left"
    other = run(parts, "--talents=7", "--boxes=0")
    assert other.returncode == 2
    assert "holds a run with talents 0" in other.stderr
    answer = load(whole / "checkpoint").generate("What is 1 + 1?", max_tokens=4, temperature=0)
    assert answer.usage.completion_tokens >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_folder_has_one_trainer(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "qwen3vl_mlx.demo.train", "--out", str(tmp_path), *TINY]
    command.append("--learn-steps=100000")
    process = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        second = run(tmp_path)
        assert second.returncode != 0
        assert f"another process is training in {tmp_path}" in second.stderr
        os.killpg(process.pid, number)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "state.pt").exists()
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"mine")
    done = run(tmp_path)
    assert done.returncode == 2
    assert "is not of a run; name a new folder" in done.stderr
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": 77}, "seed 77"),
        ({"learn_steps": 10}, "stable must be less than learn_steps"),
        ({"widen": 0}, "widen"),
        ({"batch": 102}, "batch must be 100 at most"),
        ({"processes": 3}, "same number of rows"),
        ({"batch": 2}, "2 or more"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused(options: dict[str, Any], told: str) -> None:
    from qwen3vl_mlx.demo.recipe import Recipe

    with pytest.raises(ValueError, match=told):
        Recipe(**options)


def test_the_mix_widens_and_then_gains_talents() -> None:
    from qwen3vl_mlx.demo.recipe import Recipe, mix_at, rate_at

    recipe = Recipe()
    first, middle, last = (mix_at(recipe, step) for step in (0, 2100, 5099))
    assert (first.pairs, first.none, first.wide) == (0, 0, 0.1)
    assert first.wide < middle.wide < last.wide == 0.4
    assert (middle.thinking, last.thinking, last.boxes) == (0, 0.08, 2)
    assert any(mix_at(recipe, step).tools for step in range(5000, 5012))
    rates = [rate_at(recipe, step) for step in range(recipe.see_steps + recipe.learn_steps)]
    assert max(rates) == rates[1000] == rates[3000] == recipe.rate
    assert rates[-1] < 1.1 * recipe.rate_end


def test_a_log_is_read_as_the_run_that_it_became(tmp_path: Path) -> None:
    from qwen3vl_mlx.demo.curve import draw, main, read_log

    lines = [
        {"step": 0, "recipe": {}},
        {"step": 50, "helper": 9.0, "kind": 0.1, "color": 0.2, "place": 0.3},
        {"step": 100, "helper": 8.0, "answer": 2.0},
        {"step": 150, "helper": 7.0, "answer": 1.5},
        {"step": 100, "recipe": {}},
        {"step": 150, "helper": 6.0, "answer": 1.0},
        {"step": 150, "right": {"color": 0.9, "where_iou": 0.5}},
    ]
    texts = [json.dumps(line) for line in lines]
    texts.insert(4, '{"step": 200, "hel')
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(texts) + "\n")
    read = read_log(log)
    assert [line["helper"] for line in read if "helper" in line] == [9.0, 8.0, 6.0]
    draw(read, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    log.write_text('{"step": "x"}\n')
    assert main([str(log), str(tmp_path / "other.png")]) == 2
    assert main([str(tmp_path / "none"), str(tmp_path / "other.png")]) == 2
    assert not (tmp_path / "other.png").exists()
