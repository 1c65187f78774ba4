"""One forward pass of many prompts through a checkpoint of any size, a decoder layer at a time.

Every prompt goes through layer i before layer i + 1 is read. In memory at once: one layer (before
that the vision tower or the embeddings, after it the head), and for P prompts of L tokens together
L * hidden_size hidden states, with up to four times that while DeepStack features wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from qwen3vl_mlx.engine.vision import encode
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.layout import Weights
from qwen3vl_mlx.loading import (
    build_model,
    check_weights,
    column_major,
    default_dtype,
    matrices,
    read_tensors,
    rename_weights,
)
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.models.rope import Rotation
from qwen3vl_mlx.models.text import DecoderLayer, VisualTokens, add_rows, set_rows
from qwen3vl_mlx.processing.prompt import Prompt

_TEXT = "language_model.model."


@dataclass(frozen=True)
class LayerInput:
    """What one prompt brings to a decoder layer."""

    hidden: mx.array  # (1, L, hidden_size)
    rotation: Rotation
    mask: Literal["causal"] | None

    def through(self, layer: DecoderLayer) -> mx.array:
        """The layer's output, (1, L, hidden_size). Lazy."""
        return layer(self.hidden, self.rotation, self.mask, None)


class StreamedPass:
    """A forward pass of `prompts` through the checkpoint in `folder`.

    passing = StreamedPass(folder, prompts)
    for index, layer, inputs in passing.layers():
        ...  # look at the layer, or change it: what comes next sees its outputs
    for logits in passing.logits(rows):
        ...

    Hidden states equal those of one pass through the model. dtype: as in `loading.load_model`, by
    default `default_dtype()`. read: gives the tensors of `folder` by name, not yet read from disk.
    Raises ConfigError or WeightsError before anything is read.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[Prompt],
        *,
        dtype: mx.Dtype | None = None,
        read: Callable[[Path], Weights] = read_tensors,
    ):
        if not prompts:
            raise InputError("a streamed pass needs at least one prompt")
        self.folder = folder
        self.prompts = prompts
        self.dtype = dtype or default_dtype()
        self.config = read_config(folder)
        self._read = read
        weights = self._open()
        self._model = build_model(self.config, weights)
        flat = tree_flatten(self._model.parameters(), destination={})  # type: ignore[no-untyped-call]
        assert isinstance(flat, dict)
        check_weights(weights, {name: tensor.shape for name, tensor in flat.items()})
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        self._turned = matrices(self._model) if on_cpu else frozenset()
        self._states: list[mx.array] = []  # (1, L, hidden_size) each, once all layers have run

    @property
    def num_layers(self) -> int:
        return self.config.text.num_hidden_layers

    def layers(self) -> Iterator[tuple[int, DecoderLayer, list[LayerInput]]]:
        """Yield (index, layer with its weights read, one input per prompt) for each layer.

        A layer runs when the next one is asked for, with the weights it then has, on the inputs
        yielded; the list then holds the next layer's inputs, and the layer's weights are dropped.
        """
        weights = self._open()
        text = self._model.language_model.model
        visual = self._encode(weights)
        inputs = self._embed(weights, visual)
        pending = [_Pending.of(tokens) for tokens in visual]
        del visual
        for index, layer in enumerate(text.layers):
            self._fill(layer, f"{_TEXT}layers.{index}.", weights)
            yield index, layer, inputs
            for i, item in enumerate(inputs):
                inputs[i] = replace(item, hidden=pending[i].add_to(item.through(layer)))
                mx.eval(inputs[i].hidden)
            _drop(layer)
        self._states = [item.hidden for item in inputs]

    def logits(self, rows: Sequence[slice]) -> Iterator[mx.array]:
        """For each prompt the logits of its `rows`, (n, vocab_size), in the model's type.

        Runs the layers first, unless `layers` has been used up. One prompt's are made at a time.
        """
        if not self._states:
            for _ in self.layers():
                pass
        language = self._model.language_model
        ends = zip(self._states, rows, strict=True)
        states = [language.model.norm(hidden)[0, part] for hidden, part in ends]  # (n, D) each
        mx.eval(states)
        self._states = []
        weights = self._open()
        head: nn.Module
        if "lm_head" in language:
            head, prefix = language.lm_head, "language_model.lm_head."
        else:
            head, prefix = language.model.embed_tokens, f"{_TEXT}embed_tokens."
        self._fill(head, prefix, weights)
        for state in states:
            yield language.logits(state)
        _drop(head)

    def _open(self) -> Weights:
        return rename_weights(self._read(self.folder), self.config)

    def _fill(self, module: nn.Module, prefix: str, weights: Weights) -> None:
        """Move a module's tensors out of `weights`, read and cast."""
        for name in [name for name in weights if name.startswith(prefix)]:
            tensor = weights.pop(name)
            if self.dtype is not None and mx.issubdtype(tensor.dtype, mx.floating):
                tensor = tensor.astype(self.dtype)
            if name in self._turned:
                tensor = column_major(tensor)
            mx.eval(tensor)  # one by one: there are copies until then
            module.load_weights([(name.removeprefix(prefix), tensor)], strict=False)
        module.eval()

    def _encode(self, weights: Weights) -> list[VisualTokens | None]:
        """Features of each prompt's media, from a tower that is read and dropped here."""
        visual: list[VisualTokens | None] = []
        tower = self._model.vision_tower
        if any(prompt.media for prompt in self.prompts):
            self._fill(tower, "vision_tower.", weights)
        for prompt in self.prompts:
            if prompt.media:
                features = encode(tower, prompt.media)
                mx.eval(features.embeds, *features.deepstack)
                visual.append(VisualTokens(mx.array(prompt.visual_rows), features))
            else:
                visual.append(None)
        _drop(tower)
        return visual

    def _embed(self, weights: Weights, visual: Sequence[VisualTokens | None]) -> list[LayerInput]:
        """The first layer's inputs, as `TextModel` makes them. The embeddings are dropped."""
        text = self._model.language_model.model
        self._fill(text.norm, f"{_TEXT}norm.", weights)  # stays: its type is the model's
        self._fill(text.embed_tokens, f"{_TEXT}embed_tokens.", weights)
        inputs = []
        for prompt, tokens in zip(self.prompts, visual, strict=True):
            length = len(prompt.token_ids)
            hidden = text.embed_tokens(mx.array(prompt.token_ids[None]))  # (1, L, hidden_size)
            hidden = hidden.astype(text.norm.weight.dtype)
            if tokens is None:  # text alone: the axes count together
                positions = mx.array(prompt.position_ids[0, :1])  # (1,)
            else:
                hidden = set_rows(hidden, tokens.rows, tokens.features.embeds)
                positions = mx.array(prompt.position_ids[:, None])  # (3, 1, L)
            rotation = text.rope.rotation(positions, length)
            mx.eval(hidden, rotation)
            inputs.append(LayerInput(hidden, rotation, "causal" if length > 1 else None))
        _drop(text.embed_tokens)
        return inputs


@dataclass
class _Pending:
    """DeepStack features of one prompt that no layer has taken yet."""

    rows: mx.array
    levels: list[mx.array]

    @staticmethod
    def of(tokens: VisualTokens | None) -> _Pending:
        if tokens is None:
            return _Pending(mx.array([]), [])
        return _Pending(tokens.rows, [*tokens.features.deepstack])

    def add_to(self, hidden: mx.array) -> mx.array:
        return add_rows(hidden, self.rows, self.levels.pop(0)) if self.levels else hidden


def _drop(module: nn.Module) -> None:
    """Let go of a module's weights; the module stays, to be filled again."""
    module.update(tree_map(lambda _: mx.array(0.0), module.parameters()))
    mx.clear_cache()
