"""A results file that only grows: one process writes it, a record at a time, each whole.

A record is in the file when `append` returns: a process that is killed then loses nothing. It is
also handed to the disk (fsync), so that a power failure can take the last record at most. What
such an end leaves of a record is cut off when the file is opened again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

from qwen3vl_mlx.album.records import Record
from qwen3vl_mlx.errors import InputError, OutputError

_POLL_SEC = 0.2


class Format(Protocol):
    """How records are written."""

    name: str
    header: bytes  # what every file begins with

    def pieces(self, file: BinaryIO) -> Iterator[bytes]:
        """Cut a file into its records, the header among them; the last may be a torn one."""

    def is_header(self, piece: bytes) -> bool:
        """Whether a file that begins with this was written with the same columns."""

    def parse(self, piece: bytes) -> dict[str, Any] | None:
        """A record; None where this is no whole one."""

    def may_be_torn(self, piece: bytes) -> bool:
        """Whether this is what may be left of a record."""

    def encode(self, record: Record) -> bytes:
        """A record as it is written, with the line's end."""


def told_errno(error: OSError, path: str) -> OutputError:
    """The error for a file that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else error.strerror
    return OutputError(f"{path} cannot be written: {reason}; what it holds is kept")


class RecordFile:
    """See the module. on_record: is told each record that is there, and where it lies.

    read_only: look only; nothing is made, locked or cut. note: is told what was cut off.
    wait_sec: for another run that writes it. Raises InputError for a file that is not ours or that
    another run writes, OutputError for one that cannot be written.
    """

    def __init__(
        self,
        path: str,
        form: Format,
        on_record: Callable[[dict[str, Any], tuple[int, int]], None],
        note: Callable[[str], None],
        *,
        read_only: bool = False,
        wait_sec: float = 0.0,
    ):
        self.path = path
        self.form = form
        self.fd = -1
        if read_only:
            if os.path.exists(path):
                self._check_kind()
                self._read(on_record)
            return
        self._open(note, wait_sec)
        try:
            self._mend(*self._read(on_record), note)
        except BaseException:
            self.close()
            raise

    def _open(self, note: Callable[[str], None], wait_sec: float) -> None:
        folder = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(folder):
            raise InputError(f"{self.path}: there is no folder {folder}")
        self._check_kind()
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise told_errno(error, self.path) from error
        until, told = time.monotonic() + wait_sec, False
        while not self._locked():
            if time.monotonic() >= until:
                self.close()
                raise InputError(
                    f"{self.path} is being written by another run: wait for it, or write elsewhere"
                )
            if not told:
                note(f"waiting for another run that writes {self.path}")
            told = True
            time.sleep(_POLL_SEC)

    def _locked(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # network disks may have no locks
            pass
        return True

    def _check_kind(self) -> None:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise InputError(f"{self.path} is there and is no file; leave out --out to print")

    def _read(
        self, on_record: Callable[[dict[str, Any], tuple[int, int]], None]
    ) -> tuple[int, bytes, bytes]:
        """(bytes of whole records, what is left behind them, the last whole record)."""
        at, last, torn = 0, b"", b""
        with open(self.path, "rb") as file:
            for number, piece in enumerate(self.form.pieces(file), 1):
                if torn:
                    raise self._foreign(number - 1)
                if at == 0 and self.form.header:
                    if self.form.is_header(piece):
                        at, last = len(piece), piece
                    elif self.form.header.startswith(piece):
                        torn = piece
                    else:
                        raise self._foreign(number)
                    continue
                record = self.form.parse(piece)
                if record is not None:
                    on_record(record, (at, len(piece)))
                    at, last = at + len(piece), piece
                elif self.form.may_be_torn(piece):
                    torn = piece
                else:
                    raise self._foreign(number)
        return at, torn, last

    def _foreign(self, number: int) -> InputError:
        columns = " with these columns" if self.form.header else ""
        return InputError(
            f"{self.path} was not written by this command: record {number} is none of "
            f"{self.form.name}{columns}; give another --out"
        )

    def _mend(self, end: int, torn: bytes, last: bytes, note: Callable[[str], None]) -> None:
        try:
            if torn:
                os.ftruncate(self.fd, end)
                note(f"{self.path} ended in half a record ({len(torn)} bytes), which was cut off")
            if end == 0 and self.form.header:
                self._write(self.form.header)
            elif last and not last.endswith(b"\n"):
                self._write(b"\n")
        except OSError as error:
            raise told_errno(error, self.path) from error

    def append(self, record: Record) -> None:
        """Write a record, whole or not at all. Raises OutputError."""
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        if found is None or not os.path.samestat(found, os.fstat(self.fd)):
            raise OutputError(f"{self.path} was removed or replaced while it was being written")
        end = os.fstat(self.fd).st_size
        try:
            self._write(self.form.encode(record))
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.fd, end)
            raise told_errno(error, self.path) from error

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.fd, data) :]
        os.fsync(self.fd)

    def read(self, place: tuple[int, int]) -> dict[str, Any]:
        """A record that `on_record` was told of."""
        start, length = place
        with open(self.path, "rb") as file:
            file.seek(start)
            record = self.form.parse(file.read(length))
        assert record is not None, self.path  # it was one before, and the file only grows
        return record

    def close(self) -> None:
        """Let others write it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
