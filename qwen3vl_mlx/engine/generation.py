"""One sequence from prompt to tokens: chunked prefill, then decoding one token ahead of the host.

For work that is not a request: evaluation and calibration. Requests go through the engine.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import mlx.core as mx

from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.sampling import Sampler
from qwen3vl_mlx.engine.state import CacheState
from qwen3vl_mlx.engine.vision import encode
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.prompt import Prompt

PREFILL_CHUNK = 2048
_CLEAR_EVERY = 256  # decode steps between returns of MLX's free buffers


def prefill(
    model: Model, prompt: Prompt, state: CacheState, chunk: int = PREFILL_CHUNK
) -> mx.array:
    """Bring an empty `state` to hold all of `prompt`; the last token's logits, (vocab_size,).

    Chunks may end anywhere, inside an image too: features travel with their rows.
    """
    last = mx.array([])
    for hidden in forward(model, prompt, state, 0, chunk):
        before, last = last, hidden[:, -1:]
        mx.async_eval(state.arrays(), last)
        mx.eval(before)  # two chunks in flight: the device is busy, and memory stays bounded
    return model.language_model.logits(last)[0, 0]


def forward(
    model: Model, prompt: Prompt, state: CacheState, start: int, chunk: int
) -> Iterator[mx.array]:
    """Hidden states (1, n, hidden_size) of the prompt's tokens from `start` on, chunk by chunk."""
    prefill = Prefill(model, prompt, state.layers, start)
    if prefill.media:
        prefill.give(encode(model.vision_tower, prefill.media))
    while prefill.remaining:
        yield prefill.step(chunk)


def decode(
    model: Model,
    state: CacheState,
    rope_delta: int,
    logits: mx.array,
    sampler: Sampler,
    max_tokens: int,
) -> Generator[int, None, None]:
    """Sample up to `max_tokens` tokens, starting from the prompt's last logits.

    The next step is queued before the host reads a token, so the device never waits. Closing the
    iterator ends the work; `state` then holds every token that was fed back.
    """
    token = sampler(logits)
    mx.async_eval(token)
    for count in range(1, max_tokens + 1):
        following: mx.array | None = None
        if count < max_tokens:
            positions = mx.array([state.length + rope_delta])
            hidden = model.language_model(token[None], positions, state.layers)
            following = sampler(model.language_model.logits(hidden)[0, 0])
            mx.async_eval(following)
        value = int(token.item())  # type: ignore[arg-type]
        if following is None:
            yield value
            return
        token = following
        yield value
        if count % _CLEAR_EVERY == 1:  # first of all, what prefill left
            mx.clear_cache()
