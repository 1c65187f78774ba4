"""Rows of training data for the demo checkpoint: pictures, and several questions about them.

A row is a conversation's beginning, then questions that do not see each other: one pass over the
pictures serves them all. Beside the tokens stands what each patch shows, for helper losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from tokenizers import Tokenizer

from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.demo.questions import (
    BOX_TASKS,
    ZOOM,
    Question,
    pair_questions,
    questions,
    text_questions,
    thought,
    zoom_questions,
)
from qwen3vl_mlx.demo.scenes import COLORS, PLACES, SHAPES, Scene, font_of, make_scene, retouch

PATCH = 16
MERGE = 2
CELL = PATCH * MERGE
MIN_PIXELS, MAX_PIXELS = 9216, 61440
COLOR_NAMES = tuple(COLORS)
KINDS = ("none", "text", *SHAPES)
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_CHARACTER = len(CHARACTERS)

# how often a task is asked, where the scene has it
TASK_WEIGHTS = {
    "describe": 1.2, "count": 0.7, "countx": 1.2, "color": 0.8, "shape": 0.8, "at": 1.0,
    "pos": 0.8, "exist": 1.2, "where": 2.4, "whereall": 1.0, "bg": 0.3, "read": 2.0,
    "textcolor": 0.5, "which": 3.0, "countin": 0.7, "describein": 0.7, "sum": 2.0, "talk": 1.0,
    "zoom": 8.0,
}  # fmt: skip
SYSTEM = (
    "You are a helpful assistant.", "You are a helpful vision assistant.", "Answer briefly.",
    "Be short.", "Answer in one word.", "You look at pictures.",
)  # fmt: skip


@dataclass(frozen=True)
class Mix:
    """What rows are made of."""

    wide: float = 0.4  # share of the rows
    pairs: float = 0.15  # rows with two pictures
    none: float = 0.04  # rows without one
    text: float = 0.25  # text, of the rows with one picture
    fonts: float = 0.4  # another font, of the texts
    retouched: float = 0.25  # resized or written as JPEG, of the pictures
    dialogues: float = 0.1  # rows whose questions follow each other
    system: float = 0.1  # rows with a system message
    boxes: float = 1.0  # how much oftener than at first boxes are asked, and weigh
    thinking: float = 0.0  # share of the questions
    tools: float = 0.0  # share of the rows of one picture of shapes; needs long rows
    words: int = 288  # tokens a row


@dataclass
class Row:
    """One row: token ids, their M-RoPE positions, segments (0 is seen by all), loss weights.

    questions: where the answer's tokens begin, where they end, and what is asked.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    questions: list[tuple[int, int, Question]] = field(default_factory=list)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return ids


@cache
def fonts() -> tuple[str, ...]:
    """Fonts that come with matplotlib; Pillow's own is kept for the tests."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "STIXGeneralBol", "cmb10")
    return tuple(str(folder / f"{name}.ttf") for name in names)


@cache
def tools_message() -> str:
    """The system message of a conversation with the tool `ZOOM`, as the chat template writes it."""
    from transformers import AutoTokenizer

    user = "<|im_start|>user\n"
    text = AutoTokenizer.from_pretrained(CHECKPOINT).apply_chat_template(
        [{"role": "user", "content": ""}],
        tools=[dict(ZOOM)],
        tokenize=False,
    )
    assert isinstance(text, str)
    return text[: text.index(user)]


# -- pictures ----------------------------------------------------------------------------------


def processed_size(width: int, height: int) -> tuple[int, int]:
    """The size that the image processor makes of a picture's, in pixels."""
    w, h = (max(CELL, round(side / CELL) * CELL) for side in (width, height))
    if w * h > MAX_PIXELS:
        beta = math.sqrt(width * height / MAX_PIXELS)
        w, h = (max(CELL, math.floor(s / beta / CELL) * CELL) for s in (width, height))
    elif w * h < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (width * height))
        w, h = (math.ceil(s * beta / CELL) * CELL for s in (width, height))
    return w, h


def to_patches(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Resize and cut a picture: (patches in merged order, 3 * 16 * 16), levels of 255."""
    size = processed_size(*image.size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    columns, rows = size[0] // CELL, size[1] // CELL
    pixels = np.asarray(image).reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    cut: npt.NDArray[np.uint8] = pixels.transpose(0, 3, 1, 4, 6, 2, 5)
    return cut.reshape(rows * columns * 4, -1)


def in_merged_order(grid: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(rows, columns, n) of patches to the order of the image processor."""
    rows, columns, width = grid.shape
    blocks = grid.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, width)
    ordered: npt.NDArray[np.float32] = blocks.swapaxes(1, 2).reshape(rows * columns, width)
    return ordered


