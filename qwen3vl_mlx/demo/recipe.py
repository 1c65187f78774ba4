"""The demo's recipe: how many steps of what, at which rate, and the data of each step."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from qwen3vl_mlx.demo.rows import Mix, make_batch

CHECK_SEED = 77  # of the rows a run is measured on; no run may learn from them
MOST_ROWS = 100  # a step; their scenes have seeds of their own
_TOOLS_EVERY = 12  # steps; their rows are long


def _told(default: Any, told: str) -> Any:
    return field(default=default, metadata={"help": told})


@dataclass(frozen=True)
class Recipe:
    """What a run's weights follow from. Raises ValueError for what cannot be run."""

    seed: int = _told(0, "of weights and data")
    see_steps: int = _told(1100, "of the vision tower alone")
    learn_steps: int = _told(3700, "of the whole model, after those")
    batch: int = _told(32, "rows a step, of all processes together")
    rate: float = _told(1.5e-3, "AdamW's, at its highest")
    rate_end: float = _told(2e-5, "AdamW's, at the end")
    warmup: int = _told(100, "steps until the rate is reached, in each stage")
    stable: int = _told(2400, "steps of the second stage before the rate falls")
    widen: int = _told(2000, "steps of it until pictures have their full range")
    talents: int = _told(1500, "steps of it before it learns to think and to zoom")
    boxes: int = _told(1700, "steps of it before boxes, which take longest, are asked oftener")
    helper: float = _told(0.5, "weight of the helper losses in the second stage, at first")
    helper_end: float = _told(0.1, "their weight in the end")
    helper_steps: int = _told(2500, "steps of the second stage until they have it")
    muon_factor: float = _told(4.0, "Muon's rate over AdamW's")
    decay: float = _told(0.02, "of the weights")
    processes: int = _told(2, "one a core; each averages over its own rows first")

    def __post_init__(self) -> None:
        wrong = {
            f"seed {CHECK_SEED} is that of the rows a run is measured on": self.seed == CHECK_SEED,
            "stable must be less than learn_steps": not 0 <= self.stable < self.learn_steps,
            "widen, helper_steps and warmup must be 1 or more": min(
                self.widen, self.helper_steps, self.warmup
            )
            < 1,
            f"batch must be {MOST_ROWS} at most": self.batch > MOST_ROWS,
            "each process needs the same number of rows, 2 or more": self.processes < 1
            or self.batch % self.processes > 0
            or self.batch // self.processes < 2,
        }
        for told, is_so in wrong.items():
            if is_so:
                raise ValueError(told)


def mix_at(recipe: Recipe, step: int) -> Mix:
    """Easy pictures first: a narrow world is learnt far faster, and a wide one after it."""
    full = Mix()
    into = (step - recipe.see_steps) / recipe.widen
    if into < 0:
        return replace(full, wide=0.1, text=0.4, pairs=0, none=0, retouched=0.1, fonts=0, words=112)
    part = min(1.0, into)

    def between(low: float, high: float) -> float:
        return low + (high - low) * part

    mix = replace(
        full,
        wide=between(0.1, full.wide),
        retouched=between(0.1, full.retouched),
        fonts=between(0, full.fonts),
    )
    if step >= recipe.see_steps + recipe.boxes:
        mix = replace(mix, boxes=2)
    if step < recipe.see_steps + recipe.talents:
        return mix
    if step % _TOOLS_EVERY == 0:
        return replace(mix, text=0.1, pairs=0, none=0, tools=1, words=448)
    return replace(mix, thinking=0.08)


def rate_at(recipe: Recipe, step: int) -> float:
    """AdamW's rate at a step, counted through both stages."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    into = step - recipe.see_steps
    if 0 <= into < recipe.warmup:  # the language model starts here
        return recipe.rate * (0.2 + 0.8 * into / recipe.warmup)
    done = max(0, into - recipe.stable) / (recipe.learn_steps - recipe.stable)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.rate_end + (recipe.rate - recipe.rate_end) * fall


class Steps(Dataset[dict[str, Any]]):
    """Some rows of the batches of a recipe's steps `first` to `last`."""

    def __init__(self, recipe: Recipe, first: int, last: int, rows: range) -> None:
        self.recipe, self.first, self.last, self.rows = recipe, first, last, rows

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        step = self.first + index
        return as_tensors(make_batch(self.recipe.seed, step, self.rows, mix_at(self.recipe, step)))


def as_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """What `make_batch` gives, ready for torch; the questions stay as they are."""
    return {k: v if k == "questions" else torch.from_numpy(v) for k, v in batch.items()}


def loader(data: Steps) -> DataLoader[dict[str, Any]]:
    return DataLoader(
        data,
        batch_size=None,
        num_workers=1,
        prefetch_factor=8,
        # a fork is there at once; elsewhere system libraries do not bear it
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        worker_init_fn=_live_apart,
    )


def _live_apart(_: int) -> None:
    os.setpgid(0, 0)  # a signal to the trainer's group is the trainer's to answer
