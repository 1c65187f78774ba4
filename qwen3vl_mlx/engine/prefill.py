"""One prompt into its own cache, a few tokens at a time; chunks may end inside an image too."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.errors import PromptError
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.models.text import VisualTokens
from qwen3vl_mlx.models.vision import VisionFeatures
from qwen3vl_mlx.processing.image import VisualInput
from qwen3vl_mlx.processing.prompt import Prompt


class Prefill:
    """Brings `layers`, which hold the prompt's first `done` tokens, to hold all of it.

    `done` must not lie inside a medium. Features travel with the rows they belong to.
    """

    def __init__(self, model: Model, prompt: Prompt, layers: list[Any], done: int = 0):
        self.model = model
        self.prompt = prompt
        self.layers = layers
        self.done = done
        held = sum(spans[-1].stop <= done for spans in prompt.media_spans)
        self.media: tuple[VisualInput, ...] = prompt.media[held:]  # whose features are needed
        self._skipped = sum(medium.num_tokens for medium in prompt.media[:held])
        self._rows = prompt.visual_rows
        self._features: VisionFeatures | None = None
        self.hidden: mx.array | None = None  # (1, hidden_size) of the last token, once it is read

    @property
    def ready(self) -> bool:
        """Whether no features are missing."""
        return not self.media or self._features is not None or not self.remaining

    @property
    def remaining(self) -> int:
        return len(self.prompt.token_ids) - self.done

    def give(self, features: VisionFeatures) -> None:
        """Hand over the features of all `media`, in order."""
        wanted = sum(medium.num_tokens for medium in self.media)
        if len(features.embeds) != wanted:
            raise PromptError(f"{wanted} visual tokens, but {len(features.embeds)} features")
        self._features = features

    def step(self, tokens: int) -> mx.array:
        """Queue the next chunk, at most `tokens` long; its hidden states (1, n, hidden_size)."""
        begin, end = self.done, min(self.done + tokens, len(self.prompt.token_ids))
        prompt = self.prompt
        first, last = np.searchsorted(self._rows, (begin, end))
        visual: VisualTokens | None = None
        if first < last:
            assert self._features is not None
            rows = mx.array(self._rows[first:last] - begin)
            own = slice(int(first) - self._skipped, int(last) - self._skipped)
            visual = VisualTokens(rows, self._features[own])
            positions = mx.array(prompt.position_ids[:, None, begin:end])  # (3, 1, n)
        else:  # text alone: the axes count together
            positions = mx.array(prompt.position_ids[0, begin : begin + 1])  # (1,)
        token_ids = mx.array(prompt.token_ids[None, begin:end])  # (1, n)
        hidden = self.model.language_model(token_ids, positions, self.layers, visual)
        self.done = end
        if not self.remaining:
            self._features, self.hidden = None, hidden[:, -1]
        return hidden
