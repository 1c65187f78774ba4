"""`watch`: pictures of folders as they come, each once, until it is told to stop."""

from __future__ import annotations

import argparse
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from qwen3vl_mlx.album.arrivals import Arrivals
from qwen3vl_mlx.album.crew import Ended
from qwen3vl_mlx.album.describing import DamagedError, Done, Job
from qwen3vl_mlx.album.finding import Selection, checked_root, starts
from qwen3vl_mlx.album.options import selection_of, silence_pillow, task_of
from qwen3vl_mlx.album.progress import Progress
from qwen3vl_mlx.album.records import Stamp
from qwen3vl_mlx.album.results import Results, open_results
from qwen3vl_mlx.album.watch_state import left_alone
from qwen3vl_mlx.album.working import PicturesFailedError, Work
from qwen3vl_mlx.answering import open_answerer
from qwen3vl_mlx.errors import InputError

_DEBOUNCE_MS, _STEP_MS, _TICK_MS = 100, 50, 200


def watch(args: argparse.Namespace) -> None:
    """Describe new pictures until Ctrl-C or SIGTERM. Raises Qwen3VLError."""
    silence_pillow()
    for option, value in (("--settle", args.settle), ("--patience", args.patience)):
        if not 0 <= value < math.inf:
            raise InputError(f"{option} must be a number of seconds, got {value}")
    selection, task = selection_of(args), task_of(args, counting=False)
    roots = _roots(args.folders, selection)
    # Where answers go to a file, a line for each picture shows that something happens.
    progress = Progress(
        None, quiet=args.quiet, verbose=args.verbose or (args.out is not None and not args.quiet)
    )
    results = open_results(args.out, task.settings, task.schema, progress.note)
    try:
        known: dict[str, Stamp] = {}
        for root in roots:
            known |= left_alone(root, selection, args.out, progress.note, existing=args.existing)
        arrivals = Arrivals(roots, selection, known, settle=args.settle, patience=args.patience)
        work = Work(open_answerer(args, at_once=args.at_once), task, results, progress)
        with _ended_by(signal.SIGTERM):
            _watch(work, arrivals, results, progress)
    finally:
        results.close()
    if progress.failed:
        raise PicturesFailedError(f"{progress.failed} of {progress.done} pictures failed")


def _roots(folders: Sequence[str], selection: Selection) -> list[str]:
    """The folders to watch, without links: events name files so. Raises InputError."""
    roots = []
    for folder in folders:
        root = os.path.realpath(checked_root(folder))
        if not os.path.isdir(root):
            raise InputError(f"{folder} is no folder; give a folder to watch")
        roots += [os.path.normpath(os.path.join(root, start)) for start in starts(root, selection)]
    return list(dict.fromkeys(roots))


def _watch(work: Work, arrivals: Arrivals, results: Results, progress: Progress) -> None:
    """The loop. Ctrl-C is how it ends."""
    import watchfiles

    progress.note(f"watching {', '.join(arrivals.roots)} ({work.answerer.where}); Ctrl-C ends it")
    events = watchfiles.watch(
        *arrivals.roots,
        watch_filter=None,
        recursive=arrivals.selection.recursive,
        debounce=_DEBOUNCE_MS,
        step=_STEP_MS,
        rust_timeout=_TICK_MS,
        yield_on_timeout=True,
        ignore_permission_denied=True,
    )
    try:
        with work.running():
            arrivals.see([])
            for changes in events:
                arrivals.see(path for kind, path in changes if kind != watchfiles.Change.deleted)
                while (ended := work.crew.take(0)) is not None:
                    _settle(ended, work, arrivals)
                _begin(work, arrivals, results)
                if not work.crew.busy:
                    work.finish()  # nothing comes that would clear a doubt
    except KeyboardInterrupt:
        described = progress.done - progress.failed
        progress.note(f"ended; described {described} picture{'s' * (described != 1)}")


def _begin(work: Work, arrivals: Arrivals, results: Results) -> None:
    """Ask about files that are whole, as many as there is room for."""
    while work.crew.free and (picture := arrivals.whole()) is not None:
        if results.status(picture) in ("done", "failed", "kept"):
            arrivals.settled(picture, None)
        else:
            work.crew.give(Job(picture, may_grow=arrivals.may_grow(picture)))


def _settle(ended: Ended[Job, Done], work: Work, arrivals: Arrivals) -> None:
    """Write what came of a picture, or wait for the rest of it."""
    if isinstance(ended.error, DamagedError):
        arrivals.put_back(ended.job.picture)
        return
    work.keep(ended)
    assert ended.result is not None  # else keep() has raised
    arrivals.settled(ended.job.picture, ended.result.record.stamp)


@contextmanager
def _ended_by(number: signal.Signals) -> Iterator[None]:
    """Let a signal do what Ctrl-C does: launchd and systemd end a command so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)
