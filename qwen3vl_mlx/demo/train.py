"""Train the demo checkpoint from nothing: `python -m qwen3vl_mlx.demo.train --out FOLDER`.

Needs torch and transformers (extra `dev`). First the vision tower learns alone to say what each
patch shows, with heads that are thrown away; then the whole model learns to answer, with the same
losses as a helper that decays. On one machine the same recipe gives the same weights; a run that
was stopped goes on when it is started again, as if it had never stopped. FOLDER/checkpoint is the
newest model, ready to load.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from qwen3vl_mlx import cli
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.demo.heads import SHARES
from qwen3vl_mlx.demo.learner import (
    answer_logits,
    answer_loss,
    make_model,
    make_optimizers,
    see,
    share_gradients,
)
from qwen3vl_mlx.demo.questions import BOX_TASKS, box_overlaps, is_correct
from qwen3vl_mlx.demo.recipe import CHECK_SEED, Recipe, Steps, as_tensors, loader, rate_at
from qwen3vl_mlx.demo.rows import Mix, make_batch, tokenizer
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.publish import new_folder

_CHECKS = (*[Mix(dialogues=0)] * 14, Mix(dialogues=0, thinking=1), Mix(text=0, tools=1, words=448))
_NOTE_EVERY = 50  # steps
_SAVE_SEC = 180


@dataclass(frozen=True)
class Run:
    """Where and how long a recipe runs. Compiled or not, it gives the same but for rounding."""

    out: Path
    minutes: float
    check_every: int
    compiled: bool


# -- measuring ---------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    model: Qwen3VLForConditionalGeneration, batches: list[dict[str, Any]]
) -> dict[str, float]:
    """Share of right answers by task, and of boxes the mean IoU, each token told those before it.

    Of exact answers this is what greedy decoding would give; of boxes it is a little more.
    """
    right: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            best = answer_logits(model, batch, see(model, batch)).argmax(-1).tolist()
        given = iter(best)
        for start, end, question in (q for row in batch["questions"] for q in row):
            text = tokenizer().decode([next(given) for _ in range(start, end)], False)
            said, ended, _ = text.partition("<|im_end|>")
            _, closed, answer = said.rpartition("</think>\n\n")
            task = f"thinking_{question.task}" if closed else question.task
            right[task].append(float(bool(ended) and is_correct(question, answer)))
            if question.task in BOX_TASKS:
                right[f"{task}_iou"] += box_overlaps(question.truth, answer)
    return {task: sum(found) / len(found) for task, found in sorted(right.items())}


# -- files -------------------------------------------------------------------------------------


def export(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Write the checkpoint as it ships: bfloat16, with the bundled one's other files."""
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    others = shutil.ignore_patterns("*.safetensors", "*.png", "README.md")
    with new_folder(folder, force=True) as work:
        shutil.copytree(CHECKPOINT, work, ignore=others, dirs_exist_ok=True)
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        (work / "model.safetensors").chmod(0o644)  # it is written for its owner alone


# -- running -----------------------------------------------------------------------------------


class Trainer:
    """One process of a run; rank 0 keeps the log and the files."""

    def __init__(self, recipe: Recipe, run: Run, rank: int) -> None:
        self.recipe, self.run, self.rank = recipe, run, rank
        self.model, self.heads = make_model(recipe.seed)
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimizers = make_optimizers(
            self.model, self.heads, rate=recipe.rate, muon_factor=recipe.muon_factor,
            decay=recipe.decay,
        )  # fmt: skip
        self.step, self.seconds = 0, 0.0
        if (run.out / "state.pt").exists():
            self._restore(torch.load(run.out / "state.pt", weights_only=True))
        if run.compiled:
            for layer in self.model.model.language_model.layers:
                layer.compile(dynamic=False)
        self.began = time.time() - self.seconds
        self.noticed: dict[str, list[float]] = defaultdict(list)

    def batches(self) -> Iterator[dict[str, Any]]:
        recipe = self.recipe
        share = recipe.batch // recipe.processes
        rows = range(self.rank * share, (self.rank + 1) * share)
        last = recipe.see_steps + recipe.learn_steps
        yield from loader(Steps(recipe, self.step, last, rows))

    def learn(self, batch: dict[str, Any]) -> None:
        """Take one step."""
        recipe = self.recipe
        self.model.train()
        rate = rate_at(recipe, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * rate
        share = min(1.0, (self.step - recipe.see_steps) / recipe.helper_steps)
        helper = recipe.helper + (recipe.helper_end - recipe.helper) * share
        with torch.autocast("cpu", torch.bfloat16):
            seen = see(self.model, batch)
            helped, found = self.heads(seen.last_hidden_state, seen.pooler_output, batch["targets"])
            if self.step < recipe.see_steps:
                loss = helped
            else:
                answered = answer_loss(answer_logits(self.model, batch, seen), batch)
                loss = helper * helped + answered
                self.noticed["answer"].append(answered.item())
        loss.backward()
        share_gradients(self.parameters)
        nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.noticed["helper"].append(helped.item())
        for name, value in zip(SHARES, found.tolist(), strict=True):
            if not math.isnan(value):  # nothing of the kind was in these pictures
                self.noticed[name].append(value)
        self.step += 1

    def save(self) -> None:
        """Write all that going on needs; every process takes part."""
        self.optimizers[1].consolidate_state_dict(0)  # type: ignore[attr-defined]
        if self.rank > 0:
            return
        path = self.run.out / "state.pt"
        state = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "step": self.step,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "recipe": asdict(self.recipe), "seconds": time.time() - self.began,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        export(self.model, self.run.out / "checkpoint")

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]


