"""The prefix cache on disk meets damage, full disks, killed writers, neighbours on its folder."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import LONG, Disk, disk_stats, flush, found
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefixes import Part, key, rows, same, spelled

from qwen3vl_mlx.engine import prefix_disk, prefix_file

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:100],
    "cut in the rows": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
    "garbage": lambda data: b"garbage" * 999,
    "a giant header": lambda data: b"\xff" * 8 + data[8:],
    "a wrong row": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "another type": lambda data: data.replace(b"float32", b"float64"),
    "another known type": lambda data: data.replace(b'float32\\"', b'uint32\\" '),
    "another format": lambda data: data.replace(b"-prefix-1", b"-prefix-2"),
    "another model": lambda data: data.replace(b'"model"', b'"modem"'),
    "another start": lambda data: data.replace(b'"start":"0"', b'"start":"1"'),
    "another shape": lambda data: data.replace(b"[1,2,46,4]", b"[2,1,46,4]"),
    "a weights file": lambda data: b"\x02\0\0\0\0\0\0\0{}",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_before_the_start(disk: Disk, name: str, caplog: pytest.LogCaptureFixture) -> None:
    disk.filled(LONG, [300, *range(30)])
    path = next(p for p in disk.files() if b"[1,2,46,4]" in p.read_bytes())
    damaged = DAMAGE[name](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        cache = disk()
        assert found(cache, [*LONG, 1]) == 0
        assert found(cache, [*LONG, 1]) == 0
    assert len(caplog.records) == 1
    assert path.name in caplog.text
    assert not path.exists()
    assert disk_stats(cache).damaged == 1
    assert found(cache, [300, *range(30), 1]) == 31
    cache.insert(key(LONG), rows(LONG))  # and the cache goes on
    flush(cache)
    assert found(disk(), [*LONG, 1]) == len(spelled(LONG))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_while_running(disk: Disk, name: str, caplog: pytest.LogCaptureFixture) -> None:
    more = [*LONG, *range(40)]
    cache = disk.filled(LONG, more)
    path = next(p for p in disk.files() if b"[1,2,40,4]" in p.read_bytes())
    damage = DAMAGE[name] if name != "another shape" else lambda data: data[:-9]
    damaged = damage(path.read_bytes().replace(b'"start":"46"', b'"start":"0" '))
    path.write_bytes(damaged)
    cache.shrink(0)
    with caplog.at_level(logging.WARNING):
        assert found(cache, [*more, 1]) == len(spelled(LONG))  # what is whole is used
    assert len(caplog.records) == 1
    assert not path.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_flipped_byte_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "file"
    head = prefix_file.Head(key([1, 2, 3]).values, 1)
    layers = [[array[:, :, 1:] for array in layer] for layer in rows([1, 2, 3], "bfloat16")]
    raw = [[prefix_file.as_raw(array) for array in layer] for layer in layers]
    dtypes = [[array.dtype for array in layer] for layer in layers]
    prefix_file.write_file(path, "model", head, raw, dtypes)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    where = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        read = prefix_file.read_file(path, "model", head)
    except prefix_file.DamagedFileError:
        return
    assert same(prefix_file.as_rows(read), layers)  # a blank in the header, say


def test_a_file_that_cannot_be_read_now_is_kept(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk.filled(LONG)
    cache = disk()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(prefix_file, "read_file", fail)
        assert found(cache, [*LONG, 1]) == 0
    assert "Input/output error" in caplog.text
    assert found(disk(), [*LONG, 1]) == len(spelled(LONG))


def test_a_full_disk_is_told_once_and_gone_without(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = disk.filled(LONG)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(prefix_disk, "_RETRY_SECONDS", 0.0)
        patch.setattr("qwen3vl_mlx.engine.prefix_file.os.fsync", full)
        for first in (100, 200, 300):
            parts: list[Part] = [first, *LONG[1:]]
            cache.insert(key(parts), rows(parts))
            assert found(cache, [*parts, 1]) == len(spelled(LONG))
            flush(cache)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert (disk_stats(cache).skipped, disk_stats(cache).entries) == (3, 1)
    assert len(disk.files()) == 1  # no drafts
    cache.insert(key([100, *LONG[1:]]), rows([100, *LONG[1:]]))  # there is room again
    flush(cache)
    assert found(disk(), [100, *LONG[1:], 1]) == len(spelled(LONG))


def test_a_failed_write_is_not_tried_again_at_once(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = disk.filled([1, 2])
    monkeypatch.setattr(prefix_file, "write_file", lambda *_: os.open("/", os.O_WRONLY))
    for first in (100, 200):
        cache.insert(key([first]), rows([first]))
        flush(cache)
    monkeypatch.undo()
    cache.insert(key([300]), rows([300]))
    flush(cache)
    assert (disk_stats(cache).writes, disk_stats(cache).skipped) == (1, 3)


def test_a_file_size_limit_of_the_system(disk: Disk) -> None:
    """What the writing library makes of a disk that takes no more."""
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from prefixes import key, rows
from qwen3vl_mlx.engine.prefix_cache import PrefixCache
from qwen3vl_mlx.engine.prefix_disk import DiskTier, fingerprint
cache = PrefixCache(2**30, DiskTier({str(disk.folder)!r}, "model", 2**30))
cache.insert(key([*range(99)]), rows([*range(99)]))
cache.disk.flush()
assert cache.disk.stats.skipped == 1
cache.close()
"""
    result = run(script)
    assert result.returncode == 0, result.stderr
    assert "prefixes are not kept" in result.stderr
    assert disk.files() == []


