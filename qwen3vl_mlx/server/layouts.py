"""Where texts become tokens: beside the event loop, and never more of it than can be waited for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qwen3vl_mlx.errors import QueueFullError
from qwen3vl_mlx.processing.lengths import text_length
from qwen3vl_mlx.server.errors import ApiError

_THREADS = 4
_MOST_WAITING = 512
_MOST_CHARACTERS = 2_000_000  # to count or to list the tokens of; the longest context has half

Result = TypeVar("Result")


class Layouts:
    """Lays out the prompts of all requests to one server. For one event loop.

    Python's own pool is shared with what may hang, and its queue has no end.
    """

    def __init__(self) -> None:
        # The tokenizer's own threads would let short texts wait for long ones.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="layout")
        self._pending = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """What `work` gives, in a thread. What has not begun when the caller leaves never does.

        Raises QueueFullError.
        """
        if self._pending >= _MOST_WAITING:
            raise QueueFullError(
                f"{self._pending} prompts are waiting to be laid out already; ask again later"
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_countable(param: str, *texts: object) -> None:
    """Raise ApiError for texts that are too long to count their tokens at one request."""
    characters = sum(map(text_length, texts))
    if characters > _MOST_CHARACTERS:
        raise ApiError(
            413,
            f"{param} has {characters:,} characters, and this server counts the tokens of up to "
            f"{_MOST_CHARACTERS:,} at once; send it in parts",
            param=param,
            code="too_large",
        )
