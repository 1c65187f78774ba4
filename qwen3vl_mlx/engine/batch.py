"""The rows that are decoding: one pass of the decoder gives each of them its next token.

Nothing here waits for the device but `read`, once per step for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.constraints import Guide, expand
from qwen3vl_mlx.engine.logprobs import LogprobArrays, chosen_logprobs
from qwen3vl_mlx.engine.sampling import Row, Sampler, SamplerState, draw
from qwen3vl_mlx.models.qwen3_vl import Model


@dataclass(eq=False)
class Decoding:
    """One row's own part of the work."""

    sampler: Sampler
    sampler_state: SamplerState
    guide: Guide | None
    rope_delta: int
    max_tokens: int
    top_logprobs: int | None  # None: no logprobs are wanted
    length: int  # tokens in the cache
    drawn: int = 0  # tokens drawn so far, read or not
    tokens: list[int] = field(default_factory=list)  # the answer, as far as it is read
    steps: int = 0  # passes of the decoder
    drafted: int = 0
    accepted: int = 0

    @property
    def waits_for_host(self) -> bool:
        """Whether the next draw depends on tokens that the host must have read."""
        return self.sampler.needs_history or (self.guide is not None and self.guide.wants_host)


@dataclass(frozen=True)
class Drawn:
    """Tokens on their way from the device."""

    rows: tuple[Decoding, ...]
    tokens: mx.array  # (B,)
    logprobs: tuple[LogprobArrays | None, ...]


def draw_rows(logits: mx.array, rows: Rows[Decoding]) -> Drawn:
    """Draw the next token of every row from `logits` (B, vocab_size), and note it there."""
    size = logits.shape[-1]
    asked: list[Row] = []
    for row in rows:
        bits = row.guide.mask() if row.guide is not None else None
        allowed = expand(bits, size) if bits is not None else None
        history = row.tokens if row.sampler.needs_history else None
        asked.append(Row(row.sampler, row.sampler_state, history, allowed))
    tokens, states = draw(logits, asked)
    logprobs: list[LogprobArrays | None] = []
    for i, (row, state) in enumerate(zip(rows, states, strict=True)):
        row.sampler_state = state
        row.drawn += 1
        wanted = row.top_logprobs
        logprobs.append(
            None if wanted is None else chosen_logprobs(logits[i], tokens[i : i + 1], wanted)
        )
    mx.async_eval(tokens, [x for entry in logprobs if entry is not None for x in entry])
    return Drawn(tuple(rows), tokens, tuple(logprobs))


class Batch:
    """Rows, their merged cache, and the tokens that were drawn and not read yet."""

    def __init__(self, model: Model):
        self.model = model
        self.rows: list[Decoding] = []
        self.layers: list[Any] = []
        self.unread: Drawn | None = None

    def join(
        self, rows: Rows[Decoding], layers: Rows[list[Any]], first_tokens: Rows[Drawn]
    ) -> None:
        """Take in rows whose prompts are done, with their own layers.

        first_tokens: of these rows, and of any that have no more to draw.
        """
        if rows and self.rows:
            for ours, theirs in zip(self.layers, zip(*layers, strict=True), strict=True):
                ours.join(theirs)
        elif rows:
            self.layers = [kv_cache.merge(own) for own in zip(*layers, strict=True)]
        self.rows += rows
        parts = [*([self.unread] if self.unread else []), *first_tokens]
        self.unread = Drawn(
            tuple(row for part in parts for row in part.rows),
            mx.concatenate([part.tokens for part in parts]),
            tuple(entry for part in parts for entry in part.logprobs),
        )

    def keep(self, kept: Rows[Decoding]) -> None:
        """Let all other rows go."""
        wanted = set(map(id, kept))
        indices = [i for i, row in enumerate(self.rows) if id(row) in wanted]
        self.rows = [self.rows[i] for i in indices]
        for layer in self.layers:
            layer.filter(indices)
        if not indices:
            self.layers = []

    def rows_of(self, row: Decoding, count: int) -> list[tuple[mx.array, ...]]:
        """The first `count` tokens of one row's cache, layer by layer: views."""
        index = next(i for i, own in enumerate(self.rows) if own is row)
        return [tuple(x[:, :, :count] for x in layer.rows(index)) for layer in self.layers]

    def forward(self) -> mx.array:
        """Queue a pass over every row's newest token; logits (B, vocab_size), lazily."""
        assert self.unread is not None
        offsets = np.array([row.length + row.rope_delta for row in self.rows], np.int32)
        tokens = self._newest()
        hidden = self.model.language_model(tokens[:, None], mx.array(offsets), self.layers)
        for row in self.rows:
            row.length += 1
            row.steps += 1
        return self.model.language_model.logits(hidden)[:, 0]

    def _newest(self) -> mx.array:
        """The rows' drawn tokens, (B,), in the order of the rows."""
        assert self.unread is not None
        if len(self.unread.rows) == len(self.rows):
            return self.unread.tokens
        place = {id(row): i for i, row in enumerate(self.unread.rows)}
        return self.unread.tokens[mx.array([place[id(row)] for row in self.rows])]
