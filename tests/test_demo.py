"""The bundled checkpoint through this package: as transformers answers, and as its card says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.demo import CHECKPOINT, EXAMPLE
from qwen3vl_mlx.demo.evaluate import held_out, library_answers, scores
from qwen3vl_mlx.demo.questions import WORDINGS
from qwen3vl_mlx.demo.scenes import make_scene

DATA = Path(__file__).parent / "data"
DRAWN: list[dict[str, Any]] = json.loads((DATA / "demo_scenes_transformers.json").read_text())
EXAMPLES: list[dict[str, Any]] = json.loads((DATA / "demo_answers.json").read_text())

Ask = Callable[[str, Any], str]


@pytest.fixture(scope="module")
def ask(demo: Qwen3VL) -> Ask:
    """`ask(question, image)`, greedily. Questions share a cache: a picture is seen once."""

    def asked(question: str, image: Any) -> str:
        return demo.generate(question, images=[image], temperature=0, max_tokens=200).text

    return asked


def test_answers_on_drawn_scenes_are_those_of_transformers(ask: Ask) -> None:
    assert len({record["seed"] for record in DRAWN}) >= 50
    pictures = {record["seed"]: make_scene(record["seed"]).draw() for record in DRAWN}
    wrong = [
        (record, got)
        for record in DRAWN
        if (got := ask(record["question"], pictures[record["seed"]])) != record["answer"]
    ]
    assert not wrong


def test_answers_on_the_example_pictures_are_those_of_transformers(ask: Ask) -> None:
    for scene in EXAMPLES[::4]:
        for record in scene["questions"]:
            got = ask(record["question"], DATA / "demo" / scene["file"])
            assert got == record["transformers"], (scene["file"], record["question"])


# The card's table: | what | `task` | example | accuracy in float32 | ... ; a box task has its IoU.
CARD = (CHECKPOINT / "README.md").read_text()
ROW = re.compile(
    r"^\| [^|]+ \| `(?P<task>\w+)` \| .+? \| (?P<iou>IoU )?(?P<share>[01]\.\d+) \|", re.MULTILINE
)
TRIES = 50


def claims() -> dict[str, tuple[float, bool]]:
    """What the card says it can do: the share by task, and whether that is an IoU."""
    part = CARD.split("## What it answers")[1].split("\n## ")[0]
    return {row["task"]: (float(row["share"]), bool(row["iou"])) for row in ROW.finditer(part)}


def test_the_card_claims_what_is_good_enough() -> None:
    bars = dict.fromkeys(WORDINGS, 0.95) | dict.fromkeys(("where", "whereall"), 0.75)
    bars |= dict.fromkeys(("color", "shape", "at", "pos", "count", "exist"), 0.97)
    assert all(share >= bars[task] for task, (share, _) in claims().items())
    assert {"describe", "count", "color", "shape", "at", "pos", "exist"} <= claims().keys()


def test_accuracy_is_what_the_card_says() -> None:
    asked = held_out(TRIES, tasks=list(claims()))
    answers = list(library_answers(asked, "demo", None, "float32"))
    for score in scores(asked, answers):
        share, is_iou = claims()[score.task]
        found = score.iou if is_iou else score.accuracy
        assert found is not None
        # three standard errors of so few questions
        least = share - 3 * math.sqrt(max(share * (1 - share), 0.01) / score.questions)
        assert found >= least, (score, share)


def test_another_picture_gives_another_answer(ask: Ask) -> None:
    question = "Describe the image."
    answers = {ask(question, make_scene(seed, kind="shapes").draw()) for seed in range(8)}
    assert len(answers) == 8
    assert ask(question, EXAMPLE) not in answers


def test_text_alone(demo: Qwen3VL) -> None:
    assert demo.generate("What is 3 + 4?", max_tokens=8, temperature=0).text == "7"
