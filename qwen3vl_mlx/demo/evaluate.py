"""`python -m qwen3vl_mlx.demo.evaluate`: what the demo checkpoint answers rightly, task by task.

The questions are about pictures it never saw (but those of no picture are the ones it learnt).
With --reference, transformers answers them too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx import cli
from qwen3vl_mlx.demo.questions import (
    BOX_TASKS,
    WORDINGS,
    ZOOM,
    Question,
    box_overlaps,
    is_correct,
    pair_questions,
    questions,
    text_questions,
    zoom_questions,
)
from qwen3vl_mlx.demo.scenes import PILLOW_FONT, Scene, make_scene, retouch
from qwen3vl_mlx.demo.thinking import write_twin

if TYPE_CHECKING:
    from PIL import Image

    from qwen3vl_mlx.engine.output import Completion

FIRST_SEED = 7_000_000  # far from those of the training
MAX_TOKENS = 200
DTYPES = ("float32", "bfloat16")
_PAIR_TASKS = ("which", "countin", "describein")
_TEXT_TASKS = ("read", "textcolor")
_NO_PICTURE = ("sum", "talk")


@dataclass(frozen=True)
class Asked:
    """A question, and the pictures it is about as they are shown."""

    question: Question
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Score:
    """How a task went: `iou` is the mean over the true boxes, None where there are none."""

    task: str
    questions: int
    accuracy: float
    iou: float | None


def held_out(
    number: int, *, retouched: bool = False, other_font: bool = False, tasks: Sequence[str] = ()
) -> list[Asked]:
    """`number` questions a task (where there are so many), at most two of a task a scene.

    Every other scene is a wide one. tasks: which to ask; none is all.
    """
    wanted = dict.fromkeys(tasks or WORDINGS, number)
    asked: list[Asked] = []

    def take(found: Sequence[Question], images: tuple[Image.Image, ...], most: int) -> None:
        taken: dict[str, int] = defaultdict(int)
        rng = Random(f"held out {len(asked)}")
        for question in rng.sample(found, len(found)):  # in a row, some answers come too often
            task = question.task
            if wanted.get(task, 0) and taken[task] < most:
                taken[task] += 1
                wanted[task] -= 1
                asked.append(Asked(question, images))

    def show(scene: Scene) -> Image.Image:
        return retouch(scene.draw(), scene.seed) if retouched else scene.draw()

    take(text_questions(), (), number)
    font = PILLOW_FONT if other_font else None
    for seed in count(FIRST_SEED, 2):
        missing = {task for task, left in wanted.items() if left and task not in _NO_PICTURE}
        if not missing:
            return asked
        wide = seed % 4 == 0
        first, second = (make_scene(seed + i, kind="shapes", wide=wide) for i in range(2))
        if missing - {*_PAIR_TASKS, *_TEXT_TASKS}:
            take([*questions(first), *zoom_questions(first)], (show(first),), 2)
        if missing & {*_PAIR_TASKS}:
            take(pair_questions(first, second), (show(first), show(second)), 2)
        if missing & {*_TEXT_TASKS, "describe", "bg"}:
            text = make_scene(seed, kind="text", wide=wide, font=font)
            take(questions(text), (show(text),), 1)
    raise AssertionError("unreachable")


def library_answers(
    asked: Sequence[Asked], model: Path | str, quantize: str | None, dtype: str
) -> Iterator[str]:
    """This library's greedy answers. dtype: of all that is not quantized, an MLX name."""
    import mlx.core as mx

    from qwen3vl_mlx.api import load
    from qwen3vl_mlx.engine.output import collect

    loaded = load(model, quantize=quantize, dtype=getattr(mx, dtype))
    for start in range(0, len(asked), 16):
        with ExitStack() as stack:
            streams = [
                stack.enter_context(
                    loaded.stream(
                        each.question.question,
                        images=each.images,
                        temperature=0,
                        max_tokens=MAX_TOKENS,
                        tools=[dict(ZOOM)] if each.question.task == "zoom" else None,
                    )
                )
                for each in asked[start : start + 16]
            ]
            yield from (_said(collect(stream)) for stream in streams)


def _said(completion: Completion) -> str:
    """What was said after any thoughts, with tool calls as they are written."""
    calls = [
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'
        for call in completion.tool_calls
    ]
    return completion.text + "\n".join(calls)


def reference_answers(asked: Sequence[Asked], model: Path, guesses: Sequence[str]) -> Iterator[str]:
    """The greedy answers of transformers, in float32. guesses: answers that may be the same."""
    from qwen3vl_mlx.demo.reference import Reference

    reference = Reference(model)
    for each, guess in zip(asked, guesses, strict=True):
        yield reference.answer(
            each.images,
            each.question.question,
            MAX_TOKENS,
            guess=guess,
            zoom=each.question.task == "zoom",
        )


