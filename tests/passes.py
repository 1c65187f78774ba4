"""A prompt through a model without the engine: chunk by chunk, then token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.vision import encode
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.prompt import Prompt


def forward(
    model: Model,
    prompt: Prompt,
    layers: list[Any] | None = None,
    start: int = 0,
    chunk: int = 4096,
) -> Iterator[mx.array]:
    """Hidden states (1, n, hidden_size) of the prompt's tokens from `start` on, chunk by chunk.

    layers: the cache, which holds the first `start` tokens; None is an empty one.
    """
    if layers is None:
        layers = kv_cache.new_layers(model.config.text)
    prefill = Prefill(model, prompt, layers, start)
    if prefill.media:
        prefill.give(encode(model.vision_tower, prefill.media))
    while prefill.remaining:
        yield prefill.step(chunk)


def decode(
    model: Model,
    layers: list[Any],
    rope_delta: int,
    logits: mx.array,
    choose: Callable[[mx.array], int],
    steps: int,
) -> Iterator[int]:
    """`steps` tokens that `choose` takes from logits (vocab_size,), those given first."""
    for step in range(steps):
        token = choose(logits)
        yield token
        if step + 1 < steps:
            positions = mx.array([layers[0].offset + rope_delta])
            hidden = model.language_model(mx.array([[token]]), positions, layers)
            logits = model.language_model.logits(hidden)[0, 0]
