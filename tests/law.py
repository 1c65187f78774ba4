"""What one full forward pass says to a prompt: the law, and prompts to hold roads against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from driving import WORDS
from passes import decode, forward

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.models.positions import rope_index
from qwen3vl_mlx.processing.prompt import Prompt

STEPS = 16
TOLERANCE = 1e-4  # of the largest logit
Picture: TypeAlias = npt.NDArray[np.uint8]
Messages: TypeAlias = list[dict[str, Any]]
Layers: TypeAlias = list[Any]


def picture(seed: int, width: int = 64, height: int = 64) -> Picture:
    """Noise, of a size that is not resized: (width / 32) x (height / 32) visual tokens."""
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def film(seed: int, frames: int = 5) -> list[Picture]:
    return [picture(seed + i) for i in range(frames)]


def user(*parts: Any) -> dict[str, Any]:
    """Strings, arrays (images) and lists of arrays (videos), in order."""
    kinds = {str: "text", list: "video", np.ndarray: "image"}
    return {
        "role": "user",
        "content": [{"type": kinds[type(part)], kinds[type(part)]: part} for part in parts],
    }


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


ASK = "Look at it well, and then tell me what you see there."
TURN = [user("What is this?", picture(1, 96)), said("A red box on a white table.")]
INPUTS: dict[str, Messages] = {
    "text": [user("Tell me of the sea, the wind and the old stone house on the hill. " + ASK * 2)],
    "image": [user(picture(1, 96), ASK)],
    "three sizes": [user("One", picture(1, 96), "two", picture(2, 64, 128), picture(3), ASK)],
    "same grid": [user(picture(1, 96), "and", picture(2, 96), ASK)],
    "later turn": [*TURN, user("And this one?", picture(2, 64, 128))],
    "video": [user(film(10), ASK)],
    "image and video": [user(film(10, 4), "and", picture(1, 96), "or", film(20, 2), ASK)],
}
# What the cache holds, what is asked then, and how many media of the new prompt stay.
HISTORIES: dict[str, tuple[Messages, Messages, int]] = {
    "turn without picture": ([user(ASK)], [user(ASK), said("So."), user("And?", picture(1))], 0),
    "turn with picture": (TURN[:1], INPUTS["later turn"], 1),
    "turn with video": ([user(film(10), ASK)], [user(film(10), ASK), said("So."), user("And?")], 1),
    "other pixels": ([user(picture(2, 96), ASK)], INPUTS["image"], 0),
    "first replaced": ([user(picture(3, 96), "and", picture(2, 96), ASK)], INPUTS["same grid"], 0),
    "second replaced": ([user(picture(1, 96), "and", picture(3, 96), ASK)], INPUTS["same grid"], 1),
    "swapped": ([user(picture(2, 96), "and", picture(1, 96), ASK)], INPUTS["same grid"], 0),
    "turned grid": ([user(picture(1, 64, 96), ASK)], INPUTS["image"], 0),
    "larger picture": ([user(picture(1, 96, 96), ASK)], INPUTS["image"], 0),
    "smaller picture": ([user(picture(1), ASK)], INPUTS["image"], 0),
    "longer film": ([user(film(10, 7), ASK)], INPUTS["video"], 0),
    "other last frame": ([user([*film(10, 4), picture(99)], ASK)], INPUTS["video"], 0),
    "picture for film": (INPUTS["image and video"], INPUTS["image"], 0),
    "other question": ([user(picture(1, 96), "What?")], INPUTS["image"], 1),
}


@dataclass(frozen=True)
class Run:
    """Greedy tokens, and the logits (n, vocab) of the last n positions that led to them."""

    tokens: list[int]
    logits: npt.NDArray[np.float32]


class Recorder:
    """A greedy choice that keeps the logits it is given."""

    def __init__(self) -> None:
        self.seen: list[mx.array] = []

    def __call__(self, logits: mx.array) -> int:
        self.seen.append(logits[None])
        return int(mx.argmax(logits[:WORDS]).item())


def to_numpy(parts: Sequence[mx.array]) -> npt.NDArray[np.float32]:
    return np.array(mx.concatenate(list(parts)).astype(mx.float32))


def extended(model: Qwen3VL, prompt: Prompt, answer: Sequence[int]) -> Prompt:
    """The prompt with an answer behind it, laid out anew as one sequence."""
    config = model.model.config
    token_ids = np.concatenate([prompt.token_ids, np.asarray(answer, np.int32)])
    grids = {
        kind: [m.grid_thw for m in prompt.media if m.kind == kind] for kind in ("image", "video")
    }
    index = rope_index(
        token_ids,
        grids["image"],
        grids["video"],
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        spatial_merge_size=config.vision.spatial_merge_size,
    )
    return replace(prompt, token_ids=token_ids, index=index)


def empty(model: Qwen3VL, kv_bits: int | None = None) -> Layers:
    return kv_cache.new_layers(model.model.config.text, kv_bits)


def pass_through(
    model: Qwen3VL, prompt: Prompt, layers: Layers, start: int, chunk: int
) -> list[mx.array]:
    """Prefill from `start`; the logits of each chunk, (n, vocab)."""
    hidden = forward(model.model, prompt, layers, start, chunk)
    return [model.model.language_model.logits(part)[0] for part in hidden]


def go_on(
    model: Qwen3VL, prompt: Prompt, layers: Layers, rows: list[mx.array], steps: int = STEPS
) -> Run:
    """Decode after a prefill whose logits are `rows`."""
    recorder = Recorder()
    tokens = decode(model.model, layers, prompt.rope_delta, rows[-1][-1], recorder, steps)
    return Run(list(tokens), to_numpy([*rows, *recorder.seen[1:]]))


def one_shot(model: Qwen3VL, prompt: Prompt, chunk: int = 2048, kv_bits: int | None = None) -> Run:
    layers = empty(model, kv_bits)
    rows = pass_through(model, prompt, layers, 0, chunk)
    return go_on(model, prompt, layers, rows)


def full_pass(model: Qwen3VL, prompt: Prompt, kv_bits: int | None = None) -> Run:
    """The law's own answer: tokens that one pass over prompt and answer predicts at every step."""
    tokens = one_shot(model, prompt, kv_bits=kv_bits).tokens
    whole = extended(model, prompt, tokens[:-1])
    logits = to_numpy(pass_through(model, whole, empty(model, kv_bits), 0, len(whole.token_ids)))
    assert logits[-STEPS:, :WORDS].argmax(-1).tolist() == tokens
    return Run(tokens, logits)


def distance(logits: npt.NDArray[np.float32], law: Run) -> float:
    """The largest difference to the law's last rows, relative to the largest logit."""
    expected = law.logits[len(law.logits) - len(logits) :]
    return float(np.abs(logits - expected).max() / np.abs(law.logits).max())


def check(run: Run, law: Run) -> None:
    assert run.tokens == law.tokens
    assert distance(run.logits, law) <= TOLERANCE


def places(prompt: Prompt) -> list[int]:
    """Every boundary inside and next to a medium."""
    around = {at for s in prompt.index.spans for at in range(s.start - 1, s.stop + 2)}
    return sorted(around)
