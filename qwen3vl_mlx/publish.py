"""A folder that appears whole or not at all, whatever kills the process that writes it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen3vl_mlx.errors import InputError, OutputError

_MARGIN = 64 * 2**20  # bytes a disk keeps free


def check_target(target: Path, source: Path | None, *, force: bool) -> None:
    """Raise InputError unless `target` may be written: new, empty, or replaceable with `force`."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} is there and is not a folder; give another --output")
    if source is not None and target.exists() and target.samefile(source):
        raise InputError(f"{target} is the source itself; give another --output")
    if source is not None and target.resolve() in source.resolve().parents:
        raise InputError(f"{target} holds the source; give another --output")
    here = Path.cwd()
    if target.exists() and (target.resolve() == here or target.resolve() in here.parents):
        raise InputError(f"{target} is or holds the current folder; give another output")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise InputError(f"{target} is there already; --force replaces it")
    if not (target / "config.json").exists():
        raise InputError(f"{target} is not a checkpoint's folder: --force does not replace it")


def check_space(folder: Path, nbytes: int) -> None:
    """Raise OutputError unless the disk of `folder` (or its nearest parent) has room."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes + _MARGIN:
        raise OutputError(
            f"{nbytes / 1e9:.2f} GB are to be written and the disk of {folder} has "
            f"{free / 1e9:.2f} GB free; make room or give another --output"
        )


@contextmanager
def new_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """A working folder beside `target` that becomes it when the block ends well.

    What an earlier run left behind is cleared; a run that is still going is an InputError. An
    existing `target` is replaced at the very end, with `force` only. See `check_target`.
    """
    target = target.absolute()
    work, old = _beside(target, "converting"), _beside(target, "replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(work, target)
    except OSError as error:
        raise OutputError(f"{work} cannot be made: {error.strerror}") from error
    try:
        recover(target, old)
        check_target(target, None, force=force)  # another process may have made it meanwhile
        _clear(work)
        yield work
        _sync(work)
        check_target(target, None, force=force)
        if target.exists():
            os.rename(target, old)
        os.rename(work, target)
        _sync(target.parent)
        recover(target, old)
    except OSError as error:
        _undo(work, target, old)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error
        raise OutputError(f"{target} cannot be written: {reason}") from error
    except BaseException:
        _undo(work, target, old)
        raise
    finally:
        os.close(lock)


def _undo(work: Path, target: Path, old: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        recover(target, old)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def _locked(work: Path, target: Path) -> int:
    """Make `work` if need be and lock it. Returns the descriptor that holds the lock."""
    while True:
        work.mkdir(exist_ok=True)
        try:
            lock = os.open(work, os.O_RDONLY)
        except FileNotFoundError:  # its owner has just ended
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(f"{target} is being written by another process; wait for it") from None
        except OSError:  # network disks may have no locks
            return lock
        if work.exists() and os.path.samestat(work.stat(), os.fstat(lock)):
            return lock
        os.close(lock)  # renamed or removed by its owner before it was locked here


def recover(target: Path, old: Path) -> None:
    """Finish or undo a replacement that was interrupted between its two renames."""
    removed = _beside(target, "removed")  # never recovered: it may lack some files already
    shutil.rmtree(removed, ignore_errors=True)
    if old.exists():
        os.rename(old, removed if target.exists() else target)
        shutil.rmtree(removed, ignore_errors=True)


def _clear(work: Path) -> None:
    for path in work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    draft = path.with_name(f".{path.name}.writing")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
