"""Requests that have ended, those that never would, and an engine that is held."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.output import Chunk
from qwen3vl_mlx.engine.request import Handle


def end(handle: Handle) -> Chunk:
    """The last chunk, of a request that has ended."""
    assert handle.phase == "done"
    return list(handle)[-1]


def error(handle: Handle) -> BaseException:
    assert handle.phase == "done"
    with pytest.raises(Exception) as caught:  # noqa: PT011
        list(handle)
    return caught.value


ENDLESS = {"logit_bias": {1000: -1e9, 998: -1e9}, "max_tokens": 1500}  # for the demo checkpoint


@contextmanager
def busy(model: Qwen3VL) -> Iterator[None]:
    """Hold the engine's thread between two steps."""
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        go_on.wait()

    thread = threading.Thread(target=model.engine.call, args=(hold,))
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        go_on.set()
        thread.join()
