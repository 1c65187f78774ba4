"""Ask transformers about drawn scenes and keep its answers, for tests without torch.

Writes tests/data/demo_scenes_transformers.json, and its answers in tests/data/demo_answers.json.
Needs torch and transformers (extra `dev`). Run `python tests/make_demo_answers.py` from the
repository's root after a change of the scenes or of the bundled checkpoint; it takes a minute. The
answers are greedy, in float32. Each question is one user message of one picture, then the text;
there is no system message.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from qwen3vl_mlx.demo.questions import is_correct, questions
from qwen3vl_mlx.demo.reference import Reference
from qwen3vl_mlx.demo.scenes import make_scene

DATA = Path(__file__).parent / "data"
DRAWN = DATA / "demo_scenes_transformers.json"
EXAMPLES = DATA / "demo_answers.json"


def records(reference: Reference, scenes: int) -> list[dict[str, Any]]:
    """Ask for a description of each scene of seeds 0, 1, ... and one question of its own."""
    asked = []
    for seed in range(scenes):
        scene = make_scene(seed)
        image = scene.draw()
        described, *others = questions(scene)
        for question in (described, Random(seed).choice(others)):
            answer = reference.answer([image], question.question, guess=question.truth)
            asked.append(
                {
                    "seed": seed,
                    "kind": "text" if scene.text else "shapes",
                    "question": question.question,
                    "answer": answer,
                    "correct": is_correct(question, answer),
                }
            )
    return asked


def answer_examples(reference: Reference) -> str:
    """The examples' file anew, laid out as it is, with today's answers. Returns its text."""
    scenes: list[dict[str, Any]] = json.loads(EXAMPLES.read_text())
    for scene in scenes:
        with Image.open(DATA / "demo" / scene["file"]) as file:
            image = file.convert("RGB")
        for record in scene["questions"]:
            record["transformers"] = reference.answer(
                [image], record["question"], guess=record["truth"]
            )
    return "[\n" + ",\n".join(map(example_text, scenes)) + "\n]\n"


def example_text(scene: dict[str, Any]) -> str:
    keys = ("file", "size", "background", "objects", "text")
    *first, objects, text = (f"{json.dumps(key)}: {json.dumps(scene[key])}" for key in keys)
    asked = ",\n".join(f"   {json.dumps(record)}" for record in scene["questions"])
    head = f" {{{', '.join(first)},\n  {objects},\n  {text},\n"
    return f'{head}  "questions": [\n{asked}\n  ]}}'


def main() -> None:
    reference = Reference()
    asked = records(reference, scenes=50)
    lines = ",\n".join(json.dumps(record) for record in asked)
    DRAWN.write_text(f"[\n{lines}\n]\n")
    print(f"{DRAWN}: {sum(r['correct'] for r in asked)} of {len(asked)} right")
    EXAMPLES.write_text(answer_examples(reference))


if __name__ == "__main__":
    main()
