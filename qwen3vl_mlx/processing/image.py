"""Upright RGB images to uint8 patches in the vision tower's order.

Resizing equals HF's PIL path (`Qwen2VLImageProcessorPil`); normalisation happens on the device, so
that patches stay bytes. A still image's two temporal slices are equal and kept once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.errors import CheckpointError, ConfigError, ImageError, InputError
from qwen3vl_mlx.media import MAX_ASPECT
from qwen3vl_mlx.models.config import VisionConfig
from qwen3vl_mlx.models.positions import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 16384 * 32 * 32  # what the released checkpoints allow one image


@dataclass(frozen=True)
class PixelBudget:
    """Least and most pixels of a resized image, or of a whole resized video."""

    min_pixels: int
    max_pixels: int

    def limited(self, min_pixels: int | None, max_pixels: int | None) -> PixelBudget:
        """With a request's own limits. Raises InputError for impossible ones."""
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be a positive whole number of pixels, got {value!r}")
            if value is not None and value > max(self.max_pixels, MOST_PIXELS):
                raise InputError(
                    f"{name} may be at most {max(self.max_pixels, MOST_PIXELS):,}, got {value:,}"
                )
        # A request that raises only the floor means to get a larger image, and the reverse.
        most = max(self.max_pixels, min_pixels or 0) if max_pixels is None else max_pixels
        least = min(self.min_pixels, most) if min_pixels is None else min_pixels
        if least > most:
            raise InputError(f"min_pixels ({least}) is more than max_pixels ({most})")
        return PixelBudget(least, most)


@dataclass(frozen=True)
class VisionSettings:
    """preprocessor_config.json, as far as it changes what the tower sees."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image: PixelBudget
    video: PixelBudget

    @property
    def factor(self) -> int:
        """Sides of resized images are multiples of this."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class VisualInput:
    """One image or video, ready for the tower: t * h * w patches in merge order."""

    kind: Literal["image", "video"]
    patches: npt.NDArray[np.uint8]  # (N, P * P * C), or (N, T * P * P * C) for video
    grid_thw: Grid
    settings: VisionSettings
    timestamps: tuple[float, ...] = ()  # seconds of each temporal patch of a video

    @cached_property
    def identity(self) -> str:
        """sha256 of all that the visual features depend on: pixels, grid and settings."""
        what = (self.kind, self.grid_thw, replace_budgets(self.settings))
        digest = hashlib.sha256(repr(what).encode())
        digest.update(np.ascontiguousarray(self.patches).data)
        return digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid_thw) // self.settings.merge_size**2


def replace_budgets(settings: VisionSettings) -> VisionSettings:
    """Settings without the budgets, which only act through the grid."""
    none = PixelBudget(0, 0)
    return replace(settings, image=none, video=none)


def read_settings(folder: Path, vision: VisionConfig) -> VisionSettings:
    """Read preprocessor_config.json (or processor_config.json) and the video one beside it.

    Raises CheckpointError or ConfigError where they are missing, damaged or contradict `vision`.
    """
    image = _read(folder, "preprocessor_config.json", "image_processor")
    if image is None:
        raise CheckpointError(
            f"{folder} has neither preprocessor_config.json nor processor_config.json"
        )
    video = _read(folder, "video_preprocessor_config.json", "video_processor")
    for key, ours, expected in (
        ("patch_size", "patch_size", vision.patch_size),
        ("temporal_patch_size", "temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", "spatial_merge_size", vision.spatial_merge_size),
    ):
        if image.get(key, expected) != expected:
            raise ConfigError(
                f"preprocessor_config.json: {key} is {image[key]}, but config.json says "
                f"vision_config.{ours} is {expected}"
            )
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if image.get(key, True) is not True:
            raise ConfigError(f"preprocessor_config.json: {key} must be true, got {image[key]!r}")
    mean = _channels(image, "image_mean", vision.in_channels)
    std = _channels(image, "image_std", vision.in_channels)
    if min(std) <= 0:
        raise ConfigError(f"preprocessor_config.json: image_std must be positive, got {list(std)}")
    return VisionSettings(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        mean=mean,
        std=std,
        image=_budget(image, "preprocessor_config.json"),
        # What the released checkpoints say, for folders without the video file.
        video=_budget(video, "video_preprocessor_config.json")
        if video
        else PixelBudget(4096, 25165824),
    )


def _read(folder: Path, name: str, section: str) -> Mapping[str, Any] | None:
    for path, key in ((folder / name, None), (folder / "processor_config.json", section)):
        if not path.exists():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values = values.get(key) if key else values
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read as a JSON object: {error}") from error
        if isinstance(values, Mapping):
            return values
    return None


