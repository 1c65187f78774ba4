"""Prefixes kept in a folder: they survive a restart, and processes may share them.

Each run of tokens new to the folder becomes one file (prefix_file.py) as soon as it is computed:
the owner thread queues the copy, a writer thread waits for it and writes. Reading is done by a
thread too. A file that cannot be written or read costs a prefix, never a request.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from qwen3vl_mlx.engine import prefix_file
from qwen3vl_mlx.engine.prefix_file import DamagedFileError, Head, RawRows
from qwen3vl_mlx.engine.prefix_index import FileIndex
from qwen3vl_mlx.engine.radix import Values
from qwen3vl_mlx.engine.worker import Worker
from qwen3vl_mlx.errors import OutputError
from qwen3vl_mlx.models.qwen3_vl import Model

_log = logging.getLogger(__name__)

MAX_PENDING = 2**30  # bytes computed and not yet written; what comes above is not written
MIN_GAIN = 16  # tokens: for fewer no file is read
_WORTH = 16  # a token is read so many times faster than it is computed, at the least
_RETRY_SECONDS = 60.0  # after a failed write
_REFRESH_SECONDS = 10.0  # between two looks at what other processes do
_STALE_SECONDS = 600.0  # a draft this old was left by a process that died


@dataclass(frozen=True)
class DiskStats:
    """What the folder holds for this model, and what happened since the start."""

    entries: int
    bytes: int
    hits: int  # reads that gave rows
    hit_tokens: int
    writes: int
    evictions: int  # files deleted for room, of any model
    skipped: int  # runs not written: too large, or the disk too slow or full
    damaged: int  # files deleted because they were not what they should be


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a prompt, as read: `raw` holds them and maybe more on both sides."""

    start: int
    stop: int
    raw: RawRows


@dataclass(frozen=True)
class _Step:
    """Rows [start, stop) of a prompt are to be read from a file."""

    name: str
    head: Head
    start: int
    stop: int


@dataclass
class _Counts:
    hits: int = 0
    hit_tokens: int = 0
    writes: int = 0
    evictions: int = 0
    skipped: int = 0
    damaged: int = 0


def fingerprint(model: Model, kv_bits: int | None) -> str:
    """What keys and values depend on beside tokens: config, weights, type of the cache.

    Weights count by the sum of each row's bits: no two checkpoints agree in all, and a pass over
    the weights is all it takes. Evaluates them.
    """
    digest = hashlib.sha256(repr((model.config, kv_bits)).encode())
    flat = tree_flatten(model.parameters(), destination={})  # type: ignore[no-untyped-call]
    for name, array in sorted(dict(flat).items()):
        digest.update(repr((name, array.shape, str(array.dtype))).encode())
        bits = array.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size])
        digest.update(np.asarray(bits.sum(axis=-1) if bits.ndim > 1 else bits).tobytes())
    return digest.hexdigest()


