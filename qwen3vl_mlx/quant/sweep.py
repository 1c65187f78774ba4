"""One checkpoint quantized to many sizes by several methods, ready to be compared."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_mlx.conversion import Source, convert
from qwen3vl_mlx.errors import InputError, Qwen3VLError
from qwen3vl_mlx.loading import model_itemsize
from qwen3vl_mlx.models.config import Quantization
from qwen3vl_mlx.quant.apply import (
    assign,
    overridden,
    parameter_shapes,
    quantizable_shapes,
    weigh,
)
from qwen3vl_mlx.quant.calibrate import calibrate
from qwen3vl_mlx.quant.examples import Example
from qwen3vl_mlx.quant.recipes import parse_preset, uniform_recipe

POINTS = ("2bit", "3bit", "4bit", "mxfp4", "nvfp4", "6bit", "8bit")
CALIBRATION_EXAMPLES = 96
MIXED_BELOW = 8  # bits: there rounding costs so little that fewer bits anywhere cost more
ROUNDED, CALIBRATED, PEER = "round to nearest", "calibrated", "mlx-vlm"


@dataclass(frozen=True)
class Candidate:
    """A quantized checkpoint: how it was made, to what, and where it is."""

    method: str
    name: str
    folder: Path


def candidates(
    source: Source,
    folder: Path,
    examples: Sequence[Example],
    *,
    peer: str | None = None,
    points: Sequence[str] = POINTS,
) -> Iterator[Candidate]:
    """Quantize `source` to every point, into `folder`.

    At each point the same settings everywhere outside the vision tower, rounded to nearest; what
    mlx-vlm's converter makes of them under the interpreter `peer`; and calibrated on `examples`,
    below 8 bits with mixed precision, at no more bits per weight. Raises Qwen3VLError where mlx-vlm
    fails.
    """
    shapes = parameter_shapes(source.config)
    for point in points:
        settings = parse_preset(point)
        uniform = assign(uniform_recipe(settings), quantizable_shapes(source.config))
        target = folder / f"rounded-{point}"
        convert(source, target, uniform)
        yield Candidate(ROUNDED, point, target)
        if peer is not None:
            target = folder / f"mlx-vlm-{point}"
            _peer_convert(peer, source.snapshot.folder, target, settings)
            yield Candidate(PEER, point, target)
        budget: float | None = None
        if settings.bits < MIXED_BELOW:
            budget = weigh(
                shapes, uniform.modules, model_itemsize(source.snapshot.folder)
            ).bits_per_weight
        found = calibrate(
            source.snapshot.folder, examples, uniform.modules, target_bits_per_weight=budget
        )
        assignment = overridden(uniform, found.overrides, f"{point} calibrated")
        target = folder / f"calibrated-{point}"
        convert(source, target, assignment, scaling=found)
        yield Candidate(CALIBRATED, point, target)


def _peer_convert(python: str, source: Path, target: Path, settings: Quantization) -> None:
    command = [
        *(python, "-m", "mlx_vlm", "convert"),
        *("--hf-path", str(source), "--mlx-path", str(target), "-q"),
        *("--q-bits", str(settings.bits), "--q-group-size", str(settings.group_size)),
        *("--q-mode", settings.mode),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--compare-mlx-vlm: {python} cannot be run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Qwen3VLError(f"mlx-vlm under {python} failed to convert: {lines[-1]}")
