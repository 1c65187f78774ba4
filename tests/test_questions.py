"""What is asked about the demo's scenes: without ambiguity, and judged as it should be."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_mlx.demo.questions import (
    BOX_TASKS,
    WORDINGS,
    Question,
    box_overlaps,
    is_correct,
    pair_questions,
    questions,
    read_boxes,
    read_zoom,
    text_questions,
    thought,
    zoom_questions,
)
from qwen3vl_mlx.demo.scenes import Scene, Shape, make_scene

T = TypeVar("T")
DATA = Path(__file__).parent / "data"
SEEDS = range(300)
# of two pictures, of none, or with a tool
OTHER_TASKS = {"which", "countin", "describein", "sum", "talk", "zoom"}


# -- asked without ambiguity -------------------------------------------------------------------


def only(values: list[T]) -> T:
    assert len(values) == 1, f"ambiguous: {values}"
    return values[0]


def named(shape: Shape) -> str:
    return f"{'an' if shape.color == 'orange' else 'a'} {shape.color} {shape.shape}"


def answer(scene: Scene, question: str) -> str:
    """Answer a question of words from the scene, by another road than the module's."""
    shapes, label = scene.shapes, scene.label
    if match := re.fullmatch(r"What (?:color is|is the color of) the (\w+)\?", question):
        if match[1] == "text":
            assert label
            return label.color
        if match[1] == "background":
            return scene.background
        return only([s.color for s in shapes if s.shape == match[1]])
    if question == "What is the background color?":
        return scene.background
    if match := re.fullmatch(r"(?:What|Which) shape is (\w+)\?", question):
        return only([s.shape for s in shapes if s.color == match[1]])
    if match := re.fullmatch(r"(?:What|Which shape) is at the ([\w ]+)\?", question):
        return only([named(s) for s in shapes if s.position == match[1]])
    if match := re.fullmatch(r"In which part of the image is the (\w+) (\w+)\?", question):
        return only([s.position for s in shapes if (s.color, s.shape) == match.groups()])
    if match := re.fullmatch(r"Is there (an? \w+ \w+)(?: in the image)?\?", question):
        return "Yes" if match[1] in map(named, shapes) else "No"
    if match := re.fullmatch(r"How many (\w+) shapes are there\?", question):
        return str(sum(s.color == match[1] for s in shapes))
    if (match := re.fullmatch(r"How many (\w+)s are there\?", question)) and match[1] != "shape":
        return str(sum(s.shape == match[1] for s in shapes))
    if question.startswith(("How many shapes are", "Count the shapes")):
        return str(len(shapes))
    assert re.search(r"\btext\b|\bwritten\b", question), question
    assert label
    return label.string


def caption(scene: Scene) -> str:
    ground = f"{'An' if scene.background == 'orange' else 'A'} {scene.background} background with "
    if scene.label:
        return ground + f'the text "{scene.label.string}" in {scene.label.color}.'
    parts = [f"{named(s)} at the {s.position}" for s in scene.shapes]
    return ground + re.sub(r", ([^,]*)$", r" and \1", ", ".join(parts)) + "."


@pytest.mark.parametrize("every", [False, True])
def test_questions_have_one_right_answer(every: bool) -> None:
    tasks: Counter[str] = Counter()
    for seed in SEEDS:
        scene = make_scene(seed)
        asked = questions(scene, every=every)
        assert asked == questions(scene, every=every)
        assert len({q.question for q in asked}) == len(asked)
        for q in asked:
            tasks[q.task] += 1
            if q.task == "describe":
                assert q.truth == caption(scene)
            elif q.task in BOX_TASKS:
                named_in_question = [
                    s for s in scene.shapes if re.search(rf'(the |"){s.name}[.?"]', q.question)
                ]
                shapes = scene.shapes if q.task == "whereall" else named_in_question
                assert_boxes(q.truth, shapes, scene.size)
            else:
                assert q.truth == answer(scene, q.question), q
            assert is_correct(q, q.truth)
    assert set(tasks) == set(WORDINGS) - OTHER_TASKS


