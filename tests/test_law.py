"""One answer per question: 16 greedy tokens and their logits are those of one full forward pass.

| road                                                    | test                           |
|---------------------------------------------------------|--------------------------------|
| one shot, then decode step by step                      | test_road[one shot]            |
| prefill in chunks of 1, 7 and 64                        | test_road[chunks of n]         |
| the same prompt again, its answer held                  | test_road[asked twice]         |
| prefill given up halfway, then asked again              | test_road[abandoned]           |
| text and decoded tokens turned by the GPU's fused rope   | test_road[fused rope]          |
| cache saved to a file and loaded, then a continuation   | test_road[saved and loaded]    |
| one cut at every place inside and around the media      | test_every_cut                 |
| held prefix trimmed at every place inside and around    | test_every_trim                |
| another prompt held: earlier turn, other pictures       | test_after_another_prompt      |
| two requests interleaved step by step                   | test_interleaved               |

A new road (batch, prefix cache, vision cache, ...) is a row here and a function in ROADS, or a test
of its own where it has more to vary. The full pass itself is compared with transformers elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import tiny

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine import generation
from qwen3vl_mlx.engine.state import CacheState
from qwen3vl_mlx.models.positions import rope_index
from qwen3vl_mlx.models.vision import VisionFeatures, VisionModel
from qwen3vl_mlx.processing.image import VisualInput
from qwen3vl_mlx.processing.prompt import Prompt

STEPS = 16
WORDS = 998  # the vocabulary without special tokens: a random model may pick a placeholder
TOLERANCE = 1e-4  # of the largest logit
Picture: TypeAlias = npt.NDArray[np.uint8]
Messages: TypeAlias = list[dict[str, Any]]


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
    """A greedy sampler that keeps the logits it is given."""

    def __init__(self) -> None:
        self.seen: list[mx.array] = []

    def __call__(self, logits: mx.array) -> mx.array:
        self.seen.append(logits[None])
        return mx.argmax(logits[:WORDS]).reshape(1)


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


def pass_through(
    model: Qwen3VL, prompt: Prompt, state: CacheState, start: int, chunk: int
) -> list[mx.array]:
    """Prefill from `start`; the logits of each chunk, (n, vocab)."""
    hidden = generation.forward(model.model, prompt, state, start, chunk)
    return [model.model.language_model.logits(part)[0] for part in hidden]


def go_on(
    model: Qwen3VL, prompt: Prompt, state: CacheState, rows: list[mx.array], steps: int = STEPS
) -> Run:
    """Decode after a prefill whose logits are `rows`."""
    recorder = Recorder()
    tokens = generation.decode(model.model, state, prompt.rope_delta, rows[-1][-1], recorder, steps)
    return Run(list(tokens), to_numpy([*rows, *recorder.seen[1:]]))


def one_shot(model: Qwen3VL, prompt: Prompt, chunk: int = 2048) -> Run:
    state = model.new_state()
    rows = pass_through(model, prompt, state, 0, chunk)
    state.extend(prompt)
    return go_on(model, prompt, state, rows)


def resume(model: Qwen3VL, prompt: Prompt, state: CacheState, steps: int = STEPS) -> Run:
    """What every request does: `prefill` on whatever the state holds, then decode."""
    last = generation.prefill(model.model, prompt, state, chunk=24)
    return go_on(model, prompt, state, [last[None]], steps)


def asked_twice(model: Qwen3VL, prompt: Prompt, folder: Path) -> Run:
    state = model.new_state()
    resume(model, prompt, state, 4)
    assert state.reuse(prompt) == len(prompt.token_ids) - 1
    return resume(model, prompt, state)


def abandoned(model: Qwen3VL, prompt: Prompt, folder: Path) -> Run:
    state = model.new_state()
    half = len(prompt.token_ids) // 2
    next(generation.forward(model.model, prompt, state, 0, half))
    return resume(model, prompt, state)


def fused_rope(model: Qwen3VL, prompt: Prompt, folder: Path) -> Run:
    rope = model.model.language_model.model.rope
    was, rope.fused = rope.fused, True
    try:
        return one_shot(model, prompt, 7)
    finally:
        rope.fused = was


def saved_and_loaded(model: Qwen3VL, prompt: Prompt, folder: Path) -> Run:
    state = model.new_state()
    first = resume(model, prompt, state, STEPS // 2)
    state.save(folder / "talk.safetensors")
    loaded = CacheState.load(folder / "talk.safetensors")
    longer = extended(model, prompt, first.tokens)
    assert loaded.reuse(longer) == len(longer.token_ids) - 1
    second = resume(model, longer, loaded, STEPS // 2)
    return Run(first.tokens + second.tokens, np.concatenate([first.logits, second.logits]))


# Single tokens are slow; 64 make a second chunk for the longest prompts only.
ONLY_FOR = {
    "chunks of 1": ("text", "image", "same grid", "later turn", "image and video"),
    "chunks of 64": ("text", "video", "image and video"),
}
ROADS: dict[str, Callable[[Qwen3VL, Prompt, Path], Run]] = {
    "one shot": lambda model, prompt, _: one_shot(model, prompt),
    "chunks of 1": lambda model, prompt, _: one_shot(model, prompt, 1),
    "chunks of 7": lambda model, prompt, _: one_shot(model, prompt, 7),
    "chunks of 64": lambda model, prompt, _: one_shot(model, prompt, 64),
    "asked twice": asked_twice,
    "abandoned": abandoned,
    "fused rope": fused_rope,
    "saved and loaded": saved_and_loaded,
}


@pytest.fixture(scope="module", autouse=True)
def encode_once() -> Iterator[None]:
    """The vision tower is a pure function and most of the time: each set of media runs once."""
    encode = generation.encode
    known: dict[tuple[Any, ...], VisionFeatures] = {}

    def look_up(tower: VisionModel, media: Sequence[VisualInput]) -> VisionFeatures:
        key = (id(tower), *(medium.identity for medium in media))
        if key not in known:
            known[key] = encode(tower, media)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "encode", look_up)
        yield


Ask: TypeAlias = "Callable[[Messages], tuple[Qwen3VL, Prompt, Run]]"


# A quantized model obeys the law against its own one full pass.
MODELS = (*tiny.VARIANTS, "dense64 4bit", "moe mixed_3_6")


@pytest.fixture(scope="module", params=MODELS)
def ask(request: pytest.FixtureRequest, tiny_model: Callable[[str], Qwen3VL]) -> Ask:
    """A model; `ask(messages)` gives it, their prompt, and the answer of one full pass."""
    model = tiny_model(request.param)
    known: dict[int, tuple[Qwen3VL, Prompt, Run]] = {}

    def look_up(messages: Messages) -> tuple[Qwen3VL, Prompt, Run]:
        if id(messages) not in known:
            prompt = model.processor.prompt(messages)
            known[id(messages)] = (model, prompt, full_pass(model, prompt))
        return known[id(messages)]

    return look_up


def full_pass(model: Qwen3VL, prompt: Prompt) -> Run:
    """The law's own answer: tokens that one pass over prompt and answer predicts at every step."""
    tokens = one_shot(model, prompt).tokens
    whole = extended(model, prompt, tokens[:-1])
    logits = to_numpy(pass_through(model, whole, model.new_state(), 0, len(whole.token_ids)))
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