class Log:
    """What a run writes about itself, a JSON object a line: its recipe, means, measurements."""

    def __init__(self, path: Path, trainer: Trainer) -> None:
        self.trainer = trainer
        self.checks = [
            as_tensors(make_batch(CHECK_SEED, i, range(16), mix)) for i, mix in enumerate(_CHECKS)
        ]
        torn = path.exists() and not path.read_text().endswith("\n")
        self.file = path.open("a", buffering=1)
        if torn:  # a run that was killed
            self.file.write("\n")
        self._write(recipe=asdict(trainer.recipe))
        self.noted = (time.time(), trainer.step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def step(self) -> None:
        """Write what is due after a step."""
        trainer = self.trainer
        if trainer.step % _NOTE_EVERY == 0:
            self._note()
        learning = trainer.step > trainer.recipe.see_steps
        if learning and trainer.step % trainer.run.check_every == 0:
            trainer.model.eval()
            right = measure(trainer.model, self.checks)
            self._write(right={name: round(share, 3) for name, share in right.items()})

    def _note(self) -> None:
        trainer, now = self.trainer, time.time()
        pace = (trainer.step - self.noted[1]) / (now - self.noted[0])
        means = {name: round(fmean(values), 4) for name, values in trainer.noticed.items()}
        self._write(
            minutes=round((now - trainer.began) / 60, 2),
            pace=round(pace, 2),
            rate=rate_at(trainer.recipe, trainer.step),
            **means,
        )
        trainer.noticed.clear()
        self.noted = (now, trainer.step)

    def _write(self, **told: object) -> None:
        self.file.write(json.dumps({"step": self.trainer.step, **told}) + "\n")


def train(rank: int, recipe: Recipe, run: Run, launcher: int) -> None:
    """Be process `rank` of a run, to its end or until it is told to stop.

    launcher: the id of the process that started this one; it stops when that is gone.
    """
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))
    torch.set_num_threads(1)
    meeting = f"file://{run.out.resolve() / 'meeting'}"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=recipe.processes
    )
    trainer = Trainer(recipe, run, rank)
    began = saved = time.time()
    with Log(run.out / "log.jsonl", trainer) if rank == 0 else nullcontext() as log:
        for batch in trainer.batches():
            trainer.learn(batch)
            if log:
                log.step()
            now = time.time()
            ending = stopped or os.getppid() != launcher or 0 < run.minutes * 60 < now - began
            # all processes do the same: any one's end and the first one's clock count
            told = torch.tensor([float(bool(ending)), float(rank == 0 and now - saved > _SAVE_SEC)])
            torch.distributed.all_reduce(told)
            if told[0]:
                break
            if told[1]:
                trainer.save()
                saved = now
        trainer.save()
    torch.distributed.destroy_process_group()


def start(recipe: Recipe, run: Run) -> None:
    """Train in a folder of its own, in as many processes as the recipe has.

    Raises InputError where the folder holds something else, or another process trains in it.
    """
    check_folder(recipe, run.out)
    with (run.out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is training in {run.out}") from None
        (run.out / "meeting").unlink(missing_ok=True)
        processes: list[Any] = []
        signal.signal(signal.SIGTERM, lambda *_: [each.terminate() for each in processes])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the processes too
        context = torch.multiprocessing.spawn(
            train, (recipe, run, os.getpid()), nprocs=recipe.processes, join=False
        )
        assert context is not None
        processes += context.processes
        while not context.join():
            pass


def check_folder(recipe: Recipe, out: Path) -> None:
    """Make the folder of a run, or see that it is one of this recipe."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "state.pt").exists():
        if (out / "checkpoint").exists():
            raise InputError(f"{out / 'checkpoint'} is not of a run; name a new folder")
        return
    saved = torch.load(out / "state.pt", weights_only=True, mmap=True)["recipe"]
    other = [name for name, value in asdict(recipe).items() if saved.get(name) != value]
    if other:
        told = ", ".join(f"{name} {saved.get(name)}" for name in other)
        raise InputError(f"{out} holds a run with {told}; give the same options or a new folder")


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.demo.train") -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many; 0 is never")
    parser.add_argument("--check-every", type=int, default=500, help="steps between measurements")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="compile the decoder's layers (needs a C++ compiler)")  # fmt: skip
    group = parser.add_argument_group("the recipe")
    for each in fields(Recipe):
        group.add_argument(
            f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default,
            help=f"{each.metadata['help']} (default {each.default})",
        )  # fmt: skip
    values = vars(parser.parse_args(argv))
    try:
        recipe = Recipe(**{each.name: values[each.name] for each in fields(Recipe)})
    except ValueError as error:
        parser.error(str(error))
    run = Run(values["out"], values["minutes"], values["check_every"], values["compile"])
    return cli.run(lambda: start(recipe, run))


if __name__ == "__main__":
    sys.exit(main())
