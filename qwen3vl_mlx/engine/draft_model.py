"""A smaller checkpoint of the family that guesses how a larger one's answers go on.

It has its own caches and its own look at the pictures, and reads a prompt while the row that it
is for decodes already. Its draws use the row's own random keys, so that where the two models
nearly agree they nearly always draw the same token, at any temperature (Gumbel coupling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.batch import Decoding
from qwen3vl_mlx.engine.constraints import expand
from qwen3vl_mlx.engine.feature_cache import FeatureCache
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.prefix_cache import Key, Match, PrefixCache, prompt_key
from qwen3vl_mlx.engine.reader import PromptReader
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.engine.sampling import Row, Sampler, draw
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.models.vision import VisionFeatures
from qwen3vl_mlx.processing.tokenizer import Tokenizer

_CATCH_UP = 64  # tokens of an answer that are read in one pass
_PATIENCE = 4  # wrong guesses in a row before a pause
_LONGEST_PAUSE = 256  # tokens


@dataclass(frozen=True, eq=False)
class DraftCheckpoint:
    """A loaded draft model and its tokenizer, which must be the large model's."""

    model: Model
    tokenizer: Tokenizer

    def check(self, model: Model, tokenizer: Tokenizer) -> None:
        """Raise InputError where drafts could not be meant for `model`."""
        ours, theirs = self.model.config, model.config
        sizes = {
            "vocab_size": (ours.text.vocab_size, theirs.text.vocab_size),
            "patch_size": (ours.vision.patch_size, theirs.vision.patch_size),
            "temporal_patch_size": (
                ours.vision.temporal_patch_size,
                theirs.vision.temporal_patch_size,
            ),
            "spatial_merge_size": (
                ours.vision.spatial_merge_size,
                theirs.vision.spatial_merge_size,
            ),
        }
        for name, (own, other) in sizes.items():
            if own != other:
                raise InputError(
                    f"the draft model's {name} is {own} and the model's {other}: use a smaller "
                    "checkpoint of the same family as draft"
                )
        ids, their_ids = (
            x.backend.get_vocab(with_added_tokens=True) for x in (self.tokenizer, tokenizer)
        )
        if ids != their_ids:
            raise InputError(
                "the draft model's tokenizer is not the model's: use a smaller checkpoint of the "
                "same family as draft"
            )


@dataclass(eq=False)
class _Reading:
    """A prompt on its way into the draft model's cache."""

    row: Decoding
    key: Key
    length: int
    prefill: Prefill | None
    features: dict[str, VisionFeatures] = field(default_factory=dict)


@dataclass(eq=False)
class _Row:
    """What the draft model's cache holds of one row: a prompt, `read` tokens of its answer, and
    then `guessed` ones that may be right or wrong.
    """

    row: Decoding
    sampler: Sampler
    prompt: int
    read: int = 0
    guessed: list[int] = field(default_factory=list)
    first: int | None = None  # of the last guess, which is not judged yet
    misses: int = 0  # guesses in a row that were wrong from the start
    resume: int = 0  # tokens of the answer from which on to guess again

    def judge(self) -> bool:
        """Whether to guess now: after many wrong guesses, only once in a while."""
        tokens = self.row.tokens
        if self.first is not None and len(tokens) > self.read:
            self.misses = 0 if tokens[self.read] == self.first else self.misses + 1
            self.first = None
            if self.misses >= _PATIENCE:
                self.resume = len(tokens) + min(2**self.misses, _LONGEST_PAUSE)
        return len(tokens) >= self.resume

    @property
    def length(self) -> int:
        return self.prompt + self.read

    def settle(self) -> int:
        """Take right guesses as read; how many of the newest are wrong."""
        count, tokens = len(self.guessed), self.row.tokens
        right = 0
        while right < min(count, len(tokens) - self.read) and (
            self.guessed[right] == tokens[self.read + right]
        ):
            right += 1
        self.read += right
        self.guessed = []
        return count - right


