"""A forked child cannot use what MLX started in its parent: say so, instead of waiting for ever."""

from __future__ import annotations

import os
from functools import cache

from qwen3vl_mlx.errors import ForkedProcessError


@cache
def _home() -> int:
    """The process that MLX's threads run in: the first that asked. A fork keeps the answer."""
    return os.getpid()


def is_forked() -> bool:
    """Whether this process was forked from one that had loaded a model."""
    return _home() != os.getpid()


def check_not_forked() -> None:
    """Raise ForkedProcessError where `is_forked`."""
    if is_forked():
        raise ForkedProcessError(
            "this process was forked from one that had loaded a model, and MLX's threads are not "
            "in it: start processes with multiprocessing.get_context('spawn'), load the model in "
            "the child first, or let threads share it"
        )
