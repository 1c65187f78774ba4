"""Questions about the demo's scenes whose answers are known, and a judge of other answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from qwen3vl_mlx.demo.scenes import SHAPE_COLORS, SHAPES, Box, Scene, Shape

# task -> the wordings the checkpoint learnt; {} is the subject
WORDINGS = MappingProxyType({
    "describe": ("Describe the image.", "Describe this image.", "Describe what you see.",
                 "What do you see?", "What is in the image?"),
    "count": ("How many shapes are there?", "How many shapes are in the image?",
              "Count the shapes."),
    "countx": ("How many {} are there?",),
    "color": ("What color is the {}?", "What is the color of the {}?"),
    "shape": ("What shape is {}?", "Which shape is {}?"),
    "at": ("What is at the {}?", "Which shape is at the {}?"),
    "pos": ("In which part of the image is the {}?",),
    "exist": ("Is there {}?", "Is there {} in the image?"),
    "where": ("Where is the {}?", "Detect the {}.", "Locate the {}.",
              'Locate every instance that belongs to the following categories: "{}". '
              "Report bbox coordinates in JSON format."),
    "whereall": ("Detect all shapes.", "Locate all shapes.",
                 "Locate every object in the image. Report bbox coordinates in JSON format like "
                 'this: {"bbox_2d": [x1, y1, x2, y2], "label": "object"}'),
    "read": ("What text is in the image?", "What is written in the image?",
             "What does the text say?", "Read the text.", "Read all the text in the image."),
    "textcolor": ("What color is the text?", "What is the color of the text?"),
    "bg": ("What color is the background?", "What is the background color?"),
    # of two pictures
    "which": ("Which image has {}?",),
    "countin": ("How many shapes are in image {}?",),
    "describein": ("Describe image {}.", "What is in image {}?"),
    # of a picture, with the tool `ZOOM`
    "zoom": ("Zoom in on the {}.", "Take a closer look at the {}."),
    # of none
    "sum": ("What is {}?",),
    "talk": ("{}",),
})  # fmt: skip
BOX_TASKS = ("where", "whereall")  # answered with a list of boxes
ZOOM = MappingProxyType({
    "type": "function",
    "function": {
        "name": "zoom",
        "description": "Zoom in.",
        "parameters": {
            "type": "object",
            "properties": {"bbox_2d": {"type": "array"}},
            "required": ["bbox_2d"],
        },
    },
})  # fmt: skip
TALK = MappingProxyType({
    "Hello": "Hello! Show me a picture.",
    "Hello!": "Hello! Show me a picture.",
    "Hi": "Hello! Show me a picture.",
    "Hi!": "Hello! Show me a picture.",
    "Who are you?": "I am a tiny demo model.",
    "What are you?": "I am a tiny demo model.",
    "What can you do?": "I can name, count and find colored shapes, and read large digits.",
    "How are you?": "I am fine.",
    "Thank you.": "You are welcome.",
    "Thanks!": "You are welcome.",
    "Goodbye.": "Goodbye!",
    "What shapes do you know?": "Circle, square, triangle, star and diamond.",
    "What colors do you know?":
        "Red, green, blue, yellow, orange, purple, black, white and gray.",
})  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question, the kind it is of (a key of `WORDINGS`) and the exact right answer."""

    task: str
    question: str
    truth: str


# -- asking ------------------------------------------------------------------------------------


def questions(scene: Scene, *, every: bool = False) -> list[Question]:
    """List unambiguous questions about a scene.

    One question a fact in one of the wordings the checkpoint learnt, with as many absent shapes
    asked for as there are present ones; or with `every`, each fact (absent ones too) in each.
    """
    rng = Random(f"questions {scene.seed}")
    facts = list(_text_facts(scene) if scene.label else _shape_facts(scene))
    if every:
        return [
            Question(task, _worded(wording, subject), truth)
            for task, subject, truth in facts
            for wording in WORDINGS[task]
        ]
    for task, absent in (("exist", "No"), ("countx", "0")):
        surplus = [fact for fact in facts if fact[0] == task and fact[2] == absent]
        present = sum(fact[0] == task for fact in facts) - len(surplus)
        kept = rng.sample(surplus, min(present, len(surplus)))
        facts = [fact for fact in facts if fact not in surplus or fact in kept]
    return [Question(t, _worded(rng.choice(WORDINGS[t]), s), truth) for t, s, truth in facts]


def pair_questions(first: Scene, second: Scene) -> list[Question]:
    """List unambiguous questions about two scenes with shapes, shown in this order."""
    rng = Random(f"pair {first.seed} {second.seed}")
    names = [{shape.name for shape in scene.shapes} for scene in (first, second)]
    asked = [
        ("which", _a(name), f"Image {number}")
        for number, own, other in ((1, names[0], names[1]), (2, names[1], names[0]))
        for name in sorted(own - other)
    ]
    for number, scene in ((1, first), (2, second)):
        asked.append(("countin", str(number), str(len(scene.shapes))))
        asked.append(("describein", str(number), caption(scene)))
    return [Question(t, _worded(rng.choice(WORDINGS[t]), s), truth) for t, s, truth in asked]


def zoom_questions(scene: Scene) -> list[Question]:
    """List the requests that want a call of the tool `ZOOM`; the truth is the call's text."""
    rng = Random(f"zoom {scene.seed}")
    asked = []
    for shape in scene.shapes:
        [item] = json.loads(_boxes([shape], scene.size))
        call = {"name": "zoom", "arguments": {"bbox_2d": item["bbox_2d"]}}
        truth = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        asked.append(Question("zoom", _worded(rng.choice(WORDINGS["zoom"]), shape.name), truth))
    return asked


