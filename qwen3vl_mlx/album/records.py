"""One picture's result as it is written, and what is known of those written before."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias

from qwen3vl_mlx.album.facts import Facts
from qwen3vl_mlx.album.finding import Picture
from qwen3vl_mlx.engine.output import Usage

Outcome: TypeAlias = Literal["caption", "data", "error"]
Status: TypeAlias = Literal["new", "changed", "other settings", "done", "failed", "kept"]

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Stamp:
    """A file's size in bytes and its modification time, in nanoseconds since 1970."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        return cls(found.st_size, found.st_mtime_ns)

    @property
    def modified(self) -> str:
        """In UTC, to the nanosecond: spreadsheets leave such text alone."""
        seconds, rest = divmod(self.modified_ns, 10**9)
        try:
            when = datetime.fromtimestamp(seconds, timezone.utc)
        except (ValueError, OverflowError, OSError):  # some disks have times of no calendar
            return ""
        return f"{when:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def stamp_at(path: str) -> Stamp | None:
    """The stamp of a file; None where there is none."""
    try:
        return Stamp.of(os.stat(path))
    except (OSError, ValueError):
        return None


def digest(data: bytes) -> str:
    """What identifies a file's content."""
    return hashlib.sha256(data).hexdigest()


def digest_at(path: str) -> str | None:
    """`digest` of a file; None where it cannot be read."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while data := file.read(2**20):
                found.update(data)
    except OSError:
        return None
    return found.hexdigest()


@dataclass(frozen=True)
class Record:
    """What came of one picture: `value` is the caption, the data of a schema, or the error."""

    picture: Picture
    settings: str
    outcome: Outcome
    value: Any
    facts: Facts = field(default_factory=Facts)
    stamp: Stamp | None = None
    sha256: str | None = None
    model: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the order in which it is written, without what is not known."""
        facts, usage = self.facts, self.usage
        told = {
            "model": self.model,
            "finish_reason": self.finish_reason,
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "completion_tokens": usage.completion_tokens if usage else None,
            "seconds": round(usage.total_time_sec, 3) if usage else None,
            "width": facts.width,
            "height": facts.height,
            "taken": facts.taken.isoformat() if facts.taken else None,
            "camera": facts.camera,
            "gps": list(facts.gps) if facts.gps else None,
            "path": self.picture.path,
            "size": self.stamp.size if self.stamp else None,
            "modified": self.stamp.modified if self.stamp else None,
            "sha256": self.sha256,
            "settings": self.settings,
        }
        known = {name: value for name, value in told.items() if value is not None}
        return {"file": self.picture.file, self.outcome: self.value, **known}


TOLD = (  # names in to_dict() after "file" and the outcome
    *("model", "finish_reason", "prompt_tokens", "completion_tokens", "seconds"),
    *("width", "height", "taken", "camera", "gps", "path", "size", "modified", "sha256"),
    "settings",
)


def plain_name(name: str) -> str:
    """A file's name as UTF-8 can hold it: bytes that are not UTF-8 as `\\udc80` to `\\udcff`."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", name)


@dataclass(frozen=True)
class Entry:
    """What is remembered of a record, as text."""

    file: str
    settings: str
    size: str
    modified: str
    sha256: str
    failed: bool

    def status(self, path: str, stamp: Stamp | None) -> Status:
        """Whether it is about the file as it is; where only the time differs, content decides."""
        size, modified = (str(stamp.size), stamp.modified) if stamp is not None else ("", "")
        if size != self.size:
            return "changed"
        if modified != self.modified and not (self.sha256 and digest_at(path) == self.sha256):
            return "changed"
        return "failed" if self.failed else "done"


def entry_of(record: Mapping[str, Any]) -> Entry:
    """The entry of a record as it is written, whose values may be text."""
    return Entry(
        plain_name(record["file"]),
        record["settings"],
        str(record.get("size", "")),
        record.get("modified") or "",
        record.get("sha256") or "",
        bool(record.get("error")),
    )


class Index:
    """What was written before, by the picture's path.

    settings: fingerprint of this run's. Records of other settings are no answers to this run.
    """

    def __init__(self, settings: str):
        self.settings = settings
        self.entries: dict[str, Entry] = {}
        self.others: set[str] = set()  # paths that have records of other settings
        self._moved: dict[tuple[str, str, str], str] = {}

    def add(self, record: Mapping[str, Any], place: tuple[int, int] = (0, 0)) -> None:
        """Take note of a record as it is written, whose values may be text."""
        path, entry = plain_name(record["path"]), entry_of(record)
        if entry.settings != self.settings:
            self.others.add(path)
            return
        self.entries[path] = entry
        self._moved[entry.file, entry.size, entry.modified] = path

    def status(self, picture: Picture) -> Status:
        """What is to be done about a picture."""
        stamp = stamp_at(picture.path)
        path = plain_name(picture.path)
        entry = self.entries.get(path) or self._entry_of_moved(picture, stamp)
        if entry is None:
            return "other settings" if path in self.others else "new"
        return entry.status(picture.path, stamp)

    def _entry_of_moved(self, picture: Picture, stamp: Stamp | None) -> Entry | None:
        """The entry of a file that lay elsewhere: a disk may be mounted under another name."""
        if stamp is None:
            return None
        key = (plain_name(picture.file), str(stamp.size), stamp.modified)
        path = self._moved.get(key)
        return None if path is None or os.path.lexists(path) else self.entries[path]