@pytest.mark.parametrize(
    ("road", "name"), [(road, name) for road in ROADS for name in ONLY_FOR.get(road, INPUTS)]
)
def test_road(ask: Ask, road: str, name: str, tmp_path: Path) -> None:
    model, prompt, law = ask(INPUTS[name])
    assert len(prompt.token_ids) > 64 or road != "chunks of 64"
    check(ROADS[road](model, prompt, tmp_path), law)


@pytest.mark.parametrize("name", ["image", "same grid", "later turn", "image and video"])
def test_every_cut(ask: Ask, name: str) -> None:
    model, prompt, law = ask(INPUTS[name])
    of_prompt = replace(law, logits=law.logits[: len(prompt.token_ids)])
    for cut in places(prompt):
        state = model.new_state()
        hidden = generation.forward(model.model, prompt, state, 0, cut)
        head = model.model.language_model.logits(next(hidden))[0]
        assert state.length == cut
        tail = pass_through(model, prompt, state, cut, 2048)
        assert distance(to_numpy([head, *tail]), of_prompt) <= TOLERANCE, f"cut at {cut}"


@pytest.mark.parametrize("name", ["image", "same grid", "video"])
def test_every_trim(ask: Ask, name: str) -> None:
    """A held prefix that ends inside a medium is not trusted there: it goes back to its start."""
    model, prompt, law = ask(INPUTS[name])
    of_prompt = replace(law, logits=law.logits[: len(prompt.token_ids)])
    held = model.new_state()
    generation.prefill(model.model, prompt, held)
    media = [(spans[0].start, spans[-1].stop) for spans in prompt.media_spans]
    for cut in places(prompt):
        state = trimmed(held, cut)
        broken = [start for start, stop in media if start < cut < stop]
        assert state.reuse(prompt) == (broken[0] if broken else cut)
        last = generation.prefill(model.model, prompt, trimmed(held, cut))
        assert distance(to_numpy([last[None]]), of_prompt) <= TOLERANCE, f"trimmed to {cut}"


