"""Prompts with variables, such as {filename}: read once, filled for every picture."""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from qwen3vl_mlx.album.facts import Facts
from qwen3vl_mlx.album.finding import Picture
from qwen3vl_mlx.errors import InputError


@dataclass(frozen=True)
class Context:
    """What variables are taken from. modified: the file's time, in seconds since 1970."""

    picture: Picture
    facts: Facts
    modified: float
    index: int  # from 1
    count: int


def _taken(context: Context) -> str:
    taken = context.facts.taken
    return f"{taken:%Y-%m-%d %H:%M:%S}" if taken else ""


def _date(context: Context) -> str:
    try:
        return f"{context.facts.taken or datetime.fromtimestamp(context.modified):%Y-%m-%d}"
    except (ValueError, OverflowError, OSError):  # some disks have times of no calendar
        return ""


def _gps(context: Context) -> str:
    gps = context.facts.gps
    return f"{gps[0]:.5f}, {gps[1]:.5f}" if gps else ""


VARIABLES: Mapping[str, tuple[str, Callable[[Context], str]]] = MappingProxyType(
    {
        "filename": ("IMG_1.jpg", lambda c: os.path.basename(c.picture.file)),
        "stem": ("IMG_1", lambda c: os.path.splitext(os.path.basename(c.picture.file))[0]),
        "folder": (
            "name of its folder",
            lambda c: os.path.basename(os.path.dirname(c.picture.place)),
        ),
        "path": ("full path", lambda c: c.picture.place),
        "index": ("its number among the pictures found, from 1", lambda c: str(c.index)),
        "count": ("how many pictures were found", lambda c: str(c.count)),
        "date": ("2024-05-31: day it was taken, else of the file", _date),
        "exif_date": ("2024-05-31 18:03:11: when it was taken", _taken),
        "camera": ("Apple iPhone 15 Pro", lambda c: c.facts.camera or ""),
        "width": ("pixels, upright", lambda c: str(c.facts.width or "")),
        "height": ("pixels, upright", lambda c: str(c.facts.height or "")),
        "gps": ("48.85837, 2.29448: degrees north and east", _gps),
    }
)
COUNTING = frozenset({"index", "count"})  # unknown where pictures keep coming


@dataclass(frozen=True)
class Template:
    """A prompt in pieces: literal text, and the variable after it if there is one."""

    text: str
    pieces: tuple[tuple[str, str | None], ...]

    def fill(self, context: Context) -> str:
        """The prompt for one picture. What is not known of it is empty."""
        return "".join(
            literal + (shown(VARIABLES[name][1](context)) if name else "")
            for literal, name in self.pieces
        )


def shown(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 become a sign that says so."""
    return os.fsencode(name).decode("utf-8", "replace")


def read_template(text: str, *, counting: bool = True) -> Template:
    """Read a prompt; `{{` and `}}` are braces. Raises InputError for an unknown variable.

    counting: whether {index} and {count} are known.
    """
    known = [name for name in VARIABLES if counting or name not in COUNTING]
    hint = f"known: {', '.join(f'{{{name}}}' for name in known)}; write {{{{ and }}}} for braces"
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InputError(f"--prompt has a lone brace ({error}); {hint}") from error
    for _, name, spec, conversion in fields:
        if name is not None and (name not in known or spec or conversion):
            what = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise InputError(f"--prompt: no variable {{{what}}}; {hint}")
    return Template(text, tuple((literal, name) for literal, name, _, _ in fields))
