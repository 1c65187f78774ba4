"""Draw how a training went: `python -m qwen3vl_mlx.demo.curve RUN/log.jsonl curve.png`.

Needs matplotlib (extra `plot`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3vl_mlx import cli
from qwen3vl_mlx.errors import InputError

# what is drawn of the measurements, and under which name; the rest is much like these
_TASKS = {
    "color": "colour", "describe": "caption", "read": "text", "where_iou": "box IoU",
    "which": "two pictures", "countx": "count of a kind",
}  # fmt: skip
_SEEN = {"kind": "shape", "color": "colour", "place": "place", "char": "character"}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without those that a run which went on has taken back.

    Raises InputError for a file that is no log.
    """
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}; give the log.jsonl of a run") from error
    lines = [_parsed(text) for text in texts]
    kept: list[dict[str, Any]] = []
    for line, after in zip(lines, [*lines[1:], None], strict=True):
        if line is None:
            if after is None or "recipe" not in after:  # a killed run leaves half a line
                raise InputError(f"{path} is no training log; give the log.jsonl of a run")
            continue
        if "recipe" in line:  # the run went on here, from this step
            kept = [each for each in kept if each["step"] <= line["step"]]
        kept.append(line)
    if not kept:
        raise InputError(f"{path} is empty; give the log.jsonl of a run")
    return kept


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    good = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if good else None


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the curves as a PNG: losses on the left, what it gets right on the right."""
    from matplotlib.figure import Figure

    losses = [line for line in lines if "helper" in line]
    measured = [line for line in lines if "right" in line]
    seeing = max((line["step"] for line in losses if "answer" not in line), default=0)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, title in (("helper", "patches (thrown away)"), ("answer", "answers")):
        found = [(line["step"], line[name]) for line in losses if name in line]
        if found:
            left.plot(*zip(*found, strict=True), label=title)
    left.set(title="loss", xlabel="step", yscale="log")
    for name, title in _SEEN.items():
        early = [
            (line["step"], line[name]) for line in losses if line["step"] <= seeing and name in line
        ]
        if early:
            right.plot(*zip(*early, strict=True), ":", lw=1, label=f"patch: {title}")
    for name, title in _TASKS.items():
        found = [(line["step"], line["right"][name]) for line in measured if name in line["right"]]
        if found:
            right.plot(*zip(*found, strict=True), label=title)
    right.set(title="right, of pictures it does not learn from", xlabel="step", ylim=(0, 1.02))
    for axes in (left, right):
        axes.axvline(seeing, color="gray", lw=0.8, ls="--")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=100, format="png")
    os.replace(part, path)


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.demo.curve") -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("log", type=Path, help="log.jsonl of a run")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args(argv)
    return cli.run(lambda: draw(read_log(args.log), args.picture))


if __name__ == "__main__":
    sys.exit(main())
