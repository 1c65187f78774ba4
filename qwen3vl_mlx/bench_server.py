"""`python -m qwen3vl_mlx.bench --server`: what streaming clients wait for, and what they get.

Each number of clients meets a fresh server, of ours and of mlx-vlm's in turn, and together they ask
the same questions, each about a picture of its own. Every answer is compared with the one that the
same server gave, in another process, when it was asked nothing else.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.bench_engine import EACH
from qwen3vl_mlx.bench_server_clients import (
    Answer,
    Question,
    Server,
    Side,
    answers_alone,
    ask,
    question,
    serving,
)
from qwen3vl_mlx.demo.scenes import make_scene
from qwen3vl_mlx.processing.tokenizer import Tokenizer

QUESTIONS = 128  # of each measurement
CLIENTS = (1, 8, 32)
_LIMIT_SEC = 600.0  # then a measurement asks nothing more
CAPTIONS = {
    "first_p50_sec": "first token, p50",
    "first_p99_sec": "first token, p99",
    "gap_p50_sec": "next tokens, p50",
    "gap_p99_sec": "next tokens, p99",
    "tokens_per_sec": "all clients",
}

Alone: TypeAlias = Mapping[str, Sequence[Answer]]  # by side


def make_questions(count: int, max_tokens: int, pixels: int | None = None) -> list[Question]:
    """Short questions, each about a picture of its own. pixels: about as many in each."""
    return [
        {**question(EACH[i % len(EACH)], _picture(i, pixels), max_tokens), **_budget(pixels)}
        for i in range(count)
    ]


def _picture(seed: int, pixels: int | None) -> bytes:
    """A drawn picture as a PNG file."""
    from PIL import Image

    picture = make_scene(seed, kind="shapes").draw()
    if pixels is not None:
        scale = math.sqrt(pixels / (picture.width * picture.height))
        size = (math.ceil(picture.width * scale), math.ceil(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _budget(pixels: int | None) -> dict[str, int]:
    """Fields that keep both servers from choosing another size."""
    return {} if pixels is None else {"min_pixels": pixels // 2, "max_pixels": 2 * pixels}


def compare(
    sides: Sequence[Side],
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    clients: Sequence[int],
) -> dict[str, Any]:
    """Measure every side with every number of clients. Raises Qwen3VLError.

    tokenizer: the ruler for both sides' answers.
    """
    alone: dict[str, list[Answer]] = {}
    for side in sides:
        with serving(side) as server:
            alone[side.name] = answers_alone(server, questions)
    found: dict[str, dict[int, dict[str, Any]]] = {side.name: {} for side in sides}
    for count in clients:
        for side in sides:
            with serving(side) as server:
                began = time.perf_counter()
                with ThreadPoolExecutor(count) as pool:
                    until = time.monotonic() + _LIMIT_SEC
                    answers = list(pool.map(partial(_ask_until, until, server), questions))
                seconds = time.perf_counter() - began
            found[side.name][count] = judge(answers, alone[side.name], tokenizer, seconds)
    return make_report(found, alone)


def _ask_until(until: float, server: Server, question: Question) -> Answer:
    if time.monotonic() > until:
        return Answer("", problem=f"not asked: {_LIMIT_SEC:.0f} s had passed")
    return ask(server, question)


def judge(
    answers: Sequence[Answer], alone: Sequence[Answer], tokenizer: Tokenizer, seconds: float
) -> dict[str, Any]:
    """What the clients of one server saw in so many seconds."""
    problems = [answer.problem for answer in answers if answer.problem]
    first = [answer.times[0] for answer in answers if answer.times]
    gaps = [b - a for answer in answers for a, b in pairwise(answer.times)]
    tokens = sum(len(tokenizer.encode(answer.text)) for answer in answers)
    values = {"tokens_per_sec": tokens / seconds}
    for name, times in (("first", first), ("gap", gaps)):
        for percent in (50, 99):
            values[f"{name}_p{percent}_sec"] = float(np.percentile(times or [math.nan], percent))
    return {
        "values": {key: values[key] for key in CAPTIONS},
        "asked": len(answers),
        "as_alone": sum(a.is_as(b) for a, b in zip(answers, alone, strict=True)),
        "failed": len(problems),
        "problems": sorted(set(problems))[:5],
    }


def make_report(found: Mapping[str, Mapping[int, Any]], alone: Alone) -> dict[str, Any]:
    """Both sides and, for each number of clients, how many times as good ours is."""
    ours, *theirs = alone.values()
    report: dict[str, Any] = {
        "device": str(mx.default_device()),
        "questions": len(ours),
        "different_answers": len({answer.text for answer in ours}),
        "sides": found,
    }
    if theirs:
        pairs = zip(ours, theirs[0], strict=True)
        report["same_alone"] = [sum(a.text == b.text for a, b in pairs), len(ours)]
        here, there = found.values()
        report["times_as_good"] = {
            count: _gains(here[count]["values"], there[count]["values"]) for count in here
        }
    return report


def _gains(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Shorter times and higher rates are better."""
    return {
        key: ours[key] / theirs[key] if key.endswith("_per_sec") else theirs[key] / ours[key]
        for key in ours
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for people: a line per measurement, a column per side."""
    sides = report["sides"]
    gains = report.get("times_as_good", {})
    names = "".join(f"{name:>20}" for name in sides) + (f"{'times as good':>16}" if gains else "")
    lines = [
        f"{report['device']}: {report['questions']} questions about as many pictures, with "
        f"{report['different_answers']} different answers"
    ]
    for count in next(iter(sides.values())):
        lines += ["", f"{f'{count} at once':<20}{names}"]
        for key, caption in CAPTIONS.items():
            cells = [_cell(key, side[count]["values"][key]) for side in sides.values()]
            gain = f"{gains[count][key]:>14.2f} x" if gains else ""
            lines.append(f"{caption:<20}" + "".join(f"{cell:>20}" for cell in cells) + gain)
        for key, caption in (("as_alone", "answers as alone"), ("failed", "failed")):
            cells = [f"{side[count][key]} of {side[count]['asked']}" for side in sides.values()]
            lines.append(f"{caption:<20}" + "".join(f"{cell:>20}" for cell in cells))
    if "same_alone" in report:
        same, asked = report["same_alone"]
        lines += ["", f"asked alone, both servers answer alike: {same} of {asked}"]
    for name, counts in sides.items():
        problems = {problem for found in counts.values() for problem in found["problems"]}
        lines += [f"problem: {name}: {problem}" for problem in sorted(problems)[:10]]
    return "\n".join(lines)


def _cell(key: str, value: float) -> str:
    return f"{value:,.0f} tokens/s" if key.endswith("_per_sec") else f"{1e3 * value:,.1f} ms"
