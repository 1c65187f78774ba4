"""An output is whole or not there, whatever kills, fills, fails or races the conversion."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from converting import convert, differing, tensors_of, tree, write_source

from qwen3vl_mlx import conversion, publish, stream, tensorfile
from qwen3vl_mlx.api import load
from qwen3vl_mlx.convert import main
from qwen3vl_mlx.errors import InputError, OutputError, WeightsError
from qwen3vl_mlx.publish import new_folder

OLD = {"config.json": b"old", "a": b"1", "b": b"2"}
NEW = {"config.json": b"new", "c": b"3"}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def make(target: Path, *, force: bool) -> None:
    with new_folder(target, force=force) as work:
        fill(work, NEW)


def refuse(target: Path) -> None:
    """To be refused before any work."""
    with new_folder(target, force=False):
        pytest.fail("work was begun")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "source", "dense64")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """In a folder of its own, so that anything left behind is seen."""
    return tmp_path / "target"


# Killed at every moment.

KILLED = """
import os, signal, sys
from pathlib import Path
left, folder = int(sys.argv[1]), Path(sys.argv[2])

def hook(event, args):
    global left
    calls = event.startswith(("os.", "fcntl.", "shutil."))
    if calls or (event == "open" and str(folder.parent) in str(args)):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
"""
FOLDER_KILLED = f"""{KILLED}
from qwen3vl_mlx.publish import new_folder
sys.addaudithook(hook)
with new_folder(folder, force=sys.argv[3] == "force") as work:
    (work / "junk").mkdir()
    (work / "junk" / "d").write_text("4")
    (work / "config.json").write_text("new")
    (work / "c").write_text("3")
    (work / "junk" / "d").unlink()
    (work / "junk").rmdir()
"""


def run(script: str, *arguments: object) -> int:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], timeout=60, check=False
    ).returncode


@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_killed_before_every_system_call(force: bool, tmp_path: Path) -> None:
    moments = 0
    seen = set()
    while True:
        moments += 1
        target = tmp_path / str(moments) / "target"
        target.parent.mkdir()
        if force:
            fill(target, OLD)
        status = run(FOLDER_KILLED, moments, target, "force" if force else "")
        left = tree(target) if target.exists() else None
        assert left in ((OLD, NEW, None) if force else (NEW, None))
        seen.add("nothing" if left is None else "old" if left == OLD else "new")
        if force:  # what was there is never lost
            hidden = target.with_name(".target.replaced")
            assert left is not None or tree(hidden) == OLD
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if left is None and force:  # the old one comes back first
            with pytest.raises(InputError, match="--force"):
                refuse(target)
            assert tree(target.parent) == {"target": None} | {
                f"target/{name}": content for name, content in OLD.items()
            }
        make(target, force=force or left == NEW)
        assert tree(target) == NEW
        assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert moments > (15 if force else 6)
    assert seen == ({"nothing", "old", "new"} if force else {"nothing", "new"})


CONVERSION_KILLED = f"""{KILLED}
import time
from qwen3vl_mlx import stream
from qwen3vl_mlx.convert import main
from qwen3vl_mlx.tensorfile import ShardWriter
stream.BLOCK_BYTES = 20_000
write, finish = ShardWriter.write, ShardWriter.finish
def audited(name, method):
    def call(self, *args):
        sys.audit(name)
        return method(self, *args)
    return call
ShardWriter.write = audited("test.write", write)
ShardWriter.finish = audited("test.finish", finish)

def moment(event, args):
    global left
    if event == sys.argv[3]:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(moment)
