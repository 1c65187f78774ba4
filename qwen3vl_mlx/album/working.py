"""The loop of `caption` and `watch`: jobs to a crew, what came of them to the results."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qwen3vl_mlx.album.crew import Crew, Ended
from qwen3vl_mlx.album.describing import Describer, Done, Job, Task
from qwen3vl_mlx.album.progress import Progress
from qwen3vl_mlx.album.results import Results
from qwen3vl_mlx.answering import Answerer
from qwen3vl_mlx.errors import InputError, OutputError, Qwen3VLError

_IN_A_ROW = 3


class PicturesFailedError(Qwen3VLError):
    """The run went to its end, and some pictures have no answer."""

    exit_code = 3


class Doubts:
    """Failures that may be nobody's fault but the settings' or the machine's.

    They are held back. An answer clears them; three that say the same are taken for what every
    picture would meet, and the last is raised. Refusals of input count only before the first
    answer.
    """

    def __init__(self) -> None:
        self.held: list[Done] = []
        self.answered = False

    def cleared(self, done: Done) -> list[Done]:
        """What is certain now."""
        if done.record.outcome != "error":
            self.answered = True
            return [*self.release(), done]
        if done.doubt is None or (isinstance(done.doubt, InputError) and self.answered):
            return [done]
        certain = []
        if self.held and str(self.held[-1].doubt) != str(done.doubt):
            certain = self.release()
        self.held.append(done)
        if len(self.held) == _IN_A_ROW:
            self.held.clear()  # they are asked again by the next run
            raise done.doubt
        return certain

    def release(self) -> list[Done]:
        """Those that were held, as the pictures' own faults after all."""
        held, self.held = self.held, []
        return held


class Work:
    """Jobs under way, and the results they go to."""

    def __init__(self, answerer: Answerer, task: Task, results: Results, progress: Progress):
        self.answerer = answerer
        self.results = results
        self.progress = progress
        self.stop = threading.Event()
        self.crew: Crew[Job, Done] = Crew(Describer(answerer, task, self.stop), answerer.at_once)
        self.doubts = Doubts()

    def keep(self, ended: Ended[Job, Done]) -> None:
        """Write what came of a job. Raises what ends the run."""
        if ended.error is not None:
            raise ended.error
        assert ended.result is not None
        for done in self.doubts.cleared(ended.result):
            self._write(done)

    def _write(self, done: Done) -> None:
        record = done.record
        with self.progress.aside():
            problem = self.results.add(record)
        if record.outcome == "error":
            problem = record.value
        self.progress.count(record, problem)

    def finish(self) -> None:
        """Write what was held back."""
        for done in self.doubts.release():
            self._write(done)

    def give_up(self) -> None:
        """Stop what is under way; what has ended by now is written."""
        self.stop.set()
        while (ended := self.crew.take(0)) is not None:
            if ended.result is not None and ended.result.doubt is None:
                self._write(ended.result)

    @contextmanager
    def running(self) -> Iterator[None]:
        """However this ends: nothing goes on behind it, and nothing that was answered is lost."""
        try:
            yield
            self.finish()
        except (OutputError, BrokenPipeError):
            raise  # there is nowhere to write
        except BaseException:
            self.give_up()
            raise
        finally:
            self.stop.set()
            self.crew.dismiss()
            self.answerer.close()
            self.progress.close()


def work_off(work: Work, jobs: Iterator[Job], wait: float = 0.2) -> None:
    """Do all jobs. wait: seconds after which the progress is looked at anyway."""
    with work.running():
        while True:
            while work.crew.free and (job := next(jobs, None)) is not None:
                work.crew.give(job)
            if not work.crew.busy:
                return
            ended = work.crew.take(wait)
            if ended is not None:
                work.keep(ended)
            work.progress.tick()
