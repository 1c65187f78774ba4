"""Files that clients name: only images, and only below folders that the server was given."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from qwen3vl_mlx.errors import ImageError, TooLargeError, UnsupportedImageError
from qwen3vl_mlx.media_decode import HEAD_BYTES, format_of

_LONGEST = 2**14  # above any system's longest path; taking a longer one apart takes its time


def read_below(path: str, roots: Sequence[Path], name: str, max_bytes: int) -> bytes:
    """Return the bytes of the image file at `path`; `name` stands for it in messages.

    Nothing outside `roots` is touched, nor looked at. Symbolic links are followed where they stay
    inside. FIFOs and devices are not opened. Messages say nothing of what a file holds.
    Raises ImageError, UnsupportedImageError or TooLargeError.
    """
    try:
        with open(_opened(path, roots, name), "rb") as file:
            _check_regular(os.fstat(file.fileno()), name)
            if format_of(file.read(HEAD_BYTES)) is None:
                raise UnsupportedImageError(f"{name} is not an image file that can be read")
            file.seek(0)
            data = file.read(max_bytes + 1)
    except ImageError:
        raise
    except PermissionError as err:
        raise ImageError(f"{name}: permission denied; make it readable for the server") from err
    except (OSError, ValueError) as err:  # ValueError: a NUL or a lone surrogate
        raise ImageError(f"{name}: there is no such file, or it cannot be read") from err
    if len(data) > max_bytes:
        raise TooLargeError(f"{name} is larger than the {max_bytes} bytes allowed")
    return data


def _opened(path: str, roots: Sequence[Path], name: str) -> int:
    """A file descriptor of what is at `path`, if that is below one of `roots`.

    Walks down from the root without following links, for the resolved path has none: what has
    become a link since is refused.
    """
    if len(path) > _LONGEST:
        raise _outside(roots, name)
    home = path == "~" or path.startswith("~/")  # of others: who they are is not for clients
    plain = Path(os.path.abspath(os.path.expanduser(path) if home else path))
    resolved = [root.resolve() for root in roots]
    # By its letters first: resolving a path looks at every folder on it.
    if not any(plain.is_relative_to(root) for root in (*roots, *resolved)):
        raise _outside(roots, name)
    real = Path(os.path.realpath(plain, strict=True))
    root = next((root for root in resolved if real.is_relative_to(root)), None)
    if root is None:
        raise _outside(roots, name)
    *parents, last = real.relative_to(root).parts or (".",)
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for parent in parents:
            inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        _check_regular(os.stat(last, dir_fd=folder, follow_symlinks=False), name)
        return os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


def _check_regular(found: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise ImageError(f"{name} is {kind}; expected one image file")


def _outside(roots: Sequence[Path], name: str) -> ImageError:
    may = "not below a folder that this server may read" if roots else "not read by this server"
    return ImageError(
        f"{name} is no URL and no base64 of an image; as a path it is {may}: start the server "
        "with --image-root DIR, or send the picture as a data: URI"
    )
