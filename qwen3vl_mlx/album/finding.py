"""Folders to the pictures in them: what `caption` and `watch` look at, and in which order."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from qwen3vl_mlx.errors import InputError

KINDS = (  # what media.py reads, as files are named
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff"),
    *("avif", "heic", "heif", "hif"),
)

_LIBRARIES = (".photoslibrary", ".photolibrary", ".aplibrary", ".migratedphotolibrary")
_ORIGINALS = ("originals", "Masters")  # where a Photos library keeps what its owner put in
_UNFINISHED = (".download", ".crdownload", ".part")  # folders that browsers still write to


@dataclass(frozen=True)
class Picture:
    """A file to look at: `file` below `root`, and `path` without any link in it.

    Names that are not UTF-8 hold lone surrogates, as `os.fsdecode` gives them.
    """

    root: str
    file: str
    path: str

    @property
    def place(self) -> str:
        """Where it was found; `path` differs where a link led there."""
        return os.path.join(self.root, self.file)


@dataclass(frozen=True)
class Selection:
    """Which files of a folder are meant. Patterns are those of `checked_pattern`."""

    globs: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    recursive: bool = False

    def wants(self, file: str) -> bool:
        """Whether a file, named from its root, is meant."""
        if os.path.basename(file).startswith(".") or self.excluded(file):
            return False
        known = PurePosixPath(file).suffix[1:].lower() in KINDS
        if not self.globs:
            return known
        return any(_matches(file, glob) and (known or _ends(glob)) for glob in self.globs)

    def excluded(self, file: str) -> bool:
        """Whether a file or folder, named from its root, is left out."""
        return any(_matches(file, pattern) for pattern in self.excludes)

    def enters(self, folder: str) -> bool:
        """Whether a folder, named from its root, is looked into."""
        name = os.path.basename(folder)
        closed = name.startswith(".") or name.lower().endswith((*_LIBRARIES, *_UNFINISHED))
        return self.recursive and not closed and not self.excluded(folder)

    def reaches(self, file: str) -> bool:
        """Whether a walk would come to a file, named from its root, and take it."""
        above = PurePosixPath(file).parents
        folders = [str(folder) for folder in above if folder.name]
        return self.wants(file) and all(self.enters(folder) for folder in folders)


def checked_pattern(option: str, pattern: str, *, recursive: bool) -> str:
    """A pattern in lower case, without `**/` at its start. Raises InputError naming the option."""
    plain = pattern.lower()
    while plain.startswith("**/"):
        plain = plain[3:]
    if not plain or plain.startswith("/") or "**" in plain:
        raise InputError(
            f'{option} {pattern!r}: expected a pattern for names such as "IMG_*.jpg", or for the '
            'end of a path such as "2024/*.jpg"'
        )
    if "/" in plain and not recursive:
        raise InputError(f"{option} {pattern!r} is about folders in folders: add --recursive")
    return plain


def _ends(pattern: str) -> bool:
    """Whether a pattern says how names end; "IMG_*" means pictures, not the texts beside them."""
    ending = PurePosixPath(pattern).suffix
    return bool(ending) and not any(sign in ending for sign in "*?[")


def _matches(file: str, pattern: str) -> bool:
    return PurePosixPath(file.lower()).match(pattern)


def find(
    sources: Sequence[str], selection: Selection, on_fault: Callable[[str], None]
) -> Iterator[Picture]:
    """The pictures of folders and files, in the order given and by name within a folder.

    A folder's own files come before those of folders in it. Each file comes once, however many
    links and folders lead to it. A Photos library given by itself is read for its originals.
    on_fault is told of folders that cannot be read. Raises InputError for what is not there.
    """
    roots = [checked_root(source) for source in sources]
    seen: set[str] = set()
    for root in roots:
        found = _walk(root, selection, on_fault) if os.path.isdir(root) else iter([_single(root)])
        for picture in found:
            if picture.path not in seen:
                seen.add(picture.path)
                yield picture


def checked_root(source: str) -> str:
    """The full path of a folder or file. Raises InputError where there is nothing."""
    path = os.path.abspath(os.path.expanduser(source))
    if not os.path.exists(path):
        raise InputError(f"no such folder or file: {source}")
    return path


def _single(path: str) -> Picture:
    folder, name = os.path.split(path)
    return Picture(folder, name, os.path.realpath(path))


def _walk(root: str, selection: Selection, on_fault: Callable[[str], None]) -> Iterator[Picture]:
    """Pictures below `root`. Links to folders are followed, each folder is entered once."""
    entered: set[tuple[int, int]] = set()
    waiting = starts(root, selection)
    while waiting:
        folder = waiting.pop()
        at = os.path.join(root, folder)
        try:
            there = os.stat(at)
            if (there.st_dev, there.st_ino) in entered:
                continue
            entered.add((there.st_dev, there.st_ino))
            with os.scandir(at) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            on_fault(f"{at} cannot be looked into ({error.strerror})")
            continue
        folders = []
        for entry in entries:
            file = os.path.join(folder, entry.name)
            if _is_folder(entry):
                folders.append(file)
            elif selection.wants(file) and not _is_hidden(entry):
                yield Picture(root, file, os.path.realpath(entry.path))
        waiting += [file for file in reversed(folders) if selection.enters(file)]


def starts(root: str, selection: Selection) -> list[str]:
    """Folders below `root` where a walk begins: itself, or the originals of a Photos library."""
    if not root.lower().endswith(_LIBRARIES):
        return [""]
    if not selection.recursive:
        raise InputError(f"{root} is a Photos library, whose pictures lie deep: add --recursive")
    return [name for name in _ORIGINALS if os.path.isdir(os.path.join(root, name))]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into a folder that may not be looked into
        return False


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    """Whether macOS hides it by a flag, as it does for folders' icons."""
    flag = getattr(stat, "UF_HIDDEN", 0)
    try:
        return bool(getattr(entry.stat(follow_symlinks=False), "st_flags", 0) & flag)
    except OSError:
        return False
