"""Encoded bytes and arrays to PIL pictures, and any picture to upright RGB.

Nothing is resized or colour-managed: ICC profiles are ignored, as HF transformers does, so the
model sees the stored numbers.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx.errors import ImageError, TooLargeError, UnsupportedImageError

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

MAX_ASPECT = 200
"""The longest side over the shortest that Qwen3-VL's resize takes (HF `smart_resize`)."""

_FORMATS = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WEBP", rb"RIFF....WEBP"),
    ("GIF", rb"GIF8[79]a"),
    ("BMP", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"),  # "BM" alone is too little
    ("TIFF", rb"II[*+]\0|MM\0[*+]"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1"}
_ACCEPTED = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC/HEIF"
HEAD_BYTES = 192
"""How many first bytes tell the format; the list of brands in an ISO media file fits."""

_MAX_SCANS = 100  # progressive JPEGs have about ten
_MAX_SEGMENTS = 10_000
_PIECE = 2**20  # bytes searched at a time: other threads get their turn in between
_JPEG_MARKER = re.compile(rb"\xff([^\0\xd0-\xd7\xff])")  # not inside the coded pixels

MALFORMED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's parsers raise on malformed files."""


class _Whole(io.BytesIO):
    """Bytes that raise when read past their end, so that no half picture is ever decoded.

    Pillow does the same unless some library has set ImageFile.LOAD_TRUNCATED_IMAGES for everybody.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if not data and size is not None and size > 0:
            raise OSError("the data ends too early")
        return data


def short_text(text: str, limit: int = 160) -> str:
    """Return `text` on one printable line, its middle left out when it is long."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else "?" for c in text)


def format_of(head: bytes) -> str | None:
    """Return the format of an image file from its first bytes; None if it is not accepted."""
    for name, magic in _FORMATS:
        if re.match(magic, head, re.DOTALL):
            return name
    if head[4:8] != b"ftyp":
        return None
    box = head[8 : int.from_bytes(head[:4], "big")]
    brands = {box[i : i + 4] for i in range(0, len(box), 4)}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None


def check_format(data: bytes, name: str) -> str:
    """Return the format of an image file from its first bytes, or raise UnsupportedImageError."""
    if not data:
        raise UnsupportedImageError(f"{name} is empty; expected an image: {_ACCEPTED}")
    found = format_of(data[:HEAD_BYTES])
    if found is None:
        raise UnsupportedImageError(
            f"{name} is not an image that can be read: it starts with {data[:16]!r}; "
            f"expected {_ACCEPTED}"
        )
    return found


def _damaged(name: str, form: str | None, err: BaseException) -> ImageError:
    from PIL.Image import DecompressionBombError

    bomb = isinstance(err, DecompressionBombError)
    fault = "damaged or oversized" if bomb else "damaged or truncated"
    what = f"a {fault} {form} image" if form else "an image that cannot be used"
    reason = short_text(str(err)) or type(err).__name__
    return (TooLargeError if bomb else ImageError)(
        f"{name} is {what} ({reason}); expected a whole one: copy or save it again"
    )


def open_encoded(data: bytes, name: str, max_source_pixels: int) -> PIL.Image.Image:
    """Open an image file, whose pixels may follow on `load()`. Raises ImageError.

    Calls the format's own Pillow plugin, not `Image.open`: that one warns and fails by a global
    limit, and silencing warnings is not thread-safe. No plugin outside `_FORMATS` ever runs.
    """
    from PIL import Image

    form = check_format(data, name)
    if form == "JPEG":
        _check_scans(data, name)
    try:
        if form == "HEIF":
            return _picture_from_heif(data, name, max_source_pixels)
        Image.preinit()  # the common formats; init() imports every plugin there is
        if form not in Image.OPEN:
            Image.init()
        if form not in Image.OPEN:
            raise UnsupportedImageError(
                f"{name} is an {form} image; this Pillow cannot read it: upgrade it"
            )
        return Image.OPEN[form][0](_Whole(data), "")
    except ImageError:
        raise
    except (*MALFORMED, Image.DecompressionBombError) as err:
        raise _damaged(name, form, err) from err


def _check_scans(data: bytes, name: str) -> None:
    """Raise TooLargeError for a JPEG of more scans than a progressive one has reason for.

    Every scan goes over the whole picture, and one of nothing new takes a few bytes: 300 kB can
    keep a processor busy for minutes.
    """
    scans, at = 0, 2
    for _ in range(_MAX_SEGMENTS):
        marker = _next_marker(data, at)
        if marker is None or marker[1] == b"\xd9":  # the end of the picture
            return
        scans += marker[1] == b"\xda"
        if scans > _MAX_SCANS:
            break
        at = marker.end()
        if marker[1] not in (b"\x01", b"\xd8"):  # these have no length
            at += int.from_bytes(data[at : at + 2], "big")
    raise TooLargeError(
        f"{name} is a JPEG of too many parts (over {_MAX_SCANS} scans or {_MAX_SEGMENTS} "
        "segments) to be decoded in good time; save it again"
    )


def _next_marker(data: bytes, at: int) -> re.Match[bytes] | None:
    for start in range(at, len(data), _PIECE):
        marker = _JPEG_MARKER.search(data, start, start + _PIECE + 1)  # it may lie across the end
        if marker is not None:
            return marker
    return None


def _picture_from_heif(data: bytes, name: str, max_source_pixels: int) -> PIL.Image.Image:
    """Decode HEIF. libheif turns the pixels as the container says, which is what counts in HEIF;
    `to_pillow` sets the orientation in EXIF, a mere copy, to upright.
    """
    try:
        import pillow_heif
    except ImportError as err:
        raise UnsupportedImageError(
            f'{name} is a HEIC/HEIF image, which needs pillow-heif: pip install "qwen3vl-mlx[heif]"'
        ) from err
    heif = pillow_heif.open_heif(data)
    check_size(heif.size, name, max_source_pixels)  # here: the next line decodes
    return heif.to_pillow()


def check_size(size: tuple[int, int], name: str, max_source_pixels: int) -> None:
    """Raise TooLargeError or ImageError unless a picture of `size` (width, height) may be used."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height}: it has no pixels; expected at least 1x1")
    if width * height > max_source_pixels:
        raise TooLargeError(
            f"{name} is {width}x{height} = {width * height} pixels, over the limit of "
            f"{max_source_pixels}; use a smaller picture (max_source_pixels is the limit, a "
            "server's --max-image-pixels)"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"{name} is {width}x{height}: one side is over {MAX_ASPECT} times the other, "
            "more than the model takes; crop or pad it"
        )


def picture_from_array(array: np.ndarray[Any, Any], name: str) -> PIL.Image.Image:
    """Make a picture of an (H, W) or (H, W, 1 | 3 | 4) array of uint8, uint16, bool or floats.

    Raises:
        ImageError: another shape or dtype, or floats outside [0, 1].
    """
    import numpy as np
    from PIL import Image

    shape, dtype = array.shape, array.dtype
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        hint = ""
        if array.ndim == 3 and shape[0] in (1, 3, 4):
            hint = "; it looks channels-first: pass array.transpose(1, 2, 0)"
        elif array.ndim == 4:
            hint = "; it looks like a batch: pass its images one by one"
        raise ImageError(f"{name}: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4){hint}")
    if array.size == 0:
        raise ImageError(f"{name} has no pixels; expected at least 1x1")
    if dtype.kind == "f":
        low, high = array.min(), array.max()  # NaN if any value is
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"{name} of {dtype} has values from {low:g} to {high:g}; floats must lie in "
                "[0, 1]: divide by 255, or pass uint8"
            )
        array = np.rint(array * np.float32(255))
    elif dtype.kind == "b":
        array = array * np.uint8(255)
    elif dtype.kind == "u" and dtype.itemsize == 2:
        array = array >> 8
    elif dtype != np.uint8:
        raise ImageError(
            f"{name} has dtype {dtype}; expected uint8, uint16, bool or floats in [0, 1]: "
            "convert with .astype('uint8')"
        )
    pixels = array.astype(np.uint8)  # (H, W) or (H, W, 1 | 3 | 4)
    return Image.fromarray(pixels[:, :, 0] if shape[2:] == (1,) else pixels)


def upright_rgb(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Decode `picture` to a new RGB one, upright, opaque on white and without metadata.

    Raises:
        ImageError: the pixels cannot be decoded or have no meaning as colours.
    """
    from PIL import Image

    try:
        picture.load()
        rgb = _to_rgb(picture, name)
        turn = _turn_upright(picture)  # after load(): PNG may hold EXIF behind the pixels
        upright = rgb if turn is None else rgb.transpose(turn)
    except ImageError:
        raise
    except (*MALFORMED, Image.DecompressionBombError) as err:
        raise _damaged(name, picture.format, err) from err
    upright.info.clear()  # else whoever reads the orientation next turns the picture again
    return upright


def _to_rgb(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    from PIL import Image

    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _rgb_from_wide_grey(picture, name)
    if picture.mode == "La":  # premultiplied: the one mode convert() takes only one step at a time
        picture = picture.convert("LA")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _rgb_from_wide_grey(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Grey of 16-bit, 32-bit or float values to RGB. Pillow's own convert() would clip at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture)  # (H, W)
    low, high = values.min(), values.max()
    top = 255 if picture.mode == "F" else 65535
    if not (low >= 0 and high <= top):
        raise ImageError(
            f"{name} of mode {picture.mode} has values from {low} to {high}; expected 0 to {top}: "
            "scale it to 8 bits per channel first"
        )
    if picture.mode == "F":  # Pillow's own range is 0..255, float TIFFs mostly hold 0..1
        grey = np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    else:
        grey = (values >> 8).astype(np.uint8)  # the high byte, as Pillow does for 16-bit colour
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _turn_upright(picture: PIL.Image.Image) -> PIL.Image.Transpose | None:
    """The transpose that undoes EXIF orientation 2..8 (EXIF 2.32, tag 0x0112); else None.

    Not `ImageOps.exif_transpose`: that also writes the remaining EXIF anew and fails on damaged
    tags. EXIF that cannot be read counts as upright.
    """
    from PIL import Image

    try:
        orientation = picture.getexif().get(0x0112)
    except MALFORMED:
        return None
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return turns.get(orientation) if isinstance(orientation, int) else None
