"""What of a waiting prompt will be in the prefix cache soon, so that it need not be computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwen3vl_mlx.engine.job import Job
from qwen3vl_mlx.engine.prefix_cache import PrefixCache
from qwen3vl_mlx.engine.radix import shared_prefix
from qwen3vl_mlx.engine.reader import PromptReader

_WORTH_WAITING = 32  # tokens of a prompt that is being read, for another that begins alike


@dataclass(frozen=True)
class Soon:
    """Who waits for another job's reading, or for the disk.

    wake: called from another thread when the disk has been read.
    """

    prefix: PrefixCache | None
    reader: PromptReader[Job]
    wake: Callable[[], None]

    def is_being_read(self, job: Job) -> bool:
        """Whether a prompt that begins like this one is on its way into the prefix cache.

        Decided anew only when readers have come or gone.
        """
        if self.prefix is None:
            return False
        if job.awaits is None or job.awaits[0] != self.reader.changes:
            values = job.key.values
            shared = max(
                (shared_prefix(values, other.key.values) for other in self.reader.jobs), default=0
            )
            gain = shared - self.prefix.peek(job.key) if shared >= _WORTH_WAITING else 0
            job.awaits = (self.reader.changes, gain >= _WORTH_WAITING)
        return job.awaits[1]

    def is_restored(self, job: Job, *, ask: bool) -> bool:
        """Whether nothing of the job's prompt is on its way from the disk.

        ask: whether reading may start now; if not, a job that has not asked waits, too.
        """
        if self.prefix is None:
            return True
        if not job.asked_disk:
            if not ask:
                return False
            job.asked_disk, job.restoring = True, self.prefix.restore(job.key)
            if job.restoring is not None:
                job.restoring.future.add_done_callback(lambda _: self.wake())
        return job.restoring is None or job.restoring.done
