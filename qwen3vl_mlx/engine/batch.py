"""The rows that are decoding: one pass of the decoder gives each of them its next token, or, where
a draft is verified, as many as were guessed right and one more.

Nothing here waits for the device but `read`, once per step for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.constraints import Guide, expand
from qwen3vl_mlx.engine.logprobs import LogprobArrays, chosen_logprobs
from qwen3vl_mlx.engine.sampling import Row, Sampler, SamplerState, draw
from qwen3vl_mlx.models.qwen3_vl import Model

Draft: TypeAlias = "tuple[int, ...]"


@dataclass(eq=False)
class Decoding:
    """One row's own part of the work."""

    sampler: Sampler
    sampler_state: SamplerState
    guide: Guide | None
    rope_delta: int
    max_tokens: int
    top_logprobs: int | None  # None: no logprobs are wanted
    length: int  # tokens in the cache, drafted ones not counted
    end_tokens: frozenset[int] = frozenset()  # drafts end with these
    drawn: int = 0  # tokens drawn so far, read or not; of a draft one
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
    """Tokens on their way from the device: N, one for each row and for each token of its draft.

    A row's tokens count up to the first that is not the draft's.
    """

    rows: tuple[Decoding, ...]
    drafts: tuple[Draft, ...]
    tokens: mx.array  # (N,)
    logprobs: tuple[LogprobArrays | None, ...]  # N
    states: tuple[SamplerState, ...]  # N, each after its token

    @property
    def drafted(self) -> bool:
        """Whether the newest tokens are known only to the host, once it has read them."""
        return any(self.drafts)


@dataclass(frozen=True)
class Answered:
    """A row's next tokens, on the host. The first `accepted` of them were drafted.

    state: the sampler's, after the last of them.
    """

    row: Decoding
    tokens: tuple[int, ...]
    logprobs: tuple[LogprobArrays | None, ...]
    accepted: int
    state: SamplerState


def draw_rows(logits: mx.array, rows: Rows[Decoding], drafts: Rows[Draft] | None = None) -> Drawn:
    """Draw the next token of every row from `logits` (N, vocab_size), and note it there.

    Rows are as they were where anything raises.

    drafts: a row with a draft of k tokens has k + 1 of the logits, each drawn from as if the
    draft were right so far.
    """
    drafts = [()] * len(rows) if drafts is None else drafts
    asked = [
        each
        for row, draft in zip(rows, drafts, strict=True)
        for each in _asked(row, draft, logits.shape[-1])
    ]
    tokens, states = draw(logits, asked)
    logprobs: list[LogprobArrays | None] = []
    firsts: list[SamplerState] = []
    for row, draft in zip(rows, drafts, strict=True):
        firsts.append(states[len(logprobs)])
        for i in range(len(logprobs), len(logprobs) + len(draft) + 1):
            wanted = row.top_logprobs
            logprobs.append(
                None if wanted is None else chosen_logprobs(logits[i], tokens[i : i + 1], wanted)
            )
    mx.async_eval(tokens, [x for entry in logprobs if entry is not None for x in entry])
    for row, state in zip(rows, firsts, strict=True):
        row.sampler_state = state
        row.drawn += 1
    return Drawn(tuple(rows), tuple(drafts), tokens, tuple(logprobs), tuple(states))


def draw_each(
    logits: mx.array, rows: Rows[Decoding], drafts: Rows[Draft]
) -> tuple[Drawn | None, list[tuple[Decoding, Exception]]]:
    """`draw_rows`, but rows that raise (a guide, penalties) are left out, and named."""
    try:
        return draw_rows(logits, rows, drafts), []
    except Exception:  # noqa: BLE001
        parts: list[Drawn] = []
        failed: list[tuple[Decoding, Exception]] = []
        start = 0
        for row, draft in zip(rows, drafts, strict=True):
            own = logits[start : start + len(draft) + 1]
            start += len(draft) + 1
            try:
                parts.append(draw_rows(own, [row], [draft]))
            except Exception as error:  # noqa: BLE001
                failed.append((row, error))
        return (together(parts) if parts else None), failed