def targets(scene: Scene, columns: int, rows: int) -> npt.NDArray[np.float32]:
    """What each patch shows, in merged order: kind, colour, place, character, x0, y0, x1, y1.

    The edges are those of the thing, 0 to 1 across the picture. `columns` and `rows` are patches.
    """
    found = np.zeros((rows, columns, 8), np.float32)
    found[..., 1] = COLOR_NAMES.index(scene.background)
    found[..., 3] = NO_CHARACTER
    width, height = scene.size
    x = (np.arange(columns) + 0.5) / columns
    y = (np.arange(rows) + 0.5) / rows
    things = [(s.shape, s.color, s.bbox, PLACES.index(s.position)) for s in scene.shapes]
    if scene.label:
        things.append(("text", scene.label.color, scene.label.bbox, 0))
    nearest = np.full((rows, columns), np.inf)
    for kind, color, bbox, place in things:
        x0, y0, x1, y1 = (v / n for v, n in zip(bbox, (width, height) * 2, strict=True))
        # at least a quarter of the patch's width and height
        half = (0.25 / columns, 0.25 / rows)
        inside = np.outer(
            (y > y0 - half[1]) & (y < y1 + half[1]), (x > x0 - half[0]) & (x < x1 + half[0])
        )
        far = np.hypot.outer((y - (y0 + y1) / 2) * rows, (x - (x0 + x1) / 2) * columns)
        closer = inside & (far < nearest)
        nearest[closer] = far[closer]
        found[closer] = (
            KINDS.index(kind), COLOR_NAMES.index(color), place, NO_CHARACTER, x0, y0, x1, y1
        )  # fmt: skip
    if scene.label:
        _add_characters(found, scene, x)
    return in_merged_order(found)


def _add_characters(
    found: npt.NDArray[np.float32], scene: Scene, x: npt.NDArray[np.float64]
) -> None:
    label = scene.label
    assert label
    font = font_of(label.font_size, label.font)
    for i, character in enumerate(label.string):
        left, right = (
            (label.bbox[0] + font.getlength(label.string[:n])) / scene.size[0] for n in (i, i + 1)
        )
        inside = (found[..., 0] == 1) & ((x >= left) & (x < right))[None]
        found[inside, 3] = CHARACTERS.index(character)


# -- rows --------------------------------------------------------------------------------------


