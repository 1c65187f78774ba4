"""The value between the processor and the engine: a prompt laid out in tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.models.positions import RopeIndex, Span
from qwen3vl_mlx.processing.image import VisualInput


@dataclass(frozen=True)
class Prompt:
    """L tokens with their positions, and the media their M visual tokens stand for."""

    token_ids: npt.NDArray[np.int32]  # (L,)
    index: RopeIndex
    media: tuple[VisualInput, ...]  # in prompt order

    @property
    def position_ids(self) -> npt.NDArray[np.int32]:
        """(3, L)"""
        return self.index.position_ids

    @property
    def rope_delta(self) -> int:
        return self.index.rope_delta

    @property
    def media_spans(self) -> tuple[tuple[Span, ...], ...]:
        """For each medium, its spans: one for an image, one per temporal patch of a video."""
        spans = iter(self.index.spans)
        return tuple(tuple(next(spans) for _ in range(m.grid_thw[0])) for m in self.media)

    @property
    def visual_rows(self) -> npt.NDArray[np.int32]:
        """Indexes of the visual tokens, (M,), rising."""
        ranges = [np.arange(span.start, span.stop, dtype=np.int32) for span in self.index.spans]
        return np.concatenate(ranges) if ranges else np.zeros((0,), np.int32)
