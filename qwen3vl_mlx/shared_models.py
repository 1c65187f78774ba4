"""Models that all parts of a process share: one for each checkpoint and way of loading it."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL


class SharedModels:
    """Keeps no model alive by itself: one that nobody holds any more is freed."""

    def __init__(self) -> None:
        self._models: weakref.WeakValueDictionary[Hashable, Qwen3VL] = weakref.WeakValueDictionary()
        self._locks: defaultdict[Hashable, threading.Lock] = defaultdict(threading.Lock)
        self._all = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], Qwen3VL]) -> Qwen3VL:
        """The model of `key`, loaded if nobody has it or it was closed.

        Whoever asks while it loads waits for it; another key's model loads meanwhile.
        """
        with self._all:
            lock = self._locks[key]
        with lock:
            model = self._models.get(key)
            if model is None or model.engine.closed:
                model = self._models[key] = load()
            return model


@cache
def shared_models() -> SharedModels:
    """Those of this process."""
    return SharedModels()
