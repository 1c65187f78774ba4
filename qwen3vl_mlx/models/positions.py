"""Where every token of a prompt stands: spans of visual tokens and three-axis M-RoPE positions.

Pure functions of token ids and grids, on the host, before any forward pass. They know nothing of
pixels, text or weights. Source: HF `Qwen3VLModel.get_rope_index` and the Qwen3-VL report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.errors import PromptError

Grid: TypeAlias = tuple[int, int, int]  # (t, h, w), in patches


@dataclass(frozen=True)
class Span:
    """One frame's run of visual tokens in a prompt: an image, or one temporal patch of a video."""

    start: int  # index of its first token
    rows: int  # merged grid: rows * cols tokens, row by row
    cols: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.cols


@dataclass(frozen=True)
class RopeIndex:
    """Positions of a prompt's L tokens."""

    position_ids: npt.NDArray[np.int32]  # (3, L): time, height, width
    rope_delta: int  # position of token L = L + rope_delta, on all three axes
    spans: tuple[Span, ...]


def rope_index(
    token_ids: npt.NDArray[np.int32],
    image_grid_thw: Sequence[Grid],
    video_grid_thw: Sequence[Grid],
    *,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int,
) -> RopeIndex:
    """Lay out a prompt of L tokens.

    `image_grid_thw` and `video_grid_thw` are in the order of their placeholders. A video of T
    temporal patches holds T runs of placeholders, each beside its own timestamp.
    Raises PromptError where placeholders and grids do not match.
    """
    spans = find_spans(
        token_ids,
        image_grid_thw,
        video_grid_thw,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        spatial_merge_size=spatial_merge_size,
    )
    steps = np.ones(len(token_ids), dtype=np.int64)  # how far each token moves the next one
    for span in spans:
        steps[span.start : span.stop] = 0
        steps[span.stop - 1] = max(span.rows, span.cols)
    starts = np.concatenate([[0], np.cumsum(steps)])  # (L + 1,)
    position_ids = np.tile(starts[:-1], (3, 1))  # (3, L)
    for span in spans:
        base = starts[span.start]
        position_ids[0, span.start : span.stop] = base
        position_ids[1, span.start : span.stop] = base + np.repeat(np.arange(span.rows), span.cols)
        position_ids[2, span.start : span.stop] = base + np.tile(np.arange(span.cols), span.rows)
    return RopeIndex(position_ids.astype(np.int32), int(starts[-1]) - len(token_ids), spans)


def find_spans(
    token_ids: npt.NDArray[np.int32],
    image_grid_thw: Sequence[Grid],
    video_grid_thw: Sequence[Grid],
    *,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int,
) -> tuple[Span, ...]:
    """Match every run of placeholders to a frame. Raises PromptError where counts disagree."""
    frames = {
        image_token_id: [(h, w) for _, h, w in image_grid_thw],
        video_token_id: [(h, w) for t, h, w in video_grid_thw for _ in range(t)],
    }
    names = {image_token_id: "image", video_token_id: "video"}
    visual = np.isin(token_ids, (image_token_id, video_token_id))
    kinds = np.where(visual, token_ids, -1)
    edges = np.flatnonzero(np.diff(kinds, prepend=-1, append=-1))
    spans: list[Span] = []
    for start, stop in pairwise(edges.tolist()):
        kind = int(kinds[start])
        while kind >= 0 and start < stop:  # neighbours without a wrapper share a run
            if not frames[kind]:
                raise PromptError(
                    f"the prompt has more {names[kind]} placeholders than {names[kind]}s given"
                )
            height, width = frames[kind].pop(0)
            span = Span(start, height // spatial_merge_size, width // spatial_merge_size)
            if span.stop > stop:
                raise PromptError(
                    f"a {names[kind]} of grid {height} x {width} needs {span.stop - span.start} "
                    f"placeholder tokens, the prompt has {stop - start} at token {start}"
                )
            spans.append(span)
            start = span.stop
    for kind, left in frames.items():
        if left:
            raise PromptError(
                f"{len(left)} {names[kind]} frame(s) have no placeholder in the prompt"
            )
    return tuple(spans)
