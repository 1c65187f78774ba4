"""`qwen3vl models download`: looks at a checkpoint first, and keeps what an interrupt leaves."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qwen3vl_mlx import cli, hub
from qwen3vl_mlx.errors import ConfigError, InputError, OutputError
from qwen3vl_mlx.hub_cache import cache_folder, cached_repo
from qwen3vl_mlx.models.config import read_config

_MARGIN = 256 * 2**20  # bytes a disk keeps free
_SHOW = "\x1b[?25h"  # the cursor, which a bar hides


def download(name: str, revision: str | None = None) -> Path:
    """The folder of a Hub checkpoint, fetched where it is not here; says on stderr what it does.

    Raises ConfigError for another family, before its weights; OutputError where the disk is too
    small; HubError.
    """
    if hub.local_folder(name, revision) is not None:
        place = "comes with this package" if name == "demo" else "is a folder on this machine"
        raise InputError(f"{name} {place}: there is nothing to download; give a Hub id, OWNER/NAME")
    try:
        read_config(hub.config_folder(name, revision))
    except ConfigError as error:
        raise ConfigError(f"{name} is not downloaded: {error}") from error
    folder = hub.cached_snapshot(name, revision)
    if folder is not None:
        print(f"{name} is on this machine already", file=sys.stderr)
        return folder
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    files = hub.remote_files(name, revision)
    whole, part = bytes_here(name, files)
    here, total = whole + part, sum(file.nbytes for file in files)
    check_space(name, total - here)
    rest = f", {cli.size(here)} of it here already" if here > total // 100 else ""
    print(f"{name}: {cli.size(total)} in {len(files)} files{rest}", file=sys.stderr)
    arrived, began = here, time.perf_counter()
    with _bar(here, total) as show, _stoppable() as stopped:

        def progress(done: int, _: int) -> None:
            nonlocal arrived
            if stopped.is_set():
                raise KeyboardInterrupt
            arrived = min(total, max(arrived, whole + done))  # it counts what it resumes
            show(arrived)

        try:
            folder = hub.download(name, revision, progress=progress)
        except KeyboardInterrupt:
            kept = sum(bytes_here(name, files))
            print(
                f"{cli.size(kept)} of {cli.size(total)} are kept, in whole files; the same "
                "command fetches the rest",
                file=sys.stderr,
            )
            raise
    print(f"done in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return folder


def bytes_here(name: str, files: list[hub.RemoteFile]) -> tuple[int, int]:
    """Bytes of `files` that are in the cache already: of whole files, and of parts."""
    blobs, whole, part = cached_repo(name).folder / "blobs", 0, 0
    for file in files:
        begun = blobs / f"{file.blob}.incomplete"
        if (blobs / file.blob).exists():
            whole += file.nbytes
        elif begun.exists():
            stat = begun.stat()  # may have its full length before it is filled
            part += min(file.nbytes, stat.st_size, 512 * stat.st_blocks)
    return whole, part


def check_space(name: str, nbytes: int) -> None:
    """Raise OutputError unless the disk of the Hub's cache has room for `nbytes` more."""
    folder = cache = cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes + _MARGIN:
        raise OutputError(
            f"{name} needs {cli.size(nbytes)} more, and the disk of {cache} has {cli.size(free)} "
            "free; make room (`qwen3vl models list` shows what checkpoints take), or set "
            "HF_HUB_CACHE to a folder on a larger disk"
        )


@contextmanager
def _bar(done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; yields what moves it."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Ctrl-C sets the event too, for the threads that download; the second one ends the process.

    The Hub's library waits for its threads, which may be long in coming.
    """
    stopped = threading.Event()

    def interrupted(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            if sys.stderr.isatty():
                sys.stderr.write(_SHOW)
            os._exit(130)
        stopped.set()
        print("stopping; Ctrl-C again leaves at once", file=sys.stderr)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
