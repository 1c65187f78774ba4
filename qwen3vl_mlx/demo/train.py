"""Train the demo checkpoint from nothing: `python -m qwen3vl_mlx.demo.train --out FOLDER`.

Needs torch and transformers (extra `dev`). First the vision tower learns alone to say what each
patch shows, with heads that are thrown away; then the whole model learns to answer, with the same
losses as a helper that decays. Everything follows from the seed; a run that was stopped goes on
where it was when it is started again. FOLDER/checkpoint is the newest model, ready to load.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen3VLForConditionalGeneration

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
from qwen3vl_mlx.demo.questions import iou, is_correct, read_boxes
from qwen3vl_mlx.demo.rows import Mix, make_batch, tokenizer

CHECK_SEED = 77  # of the rows a run is measured on; no run learns from them
_CHECK_BATCHES = 16
_NOTE_EVERY = 50  # steps
_TOOLS_EVERY = 12  # steps; their rows are long


@dataclass(frozen=True)
class Recipe:
    """Steps of both stages, the learning rates, and when they fall."""

    seed: int = 0
    see_steps: int = 1100
    learn_steps: int = 4000
    batch: int = 32
    rate: float = 1.5e-3
    rate_end: float = 2e-5
    warmup: int = 100
    # all below that count steps count those of the second stage
    stable: int = 2400  # before the rate falls
    widen: int = 2000  # until the pictures have their full range
    talents: int = 1500  # before it learns to think and to zoom
    boxes: int = 1700  # before boxes are asked oftener: they take the longest to learn
    helper: float = 0.5  # weight of the helper losses at first
    helper_end: float = 0.1
    helper_steps: int = 2500  # until they have it
    muon_factor: float = 4.0  # Muon's rate over AdamW's
    decay: float = 0.02


@dataclass(frozen=True)
class Run:
    """Where and how a recipe runs; only how long it takes depends on it."""

    out: Path
    processes: int
    minutes: float
    check_every: int
    compiled: bool


# -- data --------------------------------------------------------------------------------------


class Steps(Dataset[dict[str, Any]]):
    """Some rows of the batches of steps `first` to `last`, of the mix `mix_at` gives for each."""

    def __init__(
        self, seed: int, first: int, last: int, rows: range, mix_at: Callable[[int], Mix]
    ) -> None:
        self.seed, self.first, self.last, self.rows, self.mix_at = seed, first, last, rows, mix_at

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        step = self.first + index
        made = make_batch(self.seed, step, self.rows, self.mix_at(step))
        return {
            key: value if key == "questions" else torch.from_numpy(value)
            for key, value in made.items()
        }


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


def loader(data: Steps) -> DataLoader[dict[str, Any]]:
    return DataLoader(
        data,
        batch_size=None,
        num_workers=1,
        prefetch_factor=8,
        multiprocessing_context="fork",
        worker_init_fn=_end_when_told,
    )


def _end_when_told(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the trainer's own handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer


def rate_at(recipe: Recipe, step: int) -> float:
    """Steps count through both stages."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    into = step - recipe.see_steps
    if 0 <= into < recipe.warmup:  # the language model starts here
        return recipe.rate * (0.2 + 0.8 * into / recipe.warmup)
    done = max(0, into - recipe.stable) / (recipe.learn_steps - recipe.stable)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.rate_end + (recipe.rate - recipe.rate_end) * fall


# -- measuring ---------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    model: Qwen3VLForConditionalGeneration, batches: list[dict[str, Any]]
) -> dict[str, float]:
    """Share of answers that greedy decoding would give exactly, by task; of boxes the mean IoU."""
    right: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            best = answer_logits(model, batch, see(model, batch)).argmax(-1).tolist()
        given = iter(best)
        for start, end, question in (q for row in batch["questions"] for q in row):
            ids = [next(given) for _ in range(start, end)]
            text = tokenizer().decode(ids[:-1], skip_special_tokens=False)
            text = text.rpartition("</think>\n\n")[2]
            right[question.task].append(float(is_correct(question, text)))
            if question.task in ("where", "whereall"):
                pairs = zip(read_boxes(question.truth), read_boxes(text), strict=False)
                shares = [iou(a, b) if la == lb else 0.0 for (la, a), (lb, b) in pairs]
                missing = len(read_boxes(question.truth)) - len(shares)
                right[f"{question.task}_iou"] += shares + [0.0] * missing
    return {task: sum(found) / len(found) for task, found in sorted(right.items())}


# -- files -------------------------------------------------------------------------------------


