"""How much a scheduler may do at once, and what it does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much is done at once."""

    max_batch: int = 8  # rows that decode or are being read
    prefill_chunk: int = 2048  # tokens read in one pass while nobody waits for a token
    interleave: int = 512  # tokens read between two steps of the running rows
    kv_bits: int | None = None


@dataclass
class Counts:
    """What a scheduler has done so far."""

    steps: int = 0
    finished: int = 0
    failed: int = 0


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
