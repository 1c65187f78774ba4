"""safetensors files by rows: reading without holding a tensor, writing without holding a file.

MLX reads a tensor whole; a conversion must not. Format: an 8-byte little-endian header length, a
JSON header of names, types, shapes and byte ranges, then the data.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.errors import OutputError, WeightsError

Raw = npt.NDArray[Any]

_READ_AS: dict[str, tuple[str, mx.Dtype]] = {  # stored type: numpy's of that size, MLX's
    "BF16": ("<u2", mx.bfloat16),
    "F16": ("<f2", mx.float16),
    "F32": ("<f4", mx.float32),
    "F8_E4M3": ("u1", mx.uint8),  # as MLX reads it: codes for `mx.from_fp8`
    "U8": ("u1", mx.uint8),
    "U32": ("<u4", mx.uint32),
}
_WRITE_AS = {
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
    mx.uint8: "U8",
    mx.uint32: "U32",
}
_VERIFY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * np.dtype(_READ_AS[self.dtype][0]).itemsize


class TensorReader:
    """The tensors of some safetensors files. Use from one thread at a time; close after use."""

    def __init__(self, files: Sequence[Path]):
        self.tensors: dict[str, StoredTensor] = {}
        self._stack = ExitStack()
        self._files: dict[Path, FileIO] = {}
        for path in files:
            for name, tensor in read_header(path).items():
                if name in self.tensors:
                    raise WeightsError(f"{path} repeats tensor {name} of another file")
                self.tensors[name] = tensor

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> mx.Dtype:
        return _READ_AS[self.tensors[name].dtype][1]

    def read(self, name: str, start: int, stop: int) -> Raw:
        """Rows [start, stop) of a tensor, in numpy's type of that size (see `as_array`)."""
        tensor = self.tensors[name]
        rows = np.empty((stop - start, *tensor.shape[1:]), _READ_AS[tensor.dtype][0])
        view = rows.data.cast("B") if rows.size else memoryview(b"")
        try:
            file = self._files.get(tensor.file)
            if file is None:
                file = self._stack.enter_context(FileIO(tensor.file))
                self._files[tensor.file] = file
            file.seek(tensor.offset + start * tensor.row_bytes)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise WeightsError(f"{tensor.file} ends in the middle of {name}")
                view = view[count:]
        except OSError as error:
            raise WeightsError(f"{tensor.file} cannot be read: {error.strerror}") from error
        return rows

    def as_array(self, name: str, rows: Raw) -> mx.array:
        """What `read` gave, in the tensor's own type; float8 stays codes."""
        array = mx.array(rows)
        dtype = self.dtype(name)
        return array if array.dtype == dtype else array.view(dtype)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """A file's tensors in the order of their bytes. Raises WeightsError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks header, offsets and file size
            pass
        with FileIO(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is damaged or incomplete ({error}); download or convert it again"
        ) from error
    header.pop("__metadata__", None)
    if other := {entry["dtype"] for entry in header.values()} - _READ_AS.keys():
        raise WeightsError(f"{path} has tensors of type {min(other)}, which this model never has")
    order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: StoredTensor(
            path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"])
        )
        for name, entry in order
    }


@dataclass(frozen=True)
class Slot:
    """A tensor to be written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def make_shards(slots: Sequence[Sequence[Slot]], limit: int) -> list[list[Slot]]:
    """Groups of slots, kept together and in order, in files of at most `limit` bytes or a group."""
    shards: list[list[Slot]] = []
    size = 0
    for group in slots:
        nbytes = sum(slot.nbytes for slot in group)
        if not shards or (shards[-1] and size + nbytes > limit):
            shards.append([])
            size = 0
        shards[-1].extend(group)
        size += nbytes
    return shards


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


@dataclass(frozen=True)
class _Place:
    shard: int
    offset: int  # in the file
    slot: Slot


