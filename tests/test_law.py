"""One answer per question: 16 greedy tokens and their logits are those of one full forward pass.

| road                                                     | test                             |
|----------------------------------------------------------|----------------------------------|
| one shot, then decode step by step                       | test_road[one shot]              |
| prefill in chunks of 1, 7 and 64                         | test_road[chunks of n]           |
| text and decoded tokens turned by the GPU's fused rope   | test_road[fused rope]            |
| through the engine, alone                                | test_road[engine]                |
| images encoded block by block, prompts cut, rows waiting | test_road[read in small pieces]  |
| the same prompt again, its answer held                   | test_road[asked twice]           |
| reading given up halfway, then asked again               | test_road[given up and asked]    |
| picture seen elsewhere in another conversation           | test_road[features held]         |
| prefix cache saved, restored by a fresh engine           | test_road[restored from disk]    |
| tokens guessed ahead, and checked several at once        | test_road[guessed by lookup]     |
| the same, and nearly every guess is right                | test_road[guessed by a model]    |
| one cut at every place inside and around the media       | test_every_cut                   |
| a prefix held that ends at every place in and around     | test_every_prefix                |
| another prompt held: earlier turn, other pictures        | test_after_another_prompt        |
| two requests interleaved step by step                    | test_interleaved                 |
| in a batch with 1, 3, 7 others that come and go          | test_batched                     |
| neighbours cancelled while waiting, reading, running     | test_cancelled_neighbours        |
| through the server, over HTTP                            | test_server_chat.py              |

All of them with keys and values quantized, too: against one full pass over those. A new road is a
row here and a function in roads.py, or a test of its own where it has more to vary. The full pass
itself is compared with transformers elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import passes
import pytest
import tiny
from driving import Driver
from law import (
    HISTORIES,
    INPUTS,
    STEPS,
    TOLERANCE,
    Messages,
    Recorder,
    Run,
    check,
    distance,
    empty,
    full_pass,
    pass_through,
    places,
    to_numpy,
)
from roads import ONLY_FOR, ROADS, Case, own_draft, usage

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.prefix_cache import prompt_key
from qwen3vl_mlx.models.vision import VisionFeatures, VisionModel
from qwen3vl_mlx.processing.image import VisualInput
from qwen3vl_mlx.processing.prompt import Prompt


@pytest.fixture(scope="module", autouse=True)
def encode_once() -> Iterator[None]:
    """The vision tower is a pure function and most of the time: each set of media runs once.

    The engine's own encoding is left as it is.
    """
    encode = passes.encode
    known: dict[tuple[Any, ...], VisionFeatures] = {}

    def look_up(tower: VisionModel, media: Sequence[VisualInput]) -> VisionFeatures:
        key = (id(tower), *(medium.identity for medium in media))
        if key not in known:
            known[key] = encode(tower, media)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "encode", look_up)
        yield


Ask: TypeAlias = "Callable[[Messages], Case]"
Known: TypeAlias = "dict[tuple[str, int], tuple[Prompt, Run]]"

# A quantized model obeys the law against its own one full pass; so does a quantized cache.
WEIGHTS = ("dense64 4bit", "moe mixed_3_6")
CACHES = ("dense64 kv8", "moe kv4")
MODELS = (*tiny.VARIANTS, *WEIGHTS, *CACHES)


@pytest.fixture(scope="module")
def known() -> Known:
    return {}


@pytest.fixture(params=MODELS)
def ask(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Qwen3VL],
    drive: Callable[..., Driver],
    known: Known,
) -> Ask:
    """A model; `ask(messages)` gives it, their prompt, and the answer of one full pass."""
    name, _, bits = request.param.partition(" kv")
    model, kv_bits = tiny_model(name), int(bits) if bits else None

    def look_up(messages: Messages) -> Case:
        key = (request.param, id(messages))
        if key not in known:
            prompt = model.processor.prompt(messages)
            known[key] = (prompt, full_pass(model, prompt, kv_bits))
        prompt, law = known[key]
        return Case(model, kv_bits, messages, prompt, law, drive)

    return look_up


@pytest.mark.parametrize(
    ("road", "name"), [(road, name) for road in ROADS for name in ONLY_FOR.get(road, INPUTS)]
)
def test_road(ask: Ask, road: str, name: str, tmp_path: Path) -> None:
    case = ask(INPUTS[name])
    assert len(case.prompt.token_ids) > 64 or road != "chunks of 64"
    check(ROADS[road](case, tmp_path), case.law)


@pytest.mark.parametrize("ask", [*tiny.VARIANTS, *WEIGHTS], indirect=True)
@pytest.mark.parametrize("name", ["image", "same grid", "later turn", "image and video"])
def test_every_cut(ask: Ask, name: str) -> None:
    case = ask(INPUTS[name])
    model, prompt = case.model, case.prompt
    of_prompt = replace(case.law, logits=case.law.logits[: len(prompt.token_ids)])
    for cut in places(prompt):
        layers = empty(model, case.kv_bits)
        hidden = passes.forward(model.model, prompt, layers, 0, cut)
        head = model.model.language_model.logits(next(hidden))[0]
        assert layers[0].offset == cut
        tail = pass_through(model, prompt, layers, cut, 2048)
        assert distance(to_numpy([head, *tail]), of_prompt) <= TOLERANCE, f"cut at {cut}"


@pytest.mark.parametrize("ask", [*tiny.VARIANTS, *CACHES], indirect=True)
@pytest.mark.parametrize("name", ["image", "same grid", "video"])
def test_every_prefix(ask: Ask, name: str) -> None:
    """A held prefix that ends inside a medium is not trusted there: it goes back to its start."""
    case = ask(INPUTS[name])
    driver = case.driver()
    prefix = driver.scheduler.prefix
    assert prefix is not None
    driver.finish(driver.ask(case.prompt, 2))
    longer = prompt_key(case.prompt, [0])
    held = prefix.match(longer).layers  # of all of the prompt
    media = [(spans[0].start, spans[-1].stop) for spans in case.prompt.media_spans]
    for cut in places(case.prompt):
        prefix.clear()
        prefix.insert(longer, [[x[:, :, :cut] for x in layer] for layer in held])
        handle = driver.ask(case.prompt, 2)
        run = case.run(driver, handle)
        broken = [start for start, stop in media if start < cut < stop]
        assert usage(handle).cached_tokens == (broken[0] if broken else cut)
        here = case.part_of_law(2)
        assert run.tokens == here.tokens, f"prefix of {cut}"
        assert distance(run.logits, here) <= TOLERANCE, f"prefix of {cut}"


@pytest.mark.parametrize("name", HISTORIES)
def test_after_another_prompt(ask: Ask, name: str) -> None:
    held, asked, kept_media = HISTORIES[name]
    case = ask(asked)
    driver = case.driver()
    first = case.model.processor.prompt(held)
    before = case.run(driver, driver.ask(first, 4))
    handle = driver.ask(case.prompt)
    check(case.run(driver, handle), case.law)
    kept = usage(handle).cached_tokens
    assert sum(spans[-1].stop <= kept for spans in case.prompt.media_spans) == kept_media
    if np.array_equal(first.token_ids, case.prompt.token_ids):  # only the pixels tell them apart
        assert distance(before.logits[:1], case.part_of_law(1)) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("one", "other"),
    [("text", "image"), ("image", "same grid"), ("video", "image and video")],
)
def test_interleaved(ask: Ask, one: str, other: str) -> None:
    """Two requests on one model, a prefill chunk or a token of each in turn."""
    running = []
    for name in (one, other):
        case = ask(INPUTS[name])
        recorder = Recorder()
        running.append((run_stepwise(case, recorder), recorder, case.law))
    outputs = list(zip_longest(*(stepwise for stepwise, *_ in running)))
    for produced, (_, recorder, law) in zip(zip(*outputs, strict=True), running, strict=True):
        tokens = [token for token in produced if token is not None]
        check(Run(tokens, to_numpy(recorder.seen)), law)


def run_stepwise(case: Case, recorder: Recorder) -> Iterator[int | None]:
    """None for every prefill chunk of 9 tokens, then the answer token by token."""
    model, prompt = case.model, case.prompt
    layers = empty(model, case.kv_bits)
    rows = []
    for hidden in passes.forward(model.model, prompt, layers, 0, 9):
        rows.append(model.model.language_model.logits(hidden[:, -1:])[0, 0])
        yield None
    yield from passes.decode(model.model, layers, prompt.rope_delta, rows[-1], recorder, STEPS)


@pytest.mark.parametrize(("others", "guess"), [(1, False), (3, False), (7, False), (5, True)])
def test_batched(ask: Ask, others: int, guess: bool) -> None:
    """Requests of all kinds come two steps apart and leave after different times."""
    cases = [ask(messages) for messages in (*INPUTS.values(), INPUTS["image"])][-1 - others :]
    draft = own_draft(cases[0].model) if guess else None
    driver = cases[0].driver(max_batch=others + 1, interleave=40, prefix_cache_bytes=0, draft=draft)
    handles, most = [], 0
    for i, case in enumerate(cases):
        handles.append(driver.ask(case.prompt, STEPS - 3 * (i % 3)))
        driver.step()
        driver.step()
        most = max(most, len(driver.scheduler.batch.rows))
    while driver.scheduler.busy:
        driver.step()
        most = max(most, len(driver.scheduler.batch.rows))
    assert most > min(others, 3)
    for case, handle in zip(cases, handles, strict=True):
        law = case.part_of_law(len(handle.tokens))
        assert len(handle.tokens) == handle.request.max_tokens
        check(Run(handle.tokens, driver.logits(handle)), law)
    driver.drain()


def test_cancelled_neighbours(ask: Ask) -> None:
    """One is cancelled while it waits, one while it is read, and two after a few tokens."""
    names = ("image", "same grid", "image and video", "later turn", "text", "video")
    cases = [ask(INPUTS[name]) for name in names]
    driver = cases[0].driver(max_batch=5, interleave=20, prefill_chunk=20, prefix_cache_bytes=0)
    kept, one, read, two, last, waits = (driver.ask(case.prompt) for case in cases)
    driver.until(lambda: read.phase == "prefilling" and one.phase == "running")
    assert waits.phase == "waiting"
    waits.cancel()
    read.cancel()
    driver.until(lambda: len(one.tokens) == 3)
    one.cancel()
    driver.until(lambda: len(two.tokens) == 5)
    two.cancel()
    driver.finish(kept, last)
    for case, handle in zip(cases, (kept, one, read, two, last, waits), strict=True):
        assert handle.tokens == case.law.tokens[: len(handle.tokens)]
        if handle.tokens:
            run = Run(handle.tokens, driver.logits(handle))
            check(run, case.part_of_law(len(handle.tokens)))
    lengths = [len(handle.tokens) for handle in (kept, one, read, two, last, waits)]
    assert lengths == [STEPS, 3, 0, 5, STEPS, 0]
    driver.drain()