def make_row(
    rng: Random, seed: int, mix: Mix
) -> tuple[Row, list[npt.NDArray[np.uint8]], list[tuple[int, int]], list[npt.NDArray[np.float32]]]:
    """A row with its pictures' patches, grids (rows and columns of patches) and targets.

    `seed` and `seed` + 1 are those of its scenes.
    """
    scenes: list[Scene] = []
    share = rng.random()
    if share < mix.pairs:
        wide = rng.random() < mix.wide
        scenes = [make_scene(seed + i, kind="shapes", wide=wide) for i in range(2)]
        asked = pair_questions(*scenes)
    elif share < mix.pairs + mix.none:
        asked = text_questions()
    else:
        kind: Literal["shapes", "text"] = "text" if rng.random() < mix.text else "shapes"
        font = rng.choice(fonts()) if rng.random() < mix.fonts else None
        scenes = [make_scene(seed, kind=kind, wide=rng.random() < mix.wide, font=font)]
        asked = questions(scenes[0])
    row = Row()
    can_zoom = len(scenes) == 1 and bool(scenes[0].shapes)
    tools = can_zoom and mix.tools > 0 and rng.random() < mix.tools
    if tools:
        asked = [*asked, *zoom_questions(scenes[0])]
        _add(row, encode(tools_message()), 0)
    elif rng.random() < mix.system:
        _add(row, encode(f"<|im_start|>system\n{rng.choice(SYSTEM)}<|im_end|>\n"), 0)
    _add(row, encode("<|im_start|>user\n"), 0)
    patches, grids, shown = [], [], []
    for scene in scenes:
        image = scene.draw()
        if rng.random() < mix.retouched:
            image = retouch(image, scene.seed)
        cut = to_patches(image)
        width, height = processed_size(*image.size)
        grid = (height // PATCH, width // PATCH)
        patches.append(cut)
        grids.append(grid)
        shown.append(targets(scene, grid[1], grid[0]))
        _add_picture(row, grid)
    dialogue = rng.random() < mix.dialogues
    thoughts = _thoughts(rng, scenes, 0 if dialogue else mix.thinking)
    turns = zip(in_turn(rng, asked, mix.boxes), thoughts, strict=False)
    _add_questions(row, turns, mix, dialogue=dialogue)
    return row, patches, grids, shown


def in_turn(rng: Random, asked: Sequence[Question], boxes: float = 1.0) -> Iterator[Question]:
    """Questions in a random order, a task at a time by its weight, none twice."""
    weights = {**TASK_WEIGHTS, **{task: boxes * TASK_WEIGHTS[task] for task in BOX_TASKS}}
    by_task: dict[str, list[Question]] = {}
    for question in rng.sample(asked, len(asked)):
        by_task.setdefault(question.task, []).append(question)
    while by_task:
        tasks = list(by_task)
        task = rng.choices(tasks, [weights[t] for t in tasks])[0]
        yield by_task[task].pop()
        if not by_task[task]:
            del by_task[task]


def _add(row: Row, ids: Sequence[int], segment: int, weights: Sequence[float] = ()) -> None:
    start = max(row.positions[-1]) + 1 if row.positions else 0
    row.ids += ids
    row.positions += [(start + i,) * 3 for i in range(len(ids))]
    row.segments += [segment] * len(ids)
    row.weights += weights or [0.0] * len(ids)


def _add_picture(row: Row, grid: tuple[int, int]) -> None:
    _add(row, encode("<|vision_start|>"), 0)
    start = row.positions[-1][0] + 1
    rows, columns = grid[0] // MERGE, grid[1] // MERGE
    row.ids += encode("<|image_pad|>") * (rows * columns)
    row.positions += [(start, start + y, start + x) for y in range(rows) for x in range(columns)]
    row.segments += [0] * (rows * columns)
    row.weights += [0.0] * (rows * columns)
    [end] = encode("<|vision_end|>")
    row.ids.append(end)
    row.positions.append((start + max(rows, columns),) * 3)
    row.segments.append(0)
    row.weights.append(0.0)


def _thoughts(rng: Random, scenes: Sequence[Scene], share: float) -> Iterator[str | None]:
    """For each question of a row, what is thought before its answer; None is nothing."""
    while True:
        yield thought(scenes) if share > 0 and rng.random() < share else None


def _add_questions(
    row: Row, asked: Iterator[tuple[Question, str | None]], mix: Mix, *, dialogue: bool
) -> None:
    start = max(row.positions[-1]) + 1
    misses = 0
    for number, (question, thinking) in enumerate(asked, 1):
        ask = encode(f"{question.question}<|im_end|>\n<|im_start|>assistant\n")
        if dialogue and number > 1:
            ask = encode("\n<|im_start|>user\n") + ask
        answer = encode(f"{question.truth}<|im_end|>")
        weights = answer_weights(question, answer, mix.boxes)
        if thinking is not None:
            ask += encode("<think>\n")
            line = encode(f"{thinking}\n</think>\n\n")
            answer, weights = line + answer, [len(line) ** -0.5] * len(line) + weights
        if len(row.ids) + len(ask) + len(answer) > mix.words:
            misses += 1
            if misses > 3:
                return
            continue
        place = len(row.ids) + len(ask)
        row.questions.append((place, place + len(answer), question))
        _add(row, ask + answer, 0 if dialogue else number, [0.0] * len(ask) + weights)
        if not dialogue:
            first = len(row.positions) - len(ask) - len(answer)
            row.positions[first:] = [(start + i,) * 3 for i in range(len(ask) + len(answer))]


def answer_weights(question: Question, answer: Sequence[int], boxes: float) -> list[float]:
    """A long answer weighs more than a short one, but less than its length; last digits less."""
    weights = [len(answer) ** -0.5] * len(answer)
    if question.task in (*BOX_TASKS, "zoom"):
        run = 0
        for i, token in enumerate(answer):
            run = run + 1 if _is_digit(token) else 0
            if run == 3:  # the unit of a three-digit number is a guess
                weights[i] *= 0.2 * boxes
            elif run:
                weights[i] *= 1.5 * boxes
    return weights


@cache
def _is_digit(token: int) -> bool:
    text = tokenizer().id_to_token(token)
    return text is not None and text.isdigit()


# -- batches -----------------------------------------------------------------------------------


def make_batch(seed: int, step: int, rows: range, mix: Mix) -> dict[str, object]:
    """Some rows of a step, as arrays; the same for the same arguments.

    ids, segments (-1 is padding), weights: (rows, words); positions: (3, rows, words). Of all
    pictures together: patches (n, 768) uint8, targets (n, 8), grids (pictures, 3). questions: a
    list a row.
    """
    made = [
        make_row(Random(f"{seed} {step} {i}"), (1000 + seed) * 10**8 + (step * 100 + i) * 2, mix)
        for i in rows
    ]
    size = len(rows)
    length = mix.words
    ids = np.zeros((size, length), np.int64)
    positions = np.zeros((3, size, length), np.int64)
    segments = np.full((size, length), -1, np.int64)
    weights = np.zeros((size, length), np.float32)
    for i, (row, _, _, _) in enumerate(made):
        n = len(row.ids)
        ids[i, :n] = row.ids
        positions[:, i, :n] = np.array(row.positions).T
        segments[i, :n] = row.segments
        weights[i, :n] = row.weights
    grids = [(1, *grid) for _, _, found, _ in made for grid in found]
    return {
        "ids": ids,
        "positions": positions,
        "segments": segments,
        "weights": weights,
        "patches": np.concatenate([p for _, cut, _, _ in made for p in cut]),
        "grids": np.array(grids, np.int64),
        "targets": np.concatenate([t for _, _, _, shown in made for t in shown]),
        "questions": [row.questions for row, _, _, _ in made],
    }
