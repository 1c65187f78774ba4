"""What a picture's file says of itself: size, when and where it was taken, and with what.

Only headers are read, never pixels. What cannot be read is None: whether the picture is any good
is for others to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx.errors import ImageError
from qwen3vl_mlx.media import MAX_SOURCE_PIXELS
from qwen3vl_mlx.media_decode import HEAD_BYTES, MALFORMED, format_of, open_encoded

if TYPE_CHECKING:
    import PIL.Image

_ROWS = 0x0101  # a TIFF's height as it is stored
_ORIENTATION, _MAKE, _MODEL = 0x0112, 0x010F, 0x0110
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_TAKEN = (0x9003, 0x9004)  # DateTimeOriginal, DateTimeDigitized
_LATITUDE_REF, _LATITUDE, _LONGITUDE_REF, _LONGITUDE = 1, 2, 3, 4


@dataclass(frozen=True)
class Facts:
    """width, height: upright, in pixels. gps: degrees north and east."""

    width: int | None = None
    height: int | None = None
    taken: datetime | None = None
    camera: str | None = None
    gps: tuple[float, float] | None = None


def read_facts(data: bytes) -> Facts:
    """What the bytes of an image file say of it."""
    try:
        if format_of(data[:HEAD_BYTES]) == "HEIF":
            (width, height), exif, upright = _open_heif(data)
        else:
            picture = open_encoded(data, "", MAX_SOURCE_PIXELS)
            exif = _exif_of(picture)
            # Newer Pillows turn the size of a TIFF before its pixels are read.
            upright = picture.format == "TIFF" and picture.width == _tag(exif, _ROWS)
            width, height = picture.size
    except (*MALFORMED, ImageError, ImportError):
        return Facts()
    if not upright and _tag(exif, _ORIENTATION) in (5, 6, 7, 8):
        width, height = height, width
    details, gps = _ifd(exif, _EXIF_IFD), _ifd(exif, _GPS_IFD)
    dates = (_date(details.get(tag)) for tag in _TAKEN)
    return Facts(
        width,
        height,
        next((date for date in dates if date is not None), None),
        _camera(_tag(exif, _MAKE), _tag(exif, _MODEL)),
        _position(gps),
    )


def _open_heif(data: bytes) -> tuple[tuple[int, int], PIL.Image.Exif, bool]:
    """Size, EXIF, and that the size is upright. `to_pillow` would decode the pixels."""
    import pillow_heif
    from PIL import Image

    heif = pillow_heif.open_heif(data)
    exif = Image.Exif()
    if heif.info.get("exif"):
        exif.load(heif.info["exif"])
    return heif.size, exif, True


def _exif_of(picture: PIL.Image.Image) -> PIL.Image.Exif:
    from PIL import Image

    try:
        # Not the method of PNG, which decodes all pixels to see whether EXIF follows them.
        return Image.Image.getexif(picture)
    except MALFORMED:
        return Image.Exif()


def _tag(exif: PIL.Image.Exif, tag: int) -> Any:
    try:
        return exif.get(tag)
    except MALFORMED:
        return None


def _ifd(exif: PIL.Image.Exif, tag: int) -> dict[int, Any]:
    try:
        return dict(exif.get_ifd(tag))
    except MALFORMED:
        return {}


def _date(value: object) -> datetime | None:
    """An EXIF date such as `2024:05:31 18:03:11`."""
    if not isinstance(value, str):
        return None
    try:
        return datetime.strptime(value.strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None


def _camera(make: object, model: object) -> str | None:
    """Maker and model; models that begin with their maker's name say it once."""
    words = [" ".join(w.strip("\0 ").split()) for w in (make, model) if isinstance(w, str)]
    if len(words) == 2 and words[1].lower().startswith(words[0].lower()):
        words = words[1:]
    return " ".join(filter(None, words)) or None


def _position(gps: dict[int, Any]) -> tuple[float, float] | None:
    north = _degrees(gps.get(_LATITUDE), gps.get(_LATITUDE_REF), "S", 90)
    east = _degrees(gps.get(_LONGITUDE), gps.get(_LONGITUDE_REF), "W", 180)
    return None if north is None or east is None else (north, east)


def _degrees(value: Any, ref: object, negative: str, most: int) -> float | None:
    """Degrees, minutes and seconds to degrees; None for what is none, such as 0/0."""
    try:
        degrees, minutes, seconds = (float(part) for part in value)
    except MALFORMED:
        return None
    total = degrees + minutes / 60 + seconds / 3600
    if not (math.isfinite(total) and 0 <= total <= most):
        return None
    return round(-total if str(ref).strip("\0 ").upper() == negative else total, 6)