class DiskTier:
    """Files of one model in `folder`, at most `max_bytes` with other models' files there.

    fingerprint: all that keys and values depend on beside the tokens: weights, types, settings.
    Least recently used files go first, whatever model they are of. Raises OutputError where the
    folder cannot be used. `read`, `held` and `write` are for the thread that owns the model.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, max_bytes: int):
        self.folder = Path(folder).expanduser()
        self.fingerprint = fingerprint
        self.max_bytes = max_bytes
        self._index = FileIndex()
        self._lock = Lock()  # of the index and the counts
        self._counts = _Counts()
        self._pending = 0  # bytes
        self._warned = False
        self._retry_at = 0.0
        # The writer's own: bytes of all files when it last looked, and those written since.
        self._total = 0
        self._refreshed = 0.0
        try:
            # What people asked about can be told from it: for the owner's eyes.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.refresh()
        except OSError as error:
            raise OutputError(
                f"the prefix cache folder {self.folder} cannot be used: {error.strerror}; choose "
                "another"
            ) from error
        self._writer = Worker("prefix-writer")
        self._reader = Worker("prefix-reader")

    # Reading

    def read(self, values: Values, start: int) -> Future[list[Segment]] | None:
        """Read rows from `start` on, as far as the files go, in the background.

        None where there is too little to gain. The segments follow one another from `start`; they
        end early where a file turns out damaged or gone.
        """
        steps: list[_Step] = []
        at = 0
        with self._lock:
            plan = self._index.plan(values, written=True)
            for name, group in groupby(plan, key=lambda step: step[0]):
                stop = at + sum(count for _, count in group)
                if stop > start:
                    head = self._index.entries[name].head
                    steps.append(_Step(name, head, max(at, start), stop))
                at = stop
        gain = at - start
        cost = sum(len(step.head.values) - step.head.start for step in steps)
        if gain < MIN_GAIN or gain * _WORTH < cost:
            return None
        return self._reader.submit(partial(self._read, steps))

    def _read(self, steps: Sequence[_Step]) -> list[Segment]:
        segments: list[Segment] = []
        for step in steps:
            path = self.folder / step.name
            try:
                raw = prefix_file.read_file(path, self.fingerprint, step.head)
            except FileNotFoundError:  # another process made room
                self._forget(step.name)
                break
            except (DamagedFileError, OSError) as error:
                self._reject(path, error)
                break
            segments.append(Segment(step.start, step.stop, raw))
        self._touch([step.name for step in steps])
        if segments:
            self._count(hits=1, hit_tokens=segments[-1].stop - segments[0].start)
        return segments

    # Writing

    def held(self, values: Values) -> int:
        """How many of the first tokens of `values` are written or about to be."""
        with self._lock:
            return sum(count for _, count in self._index.plan(values, written=False))

    def write(self, values: Values, start: int, layers: Sequence[Sequence[mx.array]]) -> None:
        """Queue rows [start, len(values)) to be written; `layers` hold just these."""
        data = sum(array.nbytes for layer in layers for array in layer)
        nbytes = data + values.nbytes + prefix_file.header_bytes(layers)
        name = prefix_file.file_name(self.fingerprint, values, start)
        with self._lock:
            plan = self._index.plan(values[:start], written=False)
            chain = list(dict.fromkeys(step for step, _ in plan))
            needed = nbytes + sum(self._index.entries[step].nbytes for step in chain)
            full = self._pending > 0 and self._pending + nbytes > MAX_PENDING
            if needed > self.max_bytes or full or time.monotonic() < self._retry_at:
                self._counts.skipped += 1
                return
            if name in self._index.entries:
                return
            head = Head(values.copy(), start)
            self._index.insert(name, head, nbytes, written=False)
            self._pending += nbytes
        dtypes = [[array.dtype for array in layer] for layer in layers]
        # Handles of its own for the writer: two threads may not wait for one array.
        raw = [[prefix_file.as_raw(array) for array in layer] for layer in layers]
        mx.async_eval(*(array for layer in raw for array in layer))
        self._writer.submit(partial(self._write, name, head, raw, dtypes, nbytes, chain))

    def _write(
        self,
        name: str,
        head: Head,
        raw: Sequence[Sequence[mx.array]],
        dtypes: Sequence[Sequence[mx.Dtype]],
        nbytes: int,
        chain: Sequence[str],
    ) -> None:
        path = self.folder / name
        try:
            self._touch(chain)
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            late = time.monotonic() - self._refreshed > _REFRESH_SECONDS
            if late or self._total + nbytes > self.max_bytes:
                self.refresh(room_for=nbytes)
            self._total += nbytes
            prefix_file.write_file(path, self.fingerprint, head, raw, dtypes)
        except OSError as error:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            self._forget(name)
            self._count(skipped=1)
            if not self._warned:
                self._warned = True
                _log.warning("prefixes are not kept in %s for now: %s", self.folder, error)
        else:
            with self._lock:
                if name in self._index.entries:
                    self._index.mark_written(name)
            self._touch([*chain, name])
            self._count(writes=1)
        finally:
            with self._lock:
                self._pending -= nbytes

    def flush(self) -> None:
        """Wait until all that was queued is written."""
        self._writer.submit(int).result()

    def close(self) -> None:
        """Write what is queued and stop the threads. Nothing may be asked for afterwards."""
        self._writer.close()
        self._reader.close()

    # Keeping house

    def refresh(self, room_for: int = 0) -> None:
        """Learn what other processes wrote or deleted, and delete what is too much.

        room_for: bytes to keep free within the budget. Raises OSError.
        """
        files = self._files()
        total = sum(nbytes for _, nbytes, _ in files.values())
        # Least recently used first.
        for name, (_, nbytes, stale) in sorted(files.items(), key=lambda item: item[1][0]):
            full = total + room_for > self.max_bytes and not prefix_file.is_draft(name)
            if stale or full:
                (self.folder / name).unlink(missing_ok=True)
                self._count(evictions=int(not stale))
                total -= nbytes
                del files[name]
        self._total, self._refreshed = total, time.monotonic()
        with self._lock:
            known = {name for name, entry in self._index.entries.items() if entry.written}
        for name in known - files.keys():
            self._forget(name)
        for name in files.keys() - known:
            if name.startswith(prefix_file.family(self.fingerprint)):
                self._learn(name, files[name][1])

    def _files(self) -> dict[str, tuple[int, int, bool]]:
        """Files of prefix caches here, of any model: when last used (ns), bytes, a dead draft."""
        found = {}
        with os.scandir(self.folder) as listing:
            for item in listing:
                draft = prefix_file.is_draft(item.name)
                if not draft and not prefix_file.is_file(item.name):
                    continue
                try:
                    status = item.stat()
                except FileNotFoundError:  # another process was faster
                    continue
                stale = draft and time.time() - status.st_mtime > _STALE_SECONDS
                found[item.name] = (status.st_mtime_ns, status.st_size, stale)
        return found

    def _learn(self, name: str, nbytes: int) -> None:
        path = self.folder / name
        try:
            head = prefix_file.read_head(path, self.fingerprint)
            if prefix_file.file_name(self.fingerprint, head.values, head.start) != name:
                raise DamagedFileError("it holds other tokens than its name says")
        except FileNotFoundError:
            return
        except (DamagedFileError, OSError) as error:
            self._reject(path, error)
            return
        with self._lock:
            if name not in self._index.entries:
                self._index.insert(name, head, nbytes, written=True)

    def _reject(self, path: Path, error: Exception) -> None:
        """Delete a damaged file; leave one that could not be read, which may pass."""
        self._forget(path.name)
        if isinstance(error, DamagedFileError):
            self._count(damaged=1)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            _log.warning("%s is damaged and deleted from the prefix cache: %s", path, error)
        else:
            _log.warning("%s cannot be read, the prefix cache goes without: %s", path, error)

    def _touch(self, names: Sequence[str]) -> None:
        """Mark files as used now. Given in the order of their tokens: the last one goes first."""
        now = time.time_ns()
        for i, name in enumerate(names):
            used = now - 1000 * i
            with suppress(OSError):  # deleted by another process, or a folder that is read only
                os.utime(self.folder / name, ns=(used, used))

    def _forget(self, name: str) -> None:
        with self._lock:
            self._index.discard(name)

    def clear(self) -> None:
        """Delete this model's files."""
        self.flush()
        with self._lock:
            names = list(self._index.entries)
        for name in names:
            with suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)
            self._forget(name)

    def _count(
        self,
        *,
        hits: int = 0,
        hit_tokens: int = 0,
        writes: int = 0,
        evictions: int = 0,
        skipped: int = 0,
        damaged: int = 0,
    ) -> None:
        with self._lock:
            counts = self._counts
            counts.hits += hits
            counts.hit_tokens += hit_tokens
            counts.writes += writes
            counts.evictions += evictions
            counts.skipped += skipped
            counts.damaged += damaged

    @property
    def stats(self) -> DiskStats:
        with self._lock:
            return DiskStats(self._index.written, self._index.nbytes, **vars(self._counts))
