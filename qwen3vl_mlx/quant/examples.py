"""Questions about pictures with their answers, as prompts that calibration and evaluation read.

The answer's tokens stand behind the generation prompt, so one pass gives the distribution of each.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.demo.questions import Question, questions
from qwen3vl_mlx.demo.scenes import Scene, make_scene
from qwen3vl_mlx.engine.request import Stream
from qwen3vl_mlx.engine.sampling import SamplingParams
from qwen3vl_mlx.errors import ImageError, InputError
from qwen3vl_mlx.media import load_image
from qwen3vl_mlx.media_decode import HEAD_BYTES, format_of
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.processing.processor import MaxPixels, Processor
from qwen3vl_mlx.processing.prompt import Prompt

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL

# Seeds of drawn scenes, thousands apart: no count in use makes them meet. The demo learnt from
# pictures of another generator, so all of these are new to it.
CALIBRATION_SEED = 1_000_000
EVALUATION_SEED = 4_000_000
TASK_SEED = 5_000_000

MAX_PIXELS = 512 * 32 * 32
"""Pixel limit of a picture from a folder: 512 visual tokens, whose features stay in memory."""

PROMPTS = (
    "Describe this picture in detail.",
    "Read all the text in this picture. If there is none, say so.",
    "List the main objects as JSON, each with its bbox_2d and label.",
    "Count the objects of each kind in this picture.",
    "Where and when could this picture have been taken? Give your reasons.",
    "Write one sentence that says what matters most in this picture.",
)

_END = "<|im_end|>"

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A prompt whose last tokens are its answer, from `answer_start` on.

    The distribution of answer token i is the model's at position i - 1.
    """

    name: str
    prompt: Prompt
    answer_start: int

    @property
    def answer_ids(self) -> npt.NDArray[np.int32]:
        """The answer's n tokens, (n,)."""
        return self.prompt.token_ids[self.answer_start :]

    @property
    def rows(self) -> slice:
        """The n positions that predict the answer."""
        return slice(self.answer_start - 1, len(self.prompt.token_ids) - 1)


def with_answer(name: str, prompt: Prompt, answer_ids: Sequence[int]) -> Example:
    """`prompt` with its answer, at the positions that decoding gives it. Raises InputError."""
    if not answer_ids:
        raise InputError(f"example {name} has no answer; give it at least one token")
    length, index = len(prompt.token_ids), prompt.index
    places = np.arange(length, length + len(answer_ids), dtype=np.int32) + index.rope_delta
    positions = np.concatenate([index.position_ids, np.tile(places, (3, 1))], axis=1)
    longer = replace(
        prompt,
        token_ids=np.concatenate([prompt.token_ids, np.asarray(answer_ids, np.int32)]),
        index=replace(index, position_ids=positions),  # the delta stays: one position a token
    )
    return Example(name, longer, length)


def make_examples(
    source: Path,
    images: str | os.PathLike[str] | None,
    count: int,
    *,
    first_seed: int,
    answers: str | None = None,
) -> list[Example]:
    """What a command asks: about the pictures in `images`, else about drawn scenes.

    answers: the checkpoint that says what is compared; None is the source itself, quantized while
    it is loaded if it does not fit this machine. Notes and bars go to stderr.
    """
    if images is None:
        processor = Processor.from_folder(source, read_config(source))
        return demo_examples(processor, count, first_seed=first_seed)
    from qwen3vl_mlx.api import load

    model = load(source, quantize="auto") if answers is None else load(answers, progress=True)
    return folder_examples(
        model, images, count, note=lambda line: print(line, file=sys.stderr), progress=True
    )


def demo_examples(processor: Processor, count: int, *, first_seed: int) -> list[Example]:
    """One question with its true answer on each of `count` drawn scenes, the tasks in turn."""
    examples = []
    for scene, question in scene_questions(count, first_seed):
        prompt = processor.prompt(about(scene.draw(), question.question))
        answer = processor.tokenizer.encode(question.truth + _END)
        examples.append(with_answer(f"scene {scene.seed} {question.task}", prompt, answer))
    return examples


def scene_questions(count: int, first_seed: int) -> Iterator[tuple[Scene, Question]]:
    """`count` scenes from `first_seed` on, with a question of the task asked least so far."""
    asked: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + count):
        scene = make_scene(seed)
        question = min(questions(scene), key=lambda question: asked[question.task])
        asked[question.task] += 1
        yield scene, question


