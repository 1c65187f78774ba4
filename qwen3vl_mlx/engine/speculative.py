"""Speculation: tokens guessed ahead and verified in one pass. It changes speed, never the answer.

At each position a token is drawn from the model's own distribution, as without speculation, and
the pass counts for as long as the drawn token is the guessed one. Since the random numbers of a
step come from (seed, step), the same seed gives the same answer with and without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.engine.batch import Decoding
from qwen3vl_mlx.engine.feature_cache import FeatureCache
from qwen3vl_mlx.engine.prefix_cache import PrefixCache
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.models.config import TextConfig

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

MOST_DRAFTED = 7  # with the newest token 8 queries: what Metal's vector attention takes
_MOST_QUERIES = 32  # of a query head group, in the same kernel
_PASS_TOKENS = 32  # of a whole batch: up to about here a pass costs what its weights cost

_FIRST_DRAFT = 4  # tokens of a row's first draft
_MOST_PATIENCE = 16


class Drafter(Protocol):
    """Guesses how answers go on. It reads `row.tokens` by itself when it is asked."""

    @property
    def caches(self) -> Sequence[FeatureCache | PrefixCache]:
        """What it keeps for later requests."""

    def begin(self, row: Decoding, request: Request) -> None:
        """A row starts to decode."""

    def keep(self, rows: Sequence[Decoding]) -> None:
        """Only these rows go on."""

    def waits(self, row: Decoding) -> bool:
        """Whether there may be a guess once the row's newest token is read."""

    def draft(self, rows: Sequence[Decoding], counts: Sequence[int]) -> list[Sequence[int]]:
        """At most counts[i] tokens to follow row i, all of whose tokens are read."""

    def advance(self, budget: int) -> int:
        """Queue work of its own, about `budget` tokens' worth; returns what was."""


