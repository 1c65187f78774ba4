"""One conversation's key-value cache, and what is in it: tokens, and images by identity."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx._mlx_lm.models.cache import (
    KVCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.processing.prompt import Prompt

_FORMAT = "qwen3vl_mlx-1"


@dataclass
class CacheState:
    """Keys and values of `token_ids`; `media` holds (first token, identity) of each medium."""

    layers: list[Any]  # mlx-lm KVCache, one per decoder layer
    token_ids: list[int] = field(default_factory=list)
    media: tuple[tuple[int, str], ...] = ()

    @classmethod
    def empty(cls, num_layers: int) -> CacheState:
        return cls([KVCache() for _ in range(num_layers)])

    @property
    def length(self) -> int:
        """Tokens whose keys and values all layers hold; after an abort some may hold more."""
        return min(int(layer.offset) for layer in self.layers)

    def arrays(self) -> list[mx.array]:
        return [x for layer in self.layers for x in layer.state if isinstance(x, mx.array)]

    def reuse(self, prompt: Prompt) -> int:
        """Keep the longest prefix shared with `prompt` and drop the rest; returns its length.

        At least one token is left to compute, and no image is cut: a prefix ends before the first
        image that differs in pixels, size or place.
        """
        keep = _shared_prefix(self.token_ids, prompt.token_ids)
        keep = min(keep, self.length, len(prompt.token_ids) - 1)
        held = dict(self.media)
        for medium, spans in zip(prompt.media, prompt.media_spans, strict=True):
            start, stop = spans[0].start, spans[-1].stop
            if start < keep and (held.get(start) != medium.identity or stop > keep):
                keep = start
        self._trim(keep)
        self.token_ids = self.token_ids[:keep]
        self.media = tuple(item for item in self.media if item[0] < keep)
        return keep

    def _trim(self, length: int) -> None:
        for layer in self.layers:  # one by one: an abort may fall between two layers
            trim_prompt_cache([layer], int(layer.offset) - length)

    def extend(self, prompt: Prompt) -> None:
        """Note that all of `prompt` is now held."""
        self.token_ids = prompt.token_ids.tolist()
        self.media = tuple(
            (spans[0].start, medium.identity)
            for medium, spans in zip(prompt.media, prompt.media_spans, strict=True)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a .safetensors file, whole or not at all."""
        path = _checked(path)
        self._trim(len(self.token_ids))
        note = {"token_ids": self.token_ids, "media": self.media}
        metadata = {"format": _FORMAT, "state": json.dumps(note)}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            draft = Path(folder) / path.name
            save_prompt_cache(str(draft), self.layers, metadata)
            os.replace(draft, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CacheState:
        """Read what `save` wrote. Raises InputError for anything else."""
        path = _checked(path)
        if not path.is_file():
            raise InputError(f"no conversation cache {path}")
        try:
            layers, metadata = load_prompt_cache(str(path), return_metadata=True)
            if metadata["format"] != _FORMAT:
                raise KeyError(metadata["format"])
            note = json.loads(metadata["state"])
            state = cls(layers, note["token_ids"], tuple((at, key) for at, key in note["media"]))
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a conversation cache of this version") from error
        mx.eval(state.arrays())
        return state


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise InputError(f"a conversation cache is a .safetensors file, got {path}")
    return path


def _shared_prefix(ours: Sequence[int], theirs: npt.NDArray[np.int32]) -> int:
    count = min(len(ours), len(theirs))
    differing = np.flatnonzero(np.asarray(ours[:count], np.int32) != theirs[:count])
    return int(differing[0]) if len(differing) else count