def test_pairs_have_one_right_answer() -> None:
    tasks: Counter[str] = Counter()
    for seed in range(0, 200, 2):
        pair = [make_scene(seed + i, kind="shapes", wide=seed % 4 == 0) for i in range(2)]
        asked = pair_questions(*pair)
        assert asked == pair_questions(*pair)
        for q in asked:
            tasks[q.task] += 1
            if match := re.fullmatch(r"Which image has (an? \w+ \w+)\?", q.question):
                having = [
                    i for i, scene in enumerate(pair, 1) if match[1] in map(named, scene.shapes)
                ]
                assert q.truth == f"Image {only(having)}"
                continue
            number = re.search(r"image (\d)[.?]$", q.question)
            assert number
            scene = pair[int(number[1]) - 1]
            counted = q.question.startswith("How many shapes")
            assert q.truth == (str(len(scene.shapes)) if counted else caption(scene))
    assert set(tasks) == {"which", "countin", "describein"}


def test_questions_of_no_picture() -> None:
    asked = text_questions()
    assert len({q.question for q in asked}) == len(asked)
    assert {q.task for q in asked} == {"sum", "talk"}
    for q in asked:
        if match := re.fullmatch(r"What is (\d) \+ (\d)\?", q.question):
            assert q.truth == str(int(match[1]) + int(match[2]))


def test_zoom_is_asked_of_every_shape() -> None:
    for seed in SEEDS[:60]:
        scene = make_scene(seed, kind="shapes", wide=True)
        asked = zoom_questions(scene)
        assert len(asked) == len(scene.shapes)
        for q, shape in zip(asked, scene.shapes, strict=True):
            assert q.task == "zoom"
            assert f"the {shape.name}." in q.question
            box = read_zoom(q.truth)
            assert box is not None
            sides = (*scene.size, *scene.size)
            assert all(
                abs(v / 1000 * n - edge) <= n / 1000
                for v, n, edge in zip(box, sides, shape.bbox, strict=True)
            )
            assert is_correct(q, q.truth)


def test_a_thought_says_what_is_seen() -> None:
    scene = make_scene(3, kind="shapes")
    told = thought([scene])
    assert all(f"{named(shape)} at the {shape.position}" in told for shape in scene.shapes)
    both = thought([scene, make_scene(4, kind="shapes")])
    assert "Image 1: a" in both
    assert "Image 2: a" in both
    assert thought([]) == "This needs no picture."


def assert_boxes(truth: str, shapes: Any, size: tuple[int, int]) -> None:
    found = json.loads(truth)
    assert [item["label"] for item in found] == [f"{s.color} {s.shape}" for s in shapes] != []
    for item, shape in zip(found, shapes, strict=True):
        pixels = [v / 1000 * n for v, n in zip(item["bbox_2d"], (*size, *size), strict=True)]
        assert pixels == pytest.approx(shape.bbox, abs=0.0005 * max(size) + 1e-9)


def test_yes_and_no_are_asked_alike() -> None:
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        counts += Counter(q.truth for q in questions(make_scene(seed)) if q.task == "exist")
    assert counts["Yes"] == counts["No"] > 300


# -- judged ------------------------------------------------------------------------------------

ONE_BOX = '[{"bbox_2d": [100, 100, 300, 300], "label": "red circle"}]'
TWO_BOXES = ONE_BOX[:-1] + ', {"bbox_2d": [600, 600, 800, 900], "label": "blue star"}]'
CALL = '<tool_call>\n{"name": "zoom", "arguments": {"bbox_2d": [100, 100, 300, 300]}}\n</tool_call>'


