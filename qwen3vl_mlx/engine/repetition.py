"""A guard against answers that repeat themselves without end, as OCR of tables can.

Greedy decoding of a hard page may collapse into one token, phrase or line for ever. What a page
really holds repeats too: rules, rows of zeros, blank forms, sheets of equal labels. Only the
number of exact repeats tells them apart, so the thresholds are generous: a false alarm costs an
answer, a late one some seconds.
"""

from __future__ import annotations

import numpy as np

LONGEST_PERIOD = 512  # tokens: a long paragraph
# An alarm: the last tokens are p tokens over and over, as often as makes 1536 tokens, but at most
# 128 and at least 8 times. One token 128 times, a line of 30 tokens 52 times, one of 100 16 times;
# a blank form of 20 rows with 15 HTML cells each (62 tokens a row) is none.
_TOKENS, _MOST, _LEAST = 1536, 128, 8


class LoopGuard:
    """Watches one answer, token by token, in constant time (some 5 us) and memory.

    Exact repeats alone count: rows that differ in one number are none.
    """

    def __init__(self) -> None:
        periods = np.arange(1, LONGEST_PERIOD + 1)
        repeats = np.clip(-(-_TOKENS // periods), _LEAST, _MOST)
        self._needed = periods * (repeats - 1)  # matches, as the first time matches nothing
        self._tail = np.full(LONGEST_PERIOD, -1, np.int64)  # [p - 1]: the token p places back
        self._matches = np.zeros(LONGEST_PERIOD, np.int64)  # in a row, with the token p back

    def push(self, token: int) -> bool:
        """Whether the answer, with `token`, has been repeating itself for too long."""
        self._matches += 1
        self._matches *= self._tail == token
        self._tail[1:] = self._tail[:-1]
        self._tail[0] = token
        return bool((self._matches >= self._needed).any())