def together(parts: Rows[Drawn]) -> Drawn:
    """What was drawn of several groups of rows."""
    return Drawn(
        tuple(row for part in parts for row in part.rows),
        tuple(draft for part in parts for draft in part.drafts),
        mx.concatenate([part.tokens for part in parts]),
        tuple(entry for part in parts for entry in part.logprobs),
        tuple(state for part in parts for state in part.states),
    )


def _asked(row: Decoding, draft: Draft, vocab_size: int) -> list[Row]:
    """What the draws of a row depend on: its next one, and one after each token of its draft."""
    guide, sampler, state = row.guide, row.sampler, row.sampler_state
    masks: list[Any] = [None] * (len(draft) + 1)
    if guide is not None:
        masks = guide.masks(draft) if draft else [guide.mask()]
    asked: list[Row] = []
    for i, bits in enumerate(masks):
        if i:
            state = sampler.after(state, draft[i - 1])
        history = [*row.tokens, *draft[:i]] if sampler.needs_history else None
        allowed = expand(bits, vocab_size) if bits is not None else None
        asked.append(Row(sampler, state, history, allowed))
    return asked


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
        self.unread = together([*([self.unread] if self.unread else []), *first_tokens])

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
        return self.model.language_model.logits(self._pass(self._newest()[:, None])[:, 0])

    def verify(self, drafts: Rows[Draft]) -> mx.array:
        """Queue a pass over every row's newest token, which is read, and its draft.

        Returns the logits (N, vocab_size) that tokens are to be drawn from, lazily.
        Shorter drafts are filled up; until `read` the cache holds more than the rows' length.
        """
        width = 1 + max(map(len, drafts))
        fed = np.zeros((len(self.rows), width), np.int32)
        wanted: list[int] = []  # places of the N hidden states that tokens are drawn from
        for i, (row, draft) in enumerate(zip(self.rows, drafts, strict=True)):
            fed[i, : len(draft) + 1] = (row.tokens[-1], *draft)
            wanted += range(i * width, i * width + len(draft) + 1)
        hidden = self._pass(mx.array(fed)).reshape(fed.size, -1)  # (B * width, hidden_size)
        if len(wanted) < fed.size:
            hidden = hidden[mx.array(wanted)]  # (N, hidden_size)
        return self.model.language_model.logits(hidden)

    def draw(
        self, logits: mx.array, drafts: Rows[Draft] | None = None
    ) -> list[tuple[Decoding, Exception]]:
        """Draw every row's tokens from logits (N, vocab_size); rows that cannot be drawn for."""
        if drafts is None:
            drafts = [()] * len(self.rows)
        self.unread, failed = draw_each(logits, self.rows, drafts)
        return failed

    def read(self, drawn: Drawn) -> list[Answered]:
        """Wait for drawn tokens; those that follow a wrong draft are dropped, in the cache too."""
        values: list[int] = drawn.tokens.tolist()  # type: ignore[assignment]
        answers, start = [], 0
        for row, draft in zip(drawn.rows, drawn.drafts, strict=True):
            own = values[start : start + len(draft) + 1]
            pairs = zip(draft, own, strict=False)
            right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            state = drawn.states[start + right]
            if draft:
                row.sampler_state = state
                row.drafted += len(draft)
                row.drawn += right
                row.length += right
            logprobs = drawn.logprobs[start : start + right + 1]
            answers.append(Answered(row, tuple(own[: right + 1]), logprobs, right, state))
            start += len(draft) + 1
        if drawn.drafted and self.rows:
            held = self.layers[0].lengths
            surplus = [n - row.length for n, row in zip(held, self.rows, strict=True)]
            for layer in self.layers:
                layer.trim(surplus)
        return answers

    def _pass(self, tokens: mx.array) -> mx.array:
        """Hidden states (B, L, hidden_size) of tokens (B, L), which go to the cache."""
        offsets = np.array([row.length + row.rope_delta for row in self.rows], np.int32)
        hidden = self.model.language_model(tokens, mx.array(offsets), self.layers)
        for row in self.rows:
            row.length += 1
            row.steps += 1
        return hidden

    def _newest(self) -> mx.array:
        """The rows' drawn tokens, (B,), in the order of the rows."""
        assert self.unread is not None
        if len(self.unread.rows) == len(self.rows):
            return self.unread.tokens
        place = {id(row): i for i, row in enumerate(self.unread.rows)}
        return self.unread.tokens[mx.array([place[id(row)] for row in self.rows])]