@pytest.mark.parametrize(
    ("task", "truth", "given_answer", "right"),
    [
        ("color", "red", "red", True),
        ("color", "red", " red\n", True),
        ("color", "red", "Red", False),
        ("color", "red", "red.", False),
        ("count", "3", "4", False),
        ("count", "3", "", False),
        ("where", ONE_BOX, ONE_BOX, True),
        ("where", ONE_BOX, ONE_BOX.replace("300, 300", "300, 200"), True),  # IoU is 0.5
        ("where", ONE_BOX, ONE_BOX.replace("300, 300", "300, 199"), False),
        ("where", ONE_BOX, ONE_BOX.replace("100, 100", "300, 300"), False),  # empty box
        ("where", ONE_BOX, ONE_BOX.replace("red", "blue"), False),
        ("where", ONE_BOX, TWO_BOXES, False),
        ("where", ONE_BOX, "The circle is at the top left.", False),
        ("where", ONE_BOX, "[]", False),
        ("where", ONE_BOX, ONE_BOX[:-1], False),
        ("where", ONE_BOX, '[{"bbox_2d": [100, 100, 300], "label": "red circle"}]', False),
        ("whereall", TWO_BOXES, TWO_BOXES, True),
        ("whereall", TWO_BOXES, json.dumps(json.loads(TWO_BOXES)[::-1]), True),
        ("whereall", TWO_BOXES, ONE_BOX, False),
        ("whereall", TWO_BOXES, TWO_BOXES.replace("600, 600", "600, 760"), False),
        ("zoom", CALL, CALL, True),
        ("zoom", CALL, CALL.replace("300, 300", "300, 210"), True),
        ("zoom", CALL, CALL.replace("300, 300", "300, 190"), False),
        ("zoom", CALL, CALL.replace('"zoom"', '"look"'), False),
        ("zoom", CALL, CALL.replace("[100, 100, 300, 300]", "[1]"), False),
        ("zoom", CALL, CALL.replace("[100, 100, 300, 300]", "5"), False),
        ("zoom", CALL, ONE_BOX, False),
    ],
)
def test_answers_are_judged(task: str, truth: str, given_answer: str, right: bool) -> None:
    assert is_correct(Question(task, "?", truth), given_answer) is right


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"bbox_2d": [0, 0, 1, 1], "label": "red circle"}',
        '[{"bbox_2d": [0, 0, 1000, 1001], "label": "red circle"}]',
        '[{"bbox_2d": [0, 0, -1, 1], "label": "red circle"}]',
        '[{"bbox_2d": [0, 0, NaN, 1], "label": "red circle"}]',
        '[{"bbox_2d": ["0", "0", "1", "1"], "label": "red circle"}]',
        '[{"bbox_2d": [0, 0, 1, 1]}]',
    ],
)
def test_other_forms_hold_no_boxes(text: str) -> None:
    assert read_boxes(text) == []


@pytest.mark.parametrize(
    ("answer", "overlaps"),
    [
        (ONE_BOX, [1.0]),
        (ONE_BOX.replace("300, 300", "300, 200"), [0.5]),
        (ONE_BOX.replace("red", "blue"), [0.0]),
        (ONE_BOX.replace("300, 300", "300, 200")[:-1] + ", " + ONE_BOX[1:], [0.5]),  # the first
        ("[]", [0.0]),
        ("none", [0.0]),
    ],
)
def test_boxes_are_compared(answer: str, overlaps: list[float]) -> None:
    assert box_overlaps(ONE_BOX, answer) == overlaps


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.fixed_dictionaries({"bbox_2d": inner, "label": inner})
        | st.dictionaries(st.text(max_size=8), inner, max_size=2)
    ),
    max_leaves=12,
)


@given(st.text() | JSON.map(json.dumps))
def test_any_answer_can_be_judged(text: str) -> None:
    for _, box in read_boxes(text):
        assert len(box) == 4
        assert all(0 <= v <= 1000 for v in box)
    assert not is_correct(Question("where", "?", ONE_BOX), text)
    assert not is_correct(Question("zoom", "?", CALL), text)
    assert not is_correct(Question("zoom", "?", CALL), f"<tool_call>\n{text}\n</tool_call>")


# -- recorded ----------------------------------------------------------------------------------


def test_recorded_answers_belong_to_the_scenes() -> None:
    records = json.loads((DATA / "demo_scenes_transformers.json").read_text())
    assert len({record["seed"] for record in records}) >= 50
    for record in records:
        scene = make_scene(record["seed"])
        assert record["kind"] == ("text" if scene.text else "shapes")
        asked = only([q for q in questions(scene) if q.question == record["question"]])
        assert is_correct(asked, record["answer"]) == record["correct"]
    assert sum(record["correct"] for record in records) >= 0.8 * len(records)
