"""A text file beside each picture, and a hidden file of records that says which are ours.

`photo.jpg` gets `photo.jpg.txt`, or `photo.jpg.json` with a schema. Their records, errors among
them, are in `.qwen3vl-captions.jsonl` of the folder that was given; a folder below it that has
one of its own keeps it. A record comes first, and its sidecar is made from it: whatever ends a
run in between, the next one makes the sidecar without asking again. A sidecar is ours where it
holds what its record says, so one that somebody wrote or edited is never replaced unless forced.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qwen3vl_mlx.album.finding import Picture
from qwen3vl_mlx.album.formats import JsonLines, json_text
from qwen3vl_mlx.album.recordfile import RecordFile
from qwen3vl_mlx.album.records import Entry, Record, Status, entry_of, plain_name, stamp_at
from qwen3vl_mlx.errors import OutputError
from qwen3vl_mlx.publish import replace_text

MANIFEST = ".qwen3vl-captions.jsonl"
_WAIT_SEC = 600.0  # a folder action starts a run for each picture that is dropped

# By kind of answer: how its sidecars end, and what they hold of a record.
_SIDECARS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = MappingProxyType(
    {
        "caption": (".txt", lambda record: f"{record['caption']}\n"),
        "data": (".json", lambda record: json_text(record["data"], indent=2) + "\n"),
    }
)
_NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class _Manifest:
    """The records of one folder, by the picture's name from there: the folder may be moved.

    kind: of the answers that count; the other one has sidecars of its own.
    """

    def __init__(
        self,
        folder: str,
        settings: str,
        kind: str,
        note: Callable[[str], None],
        *,
        read_only: bool,
    ):
        self.folder, self.settings, self.kind = folder, settings, kind
        self.last: dict[str, Entry] = {}  # what was tried last, in vain or not
        self.answers: dict[str, list[tuple[int, int]]] = {}  # where all that were given lie
        path = os.path.join(folder, MANIFEST)
        self.file = RecordFile(
            path, JsonLines(), self._know, note, read_only=read_only, wait_sec=_WAIT_SEC
        )

    def _know(self, record: Mapping[str, Any], place: tuple[int, int]) -> None:
        file = plain_name(record["file"])
        if self.kind in record:
            self.answers.setdefault(file, []).append(place)
        if self.kind in record or record["settings"] == self.settings:
            self.last[file] = entry_of(record)

    def name(self, picture: Picture) -> str:
        return os.path.relpath(picture.place, self.folder)

    def key(self, picture: Picture) -> str:
        return plain_name(self.name(picture))

    def status(self, picture: Picture) -> Status:
        entry = self.last.get(self.key(picture))
        if entry is None:
            return "new"
        if entry.settings != self.settings:
            return "other settings"
        return entry.status(picture.path, stamp_at(picture.path))

    def add(self, record: Record) -> dict[str, Any]:
        picture = replace(record.picture, root=self.folder, file=self.name(record.picture))
        start = os.fstat(self.file.fd).st_size
        record = replace(record, picture=picture)
        self.file.append(record)
        written = record.to_dict()
        self._know(written, (start, os.fstat(self.file.fd).st_size - start))
        return written

    def answered(self, picture: Picture) -> list[dict[str, Any]]:
        """All answers about a picture, the last one last."""
        places = self.answers.get(self.key(picture), [])
        return [self.file.read(place) for place in places]


class Sidecars:
    """See the module. kind: of the answers, "caption" or "data"."""

    def __init__(
        self,
        settings: str,
        kind: str,
        note: Callable[[str], None],
        *,
        force: bool,
        read_only: bool,
    ):
        self.settings = settings
        self.kind = kind
        self.ending, self.render = _SIDECARS[kind]
        self.name = f"files *{self.ending} beside the pictures"
        self.note = note
        self.force = force
        self.read_only = read_only
        self._manifests: dict[str, _Manifest] = {}  # by the folder that holds it
        self._nearest: dict[tuple[str, str], str] = {}  # (root, folder): such a folder

    def status(self, picture: Picture) -> Status:
        manifest = self._manifest_of(picture)
        status = manifest.status(picture)
        sidecar = picture.place + self.ending
        if status == "done":
            self._restore(sidecar, picture, manifest)
            return status
        if self.force or not os.path.lexists(sidecar):
            return status
        ours = [self.render(answer) for answer in manifest.answered(picture)]
        return status if _text_at(sidecar) in ours else "kept"

    def add(self, record: Record) -> str | None:
        written = self._manifest_of(record.picture).add(record)
        if record.outcome == "error":
            return None
        return _write(record.picture.place + self.ending, self.render(written))

    def close(self) -> None:
        for manifest in self._manifests.values():
            manifest.file.close()

    def _restore(self, sidecar: str, picture: Picture, manifest: _Manifest) -> None:
        """Make a sidecar that a run which was ended did not come to, or not anew."""
        there = os.path.lexists(sidecar)
        if self.read_only or (there and len(manifest.answers[manifest.key(picture)]) == 1):
            return
        *earlier, last = (self.render(answer) for answer in manifest.answered(picture))
        if not there or (_text_at(sidecar) in earlier and _text_at(sidecar) != last):
            problem = _write(sidecar, last)
            if problem is not None:
                self.note(problem)

    def _manifest_of(self, picture: Picture) -> _Manifest:
        folder = self._manifest_folder(picture.root, os.path.dirname(picture.place))
        real = os.path.realpath(folder)
        if real not in self._manifests:
            self._manifests[real] = _Manifest(
                folder, self.settings, self.kind, self.note, read_only=self.read_only
            )
        return self._manifests[real]

    def _manifest_folder(self, root: str, folder: str) -> str:
        """The nearest folder at or above `folder` that has a manifest, else `root`."""
        key = (root, folder)
        if key not in self._nearest:
            above = [Path(folder), *Path(folder).parents]
            owner = (str(each) for each in above if (each / MANIFEST).exists())
            self._nearest[key] = next(owner, root)
        return self._nearest[key]


def _text_at(sidecar: str) -> str | None:
    """What a sidecar holds; None where it is no text."""
    try:
        with open(sidecar, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None


def _write(sidecar: str, text: str) -> str | None:
    """Write a sidecar; what stands in the way of this one. Raises OutputError for a full disk."""
    try:
        replace_text(Path(sidecar), text)
    except OutputError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NO_DISK:
            raise
        return str(error)
    return None
