"""One run of keys and values as a .safetensors file: written whole or not at all, checked on read.

The file holds the whole key up to its last token, and the rows of tokens [start, stop) as integers
of their size (numpy has no bfloat16); the metadata names the types.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.engine.radix import Values

Raw = npt.NDArray[Any]

FORMAT = "qwen3vl_mlx-prefix-1"
_PREFIX, _SUFFIX, _DRAFT = "prefix-", ".safetensors", ".tmp"
_RAW = {
    mx.bfloat16: mx.int16,
    mx.float16: mx.int16,
    mx.float32: mx.int32,
    mx.uint32: mx.int32,
    mx.uint8: mx.int8,
}
_NAMES = {str(dtype): dtype for dtype in _RAW}
_STORED = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
_KEY = "key"


class DamagedFileError(Exception):
    """A file that is not what it should be; the message says why."""


@dataclass(frozen=True)
class Head:
    """What a file holds: rows of tokens [start, len(values)) of a prompt that starts so."""

    values: Values  # (stop,)
    start: int


@dataclass(frozen=True)
class RawRows:
    """Rows as read, in integers of their size: made into arrays by the thread that owns them."""

    start: int
    arrays: tuple[tuple[mx.array, ...], ...]  # (1, H, n, d)
    dtypes: tuple[tuple[mx.Dtype, ...], ...]


def family(fingerprint: str) -> str:
    """How the names of all files of one format and model start."""
    return _PREFIX + hashlib.sha256(f"{FORMAT} {fingerprint}".encode()).hexdigest()[:16] + "-"


def file_name(fingerprint: str, values: Values, start: int) -> str:
    """Equal content, equal name: two processes that write one prefix write one file."""
    digest = hashlib.sha256(f"{start} ".encode() + values.tobytes()).hexdigest()[:32]
    return family(fingerprint) + digest + _SUFFIX


def is_file(name: str) -> bool:
    """A prefix of any format and model."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def is_draft(name: str) -> bool:
    """A prefix that somebody is writing, or was."""
    return name.startswith("." + _PREFIX) and name.endswith(_DRAFT)


def header_bytes(layers: Sequence[Sequence[mx.array]]) -> int:
    """A little more than a file has beside keys and rows."""
    return 1024 + 160 * sum(len(layer) for layer in layers)


def as_raw(array: mx.array) -> mx.array:
    """The same bytes as integers: a handle of its own, for the thread that writes. Lazy."""
    return array.view(_RAW[array.dtype])


def as_rows(raw: RawRows) -> tuple[tuple[mx.array, ...], ...]:
    """Rows in their own types. Lazy."""
    return tuple(
        tuple(array.view(dtype) for array, dtype in zip(layer, dtypes, strict=True))
        for layer, dtypes in zip(raw.arrays, raw.dtypes, strict=True)
    )


def write_file(
    path: Path,
    fingerprint: str,
    head: Head,
    arrays: Sequence[Sequence[mx.array]],
    dtypes: Sequence[Sequence[mx.Dtype]],
) -> None:
    """Write evaluated arrays made by `as_raw`. Raises OSError; leaves no draft behind then."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    tensors: dict[str, Raw] = {_KEY: head.values}
    for number, layer in enumerate(arrays):
        for i, array in enumerate(layer):
            tensors[f"{number}.{i}"] = np.ascontiguousarray(np.asarray(array))
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "start": str(head.start),
        "dtypes": json.dumps([[str(dtype) for dtype in layer] for layer in dtypes]),
    }
    metadata["crc32"] = str(_checksum(tensors, metadata))
    draft = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{_DRAFT}")
    try:
        save_file(tensors, draft, metadata)
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error
    finally:
        draft.unlink(missing_ok=True)


def read_head(path: Path, fingerprint: str) -> Head:
    """Which rows a file holds; the rows are not read. Raises DamagedFileError or OSError."""
    with FileIO(path) as file:
        return _Reader(file, fingerprint).head()


def read_file(path: Path, fingerprint: str, head: Head) -> RawRows:
    """The rows of a file that must be `head`'s. Raises DamagedFileError or OSError."""
    with FileIO(path) as file:
        reader = _Reader(file, fingerprint)
        found = reader.head()
        if found.start != head.start or not np.array_equal(found.values, head.values):
            raise DamagedFileError("it holds other tokens than its name says")
        return reader.rows(found)


class _Reader:
    def __init__(self, file: FileIO, fingerprint: str):
        self._file = file
        size = os.fstat(file.fileno()).st_size
        try:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
            metadata = header.pop("__metadata__")
            self.metadata = {str(name): str(value) for name, value in metadata.items()}
            self._entries: dict[str, Any] = header
            self._base = 8 + length
            end = self._base + max(int(entry["data_offsets"][1]) for entry in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedFileError("its header cannot be read") from error
        if size != end:
            raise DamagedFileError(f"it has {size} bytes of {end}")
        if self.metadata.get("format") != FORMAT:
            raise DamagedFileError(f"its format is not {FORMAT}")
        if self.metadata.get("fingerprint") != fingerprint:
            raise DamagedFileError("it was made by another model")

    def head(self) -> Head:
        values = self._tensor(_KEY)
        try:
            start = int(self.metadata["start"])
        except (ValueError, KeyError) as error:
            raise DamagedFileError("its metadata cannot be read") from error
        if values.dtype != np.int64 or values.ndim != 1 or not 0 <= start < len(values):
            raise DamagedFileError(f"it holds tokens {start} to {len(values)}")
        return Head(values, start)

    def rows(self, head: Head) -> RawRows:
        tensors = {name: self._tensor(name) for name in self._entries}
        if str(_checksum(tensors, self.metadata)) != self.metadata.get("crc32"):
            raise DamagedFileError("its checksum is wrong")
        try:
            names = json.loads(self.metadata["dtypes"])
            dtypes = tuple(tuple(_NAMES[name] for name in layer) for layer in names)
            # mx.array copies on this thread: nothing is left to evaluate.
            arrays = tuple(
                tuple(mx.array(tensors[f"{number}.{i}"]) for i in range(len(layer)))
                for number, layer in enumerate(dtypes)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError("its types cannot be read") from error
        count = len(head.values) - head.start
        if any(array.ndim != 4 or array.shape[2] != count for layer in arrays for array in layer):
            raise DamagedFileError(f"it does not hold {count} rows of every array")
        return RawRows(head.start, arrays, dtypes)

    def _tensor(self, name: str) -> Raw:
        try:
            entry = self._entries[name]
            first, last = (int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(side) for side in entry["shape"])
            dtype = np.dtype(_STORED[entry["dtype"]])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(f"it does not describe {name}") from error
        if min(first, *shape) < 0 or last - first != math.prod(shape) * dtype.itemsize:
            raise DamagedFileError(f"the size of {name} is wrong")
        array = np.empty(shape, dtype)
        view = array.data.cast("B") if array.size else memoryview(b"")
        self._file.seek(self._base + first)
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise DamagedFileError(f"it ends in the middle of {name}")
            view = view[count:]
        return array


def _checksum(tensors: Mapping[str, Raw], metadata: Mapping[str, str]) -> int:
    total = zlib.crc32(f"{metadata.get('start')} {metadata.get('dtypes')}".encode())
    for name in sorted(tensors):
        array = tensors[name]
        total = zlib.crc32(f"{name} {array.shape}".encode(), total)
        total = zlib.crc32(array.data.cast("B") if array.size else b"", total)
    return total
