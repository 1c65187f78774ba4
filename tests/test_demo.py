"""The bundled checkpoint through this package: as transformers answers, and as its card says."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.demo import EXAMPLE
from qwen3vl_mlx.demo.questions import is_correct, questions
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


# Least share of right answers over TRIES questions: the card's, less three standard errors.
TRIES = 24
ACCURACY = {
    "color": 0.89,
    "shape": 0.95,
    "at": 0.89,
    "count": 0.90,
    "exist": 0.90,
    "bg": 0.95,
    "read": 0.68,
}


def test_accuracy_is_what_the_card_says(ask: Ask) -> None:
    right: dict[str, list[bool]] = defaultdict(list)
    seed = 20_000
    while any(len(right[task]) < TRIES for task in ACCURACY):
        # Two tasks need text scenes.
        scene = make_scene(seed, kind="text" if seed % 2 else "shapes")
        seed += 1
        picture = scene.draw()
        for question in questions(scene):
            if len(right[question.task]) < TRIES and question.task in ACCURACY:
                right[question.task].append(is_correct(question, ask(question.question, picture)))
    shares = {task: sum(right[task]) / len(right[task]) for task in ACCURACY}
    assert all(shares[task] >= least for task, least in ACCURACY.items()), shares


def test_another_picture_gives_another_answer(ask: Ask) -> None:
    question = "Describe the image."
    answers = {ask(question, make_scene(seed, kind="shapes").draw()) for seed in range(8)}
    assert len(answers) == 8
    assert ask(question, EXAMPLE) not in answers


def test_text_alone(demo: Qwen3VL) -> None:
    assert demo.generate("What is 3 + 4?", max_tokens=8, temperature=0).text == "7"
