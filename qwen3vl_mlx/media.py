"""Any image source to one upright RGB picture; what cannot become one is refused, with reasons."""

from __future__ import annotations

import binascii
import os
import re
import stat
from base64 import b64decode
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from qwen3vl_mlx.errors import ImageError, TooLargeError
from qwen3vl_mlx.media_decode import (
    HEAD_BYTES,
    MAX_ASPECT,
    check_format,
    check_size,
    format_of,
    open_encoded,
    picture_from_array,
    short_text,
    upright_rgb,
)

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

__all__ = [
    "MAX_ASPECT",
    "MAX_DOWNLOAD_BYTES",
    "MAX_SOURCE_PIXELS",
    "ImageSource",
    "TextKind",
    "decode_text",
    "describe_source",
    "kind_of_text",
    "load_image",
    "path_of_file_url",
    "read_bytes",
]

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | PIL.Image.Image "
    "| np.ndarray[Any, Any]"
)

TextKind: TypeAlias = Literal["data", "http", "file", "other URL", "path", "base64"]

MAX_SOURCE_PIXELS = 178_956_970
"""Where Pillow itself calls a picture a decompression bomb (2 * 1024**3 // 4 // 3 pixels, half a
GiB of RGB); above any camera, and ten times what the model looks at (16384 tokens, 16.8 Mpixel)."""

MAX_DOWNLOAD_BYTES = 64 * 2**20

_MOST_ESCAPES = 2**22  # undoing them is slow, and 64 MB of base64 has fewer
_PIECE = 2**20  # characters decoded at a time: other threads get their turn in between
_LONGEST_URL = 2**14  # to be taken apart for a message

_PLAIN = bytes.maketrans(b"-_", b"+/")
_SPACES = b" \t\r\n\v\f"

_SOURCES = (
    "a path, a file:, http: or https: URL, a data: URI, base64 text, bytes, a PIL image or "
    "a numpy array"
)


def load_image(
    source: ImageSource,
    *,
    name: str | None = None,
    max_source_pixels: int = MAX_SOURCE_PIXELS,
    timeout: float = 30.0,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
) -> PIL.Image.Image:
    """Return `source` as a new upright PIL image of mode "RGB" that carries no metadata.

    Args:
        source: path (`~` is expanded), `file:`, `http:` or `https:` URL, `data:` URI, base64 text
            (an existing path wins), bytes of an image file, PIL image (left as it is), or numpy
            array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool or floats in
            [0, 1]. Of several frames or pages the first is taken; of a PIL image the current one.
        name: what messages call the source; None describes it.
        max_source_pixels: most pixels (width * height) to decode, read from the header.
        timeout: seconds a download may take.
        max_bytes: most bytes to download.

    EXIF orientation is applied once, transparency is composited on white, and 16-bit values keep
    their high byte (0..65535 becomes 0..255). Same pixels as HF `image_utils.load_image`, except
    that it drops alpha (HF's `convert_to_rgb` composites on white too) and clips 16-bit values.

    Raises:
        ImageError: the source cannot be found, read, decoded or used; the message says which.
        UnsupportedImageError: it is no image of a format that can be read.
        TooLargeError: it is over a limit.
    """
    import numpy as np
    from PIL import Image

    name = name or describe_source(source)
    if isinstance(source, Image.Image):
        picture = source
    elif isinstance(source, np.ndarray):
        picture = picture_from_array(source, name)
    else:
        data = read_bytes(source, name, timeout=timeout, max_bytes=max_bytes)
        picture = open_encoded(data, name, max_source_pixels)
    check_size(picture.size, name, max_source_pixels)
    return upright_rgb(picture, name)


