"""A checkpoint's parameters a block of rows at a time, quantized on the way.

Conversion and quantized loading both read through here, so they agree bit for bit, and neither
holds more than a few blocks of what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.errors import WeightsError
from qwen3vl_mlx.layout import Piece, Weights
from qwen3vl_mlx.models.config import Quantization
from qwen3vl_mlx.quant.apply import pack, packed_dtype, packed_shapes
from qwen3vl_mlx.tensorfile import Raw, Slot, TensorReader

BLOCK_BYTES = 16 * 2**20  # stored bytes read at a time, unless one row has more


class Scaling(Protocol):
    """What a calibration does to weights: see `quant.calibrate.Calibration`."""

    def apply(self, name: str, rows: mx.array, start: int) -> mx.array: ...

    def pack(
        self, path: str, rows: mx.array, settings: Quantization, start: int
    ) -> dict[str, mx.array]: ...


@dataclass(frozen=True)
class Plan:
    """What is read, and what it becomes.

    modules: settings of the modules to quantize. dtype: of the other floating-point parameters
    and of scales, None leaves each as it is stored.
    """

    pieces: Sequence[Piece]
    modules: Mapping[str, Quantization]
    dtype: mx.Dtype | None = None
    scaling: Scaling | None = None


@dataclass(frozen=True)
class Block:
    """The next rows of some parameters, and how many stored bytes they were made from."""

    parameters: Weights
    read_bytes: int


@dataclass(frozen=True)
class _Rows:
    piece: Piece
    start: int
    stop: int


def slots(plan: Plan, reader: TensorReader) -> list[list[Slot]]:
    """What `blocks` will yield in full, piece by piece. Reads nothing."""
    return [_slots(piece, plan, reader) for piece in plan.pieces]


def _slots(piece: Piece, plan: Plan, reader: TensorReader) -> list[Slot]:
    found: list[Slot] = []
    for name, tensor in lazily(piece, reader).items():
        dtype = _target(tensor.dtype, plan.dtype)
        path = name.removesuffix(".weight")
        settings = plan.modules.get(path) if name.endswith(".weight") else None
        if settings is None:
            found.append(Slot(name, dtype, tensor.shape))
            continue
        for suffix, shape in packed_shapes(tensor.shape, settings).items():
            found.append(Slot(f"{path}.{suffix}", packed_dtype(suffix, settings, dtype), shape))
    return found


def lazily(piece: Piece, reader: TensorReader) -> Weights:
    """A piece's parameters as arrays that are never to be evaluated: names, shapes and types."""
    columns = []
    for column in piece.columns:
        shape = reader.tensors[column.names[0]].shape
        if len(types := {reader.tensors[name].dtype for name in column.names}) > 1:
            raise WeightsError(
                f"{column.names[0]} and those stacked with it have types "
                f"{' and '.join(sorted(types))}, expected one"
            )
        shape = (len(column.names), *shape) if column.kind == "stack" else shape
        columns.append(mx.zeros(shape, reader.dtype(column.names[0])))
    return piece.make(columns, 0)


def blocks(plan: Plan, reader: TensorReader) -> Iterator[Block]:
    """All parameters, piece by piece, rows in order.

    While a block is used, the next one is made and the one after it is read.
    """
    work = [rows for piece in plan.pieces for rows in _cut(piece, reader)]
    ahead: Block | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:  # reads bytes only: MLX stays in this thread
        pending = pool.submit(_read, work[0], reader) if work else None
        for rows, following in pairwise([*work, None]):
            assert rows is not None
            assert pending is not None
            raw = pending.result()
            if following is not None:
                pending = pool.submit(_read, following, reader)
            made = _make(rows, raw, plan, reader)
            mx.async_eval(made)
            if ahead is not None:
                yield ahead
            ahead = Block(made, sum(array.nbytes for array in raw))
    if ahead is not None:
        yield ahead


def _cut(piece: Piece, reader: TensorReader) -> Iterator[_Rows]:
    sizes = []
    for column in piece.columns:
        tensor = reader.tensors[column.names[0]]
        if column.kind == "stack":
            sizes.append(tensor.row_bytes * tensor.shape[0])
        elif column.kind == "rows":
            sizes.append(tensor.row_bytes)
    step = max(1, BLOCK_BYTES // max(1, sum(sizes)))
    for start in range(0, piece.rows, step):
        yield _Rows(piece, start, min(start + step, piece.rows))


def _read(rows: _Rows, reader: TensorReader) -> list[Raw]:
    """The rows of every column as they are stored."""
    found: list[Raw] = []
    for column in rows.piece.columns:
        if column.kind == "rows":
            found.append(reader.read(column.names[0], rows.start, rows.stop))
        elif column.kind == "whole":
            name = column.names[0]
            found.append(reader.read(name, 0, reader.tensors[name].shape[0]))
        else:
            names = column.names[rows.start : rows.stop]
            parts = [reader.read(name, 0, reader.tensors[name].shape[0]) for name in names]
            found.append(np.stack(parts))
    return found


def _make(rows: _Rows, raw: Sequence[Raw], plan: Plan, reader: TensorReader) -> Weights:
    columns = [
        reader.as_array(column.names[0], part)
        for column, part in zip(rows.piece.columns, raw, strict=True)
    ]
    made: Weights = {}
    for name, tensor in rows.piece.make(columns, rows.start).items():
        path = name.removesuffix(".weight")
        settings = plan.modules.get(path) if name.endswith(".weight") else None
        dtype = _target(tensor.dtype, plan.dtype)
        if plan.scaling is not None:
            tensor = plan.scaling.apply(name, tensor, rows.start)
        if settings is None:
            made[name] = tensor.astype(dtype)
        elif plan.scaling is None:
            made |= _named(path, pack(tensor.astype(dtype), settings))
        else:
            packed = plan.scaling.pack(path, tensor, settings, rows.start)
            made |= {
                name: part if part.dtype in (mx.uint32, mx.uint8) else part.astype(dtype)
                for name, part in _named(path, packed).items()
            }
    return made


def _named(path: str, parts: Mapping[str, mx.array]) -> Weights:
    return {f"{path}.{suffix}": part for suffix, part in parts.items()}


def _target(dtype: mx.Dtype, wanted: mx.Dtype | None) -> mx.Dtype:
    return wanted if wanted is not None and mx.issubdtype(dtype, mx.floating) else dtype


def stored_bytes(plan: Plan, reader: TensorReader) -> int:
    """All that `blocks` will read, for a progress bar."""
    return sum(
        math.prod(reader.tensors[name].shape[:1]) * reader.tensors[name].row_bytes
        for piece in plan.pieces
        for column in piece.columns
        for name in column.names
    )