class DraftModel:
    """A `Drafter` that runs all its rows in one batch."""

    def __init__(
        self,
        model: Model,
        features: FeatureCache,
        prefix: PrefixCache | None = None,
        kv_bits: int | None = None,
    ):
        self.model = model
        self.prefix = prefix
        self.kv_bits = kv_bits
        self._reader: PromptReader[_Reading] = PromptReader(model, features)
        self._rows: list[_Row] = []
        self._layers: list[Any] = []
        self._features = features

    @property
    def caches(self) -> Sequence[FeatureCache | PrefixCache]:
        return [self._features, *([] if self.prefix is None else [self.prefix])]

    def begin(self, row: Decoding, request: Request) -> None:
        key = prompt_key(request.prompt)
        match = Match(0, ()) if self.prefix is None else self.prefix.match(key)
        layers = kv_cache.layers_with(match.layers, self.model.config.text, self.kv_bits)
        prefill = Prefill(self.model, request.prompt, layers, match.length)
        self._reader.add(_Reading(row, key, len(request.prompt.token_ids), prefill))

    def keep(self, rows: Sequence[Decoding]) -> None:
        kept = set(rows)
        for reading in [each for each in self._reader.jobs if each.row not in kept]:
            self._reader.remove(reading)
        indices = [i for i, own in enumerate(self._rows) if own.row in kept]
        self._rows = [self._rows[i] for i in indices]
        for layer in self._layers:
            layer.filter(indices)
        if not indices:
            self._layers = []

    def waits(self, row: Decoding) -> bool:
        return any(own.row is row and own.judge() for own in self._rows)

    def advance(self, budget: int) -> int:
        """Read prompts, about `budget` tokens; returns what was read."""
        left = budget
        while left > 0 and (reading := self._reader.next()) is not None:
            left -= self._reader.advance(reading, left, wait=False)
            if reading.prefill is not None and reading.prefill.hidden is not None:
                self._reader.remove(reading)
                self._join(reading, reading.prefill.layers)
        return budget - left

    def _join(self, reading: _Reading, layers: list[Any]) -> None:
        if self.prefix is not None:
            self.prefix.insert(reading.key, [kv_cache.layer_rows(layer) for layer in layers])
        if self._rows:
            for ours, theirs in zip(self._layers, layers, strict=True):
                ours.join([theirs])
        else:
            self._layers = [kv_cache.merge([layer]) for layer in layers]
        self._rows.append(_Row(reading.row, _drafting(reading.row.sampler), reading.length))

    def draft(self, rows: Sequence[Decoding], counts: Sequence[int]) -> list[Sequence[int]]:
        wanted = dict(zip(rows, counts, strict=True))
        asleep = {own.row for own in self._rows if not own.judge()}
        wanted = {row: 0 if row in asleep else count for row, count in wanted.items()}
        most = max((wanted.get(own.row, 0) for own in self._rows), default=0)
        if not most:
            return [()] * len(rows)
        logits = self.model.language_model.logits(self._catch_up())  # (B, vocab_size)
        drawn: list[mx.array] = []  # (B,) each
        states = [own.row.sampler_state for own in self._rows]
        while True:
            first = not drawn
            asked = [
                Row(own.sampler, state, None, self._allowed(own.row) if first else None)
                for own, state in zip(self._rows, states, strict=True)
            ]
            tokens, states = draw(logits, asked)
            drawn.append(tokens)
            if len(drawn) == most:
                break
            hidden = self._pass(tokens[:, None], len(drawn) - 1)
            logits = self.model.language_model.logits(hidden[:, 0])
        guesses: list[list[int]] = mx.stack(drawn, axis=1).tolist()  # type: ignore[assignment]
        found: dict[Decoding, list[int]] = {}
        for own, guess in zip(self._rows, guesses, strict=True):
            own.guessed = guess[:-1]  # the last was not fed
            own.first = guess[0] if wanted.get(own.row) else None
            found[own.row] = guess
        return [found.get(row, [])[:count] for row, count in wanted.items()]

    def _catch_up(self) -> mx.array:
        """Feed what was read of the answers since; the newest hidden states (B, hidden_size)."""
        self._trim([own.settle() for own in self._rows])
        waiting = [own.row.tokens[own.read :] for own in self._rows]
        longest = max(map(len, waiting))
        fed = np.zeros((len(waiting), longest), np.int32)
        for i, tokens in enumerate(waiting):
            fed[i, : len(tokens)] = tokens
        parts = [
            self._pass(mx.array(fed[:, start : start + _CATCH_UP]), start)
            for start in range(0, longest, _CATCH_UP)
        ]
        for own, tokens in zip(self._rows, waiting, strict=True):
            own.read += len(tokens)
        self._trim([longest - len(tokens) for tokens in waiting])
        last = mx.array([len(tokens) - 1 for tokens in waiting])[:, None, None]
        return mx.take_along_axis(mx.concatenate(parts, axis=1), last, axis=1)[:, 0]

    def _pass(self, tokens: mx.array, ahead: int) -> mx.array:
        """Hidden states of tokens (B, L) that stand `ahead` tokens behind what was read."""
        offsets = [own.length + own.row.rope_delta + ahead for own in self._rows]
        return self.model.language_model(tokens, mx.array(offsets, mx.int32), self._layers)

    def _trim(self, counts: list[int]) -> None:
        if any(counts):
            for layer in self._layers:
                layer.trim(counts)

    def _allowed(self, row: Decoding) -> mx.array | None:
        """What the row's guide lets through; it knows the first token only."""
        bits = row.guide.mask() if row.guide is not None else None
        return None if bits is None else expand(bits, self.model.config.text.vocab_size)


def _drafting(sampler: Sampler) -> Sampler:
    """The row's own sampler, without what needs the tokens on the host."""
    if not sampler.needs_history:
        return sampler
    params = replace(sampler.params, dry_multiplier=0.0, seed=sampler.seed)
    return Sampler(params, sampler.prompt_ids, sampler.vocab_size)