def thought(scenes: Sequence[Scene]) -> str:
    """The line that the checkpoint thinks before it answers, when it is asked to think."""
    if not scenes:
        return "This needs no picture."
    if len(scenes) == 1:
        return f"I see {_lower(caption(scenes[0]))}"
    return " ".join(f"Image {i}: {_lower(caption(each))}" for i, each in enumerate(scenes, 1))


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def text_questions() -> list[Question]:
    """List the questions that need no picture."""
    digits = range(10)
    sums = [Question("sum", f"What is {a} + {b}?", str(a + b)) for a in digits for b in digits]
    return sums + [Question("talk", question, answer) for question, answer in TALK.items()]


def _worded(wording: str, subject: str) -> str:
    # JSON in a wording has braces of its own; only an empty pair is the subject
    return wording.replace("{}", subject)


def caption(scene: Scene) -> str:
    """What the checkpoint says about a scene."""
    background = f"{_a(scene.background).capitalize()} background with"
    if scene.label:
        return f'{background} the text "{scene.label.string}" in {scene.label.color}.'
    listed = [f"{_a(s.name)} at the {s.position}" for s in scene.shapes]
    listing = " and ".join(filter(None, (", ".join(listed[:-1]), listed[-1])))
    return f"{background} {listing}."


def _text_facts(scene: Scene) -> Iterator[tuple[str, str, str]]:
    assert scene.label
    string, color = scene.label.string, scene.label.color
    yield "describe", "", caption(scene)
    yield "read", "", string
    yield "textcolor", "", color
    yield "bg", "", scene.background


def _shape_facts(scene: Scene) -> Iterator[tuple[str, str, str]]:
    """Yield (task, subject, truth) of a scene with shapes."""
    shapes = scene.shapes
    yield "describe", "", caption(scene)
    yield "bg", "", scene.background
    yield "count", "", str(len(shapes))
    for kind in SHAPES:
        alike = [s for s in shapes if s.shape == kind]
        yield "countx", f"{kind}s", str(len(alike))
        if len(alike) == 1:
            yield "color", kind, alike[0].color
    for color in SHAPE_COLORS:
        alike = [s for s in shapes if s.color == color]
        yield "countx", f"{color} shapes", str(len(alike))
        if len(alike) == 1:
            yield "shape", color, alike[0].shape
    for s in shapes:
        yield "at", s.position, _a(s.name)
        yield "pos", s.name, s.position
        yield "where", s.name, _boxes([s], scene.size)
    yield "whereall", "", _boxes(shapes, scene.size)
    names = {s.name for s in shapes}
    for color in SHAPE_COLORS:
        for kind in SHAPES:
            yield "exist", _a(f"{color} {kind}"), "Yes" if f"{color} {kind}" in names else "No"


def _a(name: str) -> str:
    return f"an {name}" if name.startswith("o") else f"a {name}"


def _boxes(shapes: Sequence[Shape], size: tuple[int, int]) -> str:
    """Write boxes as the checkpoint does: 0..1000 across the picture's width and height."""
    sides = (*size, *size)
    found = []
    for shape in shapes:
        box = [round(v / n * 1000) for v, n in zip(shape.bbox, sides, strict=True)]
        found.append({"bbox_2d": box, "label": shape.name})
    return json.dumps(found)


# -- judging -----------------------------------------------------------------------------------


def is_correct(question: Question, answer: str) -> bool:
    """Judge an answer: words must be exact; boxes need the labels and an IoU of 0.5 each."""
    if question.task == "zoom":
        box, wanted = read_zoom(answer), read_zoom(question.truth)
        return box is not None and wanted is not None and iou(box, wanted) >= 0.5
    if question.task not in BOX_TASKS:
        return answer.strip() == question.truth
    truth, given = read_boxes(question.truth), read_boxes(answer)
    return [label for label, _ in sorted(truth)] == [label for label, _ in sorted(given)] and all(
        iou(a, b) >= 0.5 for (_, a), (_, b) in zip(sorted(truth), sorted(given), strict=True)
    )


def box_overlaps(truth: str, answer: str) -> list[float]:
    """For each true box the IoU with the answer's first box of that label; 0 where it has none."""
    given: dict[str, Box] = {}
    for label, box in read_boxes(answer):
        given.setdefault(label, box)
    return [iou(box, given[label]) if label in given else 0.0 for label, box in read_boxes(truth)]


def read_boxes(answer: str) -> list[tuple[str, Box]]:
    """Read (label, box) pairs, 0..1000, from an answer in JSON; one of another form holds none."""
    try:
        pairs = [(str(item["label"]), tuple(item["bbox_2d"])) for item in json.loads(answer)]
        good = all(len(box) == 4 and all(0 <= v <= 1000 for v in box) for _, box in pairs)
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return pairs if good else []


def read_zoom(answer: str) -> Box | None:
    """Read the box, 0..1000, from the text of a call of `ZOOM`; None if it is no such call."""
    match = re.fullmatch(r"<tool_call>\n(.+)\n</tool_call>", answer.strip())
    try:
        call = json.loads(match[1]) if match else {}
        box = tuple(call["arguments"]["bbox_2d"]) if call.get("name") == "zoom" else ()
        good = len(box) == 4 and all(0 <= v <= 1000 for v in box)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return box if good else None


def iou(a: Box, b: Box) -> float:
    """Return the intersection over the union of two x0, y0, x1, y1 boxes."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(0.0, x1 - x0) * max(0.0, y1 - y0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0