sys.exit(main(sys.argv[4:]))
"""


@pytest.mark.parametrize(
    ("event", "number", "force"),
    [
        ("test.write", 1, False),
        ("test.write", 150, False),
        ("test.finish", 1, True),
        ("shutil.copyfile", 2, False),
        ("os.rename", 1, False),
        ("os.rename", 2, True),  # the old one is away, the new one not there yet
        ("os.rename", 3, True),
    ],
)
def test_a_killed_conversion(
    event: str, number: int, force: bool, source: Path, target: Path
) -> None:
    argv = ["--model", str(source), "-q", "4bit", "-o", str(target)]
    if force:
        convert(source, target, "8bit")
        old = tree(target)
        argv.append("--force")
    status = run(CONVERSION_KILLED, number, target, event, *argv)
    assert status == -signal.SIGKILL
    if target.exists():
        assert tree(target) == old if number < 3 else load(target).model.config.quantization
    elif force:
        assert tree(target.with_name(".target.replaced")) == old
    assert main(argv) == 0
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    convert(source, target.with_name("expected"), "4bit")
    assert differing(tensors_of(target), tensors_of(target.with_name("expected"))) == []


# Two at once.


def test_two_at_once(source: Path, target: Path) -> None:
    with new_folder(target, force=False) as work:
        fill(work, NEW)
        with pytest.raises(InputError, match="target is being written by another process"):
            convert(source, target)
        assert tree(work) == NEW
    assert tree(target) == NEW
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("force", [False, True])
def test_one_that_comes_as_the_other_ends(
    force: bool, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has opened the other's working folder, which is the target by now."""
    first = new_folder(target, force=False)
    fill(first.__enter__(), OLD)
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    if force:
        make(target, force=True)
    else:
        with pytest.raises(InputError, match="there already"):
            refuse(target)
    assert tree(target) == (NEW if force else OLD)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_three_at_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one ends and another begins, a third holds the lock of a folder that is none any more."""
    first, second = new_folder(target, force=False), new_folder(target, force=True)
    fill(first.__enter__(), OLD)
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        fill(second.__enter__(), NEW)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="another process"):
        make(target, force=True)
    second.__exit__(None, None, None)
    assert tree(target) == NEW
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_what_others_put_there_meanwhile_stays(target: Path) -> None:
    def meanwhile() -> None:
        with new_folder(target, force=False) as work:
            fill(work, NEW)
            fill(target, OLD)

    with pytest.raises(InputError, match="there already"):
        meanwhile()
    assert tree(target) == OLD
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_disk_without_locks(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    make(target, force=False)
    assert tree(target) == NEW


# Failures on the way.


def failing(error: BaseException, number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but its call `number` (from 1) raises."""
    calls = iter(range(1, 10**9))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return function(*args, **kwargs)

    return call


STEPS: list[tuple[Any, str, int]] = [
    (tensorfile.ShardWriter, "write", 1),
    (tensorfile.ShardWriter, "write", 60),
    (stream, "_make", 3),
    (tensorfile.ShardWriter, "finish", 1),
    (conversion, "copy_files", 1),
    (conversion, "write_text", 1),
    (publish, "_sync", 1),
    (os, "rename", 1),
    (os, "rename", 2),
]
ERRORS = {
    KeyboardInterrupt: (130, "interrupted"),
    MemoryError: (1, "MemoryError"),
    partial(OSError, errno.ENOSPC, "No space left on device"): (1, "full|No space"),
    partial(OSError, errno.EIO, "Input/output error"): (1, "Input/output error"),
}


