"""How far a checkpoint's next-token distributions are from its source's, over given examples.

The source's log-probabilities wait in a temporary file while each candidate runs, layer by layer:
no model is in memory in full, and never two of them in part.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.api import load
from qwen3vl_mlx.card import with_quality
from qwen3vl_mlx.demo.questions import is_correct
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.loading import (
    effective_config,
    read_tensors,
    weight_files,
)
from qwen3vl_mlx.models.config import ModelConfig, read_config
from qwen3vl_mlx.processing.tokenizer import Tokenizer
from qwen3vl_mlx.publish import replace_text
from qwen3vl_mlx.quant.apply import Weight, parameter_shapes
from qwen3vl_mlx.quant.examples import (
    TASK_SEED,
    Example,
    about,
    greedy_answers,
    scene_questions,
    shown,
)
from qwen3vl_mlx.quant.streamed import StreamedPass

_ROWS = 32  # positions compared at once: 19 MB of logits each, for a vocabulary of 151,936
_TASK_TOKENS = 256  # more than any answer about a scene has
_LEAST_KL = 1e-8  # less is rounding, and would stretch a plot's scale

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """One checkpoint against its source. Means are over all answer tokens of the examples.

    kl: mean KL(source || checkpoint) of next-token distributions, in nats. kl_error: its standard
    error, where examples are independent and the tokens of one are not. agreement: share of
    positions where both have the same likeliest token. perplexity: of the answers' tokens.
    accuracy, same_answers: shares of the demo's held-out questions answered rightly, and word for
    word as the source does; None where none were asked.
    """

    name: str
    size_bytes: int  # of the weight files
    bits_per_weight: float
    kl: float
    kl_error: float
    agreement: float
    perplexity: float
    source_perplexity: float
    examples: int
    tokens: int
    accuracy: float | None = None
    source_accuracy: float | None = None
    same_answers: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinities: None in their place."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Differences:
    """A candidate against a reference: for each example, one value per answer token, (n,)."""

    kl: list[Floats]
    same: list[Floats]  # 1 where the likeliest tokens are equal, else 0
    loss: list[Floats]  # -log p of the answer's token


def evaluate(
    source: Path,
    candidates: Sequence[Path],
    examples: Sequence[Example],
    *,
    questions: int = 0,
    progress: bool = False,
) -> list[Quality]:
    """Compare checkpoints with the one they were made from, in the order of `candidates`.

    examples: laid out by the source's processor. questions: how many of the demo's held-out ones
    to ask as well, which loads each checkpoint in full. progress: bars on stderr where that is a
    terminal. Needs 4 * vocab_size bytes of temporary disk per answer token.
    Raises InputError where a candidate's tokens are not the source's.
    """
    if len(examples) < 2:
        raise InputError(f"at least 2 examples are needed for a mean's error, got {len(examples)}")
    for candidate in candidates:
        check_comparable(source, candidate)
    reference = Reference(source, examples, progress=progress)
    found = [
        quality(candidate, reference.compare(candidate, progress=progress), reference.loss)
        for candidate in candidates
    ]
    del reference
    if not questions:
        return found
    asked = _Tasks(source, questions, progress=progress)
    return [
        asked.scored(result, candidate) for result, candidate in zip(found, candidates, strict=True)
    ]


def check_comparable(source: Path, candidate: Path) -> None:
    """Raise InputError unless both checkpoints read and write the same tokens."""
    ours, theirs = read_config(source), read_config(candidate)
    differing = ""
    if ours.text.vocab_size != theirs.text.vocab_size:
        differing = f"vocabulary is {theirs.text.vocab_size} tokens, not {ours.text.vocab_size}"
    elif _visual_format(ours) != _visual_format(theirs):
        differing = f"visual tokens are {_visual_format(theirs)}, not {_visual_format(ours)}"
    elif _vocabulary(source) != _vocabulary(candidate):
        differing = "tokenizer is another"
    if differing:
        raise InputError(
            f"{candidate} was not made from {source}: its {differing}; compare checkpoints of one "
            "model"
        )


def _visual_format(config: ModelConfig) -> dict[str, int]:
    return {
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "spatial_merge_size": config.vision.spatial_merge_size,
    }


def _vocabulary(folder: Path) -> dict[str, int]:
    return Tokenizer.from_folder(folder).backend.get_vocab(with_added_tokens=True)


class Reference:
    """A source's log-probabilities at the answers of `examples`, in a temporary file.

    The file has no name: its space is free again when the reference is let go of, or the process
    ends, however that happens.
    """

    def __init__(self, source: Path, examples: Sequence[Example], *, progress: bool = False):
        self.examples = examples
        self.loss: list[Floats] = []  # as in `Differences`
        counts = [len(example.answer_ids) for example in examples]
        self._starts = [0, *accumulate(counts)]
        shape = (sum(counts), read_config(source).text.vocab_size)
        _check_disk(4 * math.prod(shape))
        with tempfile.TemporaryFile() as file:  # the map keeps it open
            self._log_probs = np.memmap(file, np.float32, "w+", shape=shape)
        for i, logits in enumerate(self._logits(source, progress)):
            ids, rows = examples[i].answer_ids, self._rows(i)
            for part in _chunks(len(ids)):
                rows[part] = np.array(log_softmax(logits[part]))
            self.loss.append(-rows[np.arange(len(ids)), ids].astype(np.float64))

    def compare(self, candidate: Path, *, progress: bool = False) -> Differences:
        """Run the same examples through another checkpoint."""
        found = Differences([], [], [])
        for i, logits in enumerate(self._logits(candidate, progress)):
            ids, expected = self.examples[i].answer_ids, self._rows(i)
            parts = [
                differences(mx.array(expected[part]), log_softmax(logits[part]), ids[part])
                for part in _chunks(len(ids))
            ]
            kl, same, loss = np.concatenate(parts, axis=1)
            found.kl.append(kl)
            found.same.append(same)
            found.loss.append(loss)
        return found

    def _rows(self, i: int) -> npt.NDArray[np.float32]:
        """Example i's log-probabilities, (n, vocab_size)."""
        return self._log_probs[self._starts[i] : self._starts[i + 1]]

    def _logits(self, folder: Path, progress: bool) -> Iterator[mx.array]:
        passing = StreamedPass(folder, [example.prompt for example in self.examples])
        for _ in shown(passing.layers(), passing.num_layers, f"{folder.name}: layers", progress):
            pass
        yield from passing.logits([example.rows for example in self.examples])


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities of logits (..., vocab_size), float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def differences(expected: mx.array, got: mx.array, token_ids: npt.NDArray[np.int32]) -> Floats:
    """KL, sameness of the likeliest token, and loss of `token_ids` under `got`: (3, n).

    expected, got: log-probabilities (n, vocab_size).
    """
    kl = (mx.exp(expected) * (expected - got)).sum(axis=-1)
    same = mx.argmax(expected, axis=-1) == mx.argmax(got, axis=-1)
    loss = -mx.take_along_axis(got, mx.array(token_ids)[:, None], axis=-1)[:, 0]
    return np.array(mx.stack([kl, same.astype(mx.float32), loss]), np.float64)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))