def export(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Write the checkpoint as it ships: bfloat16, with the bundled one's other files."""
    from safetensors.torch import save_file

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(CHECKPOINT, part, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


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
            self._restore(torch.load(run.out / "state.pt", weights_only=False))
        if run.compiled:
            for layer in self.model.model.language_model.layers:
                layer.compile(dynamic=False)
        self.began = time.time() - self.seconds
        self.sums: dict[str, float] = defaultdict(float)
        self.noted = (time.time(), self.step)

    def batches(self) -> Iterator[dict[str, Any]]:
        recipe = self.recipe
        share = recipe.batch // self.run.processes
        rows = range(self.rank * share, (self.rank + 1) * share)
        last = recipe.see_steps + recipe.learn_steps
        mix = partial(mix_at, recipe)
        yield from loader(Steps(recipe.seed, self.step, last, rows, mix))

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
                self.sums["answer"] += answered.item()
        loss.backward()
        share_gradients(self.parameters)
        nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.sums["helper"] += helped.item()
        for name, value in zip(SHARES, found.nan_to_num().tolist(), strict=True):
            self.sums[name] += value
        self.step += 1

    def note(self, log: IO[str]) -> None:
        """Write a line of means since the last one."""
        now = time.time()
        seconds, steps = now - self.noted[0], self.step - self.noted[1]
        line = {key: round(value / steps, 4) for key, value in self.sums.items()}
        shown = {
            "step": self.step,
            "minutes": round((now - self.began) / 60, 2),
            "pace": round(steps / seconds, 2),
            "rate": rate_at(self.recipe, self.step),
        }
        log.write(json.dumps(shown | line) + "\n")
        self.sums.clear()
        self.noted = (now, self.step)

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


def train(rank: int, recipe: Recipe, run: Run) -> None:
    """Be process `rank` of a run, to its end or until it is told to stop."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))
    torch.set_num_threads(1)
    meeting = f"file://{run.out.resolve() / 'meeting'}"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=run.processes
    )
    trainer = Trainer(recipe, run, rank)
    checks = []
    if rank == 0:
        mix = Mix(dialogues=0)
        checks = [make_check(i, mix) for i in range(_CHECK_BATCHES)]
    began = saved = time.time()
    with (run.out / "log.jsonl").open("a", buffering=1) as log:
        if rank == 0:
            log.write(json.dumps({"recipe": asdict(recipe), "step": trainer.step}) + "\n")
        for batch in trainer.batches():
            trainer.learn(batch)
            learning = trainer.step > recipe.see_steps
            if rank == 0 and trainer.step % _NOTE_EVERY == 0:
                trainer.note(log)
            if rank == 0 and learning and trainer.step % run.check_every == 0:
                trainer.model.eval()
                right = {k: round(v, 3) for k, v in measure(trainer.model, checks).items()}
                log.write(json.dumps({"step": trainer.step, "right": right}) + "\n")
            now = time.time()
            ending = bool(stopped) or 0 < run.minutes * 60 < now - began
            # all processes do the same: the first one's clock and any one's signal count
            told = torch.tensor([float(ending), float(rank == 0 and now - saved > 180)])
            torch.distributed.all_reduce(told)
            if told[1] and not told[0]:
                trainer.save()
                saved = now
            if told[0]:
                break
        trainer.save()
    torch.distributed.destroy_process_group()


def make_check(index: int, mix: Mix) -> dict[str, Any]:
    return Steps(CHECK_SEED, index, index + 1, range(16), lambda _: mix)[0]


def start(recipe: Recipe, run: Run) -> None:
    """Train in a folder of its own, in as many processes as asked for."""
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another process is training in {run.out}") from None
        (run.out / "meeting").unlink(missing_ok=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        context = torch.multiprocessing.spawn(
            train, (recipe, run), nprocs=run.processes, join=False
        )
        assert context is not None
        signal.signal(signal.SIGTERM, lambda number, _: [p.terminate() for p in context.processes])
        while not context.join():
            pass


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qwen3vl_mlx.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--processes", type=int, default=2, help="one a core")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many; 0 is never")
    parser.add_argument("--check-every", type=int, default=500, help="steps between measurements")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="compile the decoder's layers (needs a C++ compiler)")  # fmt: skip
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    values = vars(parser.parse_args())
    recipe = Recipe(**{name: values[name] for name in asdict(Recipe())})
    run = Run(values["out"], values["processes"], values["minutes"], values["check_every"],
              values["compile"])  # fmt: skip
    start(recipe, run)


if __name__ == "__main__":
    main()