def run(script: str) -> subprocess.CompletedProcess[str]:
    places = [str(Path(__file__).parent), str(Path(prefix_disk.__file__).parents[2])]
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_killed_between_write_and_rename(disk: Disk) -> None:
    script = f"""
import os
from prefixes import key, rows
from qwen3vl_mlx.engine.prefix_cache import PrefixCache
from qwen3vl_mlx.engine.prefix_disk import DiskTier, fingerprint
cache = PrefixCache(2**30, DiskTier({str(disk.folder)!r}, "model", 2**30))
cache.insert(key([*range(50)]), rows([*range(50)]))
cache.disk.flush()
os.replace = lambda *_: os._exit(9)
cache.insert(key([*range(90)]), rows([*range(90)]))
cache.disk.flush()
"""
    assert run(script).returncode == 9
    assert len(disk.files()) == 2
    cache = disk()
    assert found(cache, [*range(99)]) == 50
    assert len(disk.files()) == 2  # somebody may be writing it
    for path in disk.files():
        hour_ago = time.time() - 3600
        os.utime(path, (hour_ago, hour_ago))
    cache = disk()
    assert [prefix_file.is_draft(path.name) for path in disk.files()] == [False]
    assert found(cache, [*range(99)]) == 50


def test_a_draft_being_written_is_left_alone(disk: Disk) -> None:
    disk.folder.mkdir()
    name = prefix_file.file_name("model", key([1]).values, 0)
    draft = disk.folder / f".{name}.1-ab.tmp"
    draft.write_bytes(b"half")
    disk(budget=0)
    assert draft.exists()


def test_two_processes_on_one_folder(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefix_disk, "_REFRESH_SECONDS", 0.0)
    one, two = disk(), disk()
    for cache in (one, two):
        cache.insert(key(LONG), rows(LONG))
    flush(one)
    flush(two)
    assert len(disk.files()) == 1
    one.insert(key([*LONG, *range(20)]), rows([*LONG, *range(20)]))
    flush(one)
    two.insert(key([7, *range(20)]), rows([7, *range(20)]))  # and it looks around
    flush(two)
    assert found(two, [*LONG, *range(20), 1]) == len(spelled(LONG)) + 20
    for path in disk.files():
        path.unlink()
    one.shrink(0)
    assert found(one, [*LONG, 1]) == 0
    assert (disk_stats(one).damaged, caplog.records) == (0, [])
    one.insert(key(LONG), rows(LONG))
    flush(one)
    assert found(disk(), [*LONG, 1]) == len(spelled(LONG))


def test_two_writers_at_once(disk: Disk) -> None:
    caches = [disk(budget=40_000) for _ in range(2)]
    for first in range(12):
        for cache in caches:
            parts: list[Part] = [first // 2, *LONG, first]
            cache.insert(key(parts), rows(parts))
            if first % 3 == 0:
                cache.shrink(0)
                found(cache, [*parts, 1])
    for cache in caches:
        flush(cache)
        assert disk_stats(cache).damaged == 0
    again = disk(budget=40_000)
    assert sum(path.stat().st_size for path in disk.files()) <= 40_000
    assert any(found(again, [i // 2, *LONG, i, 1]) == 48 for i in range(12))