def _check_disk(need: int) -> None:
    folder = tempfile.gettempdir()
    if (free := shutil.disk_usage(folder).free) < need:
        raise InputError(
            f"the comparison needs {need / 1e9:.1f} GB of temporary disk and {folder} has "
            f"{free / 1e9:.1f} GB free; use fewer examples, or set TMPDIR to another disk"
        )


def quality(candidate: Path, found: Differences, source_loss: Sequence[Floats]) -> Quality:
    """Sum up what was measured of the checkpoint in `candidate`."""
    weight = stored_weight(candidate)
    return Quality(
        name=candidate.name,
        size_bytes=sum(path.stat().st_size for path in weight_files(candidate)),
        bits_per_weight=weight.bits_per_weight,
        kl=mean(found.kl),
        kl_error=standard_error(found.kl),
        agreement=mean(found.same),
        perplexity=perplexity(found.loss),
        source_perplexity=perplexity(source_loss),
        examples=len(found.kl),
        tokens=sum(len(values) for values in found.kl),
    )


def stored_weight(folder: Path) -> Weight:
    """Parameters of the model in `folder`, and the bytes its tensors have there."""
    tensors = read_tensors(folder)
    config = effective_config(read_config(folder), tensors)
    count = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    return Weight(count, sum(tensor.nbytes for tensor in tensors.values()))


