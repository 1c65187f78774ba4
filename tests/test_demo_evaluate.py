"""The demo's report card: fair questions, told right, and the same as the code that judges."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from qwen3vl_mlx.demo import evaluate
from qwen3vl_mlx.demo.questions import WORDINGS, Question
from qwen3vl_mlx.demo.scenes import PLACES, SHAPE_COLORS, SHAPES

BOX = '[{"bbox_2d": [100, 100, 300, 300], "label": "red circle"}]'
HALF = BOX.replace("300, 300", "300, 200")


def test_every_task_is_asked_as_often() -> None:
    asked = evaluate.held_out(8)
    assert Counter(each.question.task for each in asked) == dict.fromkeys(WORDINGS, 8)
    again = evaluate.held_out(8)
    assert [each.question for each in asked] == [each.question for each in again]
    shown = {"which": 2, "countin": 2, "describein": 2, "sum": 0, "talk": 0}
    assert all(len(each.images) == shown.get(each.question.task, 1) for each in asked)


def test_retouching_leaves_the_questions() -> None:
    plain = evaluate.held_out(3)
    retouched = evaluate.held_out(3, retouched=True)
    assert [each.question for each in plain] == [each.question for each in retouched]
    changed = [
        a.images[0].tobytes() != b.images[0].tobytes()
        for a, b in zip(plain, retouched, strict=True)
        if a.images
    ]
    assert all(changed)


def test_another_font_is_drawn() -> None:
    asked = (evaluate.held_out(3, tasks=["read"], other_font=font) for font in (False, True))
    for bundled, other in zip(*asked, strict=True):
        assert bundled.images[0].tobytes() != other.images[0].tobytes()


def test_no_answer_is_asked_for_too_often() -> None:
    asked = evaluate.held_out(200, tasks=["which", "exist", "at", "countx", "count"])
    truths: dict[str, Counter[str]] = {}
    for each in asked:
        truths.setdefault(each.question.task, Counter())[each.question.truth] += 1
    assert all(truths["which"][f"Image {i}"] >= 70 for i in (1, 2))
    assert all(truths["exist"][answer] >= 70 for answer in ("Yes", "No"))
    assert all(truths["count"][str(n)] >= 25 for n in range(1, 5))
    subjects = " ".join(each.question.question for each in asked if each.question.task == "countx")
    assert all(word in subjects for word in (*SHAPES, *SHAPE_COLORS))
    placed = " ".join(each.question.question for each in asked if each.question.task == "at")
    assert all(place in placed for place in PLACES)


def test_scores_are_shares() -> None:
    asked = [evaluate.Asked(Question("color", "?", "red"), ()) for _ in range(4)]
    asked += [evaluate.Asked(Question("where", "?", BOX), ()) for _ in range(2)]
    given = ["red", "red", "red", "blue", HALF, "no"]
    where, color = sorted(evaluate.scores(asked, given), key=lambda score: -score.accuracy)[::-1]
    assert (where.task, where.questions, where.accuracy, where.iou) == ("where", 2, 0.5, 0.25)
    assert (color.task, color.questions, color.accuracy, color.iou) == ("color", 4, 0.75, None)
    report = evaluate.report(asked, given, ["red", "red", "red", "red", HALF, "no"])
    assert [each["library"] for each in report["differences"]] == ["blue"]
    told = evaluate.table(asked, given, given)
    assert "0.500, IoU 0.250" in told
    assert "6 of 6 answers are the same" in told


def test_the_command_answers_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--questions", "3", "--tasks", "sum, bg", "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert [(each["task"], each["questions"]) for each in tasks] == [("bg", 3), ("sum", 3)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "sing"], "no task 'sing'"),
        (["--questions", "0"], "at least 1"),
        (["--reference", "--quantize", "4bit"], "leave out --quantize"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_wrong_options_are_told(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(options) != 0
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