class ShardWriter:
    """Writes safetensors files and their index into `folder`, rows as they come.

    Every tensor's rows come in order, tensors in any. Call from one thread.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Sequence[Slot]],
        metadata: Mapping[str, str],
    ):
        self.folder = folder
        self.names = shard_names(len(shards))
        self._headers = [_header(slots, metadata) for slots in shards]
        self._places: dict[str, _Place] = {}
        for number, (slots, header) in enumerate(zip(shards, self._headers, strict=True)):
            offset = len(header)
            for slot in _aligned(slots):
                self._places[slot.name] = _Place(number, offset, slot)
                offset += slot.nbytes
        self._sums = dict.fromkeys(self._places, 0)
        self._written = dict.fromkeys(self._places, 0)
        self._left = [sum(slot.nbytes for slot in slots) for slots in shards]
        self._files: dict[int, FileIO] = {}

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        data = sum(place.slot.nbytes for place in self._places.values())
        return data + sum(map(len, self._headers))

    def write(self, name: str, data: memoryview) -> None:
        """Append bytes to a tensor. Raises OutputError where the disk does not take them."""
        place = self._places[name]
        data = data.cast("B") if data.nbytes else memoryview(b"")
        try:
            file = self._open(place.shard)
            file.seek(place.offset + self._written[name])
            _write_all(file, data)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror}") from error
        self._sums[name] = zlib.crc32(data, self._sums[name])
        self._written[name] += len(data)
        self._left[place.shard] -= len(data)
        if not self._left[place.shard]:
            self._close(place.shard)

    def _open(self, shard: int) -> FileIO:
        if shard not in self._files:
            file = FileIO(self.folder / self.names[shard], "w")
            self._files[shard] = file
            _write_all(file, memoryview(self._headers[shard]))
        return self._files[shard]

    def _close(self, shard: int) -> None:
        file = self._files[shard]
        os.fsync(file.fileno())
        file.close()

    def finish(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Write the index, then read everything back: sizes, shapes and checksums must agree.

        progress: told the bytes as they are read. Raises OutputError.
        """
        short = [n for n, p in self._places.items() if self._written[n] != p.slot.nbytes]
        if short:
            raise AssertionError(f"{short[0]} was not written in full")
        total = sum(place.slot.nbytes for place in self._places.values())
        weight_map = {name: self.names[place.shard] for name, place in self._places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2))
        for path in [self.folder / name for name in self.names]:
            self._verify(path, progress)

    def _verify(self, path: Path, progress: Callable[[int], object]) -> None:
        buffer = bytearray(_VERIFY_BYTES)
        shard = self.names.index(path.name)
        header = self._headers[shard]
        places = [place for place in self._places.values() if place.shard == shard]
        size = len(header) + sum(place.slot.nbytes for place in places)
        with FileIO(path) as file:
            if path.stat().st_size != size or file.read(len(header)) != header:
                raise _damaged(path, "its header")
            for place in places:
                found, left = 0, place.slot.nbytes
                file.seek(place.offset)
                while left:
                    count = file.readinto(memoryview(buffer)[: min(left, len(buffer))])
                    found = zlib.crc32(memoryview(buffer)[:count], found)
                    left -= count or left
                    progress(count)
                if found != self._sums[place.slot.name]:
                    raise _damaged(path, place.slot.name)

    def close(self) -> None:
        """Close what is open, after a failure."""
        for file in self._files.values():
            file.close()


def _write_all(file: FileIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


def _damaged(path: Path, what: str) -> OutputError:
    return OutputError(
        f"{path}: {what} does not read back as it was written; the disk may be failing: convert "
        "again, to another disk"
    )


def _aligned(slots: Sequence[Slot]) -> list[Slot]:
    """Wide types first, so that every tensor starts at a multiple of its item's size."""
    return sorted(slots, key=lambda slot: -slot.dtype.size)


def _header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for slot in _aligned(slots):
        header[slot.name] = {
            "dtype": _WRITE_AS[slot.dtype],
            "shape": slot.shape,
            "data_offsets": [offset, offset + slot.nbytes],
        }
        offset += slot.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(rows: mx.array) -> memoryview:
    """An array's bytes in row order. Evaluates it."""
    rows = mx.contiguous(rows)
    if rows.dtype == mx.bfloat16:  # a type numpy and buffers do not have
        rows = rows.view(mx.uint16)
    mx.eval(rows)
    return memoryview(rows)  # type: ignore[arg-type]


def write_text(path: Path, text: str) -> None:
    """Write a file and see it on the disk. Raises OutputError."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