def mean(groups: Sequence[Floats]) -> float:
    """Mean of all values, whichever group they are in."""
    return float(np.concatenate(groups).mean())


def standard_error(groups: Sequence[Floats]) -> float:
    """Standard error of `mean`, where groups are drawn independently but not the values in one.

    That of a ratio of sums over groups (Cochran, Sampling Techniques, 6.4).
    """
    middle = mean(groups)
    off = np.array([(values - middle).sum() for values in groups])
    count, size = len(groups), sum(len(values) for values in groups)
    return float(np.sqrt(count / (count - 1) * np.square(off).sum()) / size)


def perplexity(loss: Sequence[Floats]) -> float:
    """exp of the mean loss; infinite where that overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(mean(loss)))


class _Tasks:
    """Held-out questions about drawn scenes, and how the source answers them."""

    def __init__(self, source: Path, count: int, *, progress: bool):
        self.asked = [*scene_questions(count, TASK_SEED)]
        self.progress = progress
        self.expected = self.answers(source)

    def answers(self, folder: Path) -> list[str]:
        """What the checkpoint in `folder` says, greedily."""
        with closing(load(folder, progress=self.progress)) as model:
            processor = model.processor
            prompts = (processor.prompt(about(s.draw(), q.question)) for s, q in self.asked)
            answers = greedy_answers(model, prompts, _TASK_TOKENS)
            label = f"{folder.name}: questions"
            answers = shown(answers, len(self.asked), label, self.progress)
            return [processor.tokenizer.decode(ids) for ids in answers]

    def accuracy(self, given: Sequence[str]) -> float:
        pairs = zip(self.asked, given, strict=True)
        right = [is_correct(question, answer) for (_, question), answer in pairs]
        return sum(right) / len(right)

    def scored(self, result: Quality, candidate: Path) -> Quality:
        """`result` with what the candidate answers."""
        given = self.answers(candidate)
        same = [a == b for a, b in zip(given, self.expected, strict=True)]
        return replace(
            result,
            accuracy=self.accuracy(given),
            source_accuracy=self.accuracy(self.expected),
            same_answers=sum(same) / len(same),
        )


def write_card(folder: Path, quality: Quality) -> None:
    """Put the numbers into a checkpoint's model card, in place of earlier ones."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    replace_text(path, with_quality(card, quality.to_dict()))


def plot(lines: Mapping[str, Sequence[Quality]], path: Path) -> None:
    """Draw KL, on a log scale, against bits per weight into a PNG: one line per method.

    A checkpoint that does not differ from its source is left out.

    Raises InputError without matplotlib, or where `path` cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (method, found), marker, side in zip(lines.items(), cycle("osD^vP"), cycle((6, -12))):
        points = sorted(found, key=lambda quality: quality.bits_per_weight)
        points = [quality for quality in points if quality.kl > _LEAST_KL]
        bits = [quality.bits_per_weight for quality in points]
        kl, errors = [quality.kl for quality in points], [quality.kl_error for quality in points]
        axes.errorbar(
            bits, kl, errors, marker=marker, markersize=5, capsize=2, label=method or None
        )
        for x, y, quality in zip(bits, kl, points, strict=True):
            axes.annotate(
                quality.name, (x, y), xytext=(6, side), textcoords="offset points", fontsize=8
            )
    axes.margins(0.08)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, over the whole checkpoint")
    axes.set_ylabel("KL divergence from the source (nats per token)")
    axes.grid(which="major", alpha=0.3)
    if any(lines):
        axes.legend()
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise InputError(f"the plot {path} cannot be written: {error}") from error


def check_plot(path: Path) -> None:
    """Raise InputError where `plot` could not draw into `path`."""
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise InputError(f"the plot must be a .png file in a folder that is there, got {path}")
    if find_spec("matplotlib") is None:
        raise InputError('a plot needs matplotlib; run: pip install "qwen3vl-mlx[plot]"')
