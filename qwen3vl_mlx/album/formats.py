"""Records as lines of JSON, and as CSV with a column for each property of a schema."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from qwen3vl_mlx.album.records import TOLD, Record, plain_name

_LONGEST_CELL = 2**30
_REQUIRED = ("file", "path", "settings")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: lone surrogates, of names that are not UTF-8, as escapes."""
    return plain_name(json.dumps(value, ensure_ascii=False, indent=indent))


class JsonLines:
    """One JSON object a line."""

    name = "JSON Lines"
    header = b""
    _start = b'{"file": "'

    def pieces(self, file: BinaryIO) -> Iterator[bytes]:
        return iter(file)

    def is_header(self, piece: bytes) -> bool:
        return not piece

    def parse(self, piece: bytes) -> dict[str, Any] | None:
        try:
            record = json.loads(piece)
        except (ValueError, RecursionError):
            return None
        ours = isinstance(record, dict) and all(isinstance(record.get(n), str) for n in _REQUIRED)
        return record if ours else None

    def may_be_torn(self, piece: bytes) -> bool:
        """A beginning of a line, or the zeros that a power failure may leave in place of it."""
        if piece.endswith(b"\n") and b"\0" not in piece:
            return False
        text = piece.rstrip(b"\0\n")
        return self._start.startswith(text[: len(self._start)])

    def encode(self, record: Record) -> bytes:
        return json_text(record.to_dict()).encode() + b"\n"


def properties_of(schema: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Names of the properties that a schema's objects have; None for no or another schema."""
    properties = schema.get("properties") if schema is not None else None
    return tuple(properties) if isinstance(properties, Mapping) and properties else None


class CsvRows:
    """One row a picture, with texts in quotes, so that a line's end outside of them ends a row.

    The columns follow from the schema: one for each property, whose value is JSON where it is not
    flat; or "data" for other schemas; or "caption" without one.
    """

    name = "CSV"

    def __init__(self, schema: Mapping[str, Any] | None):
        self.properties = properties_of(schema)
        taken = {"file", "error", *TOLD}
        if self.properties is not None:
            named = {name: f"data.{name}" if name in taken else name for name in self.properties}
        else:
            named = {"": "caption" if schema is None else "data"}
        self.answers = named
        self.columns = ("file", *named.values(), "error", *TOLD)
        self.header = self._row(self.columns)

    def pieces(self, file: BinaryIO) -> Iterator[bytes]:
        piece, quotes = b"", 0
        for line in file:
            piece += line
            quotes += line.count(b'"')
            if quotes % 2 == 0:
                yield piece
                piece, quotes = b"", 0
        if piece:
            yield piece

    def is_header(self, piece: bytes) -> bool:
        cells = self._cells(piece.removeprefix(b"\xef\xbb\xbf"))
        return piece.endswith(b"\n") and cells == list(self.columns)

    def parse(self, piece: bytes) -> dict[str, Any] | None:
        cells = self._cells(piece)
        if cells is None or len(cells) != len(self.columns):
            return None
        record = dict(zip(self.columns, cells, strict=True))
        return record if all(record[name] for name in _REQUIRED) else None

    def may_be_torn(self, piece: bytes) -> bool:
        return not piece.endswith(b"\n") or b"\0" in piece or piece.count(b'"') % 2 == 1

    def encode(self, record: Record) -> bytes:
        told = record.to_dict()
        told["file"], told["path"] = plain_name(told["file"]), plain_name(told["path"])
        if gps := told.get("gps"):
            told["gps"] = f"{gps[0]}, {gps[1]}"
        cells = [told["file"], *self._answer(record), told.get("error")]
        return self._row([*cells, *(told.get(name) for name in TOLD)])

    def _answer(self, record: Record) -> Iterator[Any]:
        for name in self.answers:
            if record.outcome == "error":
                yield None
            elif record.outcome == "caption":
                yield record.value
            elif self.properties is None:
                yield json_text(record.value)
            else:
                value = record.value.get(name) if isinstance(record.value, dict) else None
                yield value if isinstance(value, (str, int, float)) else _nested(value)

    @staticmethod
    def _row(cells: Sequence[Any]) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow([_cell(cell) for cell in cells])
        return text.getvalue().encode()

    @staticmethod
    def _cells(piece: bytes) -> list[str] | None:
        csv.field_size_limit(_LONGEST_CELL)  # 131,072 by default, and answers may be longer
        try:
            rows = list(csv.reader(io.StringIO(piece.decode(), newline=""), strict=True))
        except (csv.Error, UnicodeDecodeError):
            return None
        return rows[0] if len(rows) == 1 else None


def _nested(value: Any) -> str | None:
    return None if value is None else json_text(value)


def _cell(value: Any) -> Any:
    """A cell's value. Booleans as JSON has them; readers of CSV stop at NUL."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return plain_name(value).replace("\0", "\ufffd") if isinstance(value, str) else value
