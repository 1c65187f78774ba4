"""`python -m qwen3vl_mlx.bench --engine`: what the caches, the batch and speculation bring.

Every answer is compared with the one that the same conversation got alone, with caches off. Answers
are greedy; where tokens per second count, they go on past end tokens to their full length, and are
compared up to their first one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, TypedDict

import mlx.core as mx

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.bench_measure import another_engine
from qwen3vl_mlx.demo.scenes import make_scene
from qwen3vl_mlx.engine.engine import EngineOptions
from qwen3vl_mlx.engine.output import Usage, collect
from qwen3vl_mlx.loading import default_dtype
from qwen3vl_mlx.processing.processor import Messages

Answer: TypeAlias = "list[int]"  # token ids up to an end token

AT_ONCE = 8
SMALL_PIXELS = 65_536  # of each of the pictures that are asked about at once, if not fewer
FIRST, SECOND = "Describe the image.", "What color is the background?"
EACH = (
    "Describe the image.", "What do you see?", "How many shapes are there?",
    "What color is the background?", "Detect all shapes.", "What is in the image?",
    "Count the shapes.", "Locate all shapes.",
)  # fmt: skip

_ALONE = EngineOptions(max_batch=1, prefix_cache_bytes=0, feature_cache_bytes=0)
CAPTIONS = {
    "first_sec": "first question",
    "second_sec": "second question",
    "same_sec": "new chat, same picture first",
    "words_first_sec": "words first, new picture",
    "moved_sec": "words first, known picture",
    "other_sec": "other picture, same words",
    "new_in_turn_per_sec": "new pictures, one by one",
    "new_at_once_per_sec": "new pictures, at once",
    "known_in_turn_per_sec": "known pictures, one by one",
    "known_at_once_per_sec": "known pictures, at once",
    "copied_per_sec": "copying",
    "copied_guessing_per_sec": "copying, prompt lookup",
    "copied_per_step": "copying, prompt lookup",
}
GAINS = {  # what is how many times as good as what
    "second question": ("first_sec", "second_sec"),
    "same picture, new chat": ("first_sec", "same_sec"),
    "same picture, moved": ("words_first_sec", "moved_sec"),
    "at once, new pictures": ("new_at_once_per_sec", "new_in_turn_per_sec"),
    "at once, known pictures": ("known_at_once_per_sec", "known_in_turn_per_sec"),
    "copying, prompt lookup": ("copied_guessing_per_sec", "copied_per_sec"),
}


@dataclass(frozen=True)
class EngineWorkload:
    """Conversations by name, with pictures as files of their final size."""

    model: str  # folder
    pixels: int
    small_pixels: int
    max_tokens: int
    float32: bool
    end_tokens: tuple[int, ...]
    conversations: Mapping[str, Messages]


class Round(TypedDict):
    """One round. `right`: for a measurement, how many answers of how many were as alone."""

    values: dict[str, float]
    right: dict[str, tuple[int, int]]


def make_workload(
    model: Qwen3VL, checkpoint: Path, folder: Path, *, pixels: int, max_tokens: int
) -> tuple[EngineWorkload, dict[str, Answer]]:
    """Draw pictures into `folder`, make up conversations, and answer each alone."""
    factor = model.processor.settings.factor
    small = min(pixels, SMALL_PIXELS)
    large_pictures = [_draw(folder, seed, pixels, factor) for seed in (1, 2)]
    pictures = [_draw(folder, seed, small, factor) for seed in range(3, 3 + AT_ONCE)]
    picture, other = large_pictures
    work = EngineWorkload(
        model=str(checkpoint),
        pixels=pixels,
        small_pixels=small,
        max_tokens=max_tokens,
        float32=default_dtype() == mx.float32,
        end_tokens=tuple(sorted(model.eos_token_ids)),
        conversations={
            "first": [_user(picture, FIRST)],
            "same": [_user(picture, SECOND)],
            "moved": [_user(SECOND, picture)],
            "other": [_user(other, FIRST)],
            **{str(i): [_user(p, EACH[i])] for i, p in enumerate(pictures)},
            **{f"copied {i}": [_user(p, FIRST)] for i, p in enumerate(pictures)},
        },
    )
    alone = another_engine(model, _ALONE)
    answers = {name: _ask(alone, work, name)[0] for name in work.conversations}
    later = {"second": ("first", SECOND)}
    later |= {name: (name, FIRST) for name in work.conversations if name.startswith("copied")}
    for name, (before, question) in later.items():
        said = _assistant(model.processor.tokenizer.decode(answers[before]))
        conversation = [*work.conversations[before], said, _user(question)]
        conversations = {**work.conversations, name: conversation}
        work = replace(work, conversations=conversations)
        answers[name] = _ask(alone, work, name)[0]
    alone.close()
    return work, answers


def _draw(folder: Path, seed: int, pixels: int, factor: int) -> Path:
    from PIL import Image

    side = max(1, round(math.sqrt(pixels) / factor)) * factor
    path = folder / f"{seed}-{side}.png"
    scene = make_scene(seed, kind="shapes").draw()
    scene.resize((side, side), Image.Resampling.NEAREST).save(path)
    return path


def _user(*parts: Path | str) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": str(part)}
        for part in parts
    ]
    return {"role": "user", "content": content}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _ask(
    model: Qwen3VL, work: EngineWorkload, name: str, *, full: bool = False
) -> tuple[Answer, Usage]:
    """Answer a conversation; `full` goes on past end tokens."""
    answer = model.stream(
        work.conversations[name],
        temperature=0,
        max_tokens=work.max_tokens,
        sampling={"ignore_eos": full},
        min_pixels=work.small_pixels,
        max_pixels=work.pixels,
    )
    usage = collect(answer).usage
    return up_to_end(answer.handle.tokens, work.end_tokens), usage


def up_to_end(tokens: Sequence[int], end_tokens: Sequence[int]) -> Answer:
    """The tokens before the first end token."""
    ends = [i for i, token in enumerate(tokens) if token in end_tokens]
    return list(tokens[: ends[0]] if ends else tokens)


def measure(
    model: Qwen3VL, guessing: Qwen3VL, work: EngineWorkload, alone: Mapping[str, Answer]
) -> Round:
    """One round with empty caches. guessing: the same model with prompt lookup."""
    result: Round = {"values": {}, "right": {}}
    _measure_caches(model, work, alone, result)
    _measure_batch(model, work, alone, result)
    _measure_copying(model, guessing, work, alone, result)
    return result


# Conversation, what its first token is measured as, and whether the caches are emptied before it.
# "other" has the grid and the words of "first": only the pictures tell them apart.
STEPS: tuple[tuple[str, str, bool], ...] = (
    ("first", "first_sec", True),
    ("second", "second_sec", False),
    ("same", "same_sec", False),
    ("other", "other_sec", False),
    ("moved", "words_first_sec", True),
    ("first", "", True),
    ("moved", "moved_sec", False),
)


def _measure_caches(
    model: Qwen3VL, work: EngineWorkload, alone: Mapping[str, Answer], result: Round
) -> None:
    for name, key, empty in STEPS:
        if empty:
            model.engine.clear_caches()
        answer, usage = _ask(model, work, name)
        if key:
            result["values"][key] = usage.time_to_first_token_sec
            result["right"][key] = (int(answer == alone[name]), 1)


def _measure_batch(
    model: Qwen3VL, work: EngineWorkload, alone: Mapping[str, Answer], result: Round
) -> None:
    names = [str(i) for i in range(AT_ONCE)]
    for threads, how in ((1, "in_turn"), (AT_ONCE, "at_once")):
        model.engine.clear_caches()
        for state in ("new", "known"):
            began = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                answers = list(pool.map(lambda name: _ask(model, work, name, full=True), names))
            tokens = sum(usage.completion_tokens for _, usage in answers)
            key = f"{state}_{how}_per_sec"
            result["values"][key] = tokens / (time.perf_counter() - began)
            pairs = zip(names, answers, strict=True)
            right = sum(answer == alone[name] for name, (answer, _) in pairs)
            result["right"][key] = (right, len(names))


def _measure_copying(
    model: Qwen3VL,
    guessing: Qwen3VL,
    work: EngineWorkload,
    alone: Mapping[str, Answer],
    result: Round,
) -> None:
    """Questions that were asked, and answered, before in the same conversation."""
    names = [name for name in work.conversations if name.startswith("copied")]
    for asked, key in ((model, "copied_per_sec"), (guessing, "copied_guessing_per_sec")):
        answers = [_ask(asked, work, name) for name in names]
        right = sum(answer == alone[name] for name, (answer, _) in zip(names, answers, strict=True))
        usages = [usage for _, usage in answers]
        # The first token of an answer comes from the prompt's pass.
        tokens = sum(usage.completion_tokens - 1 for usage in usages)
        seconds = sum(usage.total_completion_time_sec for usage in usages)
        result["values"][key] = tokens / max(seconds, 1e-9)
        result["right"][key] = (right, len(names))
    result["values"]["copied_per_step"] = tokens / max(1, sum(u.decode_steps for u in usages))


def make_report(
    work: EngineWorkload,
    rounds: Mapping[str, Sequence[Round]],
    alone: Mapping[str, Mapping[str, Answer]],
    runs: int,
) -> dict[str, Any]:
    """For each side the last `runs` rounds: spreads, right answers, gains.

    alone: by package, its answers with caches off.
    """
    sides = {name: _side(counted[-runs:]) for name, counted in rounds.items()}
    ours, *theirs = alone.values()
    report: dict[str, Any] = {
        "model": work.model,
        "device": str(mx.default_device()),
        "pixels": work.pixels,
        "small_pixels": work.small_pixels,
        "max_tokens": work.max_tokens,
        "runs": runs,
        "different_answers": len({tuple(ours[str(i)]) for i in range(AT_ONCE)}),
        "sides": sides,
    }
    if theirs:
        report["same_alone"] = (sum(theirs[0][name] == ours[name] for name in ours), len(ours))
    return report


def _side(rounds: Sequence[Round]) -> dict[str, Any]:
    keys = list(rounds[-1]["values"])
    spreads = {}
    for key in keys:
        values = [each["values"][key] for each in rounds]
        spreads[key] = {"median": median(values), "min": min(values), "max": max(values)}
    right = {
        key: [sum(each["right"][key][i] for each in rounds) for i in range(2)]
        for key in rounds[-1]["right"]
    }
    gains = {}
    for name, (above, below) in GAINS.items():
        if above in spreads and below in spreads:
            gains[name] = spreads[above]["median"] / spreads[below]["median"]
    return {"values": spreads, "right": right, "gains": gains}


def table(report: Mapping[str, Any]) -> str:
    """The report for people: a line per measurement, a column per side."""
    sides = report["sides"]
    lines = [
        f"{report['model']} on {report['device']}: picture of {report['pixels']:,} pixels, "
        f"{AT_ONCE} of {report['small_pixels']:,} with {report['different_answers']} different "
        f"answers, at most {report['max_tokens']} tokens, {report['runs']} runs",
        "",
        f"{'median, right answers':<30}" + "".join(f"{name:>34}" for name in sides),
    ]
    for key, caption in CAPTIONS.items():
        cells = [_cell(key, side) for side in sides.values()]
        lines.append(f"{caption:<30}" + "".join(f"{cell:>34}" for cell in cells))
    lines += ["", f"{'gains':<30}" + "".join(f"{name:>34}" for name in sides)]
    for name in GAINS:
        gains = [side["gains"].get(name) for side in sides.values()]
        cells = [f"{gain:.1f} x" if gain is not None else "-" for gain in gains]
        lines.append(f"{name:<30}" + "".join(f"{cell:>34}" for cell in cells))
    if "same_alone" in report:
        same, asked = report["same_alone"]
        lines += ["", f"asked alone with caches off, both answer alike: {same} of {asked}"]
    return "\n".join(lines)


def _cell(key: str, side: Mapping[str, Any]) -> str:
    if key not in side["values"]:
        return "-"
    value = side["values"][key]["median"]
    if key.endswith("_per_step"):
        return f"{value:.2f} tokens/pass"
    text = f"{value:,.0f} tokens/s" if key.endswith("_per_sec") else f"{1e3 * value:,.1f} ms"
    right, asked = side["right"][key]
    return f"{text}  {right:>3} of {asked}"
