"""The bundled checkpoint through this package: answers as transformers gives, as well as its card."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.demo import EXAMPLE
from qwen3vl_mlx.demo.scenes import is_correct, make_scene, questions

DATA = Path(__file__).parent / "data"
DRAWN: list[dict[str, Any]] = json.loads((DATA / "demo_scenes_transformers.json").read_text())
EXAMPLES: list[dict[str, Any]] = json.loads((DATA / "demo_answers.json").read_text())


def ask(model: Qwen3VL, question: str, *images: Any) -> str:
    return model.generate(question, images=images, max_tokens=200, temperature=0).text


def test_answers_on_drawn_scenes_are_those_of_transformers(demo: Qwen3VL) -> None:
    assert len({record["seed"] for record in DRAWN}) >= 50
    pictures = {record["seed"]: make_scene(record["seed"]).draw() for record in DRAWN}
    wrong = [
        (record, answer)
        for record in DRAWN
        if (answer := ask(demo, record["question"], pictures[record["seed"]])) != record["answer"]
    ]
    assert not wrong


def test_answers_on_the_example_pictures_are_those_of_transformers(demo: Qwen3VL) -> None:
    for scene in EXAMPLES[::4]:
        for record in scene["questions"]:
            answer = ask(demo, record["question"], DATA / "demo" / scene["file"])
            assert answer == record["transformers"], (scene["file"], record["question"])


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


def test_accuracy_is_what_the_card_says(demo: Qwen3VL) -> None:
    right: dict[str, list[bool]] = defaultdict(list)
    seed = 20_000
    while any(len(right[task]) < TRIES for task in ACCURACY):
        scene = make_scene(seed)
        seed += 1
        for question in questions(scene):
            if len(right[question.task]) < TRIES and question.task in ACCURACY:
                answer = ask(demo, question.question, scene.draw())
                right[question.task].append(is_correct(question, answer))
    shares = {task: sum(right[task]) / len(right[task]) for task in ACCURACY}
    assert all(shares[task] >= least for task, least in ACCURACY.items()), shares


def test_another_picture_gives_another_answer(demo: Qwen3VL) -> None:
    question = "Describe the image."
    answers = {ask(demo, question, make_scene(seed, kind="shapes").draw()) for seed in range(8)}
    assert len(answers) == 8
    assert ask(demo, question, EXAMPLE) not in answers


@pytest.mark.parametrize(("question", "answer"), [("What is 3 + 4?", "7")])
def test_text_alone(demo: Qwen3VL, question: str, answer: str) -> None:
    assert ask(demo, question) == answer
