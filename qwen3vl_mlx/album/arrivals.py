"""Files as they come into folders: which are new, and when they are whole."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qwen3vl_mlx.album.describing import FolderGoneError
from qwen3vl_mlx.album.finding import Picture, Selection, find
from qwen3vl_mlx.album.records import Stamp, stamp_at

_LOOK_EVERY = 5.0  # seconds; events may be lost, and some disks have none
_LOOK_SHARE = 20  # times as long as a look takes, at least


@dataclass(frozen=True)
class Waiting:
    """A file that was seen. since: when it was first seen as it is now. after: not before."""

    picture: Picture
    stamp: Stamp
    since: float
    after: float
    tried: int = 0


class Arrivals:
    """New and changed pictures below `roots`. Times are those of time.monotonic, in seconds.

    known: files, by their path, that are to be left alone while they keep their size: touching them
    makes no news, and nobody wants thousands of old files read for their digests. settle: how long
    a file is to be left alone by others. patience: how long one that cannot be decoded is waited
    for.
    """

    def __init__(
        self,
        roots: Sequence[str],
        selection: Selection,
        known: Mapping[str, Stamp],
        *,
        settle: float,
        patience: float,
    ):
        self.roots = roots
        self.selection = selection
        self.left_alone = dict(known)
        self.known: dict[str, Stamp] = {}
        self.settle = settle
        self.patience = patience
        self.waiting: dict[str, Waiting] = {}
        self.under_way: dict[str, Waiting] = {}
        self._next_look = 0.0

    def see(self, paths: Iterable[str]) -> None:
        """Look at what an event named, and at everything now and then."""
        for path in paths:
            if os.path.isdir(path):
                self._next_look = 0.0
            elif (picture := self._picture(path)) is not None:
                self._notice(picture)
        now = time.monotonic()
        if now >= self._next_look:
            self._look_everywhere()
            spent = time.monotonic() - now
            self._next_look = now + spent + max(_LOOK_EVERY, _LOOK_SHARE * spent)

    def _picture(self, path: str) -> Picture | None:
        """The picture at a path; None where it is not meant."""
        for root in self.roots:
            file = os.path.relpath(path, root)
            if not file.startswith("..") and self.selection.reaches(file):
                return Picture(root, file, os.path.realpath(path))
        return None

    def _look_everywhere(self) -> None:
        for root in self.roots:
            if not os.path.isdir(root):
                raise FolderGoneError(f"{root} is gone; what was done is kept")
        for picture in find(self.roots, self.selection, lambda _: None):
            self._notice(picture)

    def _notice(self, picture: Picture) -> None:
        path = picture.path
        if path in self.waiting or path in self.under_way:
            return
        stamp = stamp_at(path)
        left = self.left_alone.get(path)
        if stamp is None or (left is not None and left.size == stamp.size):
            return
        if self.known.get(path) != stamp:
            now = time.monotonic()
            self.waiting[path] = Waiting(picture, stamp, now, now + self.settle)

    def whole(self) -> Picture | None:
        """The next file that nobody has written to for a while; it is under way from now on."""
        now = time.monotonic()
        for path, each in list(self.waiting.items()):
            stamp = stamp_at(path)
            if stamp is None:  # it went before it was whole
                del self.waiting[path]
            elif stamp != each.stamp:
                self.waiting[path] = Waiting(each.picture, stamp, now, now + self.settle)
            elif now >= each.after:
                self.under_way[path] = self.waiting.pop(path)
                return each.picture
        return None

    def may_grow(self, picture: Picture) -> bool:
        """Whether a file that is under way and cannot be decoded is worth waiting for."""
        return time.monotonic() - self.under_way[picture.path].since < self.patience

    def put_back(self, picture: Picture) -> None:
        """Wait for the rest of a file that is under way."""
        each = self.under_way.pop(picture.path)
        pause = min(self.settle * 2**each.tried, self.patience / 4)
        after = time.monotonic() + pause
        self.waiting[picture.path] = replace(each, after=after, tried=each.tried + 1)

    def settled(self, picture: Picture, stamp: Stamp | None) -> None:
        """A file that was under way is done, as it was by `stamp`; what it became since is news."""
        each = self.under_way.pop(picture.path)
        self.known[picture.path] = stamp or each.stamp
        self.left_alone.pop(picture.path, None)
        self._notice(picture)
