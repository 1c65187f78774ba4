"""`caption`: find the pictures, leave out what is done, ask about the rest, say how it went."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen3vl_mlx.album.describing import Job, Task, read_picture
from qwen3vl_mlx.album.facts import read_facts
from qwen3vl_mlx.album.finding import Picture, find
from qwen3vl_mlx.album.options import selection_of, silence_pillow, task_of
from qwen3vl_mlx.album.progress import Progress
from qwen3vl_mlx.album.records import Status
from qwen3vl_mlx.album.results import Results, open_results
from qwen3vl_mlx.album.template import Context, shown
from qwen3vl_mlx.album.working import PicturesFailedError, Work, work_off
from qwen3vl_mlx.answering import open_answerer
from qwen3vl_mlx.errors import ImageError, InputError


@dataclass(frozen=True)
class Plan:
    """What is to be asked, and how many pictures there are of each status."""

    jobs: list[tuple[Job, Status]]
    counts: Counter[Status]


def caption(args: argparse.Namespace) -> None:
    """Describe pictures as `args` say. Raises Qwen3VLError, PicturesFailedError at the end."""
    silence_pillow()
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be at least 1, got {args.limit}")
    selection, task = selection_of(args), task_of(args, counting=True)
    say = Progress(None, quiet=args.quiet, verbose=False)
    closed: list[str] = []  # folders that cannot be looked into
    pictures = list(find(args.sources, selection, closed.append))
    for problem in closed:
        say.say(f"failed: {problem}")
    results = open_results(
        args.out, task.settings, task.schema, say.note, force=args.force, read_only=args.dry_run
    )
    try:
        plan = make_plan(pictures, results, args)
        tell_plan(plan, len(pictures), results, args, say)
        if args.dry_run:
            show_plan(plan, task)
            return
        failed = ask(plan, task, results, args) if plan.jobs else 0
    finally:
        results.close()
    earlier = 0 if args.force or args.retry_failed else plan.counts["failed"]
    conclude(failed, earlier, len(closed))


def make_plan(pictures: Sequence[Picture], results: Results, args: argparse.Namespace) -> Plan:
    """Look at each picture's status."""
    counts: Counter[Status] = Counter()
    jobs = []
    settled = {"done", "kept"} if args.retry_failed else {"done", "failed", "kept"}
    for index, picture in enumerate(pictures, 1):
        status = results.status(picture)
        counts[status] += 1
        if args.force or status not in settled:
            jobs.append((Job(picture, index, len(pictures)), status))
    return Plan(jobs[: args.limit], counts)


def tell_plan(
    plan: Plan, found: int, results: Results, args: argparse.Namespace, say: Progress
) -> None:
    """Notes on what is not asked, and why."""
    counts = plan.counts
    if not found:
        say.note(
            "no pictures were found" + ("" if args.recursive else " (--recursive looks deeper)")
        )
    if counts["other settings"]:
        say.note(
            f"{_pictures(counts['other settings'])} answered with another prompt, model or options "
            "before: asked again"
        )
    if counts["kept"] and not args.force:
        say.note(
            f"{_pictures(counts['kept'])} left out: the text beside was written or edited by "
            "somebody else (--force replaces it)"
        )
    if counts["done"] and not args.force:
        rest = f"{len(plan.jobs):,} to do" if plan.jobs else "nothing to do"
        say.note(f"{_pictures(counts['done'])} done before, {rest}")


def show_plan(plan: Plan, task: Task) -> None:
    """The prompts that would be asked, on stdout."""
    for job, status in plan.jobs:
        print(f"{shown(job.picture.file)} ({status})")
        try:
            data, stamp = read_picture(job.picture)
        except ImageError as error:
            print(f"    would fail: {error}")
            continue
        when = stamp.modified_ns / 1e9
        context = Context(job.picture, read_facts(data), when, job.index, job.count)
        for line in task.prompt.fill(context).splitlines():
            print(f"    {line}")


def ask(plan: Plan, task: Task, results: Results, args: argparse.Namespace) -> int:
    """Ask about all that is planned. Returns how many failed."""
    answerer = open_answerer(args, at_once=min(args.at_once, len(plan.jobs)))
    progress = Progress(len(plan.jobs), quiet=args.quiet, verbose=args.verbose)
    started = time.monotonic()
    try:
        work_off(Work(answerer, task, results, progress), _jobs(plan))
    except BaseException:
        if args.out:
            progress.note(
                f"{progress.done:,} of {_pictures(len(plan.jobs))} are done; the same command goes "
                "on from there"
            )
        raise
    spent = time.monotonic() - started
    answered = progress.done - progress.failed
    if answered and not args.quiet:
        progress.say(
            f"{_pictures(answered)} described by {answerer.where} in {spent:.1f} s, "
            f"{answered / spent:.2f} a second" + (f"; see {results.name}" if args.out else "")
        )
    return progress.failed


def _jobs(plan: Plan) -> Iterator[Job]:
    return (job for job, _ in plan.jobs)


def conclude(failed: int, earlier: int, closed: int) -> None:
    """Raise PicturesFailedError where a picture has no answer."""
    faults = []
    if failed:
        faults.append(f"{_pictures(failed)} failed")
    if earlier:
        faults.append(f"{_pictures(earlier)} failed before (--retry-failed asks again)")
    if closed:
        faults.append(f"{closed} folder{'s' * (closed > 1)} could not be looked into")
    if faults:
        raise PicturesFailedError(" and ".join(faults))


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"