class Speculation:
    """Which rows are worth waiting for, and drafts that can be verified.

    A drafter that raises costs nobody an answer: it is asked no more, and its caches are dropped.
    """

    def __init__(self, drafter: Drafter, config: TextConfig, draft_tokens: int):
        self.drafter: Drafter | None = drafter
        group = config.num_attention_heads // config.num_key_value_heads
        self._longest = min(draft_tokens, MOST_DRAFTED, _MOST_QUERIES // group - 1)

    def longest(self, rows: int) -> int:
        """Tokens that each of `rows` rows may have drafted in one pass."""
        return max(0, min(self._longest, _PASS_TOKENS // max(rows, 1) - 1))

    @property
    def caches(self) -> Sequence[FeatureCache | PrefixCache]:
        return self._ask(lambda drafter: drafter.caches, ())

    def begin(self, row: Decoding, request: Request) -> None:
        """A row starts to decode."""
        self._ask(lambda drafter: drafter.begin(row, request), None)

    def keep(self, rows: Sequence[Decoding]) -> None:
        """Only these rows go on."""
        self._ask(lambda drafter: drafter.keep(rows), None)

    def advance(self, budget: int) -> None:
        """Queue the drafter's own work, about `budget` tokens' worth."""
        self._ask(lambda drafter: drafter.advance(budget), 0)

    def waits(self, rows: Sequence[Decoding]) -> bool:
        """Whether the next pass should wait until the host has read the newest tokens."""

        def asked(drafter: Drafter) -> bool:
            return any(row.max_tokens - row.drawn > 1 and drafter.waits(row) for row in rows)

        return self.longest(len(rows)) > 0 and self._ask(asked, False)

    def drafts(self, rows: Sequence[Decoding]) -> list[tuple[int, ...]]:
        """A draft for each row, all of whose tokens are read; () where there is none."""
        longest = self.longest(len(rows))
        counts = [max(0, min(longest, row.max_tokens - len(row.tokens) - 1)) for row in rows]
        if not any(counts):
            return [()] * len(rows)

        def asked(drafter: Drafter) -> list[tuple[int, ...]]:
            guesses = drafter.draft(rows, counts)
            return [
                _usable(row, guess[:count])
                for row, guess, count in zip(rows, guesses, counts, strict=True)
            ]

        return self._ask(asked, [()] * len(rows))

    def _ask(self, question: Callable[[Drafter], Result], otherwise: Result) -> Result:
        if self.drafter is None:
            return otherwise
        try:
            return question(self.drafter)
        except Exception:  # noqa: BLE001
            _log.warning("guessing ahead failed, answers go on without it", exc_info=True)
            self.drafter = None
            return otherwise


def _usable(row: Decoding, guess: Sequence[int]) -> tuple[int, ...]:
    """A guess up to an end token, or to what the row's guide forbids."""
    ends = (i + 1 for i, token in enumerate(guess) if token in row.end_tokens)
    draft = tuple(guess[: next(ends, len(guess))])
    if row.guide is None or not draft:
        return draft
    try:
        return draft[: row.guide.accepts(draft)]
    except Exception:  # noqa: BLE001
        return ()  # a guide that is broken says so when it is asked for its mask


class Either:
    """The first drafter's guess, or the second's where it has none."""

    def __init__(self, first: Drafter, second: Drafter):
        self.first, self.second = first, second

    @property
    def caches(self) -> Sequence[FeatureCache | PrefixCache]:
        return [*self.first.caches, *self.second.caches]

    def begin(self, row: Decoding, request: Request) -> None:
        self.first.begin(row, request)
        self.second.begin(row, request)

    def keep(self, rows: Sequence[Decoding]) -> None:
        self.first.keep(rows)
        self.second.keep(rows)

    def waits(self, row: Decoding) -> bool:
        return self.first.waits(row) or self.second.waits(row)

    def draft(self, rows: Sequence[Decoding], counts: Sequence[int]) -> list[Sequence[int]]:
        guesses = self.first.draft(rows, counts)
        left = [0 if guess else n for guess, n in zip(guesses, counts, strict=True)]
        if not any(left):
            return guesses
        others = self.second.draft(rows, left)
        return [guess or other for guess, other in zip(guesses, others, strict=True)]

    def advance(self, budget: int) -> int:
        return self.first.advance(budget) + self.second.advance(budget)


class Lookup:
    """Guesses that an answer goes on as prompt or answer did after the same few tokens.

    After "prompt lookup decoding" (https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self) -> None:
        self._texts: WeakKeyDictionary[Decoding, PromptLookup] = WeakKeyDictionary()

    @property
    def caches(self) -> Sequence[FeatureCache | PrefixCache]:
        return ()

    def begin(self, row: Decoding, request: Request) -> None:
        prompt = request.prompt
        visual = frozenset(np.unique(prompt.token_ids[prompt.visual_rows]).tolist())
        self._texts[row] = PromptLookup(prompt.token_ids, visual)

    def keep(self, rows: Sequence[Decoding]) -> None:
        kept = set(rows)
        for row in [row for row in self._texts if row not in kept]:
            del self._texts[row]

    def waits(self, row: Decoding) -> bool:
        return row in self._texts and self._read(row).sure

    def draft(self, rows: Sequence[Decoding], counts: Sequence[int]) -> list[Sequence[int]]:
        return [
            self._read(row).draft(count) if row in self._texts else ()
            for row, count in zip(rows, counts, strict=True)
        ]

    def advance(self, budget: int) -> int:
        return 0

    def _read(self, row: Decoding) -> PromptLookup:
        text = self._texts[row]
        for token in islice(row.tokens, text.answered, None):
            text.push(token)
        return text


class PromptLookup:
    """Finds where the end of one text, prompt and answer, stood before.

    The place found is followed as the answer grows, and a draft is made only while it keeps being
    right: `patience` tokens of it, more after a draft that was wrong from its start. So a row that
    copies nothing never waits for the host. `forbidden` tokens are never drafted.
    """

    def __init__(self, prompt_ids: npt.NDArray[np.int32], forbidden: frozenset[int] = frozenset()):
        self.tokens: list[int] = prompt_ids.tolist()
        self.forbidden = forbidden
        self._prompt = len(self.tokens)
        self._indexes = [_Index(prompt_ids, 3), _Index(prompt_ids, 2)]  # longest first
        self._source: int | None = None  # the token here is expected next
        self._right = 0  # tokens in a row that were as expected
        self._patience = 1
        self._length = _FIRST_DRAFT
        self._drafted = self._hits = 0  # of the draft that is being verified

    @property
    def answered(self) -> int:
        """Tokens of the answer that were pushed."""
        return len(self.tokens) - self._prompt

    @property
    def sure(self) -> bool:
        """Whether what was expected has come true for long enough."""
        return self._source is not None and self._right >= self._patience

    def push(self, token: int) -> None:
        """Note the answer's next token."""
        hit = self._source is not None and self.tokens[self._source] == token
        self._judge(hit)
        self.tokens.append(token)
        if hit and self._source is not None:
            self._source += 1
            self._right += 1
        else:
            self._source, self._right = None, 0
        for index in self._indexes:
            place = index.exchange(self.tokens)
            if self._source is None:
                self._source = place

    def draft(self, count: int) -> list[int]:
        """At most `count` tokens that may follow; a text that repeats itself is repeated on."""
        if not self.sure or self._source is None:
            return []
        source = self._source
        period = len(self.tokens) - source
        found: list[int] = []
        for i in range(min(count, self._length)):
            token = self.tokens[source + i % period]
            if token in self.forbidden:
                break
            found.append(token)
        self._drafted, self._hits = len(found), 0
        return found

    def _judge(self, hit: bool) -> None:
        """Draft more after a draft that was right, and less, or later, after one that was not."""
        if not self._drafted:
            return
        if hit:
            self._hits += 1
            if self._hits == self._drafted:
                self._length = min(2 * self._length, MOST_DRAFTED)
                self._patience, self._drafted = 1, 0
            return
        if not self._hits:
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self._length, self._drafted = max(1, self._hits), 0


class _Index:
    """Where each run of n tokens stood last: arrays for the prompt, a dict for the answer."""

    def __init__(self, prompt_ids: npt.NDArray[np.int32], n: int):
        self.n = n
        count = max(0, len(prompt_ids) - n)  # what ends the prompt is followed by nothing yet
        codes = np.zeros(count, np.int64)
        for i in range(n):
            codes = (codes << 20) | prompt_ids[i : i + count]
        order = np.argsort(codes, kind="stable")
        self._codes, self._next = codes[order], order + n
        self._answer: dict[int, int] = {}

    def exchange(self, tokens: list[int]) -> int | None:
        """Where the token stands that followed the last n tokens before; note that they are here.

        To be called once with each new token, at the end of `tokens`.
        """
        if len(tokens) < self.n:
            return None
        code = 0
        for token in tokens[-self.n :]:
            code = (code << 20) | token
        place = self._answer.get(code)
        if place is None:
            at = int(np.searchsorted(self._codes, code, side="right")) - 1
            if at >= 0 and self._codes[at] == code:
                place = int(self._next[at])
        self._answer[code] = len(tokens)
        return place
