"""The words a checkpoint is asked in: the family's own, or those of its config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from converting import convert

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.demo.questions import WORDINGS
from qwen3vl_mlx.errors import ConfigError, InputError
from qwen3vl_mlx.tasks import TaskName, Wording, read_wording


def test_templates_take_a_subject_as_it_stands() -> None:
    wording = Wording(detect="Find {} now: {}", point="Point at {}")
    assert wording.prompt("detect", ' {}, "x" {0} %s\\ ') == (
        'Find {}, "x" {0} %s\\ now: {}, "x" {0} %s\\'
    )
    assert wording.prompt("detect") == wording.prompt("detect", " ") == wording.detect_all
    assert wording.prompt("point") == wording.point_all
    assert wording.prompt("read", "ignored") == wording.read


@pytest.mark.parametrize("wording", [Wording(), read_wording(CHECKPOINT)])
@pytest.mark.parametrize("task", get_args(TaskName))
def test_every_task_has_words(wording: Wording, task: TaskName) -> None:
    assert "{}" not in wording.prompt(task, "cat")
    assert wording.prompt(task).strip()
    assert ("cat" in wording.prompt(task, "cat")) == (
        task in ("detect", "point") or (task == "extract" and wording == Wording())
    )


def test_no_such_task() -> None:
    with pytest.raises(InputError, match="task 'sing' is unknown; use one of describe, read"):
        Wording().prompt("sing")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("subject", "joined"),
    [("cat", "cat"), (" cat ,\n big  dog,", "cat, big dog"), (["cat", "a, b"], "cat, a, b")],
)
def test_several_subjects(subject: Any, joined: str) -> None:
    wording = Wording(detect="{}!")
    assert wording.prompts("detect", subject) == [f"{joined}!"]
    one = Wording(detect="{}!", several=False)
    listed = [f"{each}!" for each in joined.split(", ")] if isinstance(subject, str) else None
    assert one.prompts("detect", subject) == (listed or ["cat!", "a, b!"])
    assert one.prompts("detect", "") == [one.detect_all]


def test_the_demo_checkpoint_is_asked_what_it_learnt(demo: Qwen3VL) -> None:
    learnt = {wording for each in WORDINGS.values() for wording in each}
    wording = demo.wording
    assert {wording.detect, wording.detect_all, wording.point, wording.point_all} <= learnt
    assert {wording.read, wording.describe, wording.markdown, wording.html} <= learnt
    assert not wording.several


def checkpoint(folder: Path, task_prompts: Any) -> Path:
    """The demo checkpoint with other words; `...` for none."""
    shutil.copytree(CHECKPOINT, folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["task_prompts"]
    if task_prompts is not ...:
        values["task_prompts"] = task_prompts
    path.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("absent", [..., None, {}])
def test_most_checkpoints_say_nothing(tmp_path: Path, absent: Any) -> None:
    assert load(checkpoint(tmp_path / "model", absent)).wording == Wording()


def test_some_words_may_be_the_checkpoints_own(tmp_path: Path) -> None:
    wording = read_wording(checkpoint(tmp_path / "model", {"read": "OCR."}))
    assert wording == Wording(read="OCR.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "task_prompts must be an object of texts, got list"),
        ("Read.", "task_prompts must be an object of texts, got str"),
        ({"read": 5}, "task_prompts.read must be a text that says something, got 5"),
        ({"read": " "}, "task_prompts.read must be a text that says something"),
        ({"detect": None}, "task_prompts.detect must be a text"),
        ({"detect": "Find it."}, 'task_prompts.detect must have "{}"'),
        ({"point": "Point."}, 'task_prompts.point must have "{}"'),
        ({"read": "Read {}."}, 'task_prompts.read has a "{}", but nothing goes there'),
        ({"several": "yes"}, "task_prompts.several must be true or false, got 'yes'"),
        ({"sing": "La."}, "task_prompts.sing is no task; known are describe, read"),
    ],
)
def test_words_that_cannot_be_used(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(checkpoint(tmp_path / "model", values))
    assert message in str(caught.value)


def test_copies_keep_the_words(demo: Qwen3VL, tmp_path: Path) -> None:
    demo.save(tmp_path / "saved")
    convert(CHECKPOINT, tmp_path / "quantized", "4bit")
    convert(tmp_path / "quantized", tmp_path / "whole", to_hf=True)
    for name in ("saved", "quantized", "whole"):
        assert read_wording(tmp_path / name) == demo.wording


@pytest.mark.parity
def test_transformers_does_not_mind_the_words() -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(CHECKPOINT)
    assert config.task_prompts["markdown"] == "Read the text."
    assert config.text_config.hidden_size == 128
