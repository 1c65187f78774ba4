"""What may be completed in a line: names of commands and settings, conversations, paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from qwen3vl_mlx.chat.attachments import EXTENSIONS, path_fragment, unescaped
from qwen3vl_mlx.chat.commands import COMMANDS, command_named
from qwen3vl_mlx.chat.settings import SETTINGS
from qwen3vl_mlx.chat.store import saved_names
from qwen3vl_mlx.errors import InputError

_COMMAND = re.compile(r"\s*([/\\])([A-Za-z_]*)")
_ARGUMENT = re.compile(r"\s*[/\\]([A-Za-z_]+)\s+(.*)", re.S)
_MOST = 200  # entries of one folder
_SPECIAL = re.compile(r"([^\w./~+,:@%=-])")


@dataclass(frozen=True)
class Choice:
    """One way to go on. replaces: how many characters before the cursor it stands for."""

    text: str
    replaces: int
    shown: str
    hint: str = ""


def is_command_name(text: str) -> bool:
    """Whether the name of a command is being typed."""
    return _COMMAND.fullmatch(text) is not None


def complete(text: str) -> Iterator[Choice]:
    """The ways to go on from `text`, which ends at the cursor."""
    if match := _COMMAND.fullmatch(text):
        for command in COMMANDS:
            if command.name.startswith(match[2].lower()):
                name = match[1] + command.name
                yield Choice(name, len(match[0].lstrip()), command.usage, command.does)
    elif match := _ARGUMENT.fullmatch(text):
        yield from _argument(match[1], match[2])
    else:
        yield from _paths(path_fragment(text), everything=False)
        return
    if is_command_name(text) and text.strip() != "/":
        yield from _paths(text.strip(), everything=False)


def _argument(name: str, typed: str) -> Iterator[Choice]:
    try:
        command = command_named(name)
    except InputError:  # a path, perhaps
        yield from _paths(path_fragment(f"/{name} {typed}"), everything=False)
        return
    words: dict[str, str] = {}
    if command.name == "set":
        words = {setting.name: setting.hint for setting in SETTINGS.values()}
    elif command.name == "help":
        words = {command.name: command.does for command in COMMANDS}
    elif command.name in ("load", "save"):
        words = dict.fromkeys(saved_names(), "saved")
    for word, hint in words.items():
        if word.startswith(typed) and word != typed:
            yield Choice(word, len(typed), word, hint)
    if command.name == "image":
        last = re.search(r"""(?:\\.|[^\\\s"'])*$|["'][^"']*$""", typed, re.S)
        yield from _paths(last[0] if last else "", everything=False)
    elif command.name in ("load", "save", "model"):
        yield from _paths(typed, everything=True)


def _paths(fragment: str | None, *, everything: bool) -> Iterator[Choice]:
    """Folders, and pictures or all files, that begin as `fragment` does, quoted as it is."""
    if fragment is None:
        return
    quote = fragment[:1] if fragment[:1] in ("'", '"') else ""
    plain = fragment[1:] if quote else unescaped(fragment)
    folder, _, start = plain.rpartition("/")
    folder = folder + "/" if "/" in plain else ""
    for name, is_folder in _entries(folder, start, everything):
        path = folder + name
        written = path if quote else _SPECIAL.sub(r"\\\1", path)
        end = "/" if is_folder else quote
        yield Choice(quote + written + end, len(fragment), name + ("/" if is_folder else ""))


def _entries(folder: str, start: str, everything: bool) -> list[tuple[str, bool]]:
    found: list[tuple[str, bool]] = []
    try:
        with os.scandir(os.path.expanduser(folder or ".")) as listing:
            for entry in listing:
                hidden = entry.name.startswith(".") and not start.startswith(".")
                if not entry.name.startswith(start) or hidden:
                    continue
                is_folder = entry.is_dir()
                ending = entry.name.rpartition(".")[2].lower()
                if is_folder or everything or ending in EXTENSIONS:
                    found.append((entry.name, is_folder))
    except (OSError, ValueError):
        return []
    return sorted(found)[:_MOST]