def scores(asked: Sequence[Asked], answers: Sequence[str]) -> list[Score]:
    """Accuracy by task, in the order of `WORDINGS`."""
    right: dict[str, list[bool]] = defaultdict(list)
    overlaps: dict[str, list[float]] = defaultdict(list)
    for each, answer in zip(asked, answers, strict=True):
        task = each.question.task
        right[task].append(is_correct(each.question, answer))
        if task in BOX_TASKS:
            overlaps[task] += box_overlaps(each.question.truth, answer)
    return [
        Score(t, len(right[t]), fmean(right[t]), fmean(overlaps[t]) if overlaps[t] else None)
        for t in WORDINGS
        if right[t]
    ]


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.demo.evaluate"
) -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    return cli.run(lambda: run(args), debug=args.debug)


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--model", default="demo", help="a folder (default: the bundled checkpoint)")
    p.add_argument("--questions", type=int, default=200, metavar="N", help="a task (default 200)")
    p.add_argument("--tasks", default="", metavar="A,B", help=f"of {', '.join(WORDINGS)}")
    p.add_argument("--quantize", metavar="NAME", help='quantize while loading: "8bit", "4bit"')
    p.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="to compute in (default float32)"
    )
    p.add_argument("--retouched", action="store_true", help="pictures resized and saved as JPEG")
    p.add_argument("--other-font", action="store_true", help="texts in a font it never saw")
    p.add_argument("--thinking", action="store_true", help="ask through the Thinking template")
    p.add_argument("--reference", action="store_true", help="ask transformers too, in float32")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def run(args: argparse.Namespace) -> None:
    """Measure as `args` say and print. Raises Qwen3VLError."""
    from qwen3vl_mlx import hub
    from qwen3vl_mlx.errors import InputError

    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    if unknown := sorted({*tasks} - {*WORDINGS}):
        raise InputError(f"--tasks: no task {unknown[0]!r}; use some of {', '.join(WORDINGS)}")
    if args.questions < 1:
        raise InputError(f"--questions must be at least 1, got {args.questions}")
    if args.reference and (args.quantize or args.dtype != "float32"):
        raise InputError("--reference answers in float32; leave out --quantize and --dtype")
    if args.reference and args.thinking:
        raise InputError("--reference answers without thoughts; leave out --thinking")
    folder = hub.resolve(args.model)
    asked = held_out(
        args.questions, retouched=args.retouched, other_font=args.other_font, tasks=tasks
    )
    with TemporaryDirectory() as place:
        asking = write_twin(Path(place) / "thinking", folder) if args.thinking else folder
        answers = library_answers(asked, asking, args.quantize, args.dtype)
        given = shown(answers, len(asked), "library")
    reference = (
        shown(reference_answers(asked, folder, given), len(asked), "transformers")
        if args.reference
        else None
    )
    if args.json:
        print(json.dumps(report(asked, given, reference)))
    else:
        print(table(asked, given, reference))


def shown(answers: Iterator[str], total: int, name: str) -> list[str]:
    """The answers as a list, with a bar on stderr where that is a terminal."""
    from tqdm import tqdm

    return list(tqdm(answers, name, total, leave=False, disable=not sys.stderr.isatty()))


def report(
    asked: Sequence[Asked], given: Sequence[str], reference: Sequence[str] | None
) -> dict[str, Any]:
    """Everything measured, ready for JSON."""
    found: dict[str, Any] = {"tasks": [vars(score) for score in scores(asked, given)]}
    if reference is not None:
        found["reference"] = [vars(score) for score in scores(asked, reference)]
        found["differences"] = [
            {"task": e.question.task, "question": e.question.question, "library": a, "reference": b}
            for e, a, b in zip(asked, given, reference, strict=True)
            if a != b
        ]
    return found


def table(asked: Sequence[Asked], given: Sequence[str], reference: Sequence[str] | None) -> str:
    """The scores for people."""
    columns = [scores(asked, given)] + ([scores(asked, reference)] if reference else [])
    names = ("library", "transformers")[: len(columns)]
    lines = [f"{'task':<12}{'questions':>9}" + "".join(f"{name:>22}" for name in names)]
    lines += [
        f"{row[0].task:<12}{row[0].questions:>9}" + "".join(map(_cell, row))
        for row in zip(*columns, strict=True)
    ]
    if reference:
        same = sum(a == b for a, b in zip(given, reference, strict=True))
        lines.append(f"\n{same} of {len(asked)} answers are the same, word for word")
    return "\n".join(lines)


def _cell(score: Score) -> str:
    overlap = "" if score.iou is None else f", IoU {score.iou:.3f}"
    return f"{score.accuracy:.3f}{overlap}".rjust(22)


if __name__ == "__main__":
    sys.exit(main())
