"""How much a scheduler may do at once, and what it does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much is done at once."""

    max_batch: int  # rows that decode or are being read
    prefill_chunk: int  # tokens read in one pass while nobody waits for a token
    interleave: int  # tokens read between two steps of the running rows
    kv_bits: int | None


@dataclass
class Counts:
    """What a scheduler has done so far."""

    steps: int = 0
    begun: int = 0  # requests that left the queue, for the first time
    finished: int = 0
    failed: int = 0

    @property
    def ended(self) -> int:
        return self.finished + self.failed


@dataclass(frozen=True)
class Load:
    """Who is where, and what was done so far."""

    waiting: int
    prefilling: int
    running: int
    steps: int
    finished: int
    failed: int
    reserved_bytes: int
