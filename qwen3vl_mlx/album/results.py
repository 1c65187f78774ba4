"""Where results go: lines on stdout, one file that grows, or a text file beside each picture."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from qwen3vl_mlx.album.finding import Picture
from qwen3vl_mlx.album.formats import CsvRows, JsonLines
from qwen3vl_mlx.album.recordfile import Format, RecordFile, told_errno
from qwen3vl_mlx.album.records import Index, Record, Status
from qwen3vl_mlx.album.sidecars import Sidecars
from qwen3vl_mlx.errors import InputError


class Results(Protocol):
    """What was written before, and where to write more. One run at a time."""

    name: str  # for people

    def status(self, picture: Picture) -> Status:
        """What is to be done about a picture: nothing where it is "done", "failed" or "kept"."""

    def add(self, record: Record) -> str | None:
        """Keep a record; what stands in the way of this one alone. Raises OutputError."""

    def close(self) -> None:
        """Let others write."""


class Printed:
    """JSON Lines on stdout, each at once. It remembers this run alone."""

    name = "stdout"

    def __init__(self, settings: str):
        self.index = Index(settings)

    def status(self, picture: Picture) -> Status:
        return self.index.status(picture)

    def add(self, record: Record) -> str | None:
        try:
            sys.stdout.buffer.write(JsonLines().encode(record))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise told_errno(error, self.name) from error
        self.index.add(record.to_dict())
        return None

    def close(self) -> None:
        pass


class OneFile:
    """All records in one file: see `RecordFile`."""

    def __init__(
        self,
        path: str,
        form: Format,
        settings: str,
        note: Callable[[str], None],
        *,
        read_only: bool = False,
    ):
        self.name = path
        self.index = Index(settings)
        self.file = RecordFile(path, form, self.index.add, note, read_only=read_only)

    def status(self, picture: Picture) -> Status:
        return self.index.status(picture)

    def add(self, record: Record) -> str | None:
        self.file.append(record)
        self.index.add(record.to_dict())
        return None

    def close(self) -> None:
        self.file.close()


def open_results(
    out: str | None,
    settings: str,
    schema: Mapping[str, Any] | None,
    note: Callable[[str], None],
    *,
    force: bool = False,
    read_only: bool = False,
) -> Results:
    """What --out names: NAME.jsonl, NAME.csv, "sidecar", or None for stdout.

    settings: fingerprint of what is asked. force: sidecars of another origin are replaced.
    read_only: nothing is made or changed. Raises InputError or OutputError.
    """
    if out is None or out == "-":
        return Printed(settings)
    if out == "sidecar":
        kind = "caption" if schema is None else "data"
        return Sidecars(settings, kind, note, force=force, read_only=read_only)
    path = os.path.expanduser(out)
    ending = Path(path).suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        return OneFile(path, JsonLines(), settings, note, read_only=read_only)
    if ending == ".csv":
        return OneFile(path, CsvRows(schema), settings, note, read_only=read_only)
    raise InputError(f'--out {out}: expected NAME.jsonl, NAME.csv, or "sidecar"')