@pytest.mark.parametrize("error", ERRORS, ids=["interrupted", "memory", "full", "failing"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[1]} {step[2]}")
def test_a_failure_leaves_nothing(
    step: tuple[Any, str, int],
    error: Callable[[], BaseException],
    source: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither files, nor a trace in what was there before."""
    fill(target, OLD)
    before = tree(target.parent)
    owner, name, number = step
    monkeypatch.setattr(owner, name, failing(error(), number, getattr(owner, name)))
    status, words = ERRORS[error]
    assert main(["--model", str(source), "-o", str(target), "--force"]) == status
    assert any(word in capsys.readouterr().err for word in words.split("|"))
    assert tree(target.parent) == before


class Disk:
    """Stands for `FileIO` in writing; says how many bytes were taken."""

    def __init__(self, spoil: Callable[[int, bytes], bytes | int]):
        self.spoil, self.taken = spoil, 0

    def file(self) -> type[FileIO]:
        disk = self

        class Spoiled(FileIO):
            def write(self, data: Any) -> int:
                found = disk.spoil(disk.taken, bytes(data))
                data = data[:found] if isinstance(found, int) else found
                disk.taken += len(data)
                return super().write(data)

        return Spoiled


def test_a_disk_that_takes_a_part_at_a_time(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(lambda _, data: min(len(data), 1000))
    monkeypatch.setattr(tensorfile, "FileIO", disk.file())
    convert(source, target, "4bit")
    monkeypatch.undo()
    convert(source, target.with_name("expected"), "4bit")
    assert disk.taken > 100_000
    assert differing(tensors_of(target), tensors_of(target.with_name("expected"))) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_disk_that_is_full(
    share: float,
    source: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limit = share * sum(path.stat().st_size for path in source.glob("*.safetensors"))

    def spoil(taken: int, data: bytes) -> int:
        if taken + len(data) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    monkeypatch.setattr(tensorfile, "FileIO", Disk(spoil).file())
    assert main(["--model", str(source), "-o", str(target)]) == 1
    error = capsys.readouterr().err
    assert "space" in error or "full" in error
    assert not list(target.parent.iterdir())


def test_a_disk_that_is_too_small(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is written; the result's size counts, not the source's."""
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    usage = namedtuple("usage", "total used free")
    asked = []

    def disk_usage(folder: Path) -> Any:
        asked.append(folder)
        return usage(0, 0, nbytes + 64 * 2**20 - 100_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(tensorfile.ShardWriter, "_open", None)
    assert main(["--model", str(source), "-o", str(target)]) == 1
    assert "GB free" in capsys.readouterr().err
    assert asked
    assert not list(target.parent.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert main(["--model", str(source), "-q", "4bit", "-o", str(target)]) == 0


@pytest.mark.parametrize("place", [0, 9, 500, 0.2, 0.5, 0.999999])
def test_a_bit_that_falls_over_is_seen(
    place: float, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the header's length, the header, or any tensor of either file."""
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    where = int(place if place > 1 else place * nbytes)
    spoiled = []

    def spoil(taken: int, data: bytes) -> bytes:
        if taken <= where < taken + len(data):
            spoiled.append(where)
            i = where - taken
            return data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :]
        return data

    monkeypatch.setattr(tensorfile, "FileIO", Disk(spoil).file())
    with pytest.raises(OutputError, match="does not read back"):
        convert(source, target, shard_bytes=2_000_000)
    assert spoiled
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_seen(
    change: int, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = tensorfile.ShardWriter.finish

    def cut(writer: Any, *args: Any) -> None:
        path = writer.folder / writer.names[-1]
        os.truncate(path, path.stat().st_size + change)
        finish(writer, *args)

    monkeypatch.setattr(tensorfile.ShardWriter, "finish", cut)
    with pytest.raises(OutputError, match="does not read back"):
        convert(source, target)
    assert not list(target.parent.iterdir())


# Sources at fault.


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def overwrite(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize("damage", [cut, Path.unlink, overwrite])
def test_a_bad_source(
    damage: Callable[[Path], None],
    source: Path,
    target: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path_factory.mktemp("bad") / "bad"
    shutil.copytree(source, copy)
    damage(copy / "model-00002-of-00002.safetensors")
    assert main(["--model", str(copy), "-o", str(target)]) == 1
    assert "model-00002-of-00002.safetensors" in capsys.readouterr().err
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 5000), Path.unlink])
def test_a_source_that_fails_halfway(
    damage: Callable[[Path], None],
    source: Path,
    target: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path_factory.mktemp("bad") / "bad"
    shutil.copytree(source, copy)
    check_space = conversion.check_space

    def then_damage(*args: Any) -> None:  # all headers have been read by now
        check_space(*args)
        damage(copy / "model-00002-of-00002.safetensors")

    monkeypatch.setattr(conversion, "check_space", then_damage)
    with pytest.raises(WeightsError, match="model-00002-of-00002"):
        convert(copy, target)
    assert not list(target.parent.iterdir())


# Targets that must not be touched.


def as_link(target: Path, source: Path) -> None:
    target.symlink_to(source, target_is_directory=True)


def as_file(target: Path, source: Path) -> None:
    target.write_text("mine")


def as_checkpoint(target: Path, source: Path) -> None:
    fill(target, OLD)


def as_other_folder(target: Path, source: Path) -> None:
    fill(target, {"thesis.txt": b"years"})


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("place", "words"),
    [
        (as_link, "not a folder"),
        (as_file, "not a folder"),
        (as_checkpoint, "--force replaces it"),
        (as_other_folder, "there already|not a checkpoint"),
        ("source", "the source itself"),
        ("source/", "the source itself"),
        ("source/..", "holds the source"),
        ("SOURCE", "the source itself"),
    ],
)
def test_targets_that_are_refused(
    place: Any,
    words: str,
    force: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    target = str(tmp_path / "target")
    if callable(place):
        place(tmp_path / "target", copy)
    elif place == "SOURCE":  # by way of a link to its parent
        (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
        target = str(tmp_path / "link" / "source")
    else:
        target = str(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    argv = ["--model", str(copy), "-q", "4bit", "-o", target, *(["--force"] if force else [])]
    if force and place is as_checkpoint:
        assert main(argv) == 0
        assert load(tmp_path / "target").model.config.quantization is not None
        return
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert any(word in error for word in words.split("|"))
    assert error.count("\n") == 1
    assert tree(tmp_path) == before


def test_an_empty_folder_is_taken(source: Path, target: Path) -> None:
    target.mkdir()
    assert main(["--model", str(source), "-o", str(target)]) == 0
    assert (target / "config.json").exists()


def test_parents_are_made(source: Path, tmp_path: Path) -> None:
    assert main(["--model", str(source), "-o", str(tmp_path / "a" / "b" / "target")]) == 0
    assert (tmp_path / "a" / "b" / "target" / "config.json").exists()


def test_a_parent_that_is_a_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["--model", str(source), "-o", str(tmp_path / "file" / "target")]) == 1
    assert "cannot be made" in capsys.readouterr().err
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shut").mkdir(mode=0o500)
    assert main(["--model", str(source), "-o", str(tmp_path / "shut" / "target")]) == 1
    assert "cannot be made" in capsys.readouterr().err
