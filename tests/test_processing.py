"""Pictures and films to patches: against recorded values, HF's processors, and by the book."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stages import film, picture

import qwen3vl_mlx
from qwen3vl_mlx.errors import ImageError
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.models.vision import normalize_patches
from qwen3vl_mlx.processing.image import (
    PixelBudget,
    VisionSettings,
    image_input,
    read_settings,
    smart_resize,
    smart_resize_video,
    timestamps,
    video_input,
)

DEMO = Path(qwen3vl_mlx.__file__).parent / "demo" / "checkpoint"
SETTINGS = read_settings(DEMO, read_config(DEMO).vision)
TINY_BUDGET, RELEASED_BUDGET = PixelBudget(4096, 262144), PixelBudget(65536, 16777216)
SIZES = [  # height, width
    (1, 1),
    (3, 3),
    (16, 16),
    (20, 20),
    (31, 33),
    (33, 47),
    (64, 64),
    (96, 160),
    (100, 100),
    (300, 400),
    (337, 211),
    (1, 150),
    (33, 3000),
    (3000, 33),
    (16, 3199),
]


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import hf

    return hf


def normalized(patches: npt.NDArray[np.uint8], settings: VisionSettings) -> npt.NDArray[np.float32]:
    return np.array(normalize_patches(mx.array(patches), settings.mean, settings.std, mx.float32))


# Images


def test_recorded_statistics() -> None:
    """A synthetic picture whose normalised patches HF's run had this mean and deviation."""
    y, x = np.mgrid[:300, :400]
    pixels = np.stack([x * 255 // 399, y * 255 // 299, (x + y) % 256], axis=-1)
    found = image_input(Image.fromarray(pixels.astype(np.uint8)), SETTINGS, RELEASED_BUDGET)
    assert found.grid_thw == (1, 18, 24)
    assert found.patches.shape == (432, 16 * 16 * 3)  # one temporal slice; HF has two equal ones
    values = normalized(found.patches, SETTINGS).astype(np.float64)
    assert values.mean() == pytest.approx(-0.007370254, abs=2e-8)
    assert values.std() == pytest.approx(0.5760063, abs=1e-7)


@settings(deadline=None)
@given(
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)), frames=st.integers(1, 5), data=st.data()
)
def test_where_every_pixel_goes(blocks: tuple[int, int], frames: int, data: st.DataObject) -> None:
    """Patch, frame, row, column and channel of any pixel, in a still and in a video."""
    height, width = 32 * blocks[0], 32 * blocks[1]
    pictures = film(frames, height, width)
    pixels = np.stack([np.asarray(frame) for frame in pictures])
    budget = PixelBudget(1024, 2**24)
    still = image_input(pictures[0], SETTINGS, budget)
    video = video_input(pictures, 2.0, SETTINGS, budget)
    assert still.grid_thw == (1, height // 16, width // 16)
    assert video.grid_thw == ((frames + 1) // 2, height // 16, width // 16)
    still_patches = still.patches.reshape(-1, 16, 16, 3)
    video_patches = video.patches.reshape(-1, 2, 16, 16, 3)
    per_frame = len(still_patches)
    k = data.draw(st.integers(0, len(video_patches) - 1))
    t, inside = divmod(k, per_frame)
    block, corner = divmod(inside, 4)
    row = 2 * (block // blocks[1]) + corner // 2
    col = 2 * (block % blocks[1]) + corner % 2
    cut = pixels[:, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
    for slice_ in range(2):
        frame = min(2 * t + slice_, frames - 1)  # the last one is repeated
        assert np.array_equal(video_patches[k, slice_], cut[frame])
    if t == 0:
        assert np.array_equal(still_patches[k], cut[0])


@pytest.mark.parity
@pytest.mark.parametrize("budget", [TINY_BUDGET, RELEASED_BUDGET], ids=["tiny", "released"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_patches_are_hfs(hf: ModuleType, height: int, width: int, budget: PixelBudget) -> None:
    """Bytes bit for bit; normalised values to half a rounding.

    HF's PIL processor rounds three times, its fast one and ours once: those two are equal.
    """
    source = picture(height, width)
    ours = image_input(source, SETTINGS, budget)
    size = {"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels}
    raw, grids = hf.image_patches([source], DEMO, size=size, do_rescale=False, do_normalize=False)
    assert tuple(grids[0]) == ours.grid_thw
    theirs = hf.read_patches(raw)
    assert np.array_equal(theirs[:, 0], theirs[:, 1])
    assert np.array_equal(theirs[:, 0].reshape(len(raw), -1), ours.patches)
    pixel_values, _ = hf.image_patches([source], DEMO, size=size)
    values = normalized(ours.patches, SETTINGS)
    theirs = hf.read_patches(pixel_values)[:, 0].reshape(len(raw), -1)
    assert np.abs(values - theirs).max() <= 2**-24
    fused = (ours.patches.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    assert np.abs(values - fused).max() <= (0 if mx.default_device() == mx.cpu else 2**-24)


# Tiny, ordinary and narrow.
SIDES = st.one_of(st.integers(1, 70), st.integers(1, 2000), st.integers(1, 20000))


@pytest.mark.parity
@settings(deadline=None)
@given(height=SIDES, width=SIDES, least=st.integers(1, 2**20), room=st.integers(0, 2**24))
def test_image_sizes_are_hfs(
    hf: ModuleType, height: int, width: int, least: int, room: int
) -> None:
    budget = PixelBudget(least, least + room)
    try:
        theirs = hf.image_smart_resize(height, width, 32, least, least + room)
    except ValueError:
        with pytest.raises(ImageError):
            smart_resize(height, width, 32, budget)
        return
    assert smart_resize(height, width, 32, budget) == theirs


@pytest.mark.parity
@settings(deadline=None)
@given(
    frames=st.integers(2, 800),
    height=SIDES,
    width=SIDES,
    least=st.integers(1, 2**20),
    room=st.integers(0, 2**26),
)
def test_video_sizes_are_hfs(
    hf: ModuleType, frames: int, height: int, width: int, least: int, room: int
) -> None:
    budget = PixelBudget(least, least + room)
    try:
        theirs = hf.video_smart_resize(frames, height, width, 2, 32, least, least + room)
    except ValueError:
        with pytest.raises(ImageError):
            smart_resize_video(frames, height, width, 32, 2, budget)
        return
    assert smart_resize_video(frames, height, width, 32, 2, budget) == theirs


# Videos


@pytest.mark.parity
@pytest.mark.parametrize(
    ("frames", "height", "width"), [(2, 64, 64), (4, 64, 96), (5, 96, 64), (1, 64, 64)]
)
def test_video_patches_are_hfs(hf: ModuleType, frames: int, height: int, width: int) -> None:
    pictures = film(frames, height, width)
    ours = video_input(pictures, 2.0, SETTINGS, PixelBudget(1024, 2**24))
    theirs, grid = hf.video_patches(np.stack([np.asarray(frame) for frame in pictures]))
    assert ours.grid_thw == grid
    order = hf.read_patches(theirs).reshape(len(theirs), -1)
    assert np.array_equal(normalized(ours.patches, SETTINGS), order)


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected"),
    [
        (1, 2.0, [0.0]),
        (2, 2.0, [0.25]),
        (5, 2.0, [0.25, 1.25, 2.0]),
        (4, 1.0, [0.5, 2.5]),
        (3, 10.0, [0.05, 0.2]),
    ],
)
def test_timestamps(num_frames: int, fps: float, expected: list[float]) -> None:
    assert timestamps(num_frames, fps, 2) == pytest.approx(tuple(expected))


@pytest.mark.parity
@settings(deadline=None)
@given(num_frames=st.integers(1, 60), fps=st.floats(0.1, 120), temporal=st.integers(1, 4))
def test_timestamps_are_hfs(hf: ModuleType, num_frames: int, fps: float, temporal: int) -> None:
    """To the last bit: 0.15 and 0.15000000000000002 are different seconds in a prompt."""
    theirs = hf.timestamps(num_frames, fps, temporal)
    assert list(timestamps(num_frames, fps, temporal)) == theirs


def test_tenths_of_seconds_are_written_as_hf_rounds_them() -> None:
    """Each frame's time is rounded before the mean is: 0.6 and 0.7 give 0.6499..., not 0.65."""
    written = [f"{time:.1f}" for time in timestamps(10, 10.0, 2)]
    assert written == ["0.1", "0.2", "0.5", "0.6", "0.9"]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one frame"),
        ([picture(64, 64), picture(64, 96)], "64 x 64 and 96 x 64"),
    ],
)
def test_videos_that_cannot_be(frames: list[Image.Image], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        video_input(frames, 2.0, SETTINGS, SETTINGS.video)