def describe_source(source: ImageSource, kind: TextKind | None = None) -> str:
    """Return a short name of an image source for messages, without credentials or URL queries.

    kind: what a text is, where that is known.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "bytes"
    if isinstance(source, os.PathLike):
        return short_text(os.fsdecode(source))
    if not isinstance(source, str):
        import numpy as np
        from PIL import Image

        if isinstance(source, np.ndarray):
            return f"array {source.shape}"
        if isinstance(source, Image.Image):
            return f"PIL image ({source.width}x{source.height}, {source.mode})"
        return f"{type(source).__name__} object"
    kind = kind or kind_of_text(source)
    if kind == "data":
        text = source.lstrip()
        header, start = _data_header(text)
        size = len(text) - start if start else 0
        size = size * 3 // 4 if _is_base64(header) else size
        form = short_text(header.partition(";")[0], 40) or "no type"
        return f"data URI ({form}, {_bytes(size)})"
    if kind == "base64":
        return f"base64 text ({_bytes(len(source) * 3 // 4)})"
    if kind in ("http", "other URL"):
        if len(source) > _LONGEST_URL:
            return f"URL of {len(source)} characters"
        try:
            url = urlsplit(source.strip())
        except ValueError:
            return "URL"
        host = url.netloc.rpartition("@")[2]
        return short_text(f"{url.scheme}://{host}{url.path}") + ("?..." if url.query else "")
    return short_text(source) or "''"


def _bytes(count: int) -> str:
    return f"{count} bytes" if count < 1000 else f"{count / 1000:.0f} kB"


# ---- sources to bytes


def kind_of_text(text: str, *, on_disk: bool = True) -> TextKind:
    """Return what a str source means. A scheme wins, then a path that exists, then base64.

    on_disk: whether to look if it exists.
    """
    scheme = re.match(r"\s*(?:([a-z][a-z0-9+.-]+)://|(data|file):)", text[:99], re.I)
    if scheme:
        word = (scheme[1] or scheme[2]).lower()
        if word in ("http", "https"):
            return "http"
        if word == "data":
            return "data"
        return "file" if word == "file" else "other URL"
    if on_disk and os.path.exists(_expanded(text)):
        return "path"
    compact = "".join(text[: HEAD_BYTES * 4 // 3].split())
    head = _decode_base64(_pieces(compact[: len(compact) // 4 * 4]))
    if head is not None and (len(text) > 1024 or format_of(head)):
        return "base64"
    return "path"


def read_bytes(
    source: ImageSource,
    name: str | None = None,
    *,
    timeout: float = 30.0,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
) -> bytes:
    """Return the file that a path, URL, data: URI, base64 text or bytes stand for, not decoded.

    Arguments and errors are those of `load_image`.
    """
    name = name or describe_source(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, os.PathLike):
        return _read_file(_expanded(os.fsdecode(source)), name)
    if not isinstance(source, str):
        raise ImageError(f"a {name} is not an image source; expected {_SOURCES}")
    kind = kind_of_text(source)
    if kind == "http":
        from qwen3vl_mlx.media_http import fetch

        return fetch(source.strip(), name, timeout=timeout, max_bytes=max_bytes)
    if kind == "file":
        return _read_file(path_of_file_url(source.strip(), name), name)
    if kind == "path":
        return _read_file(_expanded(source), name)
    return decode_text(source, kind, name)


def decode_text(text: str, kind: TextKind, name: str) -> bytes:
    """Return the bytes that a data: URI or base64 text holds. ImageError if it is malformed."""
    if kind == "other URL":
        raise ImageError(
            f"{name}: this URL scheme cannot be read; expected http, https, file or data"
        )
    start, escapes = 0, kind == "data"
    if kind == "data":
        text = text.strip()
        header, start = _data_header(text)
        if not start:
            raise ImageError(f"{name} has no comma; expected data:image/png;base64,<data>")
        if text.count("%", start) > _MOST_ESCAPES:
            raise TooLargeError(f"{name} has too many % escapes; send base64 without them")
        if not _is_base64(header):
            return b"".join(_pieces(text, start, escapes))
    data = _decode_base64(_pieces(text, start, escapes))
    if data is None:
        raise ImageError(
            f"{name} is not valid base64: expected only A-Z a-z 0-9 + / (or - _), whitespace and "
            "closing =; encode the file's bytes again"
        )
    return data


def _data_header(text: str) -> tuple[str, int]:
    """What a data: URI says of its data, and where these begin: 0 if there is no comma."""
    comma = text.find(",")
    return (text[5:comma], comma + 1) if comma >= 0 else (text[5:], 0)


def _is_base64(header: str) -> bool:
    return header.rstrip()[-7:].lower() == ";base64"


def _pieces(text: str, start: int = 0, escapes: bool = False) -> Iterator[bytes]:
    """The bytes of `text` from `start` on, a megabyte at a time; % escapes undone if there may be.

    A lone surrogate becomes "?", which is in no base64.
    """
    while start < len(text):
        end = start + _PIECE
        if escapes and (cut := text.rfind("%", end - 2, end)) >= 0:  # an escape stays whole
            end = cut
        piece = text[start:end].encode(errors="replace")
        yield unquote_to_bytes(piece) if escapes else piece
        start = end


def _decode_base64(pieces: Iterator[bytes]) -> bytes | None:
    """Decode either alphabet, with whitespace and without padding; None if it is not base64."""
    decoded, rest = [], b""
    try:
        for piece in pieces:
            rest += piece.translate(_PLAIN, _SPACES)
            data = rest.rstrip(b"=")
            if b"=" in data:
                return None
            whole = len(data) // 4 * 4
            decoded.append(b64decode(data[:whole], validate=True))
            rest = rest[whole : len(data) + 1]  # one "=" is enough to tell that this was the end
        rest = rest.rstrip(b"=")
        decoded.append(b64decode(rest + b"=" * (-len(rest) % 4), validate=True))
    except binascii.Error:
        return None
    return b"".join(decoded)


def path_of_file_url(url: str, name: str) -> str:
    """Return the path in a file: URL of this machine. ImageError if there is none."""
    try:
        parts = urlsplit(url)
    except ValueError as err:
        raise ImageError(f"{name} is not a valid URL ({err}); expected file:///path") from err
    if parts.netloc not in ("", "localhost"):
        raise ImageError(f"{name} names another host; expected file:///path (three slashes)")
    return unquote(parts.path)


def _expanded(path: str) -> str:
    """The path with `~` or `~user` at its beginning written out, where that is possible."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # no user's name holds a NUL
        return path


def _read_file(path: str, name: str) -> bytes:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a directory; expected one image file")
        if not stat.S_ISREG(mode):
            raise ImageError(f"{name} is not a regular file; expected one image file")
        with open(path, "rb") as file:
            check_format(file.read(HEAD_BYTES), name)  # before gigabytes of something else are read
            file.seek(0)
            return file.read()
    except ImageError:
        raise
    except PermissionError as err:
        raise ImageError(f"{name}: permission denied; make it readable for this user") from err
    except OSError as err:
        if os.path.exists(path):
            raise ImageError(f"{name} cannot be read ({err.strerror}); try a copy of it") from err
        raise ImageError(f"no such file: {name}; expected {_SOURCES}") from err
    except ValueError as err:  # a NUL or a lone surrogate
        raise ImageError(f"no such file: {name}; the name holds an impossible character") from err
