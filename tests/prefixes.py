"""Prompts spelled as short lists, and rows that tell which tokens they were computed from."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.engine.prefix_cache import Key, Layers, prompt_key
from qwen3vl_mlx.models.positions import rope_index
from qwen3vl_mlx.processing.image import PixelBudget, VisionSettings, VisualInput
from qwen3vl_mlx.processing.prompt import Prompt

IMAGE, VIDEO, TIME = 90_000, 90_001, 80_000
SETTINGS = VisionSettings(
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    image=PixelBudget(1, 2**20),
    video=PixelBudget(1, 2**20),
)


@dataclass(frozen=True)
class Medium:
    """`frames` of 2 x 3 tokens; a video's are kept apart by timestamps that start at `time`."""

    name: str
    frames: int = 1
    kind: str = "image"
    time: int = TIME

    @property
    def visual(self) -> VisualInput:
        grid = (self.frames, 4, 6)
        seed = zlib.crc32(self.name.encode())
        patches = np.random.RandomState(seed).randint(0, 256, (self.frames * 24, 4), np.uint8)
        return VisualInput(self.kind, patches, grid, SETTINGS)  # type: ignore[arg-type]


A, B = Medium("A"), Medium("B")
V = Medium("V", 2, "video")
LATE = Medium("V", 2, "video", TIME + 50)  # the same frames at other times
Part = int | Medium


def token_ids(parts: Sequence[Part]) -> list[int]:
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif part.kind == "image":
            ids += [IMAGE] * 6
        else:
            frames = [[part.time + i, *[VIDEO] * 6] for i in range(part.frames)]
            ids += [token for frame in frames for token in frame]
    return ids


def prompt(parts: Sequence[Part]) -> Prompt:
    media = [part.visual for part in parts if isinstance(part, Medium)]
    ids = np.array(token_ids(parts), np.int32)
    index = rope_index(
        ids,
        [m.grid_thw for m in media if m.kind == "image"],
        [m.grid_thw for m in media if m.kind == "video"],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        spatial_merge_size=2,
    )
    return Prompt(ids, index, tuple(media))


def key(parts: Sequence[Part], answer: Sequence[int] = ()) -> Key:
    return prompt_key(prompt(parts), answer)


def spelled(parts: Sequence[Part]) -> list[object]:
    """What each token is, in words: the truth that keys are tested against."""
    tokens: list[object] = []
    for part in parts:
        ids = token_ids([part])
        tokens += ids if isinstance(part, int) else [(part, row) for row in range(len(ids))]
    return tokens


def media_spans(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Tokens of each medium, without a video's first timestamp, which stands before it."""
    spans, at = [], 0
    for part in parts:
        stop = at + len(token_ids([part]))
        if isinstance(part, Medium):
            spans.append((at + (part.kind == "video"), stop))
        at = stop
    return spans


def rows(parts: Sequence[Part], kind: str = "float32", count: int | None = None) -> Layers:
    """Two layers of arrays (1, 2, n, d): each row made of all tokens up to its own."""
    sums = accumulate(spelled(parts), lambda s, t: zlib.crc32(repr(t).encode(), s), initial=0)
    codes = np.array(list(sums)[1:][:count], np.uint32)  # (n,)

    def array(seed: int, width: int, dtype: mx.Dtype) -> mx.array:
        mixed = codes[None, None, :, None] ^ np.random.RandomState(seed).randint(
            0, 2**32, (1, 2, 1, width), np.uint32
        )
        return mx.array(mixed) if dtype == mx.uint32 else mx.array(mixed % 251).astype(dtype)

    if kind == "quantized":
        one = [(4, mx.uint32), (2, mx.bfloat16), (2, mx.bfloat16)]
        shape = [*one, *one]
    else:
        dtype = {"float32": mx.float32, "bfloat16": mx.bfloat16}[kind]
        shape = [(4, dtype), (4, dtype)]
    return tuple(
        tuple(array(10 * layer + i, width, dtype) for i, (width, dtype) in enumerate(shape))
        for layer in range(2)
    )


def same(ours: Layers, theirs: Layers) -> bool:
    return len(ours) == len(theirs) and all(
        len(one) == len(two)
        and all(
            a.dtype == b.dtype and bool(mx.array_equal(a, b)) for a, b in zip(one, two, strict=True)
        )
        for one, two in zip(ours, theirs, strict=True)
    )


def nbytes(layers: Layers) -> int:
    return sum(array.nbytes for layer in layers for array in layer)


class Naive:
    """All that was inserted, as lists."""

    def __init__(self) -> None:
        self.kept: list[list[object]] = []

    def insert(self, parts: Sequence[Part], count: int) -> None:
        self.kept.append(spelled(parts)[: cut(parts, count)])

    def match(self, parts: Sequence[Part]) -> int:
        tokens = spelled(parts)
        best = 0
        for kept in self.kept:
            shared = 0
            while shared < min(len(kept), len(tokens) - 1) and kept[shared] == tokens[shared]:
                shared += 1
            best = max(best, shared)
        return cut(parts, best)


def cut(parts: Sequence[Part], length: int) -> int:
    return next((a for a, b in media_spans(parts) if a < length < b), length)
