"""The picture on the clipboard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx.errors import ImageError, InputError
from qwen3vl_mlx.media import load_image

if TYPE_CHECKING:
    import PIL.Image

_HOW = (
    "copy a picture first (on a Mac, Control-Shift-Command-4 copies a part of the screen), or give "
    "its path"
)
_SECONDS = 20.0  # macOS asks the program that owns the clipboard


def clipboard_image() -> PIL.Image.Image:
    """The copied picture, or the first file of those copied in a file manager, upright and RGB.

    Reads macOS's clipboard, and on Linux that of Wayland (wl-paste) or X11 (xclip). Raises
    InputError where there is no picture or no tool to get it with, ImageError for one that cannot
    be read.
    """
    from PIL import ImageGrab

    # Beside a file that was copied in Finder lies a picture of its icon: the file goes first.
    if sys.platform == "darwin" and (path := _copied_file()) is not None:
        return load_image(path)
    try:
        found = ImageGrab.grabclipboard()
    except NotImplementedError as error:
        raise InputError(
            "the clipboard needs wl-paste (Wayland) or xclip (X11) on this system: install one of "
            "them, or give the picture's path"
        ) from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"the clipboard cannot be read ({reason}); {_HOW}") from error
    if isinstance(found, list):  # Windows, and what Pillow may come to know
        paths = [path for path in found if Path(path).is_file()]
        if not paths:
            raise InputError(f"what was copied is no file that can be read; {_HOW}")
        return load_image(Path(paths[0]))
    if found is None:
        raise InputError(f"there is no picture on the clipboard; {_HOW}")
    return load_image(found, name="the clipboard's picture")


def _copied_file() -> Path | None:
    """The file that was copied in Finder, if one was."""
    script = "POSIX path of (the clipboard as «class furl»)"
    try:
        asked = subprocess.run(
            ["osascript", "-e", script], capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode != 0:
        return None
    path = Path(asked.stdout.decode(errors="replace").rstrip("\n"))
    return path if path.is_file() else None
