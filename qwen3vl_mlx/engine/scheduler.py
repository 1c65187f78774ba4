"""Many requests on one model: who waits, whose prompt is read, who decodes.

`Scheduler.step` does one round: a token for every running row, and behind it a bounded amount of
reading (vision encoding, prefill) for those that are to join. All of it belongs to one thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.admission import Admission, Cost
from qwen3vl_mlx.engine.batch import Answered, Batch, Decoding, Draft, Drawn, draw_rows
from qwen3vl_mlx.engine.constraints import GrammarCompiler
from qwen3vl_mlx.engine.feature_cache import FeatureCache
from qwen3vl_mlx.engine.job import Job
from qwen3vl_mlx.engine.load import Counts, Limits, Load
from qwen3vl_mlx.engine.logprobs import to_host
from qwen3vl_mlx.engine.output import FinishReason
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.prefix_cache import Match, PrefixCache
from qwen3vl_mlx.engine.reader import PromptReader
from qwen3vl_mlx.engine.request import Handle
from qwen3vl_mlx.engine.room import make_room, shrink_caches, who_gives_way
from qwen3vl_mlx.engine.soon import Soon
from qwen3vl_mlx.engine.speculative import Speculation
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_CLEAR_EVERY = 256  # steps between returns of MLX's free buffers
_RESTORING = 2  # jobs whose beginnings are read from the disk at once


@dataclass
class Scheduler:
    """The state of all requests of one model."""

    model: Model
    tokenizer: Tokenizer
    compiler: GrammarCompiler
    admission: Admission
    prefix: PrefixCache | None
    features: FeatureCache
    limits: Limits
    speculation: Speculation | None = None
    wake: Callable[[], None] = field(default=lambda: None)  # from any thread: there is work

    def __post_init__(self) -> None:
        self.batch = Batch(self.model)
        self.waiting: deque[Job] = deque()
        self.reader: PromptReader[Job] = PromptReader(self.model, self.features)
        self.soon = Soon(self.prefix, self.reader, self.wake)
        self.running: dict[int, Job] = {}  # by id of the row
        self.counts = Counts()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reader.jobs or self.running)

    @property
    def active(self) -> int:
        """Requests that are being read or run."""
        return len(self.reader.jobs) + len(self.running)

    @property
    def stalled(self) -> bool:
        """Whether all that is asked waits for the disk."""
        return not self.active and any(map(_is_restoring, self.waiting))

    @property
    def caches(self) -> list[FeatureCache | PrefixCache]:
        """All that is kept for later requests, the least dear first."""
        drafter = [] if self.speculation is None else self.speculation.caches
        return [*drafter, self.features, *([] if self.prefix is None else [self.prefix])]

    @property
    def load(self) -> Load:
        return Load(
            len(self.waiting),
            len(self.reader.jobs),
            len(self.running),
            self.counts.steps,
            self.counts.finished,
            self.counts.failed,
            self.admission.together(self._costs()),
        )

    def add(self, handle: Handle, submitted: float) -> None:
        """Take in a request that fits alone; `submitted` is on the clock of time.perf_counter."""
        try:
            job = Job(handle, self.tokenizer, submitted, self.admission)
        except BaseException:
            self.counts.begun += 1
            self.counts.failed += 1
            raise
        if not self.busy:
            mx.reset_peak_memory()
        self.waiting.append(job)

    def cancel(self, handle: Handle) -> None:
        """End a request with what it has; nothing happens where it has ended."""
        for job in self._jobs():
            if job.handle is handle:
                self._finish(job, "cancelled")

    def step(self) -> None:
        """One round. Waits for the device at most once."""
        self.counts.steps += 1
        now = time.perf_counter()
        for job in [job for job in self._jobs() if now > job.deadline]:
            self._finish(job, "timeout")
        self._admit()
        if self.batch.unread is not None:
            try:
                self._decode()
            except Exception as error:  # noqa: BLE001
                self._fail_running(error)
        self._read_prompts()
        if self.counts.steps % _CLEAR_EVERY == 0:
            mx.clear_cache()

    def abandon(self, error: BaseException) -> None:
        """End every request with `error`, after the model itself has failed."""
        for job in self._jobs():
            job.handle.put(error)
        self.waiting.clear()
        self.reader.clear()
        self.running.clear()

    def close(self) -> None:
        """End every request as cancelled, and write what the prefix cache is to keep."""
        for job in self._jobs():
            self._finish(job, "cancelled")
        if self.prefix is not None:
            self.prefix.close()

    def _jobs(self) -> list[Job]:
        return [*self.waiting, *self.reader.jobs, *self.running.values()]

    # Waiting -> prefilling

    def _admit(self) -> None:
        restoring = sum(map(_is_restoring, self.waiting))
        for job in list(self.waiting):
            if not _is_restoring(job):  # one that is has its place and its memory
                if self.active + restoring >= self.limits.max_batch:
                    return
                if self.soon.is_being_read(job):
                    continue  # soon in the cache
                if not self._make_room([job.cost, *self._costs()]):
                    return
            if self.soon.is_restored(job, ask=restoring < _RESTORING):
                self.waiting.remove(job)
                with self._isolated(job):
                    self._begin(job)
            restoring = sum(map(_is_restoring, self.waiting))

    def _make_room(self, costs: list[Cost]) -> bool:
        return make_room(self.admission, costs, self.caches)

    def _costs(self, without: Job | None = None) -> list[Cost]:
        """What every active request may come to use; a prompt that is read needs no more."""
        reading = [*filter(_is_restoring, self.waiting), *self.reader.jobs]
        costs = [job.cost for job in reading if job is not without]
        running = list(self.running.values())
        return costs + [job.cost.answering for job in running if job is not without]

    def _begin(self, job: Job) -> None:
        match = Match(0, ())
        if self.prefix is not None:
            match = self.prefix.match(job.key, job.restoring)
            job.restoring = None
        job.held = match.length
        if job.row is None:
            job.cached = match.length
        layers = kv_cache.layers_with(match.layers, self.model.config.text, self.limits.kv_bits)
        job.prefill = Prefill(self.model, job.prompt, layers, match.length)
        job.handle.phase = "prefilling"
        self.reader.add(job)
        self._leaves_queue(job)

    def _leaves_queue(self, job: Job) -> None:
        self.counts.begun += not job.begun
        job.begun = True

    # Prefilling -> running

    def _read_prompts(self) -> None:
        """Queue about as many tokens of prompts as the running rows may wait for."""
        alone = not self.batch.rows
        budget = self.limits.prefill_chunk if alone else self.limits.interleave
        done: list[tuple[Job, Drawn]] = []
        while budget > 0 and (job := self.reader.next()) is not None:
            with self._isolated(job):
                budget -= self.reader.advance(job, min(budget, job.chunk), wait=alone)
                if job.prefill is not None and job.prefill.hidden is not None:
                    done.append((job, self._first_token(job, job.prefill.hidden)))
        if done:
            try:
                self._join(done)
            except Exception as error:  # noqa: BLE001
                self._fail_running(error)
                for job, _ in done:
                    self._fail(job, error)
        if self.speculation is not None and budget > 0 and self.batch.rows:
            self.speculation.advance(budget)

    def _first_token(self, job: Job, last: mx.array) -> Drawn:
        """Draw a row's first token from its prompt's last hidden state (1, hidden_size)."""
        row = job.row
        if row is None:
            row = job.start(self.model.config.text.vocab_size, self.compiler)
        drawn = draw_rows(self.model.language_model.logits(last), [row])
        self._remember(job)
        return drawn

    def _join(self, done: Iterable[tuple[Job, Drawn]]) -> None:
        rows, layers, drawn = [], [], []
        for job, first in done:
            assert job.row is not None
            assert job.prefill is not None
            self.reader.remove(job)
            job.handle.phase = "running"
            self.running[id(job.row)] = job
            drawn.append(first)
            if job.row.drawn < job.row.max_tokens:
                rows.append(job.row)
                layers.append(job.prefill.layers)
            job.prefill = None
            if self.speculation is not None and rows and rows[-1] is job.row:
                self.speculation.begin(job.row, job.request)
        self.batch.join(rows, layers, drawn)

    # Running

    def _decode(self) -> None:
        """Queue every row's next token, then read the ones queued before."""
        batch, before, speculation = self.batch, self.batch.unread, self.speculation
        assert before is not None
        if before.drafted or (speculation is not None and speculation.waits(batch.rows)):
            assert speculation is not None
            batch.unread = None
            self._read(before)
            if batch.rows:
                drafts = speculation.drafts(batch.rows)
                self._draw(batch.verify(drafts), drafts)
            return
        self._let_go([row for row in batch.rows if row.drawn >= row.max_tokens])
        logits: mx.array | None = None
        waits = any(row.waits_for_host for row in batch.rows)
        if batch.rows:
            logits = batch.forward()
            if not waits:
                self._draw(logits)
        if logits is None or waits:
            batch.unread = None
        if logits is not None and waits:
            mx.async_eval(logits)
        rows = list(batch.rows)
        self._read(before)
        if logits is not None and waits and batch.rows:
            kept = [i for i, row in enumerate(rows) if any(row is other for other in batch.rows)]
            if len(kept) < len(rows):
                logits = logits[mx.array(kept)]
            self._draw(logits)

    def _draw(self, logits: mx.array, drafts: list[Draft] | None = None) -> None:
        for row, error in self.batch.draw(logits, drafts):
            self._fail(self.running[id(row)], error)

    def _read(self, drawn: Drawn) -> None:
        for answer in self.batch.read(drawn):
            job = self.running.get(id(answer.row))
            if job is None:
                continue  # it ended, or was put back, while this token was on its way
            with self._isolated(job):
                if (reason := self._take(job, answer)) is not None:
                    self._finish(job, reason)

    def _take(self, job: Job, answer: Answered) -> FinishReason | None:
        """Hand a row's tokens to its job; why the answer ends with one of them, if it does."""
        row, job.state = answer.row, answer.state
        for i, (token, arrays) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            logprob = None if arrays is None else to_host(arrays, token, self.tokenizer)
            reason = job.take(token, logprob)
            row.accepted += i < answer.accepted
            if reason is not None:
                return reason
        return "length" if row.length > job.reserved_length and not self._grow(job) else None

    def _grow(self, job: Job) -> bool:
        """Reserve room for more tokens than were predicted for a request without max_tokens.

        Where there is none beside others, this request is put back until there is, or others are.
        False where it would not fit alone.
        """
        more = job.grown(self.admission)
        if not self.admission.fits(more):
            return False
        while not self._make_room([more, *self._costs(without=job)]):
            running = self.running.values()
            giver = who_gives_way(self.admission, job, self.reader.jobs, running)
            if giver is None:
                return False
            self._put_back(giver)
            if giver is job:
                return True
        job.cost, job.reserved_tokens = more, job.grown_tokens
        return True

    def _put_back(self, job: Job) -> None:
        """Let a job wait again, before all others, with what it has said so far."""
        self._leave(job)
        job.put_back(self.admission)
        self.waiting.appendleft(job)

    def _fail_running(self, error: Exception) -> None:
        """End all rows: a pass is shared, and nothing is known of any row's cache now."""
        self.batch = Batch(self.model)
        self._keep([])
        for job in list(self.running.values()):
            self._fail(job, error)

    def _let_go(self, rows: Iterable[Decoding]) -> None:
        """Take rows out of the batch that have no more to draw."""
        gone = list(rows)
        for row in gone:
            self._remember(self.running[id(row)])
        self._keep([row for row in self.batch.rows if row not in gone])

    def _keep(self, rows: list[Decoding]) -> None:
        """Let all other rows go."""
        self.batch.keep(rows)
        if self.speculation is not None:
            self.speculation.keep(rows)

    def _remember(self, job: Job) -> None:
        """Put what a job has computed into the prefix cache. Where that fails it is not kept."""
        if self.prefix is None:
            return
        try:
            if (layers := job.computed(self.batch)) is not None:
                self.prefix.insert(job.whole_key, layers)
            shrink_caches(self.admission, self._costs(), self.caches)
        except Exception:  # noqa: BLE001
            _log.warning("a prefix could not be kept", exc_info=True)

    # The end

    def _finish(self, job: Job, reason: FinishReason) -> None:
        if job.ended:
            return
        try:
            chunks = job.end(reason)
        except Exception as error:  # noqa: BLE001
            self._fail(job, error)
            return
        self._leave(job)
        self._end(job)
        self.counts.finished += 1
        for chunk in chunks:
            job.handle.put(chunk)

    def _fail(self, job: Job, error: BaseException) -> None:
        if job.ended:
            return
        self._leave(job, keep=False)
        self._end(job)
        self.counts.failed += 1
        job.handle.put(error)

    def _end(self, job: Job) -> None:
        job.ended = True
        self._leaves_queue(job)

    @contextmanager
    def _isolated(self, job: Job) -> Iterator[None]:
        """What goes wrong inside ends this request, and no other."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self._fail(job, error)

    def _leave(self, job: Job, *, keep: bool = True) -> None:
        """Drop all that holds the job; keep what it computed in the prefix cache."""
        if keep:
            self._remember(job)
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.reader.jobs:
            self.reader.remove(job)
        if job.row is not None:
            self._keep([row for row in self.batch.rows if row is not job.row])
            self.running.pop(id(job.row), None)
            unread = self.batch.unread
            if unread is not None and not any(id(row) in self.running for row in unread.rows):
                self.batch.unread = None


def _is_restoring(job: Job) -> bool:
    """Whether a waiting job's beginning is read from the disk, or was and is held for it."""
    return job.restoring is not None