def folder_examples(
    model: Qwen3VL,
    folder: str | os.PathLike[str],
    count: int,
    *,
    max_answer_tokens: int = 48,
    max_pixels: MaxPixels = MAX_PIXELS,
    note: Callable[[str], None] | None = None,
    progress: bool = False,
) -> list[Example]:
    """Pictures of the user's own, with what `model` itself says about them, greedily.

    Up to `count` pairs of a picture in `folder` (or below it) and one of `PROMPTS`: pictures
    evenly spread over the sorted folder, each with the next prompt, and again with other prompts
    where there are fewer pictures. note: called with a line for each picture that is skipped.
    progress: a bar on stderr where that is a terminal.
    Raises InputError for a folder without a readable picture.
    """
    if count < 1 or max_answer_tokens < 1:
        raise InputError(
            f"count and max_answer_tokens must be at least 1, got {count} and {max_answer_tokens}"
        )
    path = Path(folder).expanduser()
    problems: list[str] = []

    def skipped(error: ImageError) -> None:
        problems.append(str(error))
        if note is not None:
            note(f"skipped: {error}")

    pictures = list(islice(_readable(spread(find_pictures(path), count), skipped), count))
    if not pictures:
        reason = f"; the first of {len(problems)}: {problems[0]}" if problems else ""
        raise InputError(f"{path} has no picture that can be read{reason}")
    total = min(count, len(pictures) * len(PROMPTS))
    asked, again = tee(_asked(model, path, pictures, total, max_pixels))
    answers = greedy_answers(model, (prompt for _, prompt in asked), max_answer_tokens)
    answers = shown(answers, total, "Asking about pictures", progress)
    return [
        with_answer(name, prompt, answer)
        for (name, prompt), answer in zip(again, answers, strict=True)
    ]


def _asked(
    model: Qwen3VL, folder: Path, pictures: Sequence[Path], total: int, max_pixels: MaxPixels
) -> Iterator[tuple[str, Prompt]]:
    """The first `total` pairs of a picture and a question, by name."""
    for number in range(total):
        turn, place = divmod(number, len(pictures))
        picture = pictures[place]
        question = PROMPTS[(place + turn) % len(PROMPTS)]
        prompt = model.processor.prompt(about(load_image(picture), question), max_pixels=max_pixels)
        yield f"{picture.relative_to(folder)}: {question}", prompt


def greedy_answers(
    model: Qwen3VL, prompts: Iterable[Prompt], max_tokens: int
) -> Iterable[list[int]]:
    """Token ids of each prompt's greedy answer, in order; an end token is the last, if it came.

    As many run at once as the engine takes, and a prompt is made when its turn comes.
    """
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    options = model.engine.options
    running: deque[Stream] = deque()
    for prompt in prompts:
        request = model.asking.request(prompt, params, tools=False, started=time.perf_counter())
        running.append(model.run(request))
        if len(running) >= min(options.max_batch, options.max_queue):
            yield _tokens(running.popleft())
    while running:
        yield _tokens(running.popleft())


def _tokens(stream: Stream) -> list[int]:
    for _ in stream:
        pass
    return stream.handle.tokens


def find_pictures(folder: Path) -> list[Path]:
    """Files in `folder` and below it whose first bytes are a picture's, sorted; no hidden ones.

    Raises InputError where there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; give one that holds pictures")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if _looks_like_picture(path))


def _looks_like_picture(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would wait for ever
            return False
        with path.open("rb") as file:
            return format_of(file.read(HEAD_BYTES)) is not None
    except OSError:
        return False


def spread(items: Sequence[Path], count: int) -> list[Path]:
    """All items: first `count` at even distances, in order, then those left out."""
    if len(items) <= count:
        return list(items)
    chosen = [i * len(items) // count for i in range(count)]
    rest = sorted(set(range(len(items))) - set(chosen))
    return [items[i] for i in (*chosen, *rest)]


def _readable(paths: Sequence[Path], skipped: Callable[[ImageError], None]) -> Iterator[Path]:
    for path in paths:
        if (problem := _problem(path)) is None:
            yield path
        else:
            skipped(problem)


def _problem(path: Path) -> ImageError | None:
    """Why a picture cannot be read. Decodes and drops it: many at once would fill the memory."""
    try:
        load_image(path)
    except ImageError as error:
        return error
    return None


def about(image: object, question: str) -> list[dict[str, object]]:
    """One user message: a picture, then the question."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def shown(steps: Iterable[T], total: int, label: str, wanted: bool) -> Iterable[T]:
    """`steps` behind a bar on stderr, where that is a terminal and they take over a second."""
    if not wanted or not sys.stderr.isatty():
        return steps
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(steps, total=total, desc=label, delay=1.0, leave=False)
    return bar
