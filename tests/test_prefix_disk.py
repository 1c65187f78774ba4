"""The prefix cache on disk: restarts, damage, full disks, neighbours on one folder."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prefixes import A, B, Naive, Part, V, key, nbytes, rows, same, spelled

from qwen3vl_mlx.engine import prefix_disk, prefix_file
from qwen3vl_mlx.engine.prefix_cache import PrefixCache
from qwen3vl_mlx.engine.prefix_disk import DiskTier, fingerprint
from qwen3vl_mlx.errors import OutputError
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.models.qwen3_vl import Model

PLENTY = 2**40
LONG: list[Part] = [*range(20), A, *range(20)]


class Disk:
    """Caches over one folder, as processes come and go."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.open: list[PrefixCache] = []

    def __call__(
        self, memory: int = PLENTY, budget: int = PLENTY, name: str = "model"
    ) -> PrefixCache:
        self.open.append(PrefixCache(memory, DiskTier(self.folder, name, budget)))
        return self.open[-1]

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)

    def filled(self, *prompts: list[Part], kind: str = "float32", **options: Any) -> PrefixCache:
        cache = self(**options)
        for parts in prompts:
            cache.insert(key(parts), rows(parts, kind))
        flush(cache)
        return cache


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "prefixes")
    yield disk
    for cache in disk.open:
        cache.close()


def flush(cache: PrefixCache) -> None:
    assert cache.disk is not None
    cache.disk.flush()


def found(cache: PrefixCache, parts: list[Part], kind: str = "float32") -> int:
    match = cache.match(key(parts))
    if match.length:
        assert same(match.layers, rows(parts, kind, match.length))
    return match.length


def disk_stats(cache: PrefixCache) -> prefix_disk.DiskStats:
    assert cache.disk is not None
    return cache.disk.stats


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "quantized"])
def test_a_restart_forgets_nothing(disk: Disk, kind: str) -> None:
    longer = [*LONG, V, A, 1]
    disk.filled(LONG, longer, [*range(18), 99], kind=kind)
    again = disk()
    assert (disk_stats(again).entries, len(disk.files())) == (3, 3)
    assert disk_stats(again).bytes == sum(path.stat().st_size for path in disk.files())
    assert found(again, [*LONG, 5], kind) == len(spelled(LONG))
    assert found(again, [*longer, 2], kind) == len(spelled(longer))
    assert found(again, [*range(18), 99, 1], kind) == 18  # not worth a file for one token
    assert found(again, [*range(20), B, 1], kind) == 20
    assert disk_stats(again).hits == 2
    assert disk_stats(again).hit_tokens == len(spelled(longer))
    assert disk_stats(again).writes == 0
    flush(again)
    assert len(disk.files()) == 3


def test_what_was_read_stays_in_memory(disk: Disk) -> None:
    disk.filled(LONG)
    again = disk()
    for _ in range(2):
        assert found(again, [*LONG, 1]) == len(spelled(LONG))
    assert disk_stats(again).hits == 1
    small = disk(memory=0)
    for _ in range(2):
        assert found(small, [*LONG, 1]) == len(spelled(LONG))
    assert disk_stats(small).hits == 2
    assert small.stats.bytes == 0


def test_what_memory_dropped_comes_back(disk: Disk) -> None:
    cache = disk.filled(LONG)
    cache.shrink(0)
    assert cache.peek(key([*LONG, 1])) == 0
    assert found(cache, [*LONG, 1]) == len(spelled(LONG))


def test_reading_ahead(disk: Disk) -> None:
    disk.filled(LONG)
    cache = disk()
    restored = cache.restore(key([*LONG, 1]))
    assert restored is not None
    restored.future.result()
    assert restored.done
    for path in disk.files():
        path.unlink()  # it is read already
    match = cache.match(key([*LONG, 1]), restored)
    assert match.length == len(spelled(LONG))
    assert same(match.layers, rows(LONG))
    assert cache.restore(key([*LONG, 1])) is None
    assert cache.restore(key([50, 51])) is None


@pytest.mark.parametrize("between", ["more", "less", "other"])
def test_memory_may_change_while_reading_ahead(disk: Disk, between: str) -> None:
    disk.filled([*LONG, *range(30)])
    cache = disk()
    cache.insert(key(LONG), rows(LONG))
    restored = cache.restore(key([*LONG, *range(40)]))
    assert restored is not None
    if between == "less":
        cache.shrink(0)
    else:
        parts = [*LONG, *range(35)] if between == "more" else [*LONG, *range(10), 9, 9, 9]
        cache.insert(key(parts), rows(parts))
    match = cache.match(key([*LONG, *range(40)]), restored)
    assert match.length == {"more": 81, "less": 0, "other": 76}[between]
    if match.length:
        assert same(match.layers, rows([*LONG, *range(40)], count=match.length))


