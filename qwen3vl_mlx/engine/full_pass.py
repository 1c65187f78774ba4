"""All of a prompt's logits, for evaluation, computed between the steps of what else is running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.engine import Engine
from qwen3vl_mlx.engine.logprobs import TokenLogprob, chosen_logprobs, to_host
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.vision import Encoding
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.models.vision import VisionFeatures
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.processing.tokenizer import Tokenizer

Result = TypeVar("Result")


def full_logits(engine: Engine, model: Model, prompt: Prompt) -> npt.NDArray[np.float32]:
    """Next-token logits at every position of a prompt, (L, vocab_size).

    No cache is used, and nothing is kept. As much is done at a time as running rows may wait for.
    """

    def to_numpy(logits: mx.array, _: int) -> npt.NDArray[np.float32]:
        return np.array(logits.astype(mx.float32))

    return np.concatenate(list(_passes(engine, model, prompt, to_numpy)))


def prompt_logprobs(
    engine: Engine, model: Model, prompt: Prompt, tokenizer: Tokenizer, top: int
) -> Iterator[list[TokenLogprob]]:
    """Of each token of a prompt but the first, with the `top` likeliest in its place, in order.

    Each item is the work of one turn on the engine, whose logits are dropped before the next.
    """
    following = prompt.token_ids[1:]

    def score(logits: mx.array, begin: int) -> list[TokenLogprob]:
        tokens = following[begin : begin + len(logits)].tolist()
        scores = [
            chosen_logprobs(row, mx.array([token]), top)
            for row, token in zip(logits, tokens, strict=False)  # nothing follows the last row
        ]
        mx.eval(scores)
        return [
            to_host(score, token, tokenizer) for score, token in zip(scores, tokens, strict=True)
        ]

    return _passes(engine, model, prompt, score)


def _passes(
    engine: Engine, model: Model, prompt: Prompt, use: Callable[[mx.array, int], Result]
) -> Iterator[Result]:
    """`use(logits (n, vocab_size), first position)`, on the engine's thread, chunk by chunk.

    Raises InputError for what can never fit in memory.
    """
    chunk, admission = engine.options.interleave, engine.scheduler.admission
    if problem := admission.refuse(admission.cost(prompt, 1)):
        raise InputError(problem)
    layers = kv_cache.new_layers(model.config.text)
    prefill = Prefill(model, prompt, layers)
    if prefill.media:
        encoding = engine.call(partial(Encoding, model.vision_tower, prefill.media))
        while not engine.call(partial(encoding.step, chunk)):
            pass
        features = [encoding.features[medium.identity] for medium in prefill.media]
        engine.call(lambda: prefill.give(VisionFeatures.concatenate(features)))

    def use_some() -> Result:
        begin = prefill.done
        return use(model.language_model.logits(prefill.step(chunk))[0], begin)

    while prefill.remaining:
        yield engine.call(use_some)
