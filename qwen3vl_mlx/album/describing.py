"""One picture to its record: read, asked about, and what its faults are called.

A fault of one picture becomes a record. What would befall every picture, such as a server that
is gone, is raised.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen3vl_mlx.album.facts import read_facts
from qwen3vl_mlx.album.finding import Picture
from qwen3vl_mlx.album.records import Outcome, Record, Stamp, digest, stamp_at
from qwen3vl_mlx.album.template import Context, Template, shown
from qwen3vl_mlx.answering import Answerer, Question
from qwen3vl_mlx.client import ServerGoneError, ServerLoadingError
from qwen3vl_mlx.engine.output import Completion, collect
from qwen3vl_mlx.errors import (
    CheckpointError,
    EngineClosedError,
    HubError,
    ImageError,
    InputError,
    OutputError,
    QueueFullError,
    Qwen3VLError,
    TooLargeError,
)
from qwen3vl_mlx.media import load_image
from qwen3vl_mlx.media_decode import HEAD_BYTES, check_format

# Whatever is asked next would meet the same.
_FATAL = (
    CheckpointError,
    EngineClosedError,
    HubError,
    OutputError,
    ServerGoneError,
    ServerLoadingError,
)
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # seconds before a full queue is asked again
_CUT = {
    "timeout": "the answer was cut off by --timeout",
    "constraint": "the answer could not follow the schema to its end",
    "cancelled": "the answer was cancelled",
}


class StoppedError(Exception):
    """The run is being stopped: what was begun does not count."""


class FolderGoneError(Qwen3VLError):
    """The folder given is there no more, with all its pictures."""


@dataclass(frozen=True)
class Task:
    """What is asked about every picture. settings: a fingerprint of all that decides answers."""

    prompt: Template
    settings: str
    system: str | None
    schema: Mapping[str, Any] | None
    sampling: Mapping[str, Any]
    pixels: Mapping[str, Any]
    timeout: float | None

    def question(self, prompt: str, data: bytes) -> Question:
        schema = self.schema
        return Question(
            prompt,
            (data,),
            system=self.system,
            sampling=self.sampling,
            grammar=None if schema is None else {"type": "json_schema", "value": dict(schema)},
            timeout=self.timeout,
            **self.pixels,
        )


@dataclass(frozen=True)
class Job:
    """A picture to ask about, its number among those found, from 1, and how many these are.

    may_grow: it may be on its way still, so that one that is damaged is not to be recorded.
    """

    picture: Picture
    index: int = 0
    count: int = 0
    may_grow: bool = False


@dataclass(frozen=True)
class Done:
    """What came of a job. doubt: why it may not be the picture's fault, where that is unclear."""

    job: Job
    record: Record
    doubt: Exception | None = None


class DamagedError(ImageError):
    """A picture cannot be decoded, and may be on its way still."""


@dataclass(frozen=True)
class Describer:
    """Does jobs, in any number of threads. stop: ends them early."""

    answerer: Answerer
    task: Task
    stop: threading.Event

    def __call__(self, job: Job) -> Done:
        """Raises DamagedError where a picture may grow still, StoppedError, and what is fatal."""
        name = shown(job.picture.file)
        known = Record(
            job.picture, self.task.settings, "error", "", stamp=stamp_at(job.picture.path)
        )
        try:
            data, stamp = read_picture(job.picture)
            if job.may_grow:
                load_image(data, name=name)
        except ImageError as error:
            if job.may_grow:
                raise DamagedError(str(error)) from error
            return Done(job, replace(known, value=str(error)))
        known = replace(known, facts=read_facts(data), stamp=stamp, sha256=digest(data))
        context = Context(job.picture, known.facts, stamp.modified_ns / 1e9, job.index, job.count)
        question = self.task.question(self.task.prompt.fill(context), data)
        try:
            return Done(job, self._answered(known, self._ask(question)))
        except (StoppedError, *_FATAL):
            raise
        except Exception as error:
            # Whatever one picture brings about, the others are to be described.
            if self.stop.is_set():
                raise StoppedError from error
            problem, doubt = fault_of(error, data, name)
            return Done(job, replace(known, value=problem), doubt)

    def _ask(self, question: Question) -> Completion:
        """The whole answer. A queue that is full is asked again, for as long as it takes."""
        wait = _FIRST_WAIT
        while not self.stop.is_set():
            try:
                return self._answer(question)
            except QueueFullError:  # noqa: PERF203
                self.stop.wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise StoppedError

    def _answer(self, question: Question) -> Completion:
        chunks = []
        with self.answerer.stream(question) as stream:
            for chunk in stream:
                if self.stop.is_set():
                    raise StoppedError
                chunks.append(chunk)
        return collect(chunks)

    def _answered(self, known: Record, answer: Completion) -> Record:
        kind, value = self._read(answer)
        return replace(
            known,
            outcome=kind,
            value=value,
            model=self.answerer.model,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
        )

    def _read(self, answer: Completion) -> tuple[Outcome, Any]:
        """What an answer amounts to."""
        if not answer.reasoning_closed:
            return "error", "the answer ended before the thought had; raise --max-tokens"
        if answer.finish_reason in _CUT:
            return "error", _CUT[answer.finish_reason]
        if self.task.schema is None:
            return "caption", answer.text
        try:
            return "data", json.loads(answer.text)
        except (ValueError, RecursionError):
            reason = answer.finish_reason
            return "error", f"the answer is no whole JSON ({reason}); raise --max-tokens"


def read_picture(picture: Picture) -> tuple[bytes, Stamp]:
    """A file's bytes, and its stamp from before they were read.

    Raises ImageError for what is no picture's file, FolderGoneError where the folder is gone.
    """
    name, path = shown(picture.file), picture.path
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its writer
            raise ImageError(f"{name} is no regular file; expected one image file")
        with open(path, "rb") as file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            head = file.read(HEAD_BYTES)
            check_format(head, name)  # before gigabytes of something else are read
            return head + file.read(), stamp
    except FileNotFoundError as error:
        if not os.path.isdir(picture.root):
            raise FolderGoneError(
                f"{picture.root} is gone: was its disk removed? What was done is kept"
            ) from error
        raise ImageError(f"{name} was there and is gone") from error
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error.strerror})") from error


def fault_of(error: Exception, data: bytes, name: str) -> tuple[str, Exception | None]:
    """What is wrong with a picture that was refused, and whether that is in doubt.

    What refused it may know it by another name, or not at all: its own decoding tells.
    """
    if isinstance(error, InputError):
        try:
            load_image(data, name=name)
        except ImageError as fault:
            return str(fault), None
    problem = " ".join(str(error).split())
    if isinstance(error, TooLargeError):  # for a server's limits
        return problem, None
    if not isinstance(error, Qwen3VLError):
        problem = f"{type(error).__name__}: {problem}"
    return problem, error
