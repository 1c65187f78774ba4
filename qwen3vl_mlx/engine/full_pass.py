"""All of a prompt's logits, for evaluation, computed between the steps of what else is running."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.engine import Engine
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.vision import Encoding
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.models.vision import VisionFeatures
from qwen3vl_mlx.processing.prompt import Prompt


def full_logits(engine: Engine, model: Model, prompt: Prompt) -> npt.NDArray[np.float32]:
    """Next-token logits at every position of a prompt, (L, vocab_size).

    No cache is used, and nothing is kept. As much is done at a time as running rows may wait for.
    """
    chunk = engine.options.interleave
    layers = kv_cache.new_layers(model.config.text)
    prefill = Prefill(model, prompt, layers)
    if prefill.media:
        encoding = engine.call(partial(Encoding, model.vision_tower, prefill.media))
        while not engine.call(partial(encoding.step, chunk)):
            pass
        features = [encoding.features[medium.identity] for medium in prefill.media]
        engine.call(lambda: prefill.give(VisionFeatures.concatenate(features)))

    def read_some() -> npt.NDArray[np.float32]:
        logits = model.language_model.logits(prefill.step(chunk))[0]  # (n, vocab_size)
        return np.array(logits.astype(mx.float32))

    parts: list[npt.NDArray[np.float32]] = []
    while prefill.remaining:
        parts.append(engine.call(read_some))
    return np.concatenate(parts)