def trimmed(held: CacheState, count: int) -> CacheState:
    """A copy that knows of `count` tokens only, and would answer wrongly if it used the others."""
    state = CacheState.empty(len(held.layers))
    for ours, theirs in zip(state.layers, held.layers, strict=True):
        keys, values, _ = theirs.state
        known = (mx.arange(keys.shape[2]) < count)[:, None]
        ours.state = (mx.where(known, keys, 9), mx.where(known, values, 9), held.length)
    state.token_ids = held.token_ids[:count]
    state.media = tuple(item for item in held.media if item[0] < count)
    return state


@pytest.mark.parametrize("name", HISTORIES)
def test_after_another_prompt(ask: Ask, name: str) -> None:
    held, asked, kept_media = HISTORIES[name]
    model, prompt, law = ask(asked)
    first = model.processor.prompt(held)
    state = model.new_state()
    before = resume(model, first, state, 4)
    kept = state.reuse(prompt)
    assert sum(spans[-1].stop <= kept for spans in prompt.media_spans) == kept_media
    check(resume(model, prompt, state), law)
    if np.array_equal(first.token_ids, prompt.token_ids):  # only the pixels tell them apart
        here = replace(law, logits=law.logits[: len(prompt.token_ids)])
        assert distance(before.logits[:1], here) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("one", "other"),
    [("text", "image"), ("image", "same grid"), ("video", "image and video")],
)
def test_interleaved(ask: Ask, one: str, other: str) -> None:
    """Two requests on one model, a prefill chunk or a token of each in turn."""
    running = []
    for name in (one, other):
        model, prompt, law = ask(INPUTS[name])
        recorder = Recorder()
        running.append((run_stepwise(model, prompt, recorder), recorder, law))
    outputs = list(zip_longest(*(stepwise for stepwise, *_ in running)))
    for produced, (_, recorder, law) in zip(zip(*outputs, strict=True), running, strict=True):
        tokens = [token for token in produced if token is not None]
        check(Run(tokens, to_numpy(recorder.seen)), law)


def run_stepwise(model: Qwen3VL, prompt: Prompt, recorder: Recorder) -> Iterator[int | None]:
    """None for every prefill chunk of 9 tokens, then the answer token by token."""
    state = model.new_state()
    rows = []
    for hidden in generation.forward(model.model, prompt, state, 0, 9):
        rows.append(model.model.language_model.logits(hidden[:, -1:])[0, 0])
        yield None
    state.extend(prompt)
    yield from generation.decode(model.model, state, prompt.rope_delta, rows[-1], recorder, STEPS)
