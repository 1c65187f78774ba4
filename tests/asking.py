"""Questions to the bundled checkpoint with known answers, and a model that is told what to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine import batch
from qwen3vl_mlx.engine.output import Completion
from qwen3vl_mlx.engine.sampling import Row, SamplerState

SCENES = Path(__file__).parent / "data" / "demo"
QUESTION = "Describe the image."
TRUTH = "A blue background with a purple star at the bottom."
OTHER_TRUTH = "A green background with an orange triangle at the right."


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def about(image: Image, text: str = QUESTION) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def anew(model: Qwen3VL, messages: list[dict[str, Any]], **options: Any) -> Completion:
    """The answer of a model that remembers nothing."""
    model.engine.clear_caches()
    done = model.generate(messages, **options)
    assert done.usage.cached_tokens == 0
    return done


def script(monkeypatch: pytest.MonkeyPatch, model: Qwen3VL, text: str) -> None:
    """Make the model say `text`: the tokens are forced, all else runs as ever."""
    tokens = model.processor.tokenizer.encode(text + "<|im_end|>")

    def scripted(_: mx.array, rows: Sequence[Row]) -> tuple[mx.array, list[SamplerState]]:
        said = [tokens[min(row.state.step, len(tokens) - 1)] for row in rows]
        after = [row.sampler.after(row.state, t) for row, t in zip(rows, said, strict=True)]
        return mx.array(said, mx.int32), after

    monkeypatch.setattr(batch, "draw", scripted)
