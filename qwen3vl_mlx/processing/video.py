"""A video as a caller gives it: sampled frames and their rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.media import ImageSource

DEFAULT_FPS = 2.0  # the rate the model's own sampling uses


@dataclass(frozen=True)
class Video:
    """Frames in order, `fps` of them per second of film. Frames share one size.

    max_pixels: most pixels of all resized frames together; None is the checkpoint's own budget.
    """

    frames: Sequence[ImageSource]
    fps: float = DEFAULT_FPS
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if type(self.fps) not in (int, float) or not 0 < self.fps < math.inf:
            raise InputError(f"fps must be a number above 0, got {self.fps!r}")
