"""A small picture of a picture, for terminals that can show one: iTerm2's way, or Kitty's."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import PIL.Image

Protocol: TypeAlias = Literal["iterm2", "kitty"]

MOST_ROWS = 12
_MOST_COLUMNS = 48
_CELL = (10, 20)  # pixels of a character, about: the terminal scales to whole rows
_SHARPNESS = 2  # pixels sent for each of these, for screens with more of them
_PIECE = 4096  # base64 characters in one of Kitty's commands

_PROGRAMS: Mapping[str, Protocol] = {
    "iTerm.app": "iterm2",
    "WezTerm": "iterm2",
    "vscode": "iterm2",
    "mintty": "iterm2",
    "ghostty": "kitty",
}


def protocol(environment: Mapping[str, str]) -> Protocol | None:
    """How this terminal takes pictures; None where it does not, or it cannot be known."""
    if any(environment.get(name) for name in ("TMUX", "STY", "ZELLIJ")):
        return None  # what stands between would show the bytes, or lose the place
    term = environment.get("TERM", "")
    if term.startswith(("screen", "tmux", "dumb", "linux")):
        return None
    if environment.get("KITTY_WINDOW_ID") or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    program = environment.get("TERM_PROGRAM") or environment.get("LC_TERMINAL", "")
    return _PROGRAMS.get({"iTerm2": "iTerm.app"}.get(program, program))


def encode(image: PIL.Image.Image, way: Protocol, columns: int) -> str:
    """What to write to the terminal, which shows the picture and goes to the next line.

    columns: the terminal's width.
    """
    wide, rows = cells(image.size, columns)
    small = image.copy()
    small.thumbnail((wide * _CELL[0] * _SHARPNESS, rows * _CELL[1] * _SHARPNESS))
    file = io.BytesIO()
    small.convert("RGB").save(file, "PNG", optimize=True)
    data = b64encode(file.getvalue()).decode("ascii")
    if way == "iterm2":
        options = f"inline=1;size={file.tell()};width={wide};height={rows};preserveAspectRatio=1"
        return f"\x1b]1337;File={options}:{data}\x07\n"
    pieces = [data[i : i + _PIECE] for i in range(0, len(data), _PIECE)]
    commands = []
    for number, piece in enumerate(pieces):
        more = int(number + 1 < len(pieces))
        # q=2: no answer, which would be read as if it was typed.
        first = f"a=T,f=100,q=2,c={wide},r={rows}," if number == 0 else ""
        commands.append(f"\x1b_G{first}m={more};{piece}\x1b\\")
    return "".join(commands) + "\n"


def cells(size: tuple[int, int], columns: int) -> tuple[int, int]:
    """Columns and rows a picture is shown in: about its own shape, and small."""
    width, height = size
    most_wide = max(min(_MOST_COLUMNS, columns - 2), 1)
    scale = min(most_wide * _CELL[0] / width, MOST_ROWS * _CELL[1] / height, 1.0)
    return (
        min(max(round(width * scale / _CELL[0]), 1), most_wide),
        min(max(round(height * scale / _CELL[1]), 1), MOST_ROWS),
    )