def _channels(values: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    given = values.get(key, [0.5] * count)
    if not isinstance(given, list) or len(given) != count or {*map(type, given)} - {int, float}:
        raise ConfigError(f"preprocessor_config.json: {key} must be {count} numbers, got {given!r}")
    return tuple(float(value) for value in given)


def _budget(values: Mapping[str, Any], name: str) -> PixelBudget:
    """`size.shortest_edge` and `longest_edge` are pixel counts in these files, not edges."""
    size = values.get("size") or {}
    if not isinstance(size, Mapping):
        raise ConfigError(f"{name}: size must be an object, got {size!r}")
    least = size.get("shortest_edge", values.get("min_pixels"))
    most = size.get("longest_edge", values.get("max_pixels"))
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        raise ConfigError(
            f"{name}: size.shortest_edge ({least}) and size.longest_edge ({most}) must be pixel "
            "counts, the first not above the second"
        )
    return PixelBudget(least, most)


def smart_resize(height: int, width: int, factor: int, budget: PixelBudget) -> tuple[int, int]:
    """The size an image is resized to: multiples of `factor`, area within `budget`, about the
    same aspect. Source: HF `smart_resize` of Qwen2-VL. Raises ImageError above aspect 200.
    """
    return _fit(height, width, factor, budget, frames=1, rounded_frames=1)


def smart_resize_video(
    frames: int, height: int, width: int, factor: int, temporal: int, budget: PixelBudget
) -> tuple[int, int]:
    """Like `smart_resize` for every frame of a video, `budget` counting all frames together.

    Source: HF `smart_resize` of Qwen3-VL's video processor.
    """
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rounded = round(frames / temporal) * temporal
    return _fit(height, width, factor, budget, frames, rounded)


def _fit(
    height: int, width: int, factor: int, budget: PixelBudget, frames: int, rounded_frames: int
) -> tuple[int, int]:
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ImageError(
            f"an image of {width} x {height} pixels is too narrow: sides may differ by a factor "
            f"of at most {MAX_ASPECT}; crop it"
        )
    # Python rounds halves to even, and the released models were trained with that.
    rows, cols = round(height / factor) * factor, round(width / factor) * factor
    area = frames * height * width
    if rounded_frames * rows * cols > budget.max_pixels:
        shrink = math.sqrt(area / budget.max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        cols = max(factor, math.floor(width / shrink / factor) * factor)
    elif rounded_frames * rows * cols < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / area)
        rows = math.ceil(height * grow / factor) * factor
        cols = math.ceil(width * grow / factor) * factor
    return rows, cols


def image_input(image: Image, settings: VisionSettings, budget: PixelBudget) -> VisualInput:
    """Resize and cut one upright RGB image into patches."""
    rows, cols = smart_resize(image.height, image.width, settings.factor, budget)
    pixels = _resized(image, rows, cols)[None]  # (1, rows, cols, C)
    grid = (1, rows // settings.patch_size, cols // settings.patch_size)
    return VisualInput("image", _patchify(pixels, 1, settings), grid, settings)


def _resized(image: Image, rows: int, cols: int) -> npt.NDArray[np.uint8]:
    from PIL.Image import Resampling

    pixels: npt.NDArray[np.uint8] = np.asarray(image.resize((cols, rows), Resampling.BICUBIC))
    return pixels


def _patchify(
    frames: npt.NDArray[np.uint8], temporal: int, settings: VisionSettings
) -> npt.NDArray[np.uint8]:
    """(T * temporal, rows, cols, C) to (T * gh * gw, temporal * P * P * C), merge order."""
    count, rows, cols, channels = frames.shape
    patch, merge = settings.patch_size, settings.merge_size
    split = frames.reshape(
        count // temporal,
        temporal,
        rows // (merge * patch),
        merge,
        patch,
        cols // (merge * patch),
        merge,
        patch,
        channels,
    )
    ordered = split.transpose(0, 2, 5, 3, 6, 1, 4, 7, 8)  # (T, bh, bw, mh, mw, t, P, P, C)
    patches: npt.NDArray[np.uint8] = ordered.reshape(-1, temporal * patch * patch * channels)
    return patches


def video_input(
    frames: list[Image], fps: float, settings: VisionSettings, budget: PixelBudget
) -> VisualInput:
    """Resize and cut a video's sampled frames; the last one is repeated to fill a temporal patch.

    Raises ImageError for no frames or frames of different sizes.
    """
    if not frames:
        raise ImageError("a video needs at least one frame, got none")
    if sizes := {frame.size for frame in frames} - {frames[0].size}:
        width, height = sizes.pop()
        raise ImageError(
            f"a video's frames must share one size, got {frames[0].width} x {frames[0].height} "
            f"and {width} x {height}"
        )
    temporal = settings.temporal_patch_size
    padded = frames + frames[-1:] * (-len(frames) % temporal)
    count = max(len(frames), temporal)
    rows, cols = smart_resize_video(
        count, frames[0].height, frames[0].width, settings.factor, temporal, budget
    )
    pixels = np.stack([_resized(frame, rows, cols) for frame in padded])
    grid = (
        len(padded) // temporal,
        rows // settings.patch_size,
        cols // settings.patch_size,
    )
    times = timestamps(len(frames), fps, temporal)
    return VisualInput("video", _patchify(pixels, temporal, settings), grid, settings, times)


def timestamps(num_frames: int, fps: float, temporal_patch_size: int) -> tuple[float, ...]:
    """Seconds of each temporal patch: the mean of its first and last frame's times.

    A patch that lacks frames counts the last one again. Source: HF `_calculate_timestamps`.
    """
    indices = list(range(num_frames)) + [num_frames - 1] * (-num_frames % temporal_patch_size)
    return tuple(
        (indices[i] / fps + indices[i + temporal_patch_size - 1] / fps) / 2
        for i in range(0, len(indices), temporal_patch_size)
    )
