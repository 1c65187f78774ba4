"""A video as a caller gives it: sampled frames and their rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.media import ImageSource

DEFAULT_FPS = 2.0  # the rate the model's own sampling uses


@dataclass(frozen=True)
class Video:
    """Frames in order, `fps` of them per second of film. Frames share one size."""

    frames: Sequence[ImageSource]
    fps: float = DEFAULT_FPS

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise InputError(f"fps must be above 0, got {self.fps}")
