"""A picture of the conversation: decoded when it is named, its file kept for saving."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qwen3vl_mlx.errors import ImageError
from qwen3vl_mlx.media import (
    MAX_DOWNLOAD_BYTES,
    decode_text,
    describe_source,
    kind_of_text,
    load_image,
    path_of_file_url,
)

if TYPE_CHECKING:
    import PIL.Image

_DOWNLOAD_SEC = 30.0


@dataclass(frozen=True)
class Picture:
    """data: the image file as it was read; size: (width, height) of the upright picture."""

    name: str
    data: bytes
    size: tuple[int, int]

    def image(self) -> PIL.Image.Image:
        """Decode it, upright and RGB."""
        return load_image(self.data, name=self.name)


@dataclass(frozen=True)
class Attached:
    """A picture that goes with the next question, decoded already."""

    picture: Picture
    image: PIL.Image.Image


def read_picture(source: str) -> Attached:
    """Read a path, a URL or a data: URI. Raises ImageError saying what is wrong with it."""
    kind = kind_of_text(source)
    shown = describe_source(source, kind)
    if kind == "http":
        from qwen3vl_mlx.media_http import fetch

        data = fetch(source, shown, timeout=_DOWNLOAD_SEC, max_bytes=MAX_DOWNLOAD_BYTES)
        return picture_of(data, Path(urlsplit(source).path).name or shown, shown)
    if kind in ("data", "other URL"):
        return picture_of(decode_text(source, kind, shown), shown, shown)
    path = Path(path_of_file_url(source, shown) if kind == "file" else os.path.expanduser(source))
    image = load_image(path)  # says what is wrong with the file, if anything is
    try:
        return Attached(Picture(path.name, path.read_bytes(), image.size), image)
    except OSError as error:
        raise ImageError(f"{shown} cannot be read again ({error.strerror})") from error


def picture_of(data: bytes, name: str, shown: str | None = None) -> Attached:
    """A picture from an image file's bytes. Raises ImageError."""
    image = load_image(data, name=shown or name)
    return Attached(Picture(name, data, image.size), image)


def pasted_picture(image: PIL.Image.Image, number: int) -> Attached:
    """A picture that has no file, such as the clipboard's."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return Attached(Picture(f"pasted {number}.png", file.getvalue(), image.size), image)
