"""Small pictures and their files, shared by the tests of media."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from qwen3vl_mlx.media import load_image

HAS_AVIF = ".avif" in Image.registered_extensions()
RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (23, 31, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (23, 31), dtype=np.uint8)
# Four flat colours, all different under every turn, that lossy formats keep within a few levels.
QUARTERS = np.kron(
    np.array([[[200, 30, 30], [30, 180, 40]], [[40, 50, 210], [230, 220, 60]]], np.uint8),
    np.ones((32, 48, 1), np.uint8),
)

# EXIF 2.32, tag 0x0112: from the stored array to the upright one.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def encode(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    if form == "HEIF":
        pillow_heif.register_heif_opener()
    if form == "AVIF" and not HAS_AVIF:
        pytest.skip("Pillow reads and writes AVIF from 11.3 on")
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def pixels(source: Any, **options: int) -> np.ndarray:
    picture = load_image(source, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels would begin."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = struct.pack(">I", 9000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + idat