def test_a_large_file_is_not_read_for_a_few_tokens(disk: Disk) -> None:
    disk.filled([*range(2000)])
    cache = disk()
    assert found(cache, [*range(100), 5]) == 0
    assert found(cache, [*range(200), 5]) == 200


def test_writing_into_restored_rows_changes_nothing(disk: Disk) -> None:
    disk.filled(LONG)
    cache = disk()
    match = cache.match(key([*LONG, 1]))
    match.layers[0][0][:, :, :3, :] = mx.zeros((1, 2, 3, 4))
    mx.eval(match.layers)
    assert found(cache, [*LONG, 1]) == len(spelled(LONG))


def test_other_models_and_formats_are_never_read(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.filled(LONG)
    other = disk(name="other model")
    assert found(other, [*LONG, 1]) == 0
    assert disk_stats(other).entries == 0
    monkeypatch.setattr(prefix_file, "FORMAT", "qwen3vl_mlx-prefix-0")
    assert found(disk(), [*LONG, 1]) == 0
    assert len(disk.files()) == 1


def test_other_models_files_count_and_go_first(disk: Disk) -> None:
    disk.filled(LONG, name="old model")
    size = disk.files()[0].stat().st_size
    cache = disk(budget=2 * size)
    assert len(disk.files()) == 1
    for first in (100, 200):
        parts: list[Part] = [first, *LONG[1:]]
        cache.insert(key(parts), rows(parts))
    flush(cache)
    assert sorted(path.name for path in disk.files()) == sorted(cache.disk._index.entries)
    assert disk_stats(cache).evictions >= 1
    assert found(disk(budget=2 * size), [200, *LONG[1:], 1]) == len(spelled(LONG))


def test_strangers_files_are_left_alone(disk: Disk) -> None:
    disk.folder.mkdir()
    for name in ("notes.txt", "model.safetensors", "prefix-of-mine.txt"):
        (disk.folder / name).write_text("mine")
    disk.filled(LONG, budget=0)
    disk(budget=1)
    assert len(disk.files()) == 3


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


def test_least_recently_used_files_go_first(disk: Disk) -> None:
    cache = disk.filled([1, *range(60)])
    size = disk.files()[0].stat().st_size
    cache = disk(budget=3 * size + 1500)
    for first in (2, 3):
        cache.insert(key([first, *range(60)]), rows([first, *range(60)]))
        flush(cache)
    assert found(cache, [1, *range(60), 1]) == 61  # read: used
    cache.insert(key([4, *range(60)]), rows([4, *range(60)]))
    flush(cache)
    assert (disk_stats(cache).evictions, disk_stats(cache).entries) == (1, 3)
    again = disk()
    assert [found(again, [i, *range(60), 1]) for i in (1, 2, 3, 4)] == [61, 0, 61, 61]


@pytest.mark.parametrize("used", ["written", "read"])
def test_a_prefix_outlives_what_continues_it(
    disk: Disk, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*args: Any) -> None:
        time.sleep(0.02)
        write_file(*args)

    write_file = prefix_file.write_file
    monkeypatch.setattr(prefix_file, "write_file", slowly)
    base: list[Part] = [*range(60)]
    longer = [*base, *range(60)]
    disk.filled(base)
    size = disk.files()[0].stat().st_size
    disk.filled(longer)
    if used == "read":
        assert found(disk(), [*longer, 1]) == 120
    cache = disk.filled([99, *range(60)], budget=2 * size + 2500)
    assert found(disk(), [*longer, 1]) == 60
    assert disk_stats(cache).evictions == 1


def test_a_prefix_makes_no_room_for_what_continues_it(disk: Disk) -> None:
    base: list[Part] = [*range(60)]
    disk.filled(base)
    disk.filled([99, *range(60)])
    size = disk.files()[0].stat().st_size
    disk.filled(base, [*base, *range(60)], budget=2 * size + 2500)
    assert found(disk(), [*base, *range(60), 1]) == 120


def test_what_does_not_fit_beside_its_prefix_is_not_written(disk: Disk) -> None:
    base: list[Part] = [*range(500)]
    disk.filled(base)
    size = disk.files()[0].stat().st_size
    cache = disk.filled(base, [*base, *range(500)], budget=size + size // 2)
    assert disk_stats(cache).skipped == 1
    assert found(disk(), [*base, 1]) == 500


@pytest.mark.parametrize("budget", [0, 100, 20_000])
def test_what_is_larger_than_the_budget_is_not_written(disk: Disk, budget: int) -> None:
    cache = disk.filled([*range(500)], budget=budget)
    assert disk.files() == []
    assert disk_stats(cache).skipped == 1
    assert found(cache, [*range(500), 1]) == 500


def test_a_slow_disk_makes_nobody_wait(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_disk, "MAX_PENDING", 1000)
    cache = disk()
    cache.disk._writer.submit(time.sleep, 0.3)
    start = time.perf_counter()
    for first in range(5):
        cache.insert(key([first, *LONG]), rows([first, *LONG]))
    assert time.perf_counter() - start < 0.25
    flush(cache)
    assert (disk_stats(cache).writes, disk_stats(cache).skipped) == (1, 4)
    cache.insert(key([4, *LONG]), rows([4, *LONG]))  # asked for again, written then
    flush(cache)
    assert found(disk(), [4, *LONG, 1]) == len(spelled(LONG)) + 1


def test_clear_deletes_this_models_files(disk: Disk) -> None:
    disk.filled(LONG, name="other model")
    cache = disk.filled(LONG, [1, 2])
    cache.clear()
    assert len(disk.files()) == 1
    assert found(cache, [*LONG, 1]) == 0
    assert disk_stats(cache).entries == disk_stats(cache).bytes == 0
    assert not cache.disk._index.root.children


def test_what_is_not_written_yet_is_not_read(disk: Disk) -> None:
    cache = disk()
    cache.disk._writer.submit(time.sleep, 0.2)
    cache.insert(key(LONG), rows(LONG))
    cache.shrink(0)
    assert found(cache, [*LONG, 1]) == 0
    flush(cache)
    assert found(cache, [*LONG, 1]) == len(spelled(LONG))


def test_rows_without_what_they_follow_are_not_used(disk: Disk) -> None:
    longer = [*LONG, *range(60)]
    disk.filled(LONG)
    base = disk.files()[0]
    disk.filled(LONG, longer)
    base.unlink()
    assert found(disk(), [*longer, 1]) == 0
    cache = disk.filled(LONG)  # the base again: both are of use
    cache.shrink(0)
    assert found(cache, [*longer, 1]) == len(spelled(longer))


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


def test_close_writes_what_is_queued(disk: Disk) -> None:
    cache = disk()
    cache.insert(key(LONG), rows(LONG))
    cache.close()
    assert found(disk(), [*LONG, 1]) == len(spelled(LONG))


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(OutputError, match="cannot be used"):
        DiskTier(path, "model", PLENTY)


def test_the_folder_is_private(disk: Disk) -> None:
    disk()
    assert disk.folder.stat().st_mode & 0o077 == 0


def test_a_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    model = Model(read_config(tiny.write_tiny(tmp_path / "tiny", "moe")))
    seen = [fingerprint(model, None)]
    assert fingerprint(model, None) == seen[0]
    seen.append(fingerprint(model, 8))
    norm = model.language_model.model.layers[1].input_layernorm
    norm.weight = norm.weight + mx.array([0.0] * 47 + [1e-6])  # one bit or so
    seen.append(fingerprint(model, None))
    proj = model.vision_tower.blocks[0].attn.qkv
    proj.weight = proj.weight[::-1]
    seen.append(fingerprint(model, None))
    model.set_dtype(mx.bfloat16)
    seen.append(fingerprint(model, None))
    assert len(set(seen)) == len(seen)


class Machine(RuleBasedStateMachine):
    """Whatever memory drops and however often it restarts, the disk has everything."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(prefix_disk, "MIN_GAIN", 1)
        self.patch.setattr(prefix_disk, "_WORTH", 10**9)
        self.held = tempfile.TemporaryDirectory()
        self.folder = Path(self.held.name)
        self.naive = Naive()
        self.start(10)

    def start(self, tokens: int) -> None:
        budget = tokens * nbytes(rows([1]))
        self.cache = PrefixCache(budget, DiskTier(self.folder, "model", PLENTY))

    @rule(tokens=st.integers(0, 40))
    def restart(self, tokens: int) -> None:
        self.cache.close()
        self.start(tokens)

    PARTS = st.lists(st.sampled_from([0, 1, A, B, V]), min_size=1, max_size=5)

    @rule(parts=PARTS, data=st.data())
    def insert(self, parts: list[Part], data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(spelled(parts))))
        refused = self.cache.stats.refused
        self.cache.insert(key(parts), rows(parts, count=count))
        if self.cache.stats.refused == refused:
            self.naive.insert(parts, count)

    @rule(parts=PARTS)
    def match(self, parts: list[Part]) -> None:
        flush(self.cache)
        match = self.cache.match(key(parts))
        assert match.length == self.naive.match(parts)
        if match.length:
            assert same(match.layers, rows(parts, count=match.length))

    @rule(tokens=st.integers(0, 10))
    def shrink(self, tokens: int) -> None:
        self.cache.shrink(tokens * nbytes(rows([1])))

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.naive.kept.clear()

    @invariant()
    def within_budget(self) -> None:
        assert self.cache.stats.bytes <= self.cache.max_bytes

    def teardown(self) -> None:
        self.cache.close()
        self.held.cleanup()
        self.patch.undo()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
