"""The prefix cache on disk: restarts, budgets, and what is read and written when."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from disks import LONG, PLENTY, Disk, disk_stats, flush, found
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prefixes import A, B, Naive, Part, V, key, nbytes, rows, same, spelled

from qwen3vl_mlx.engine import prefix_disk, prefix_file
from qwen3vl_mlx.engine.prefix_cache import PrefixCache
from qwen3vl_mlx.engine.prefix_disk import DiskTier, fingerprint
from qwen3vl_mlx.errors import OutputError
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.models.qwen3_vl import Model


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
    match = cache.match(key([*LONG, 1]), cache.restore(key([*LONG, 1])))
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
    cache.disk._writer.submit(lambda: time.sleep(0.3))
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
    cache.disk._writer.submit(lambda: time.sleep(0.2))
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
        match = self.cache.match(key(parts), self.cache.restore(key(parts)))
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
