"""Uploaded files to pictures: read once, with a copy that any browser can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.session import Picture
from qwen3vl_mlx.errors import ImageError
from qwen3vl_mlx.media import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = (1280, 1280)  # pixels: sharp in a column of half that, and small to send


@dataclass(frozen=True)
class Read:
    """Pictures of the files that could be read, in their order, and what was wrong with others."""

    pictures: tuple[Picture, ...]
    good: tuple[str, ...]
    problems: tuple[str, ...]


def read_pictures(paths: Sequence[str], folder: Path) -> Read:
    """Read uploaded files. `folder` takes the copies to show."""
    pictures, good, problems = [], [], []
    for path in paths:
        name = Path(path).name
        try:
            image = load_image(Path(path), name=name)
        except ImageError as error:
            problems.append(str(error))
            continue
        pictures.append(Picture(image, path, show(image, folder), name))
        good.append(path)
    return Read(tuple(pictures), tuple(good), tuple(problems))


def show(image: Image, folder: Path) -> str:
    """The path of a small copy: HEIC and TIFF, which browsers do not know, as WebP."""
    import hashlib

    copy = image.copy()
    copy.thumbnail(_SHOWN)
    digest = hashlib.sha256(copy.tobytes() + repr(copy.size).encode()).hexdigest()[:24]
    path = folder / f"{digest}.webp"
    if not path.exists():
        partial = path.with_name(f"{path.name}.{id(copy)}.part")
        copy.save(partial, "WEBP", quality=90)
        partial.replace(path)
    return str(path)
