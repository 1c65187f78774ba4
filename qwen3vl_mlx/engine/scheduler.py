"""Many requests on one model: who waits, whose prompt is read, who decodes.

`Scheduler.step` does one round: a token for every running row, and behind it a bounded amount of
reading (vision encoding, prefill) for those that are to join. All of it belongs to one thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
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
from qwen3vl_mlx.engine.prefix_cache import Key, Match, PrefixCache
from qwen3vl_mlx.engine.radix import shared_prefix
from qwen3vl_mlx.engine.reader import PromptReader
from qwen3vl_mlx.engine.request import Handle
from qwen3vl_mlx.engine.speculative import Speculation
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.tokenizer import Tokenizer

_CLEAR_EVERY = 256  # steps between returns of MLX's free buffers
_WORTH_WAITING = 32  # tokens of a prompt that is being read, for another that begins alike


@dataclass
class Scheduler:
    """The state of all requests of one model."""

    model: Model
    tokenizer: Tokenizer
    compiler: GrammarCompiler
    admission: Admission
    prefix: PrefixCache | None
    features: FeatureCache
    limits: Limits = field(default_factory=Limits)
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        self.batch = Batch(self.model)
        self.waiting: deque[Job] = deque()
        self.reader: PromptReader[Job] = PromptReader(self.model, self.features)
        self.running: dict[int, Job] = {}  # by id of the row
        self.counts = Counts()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reader.jobs or self.running)

    @property
    def idle(self) -> bool:
        """Whether all that is asked waits for the disk."""
        return not (self.reader.jobs or self.running)

    @property
    def caches(self) -> list[FeatureCache | PrefixCache]:
        """All that is kept for later requests, the least dear first."""
        drafter = [] if self.speculation is None else [*self.speculation.drafter.caches]
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
        """Take in a request; `submitted` is on the clock of time.perf_counter."""
        job = Job(handle, self.tokenizer, submitted, self.admission)
        if problem := self.admission.refuse(job.cost):
            self._fail(job, InputError(problem))
            return
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
                # The pass is shared: nothing is known of any row's cache now.
                self.batch = Batch(self.model)
                self._keep([])
                for job in list(self.running.values()):
                    self._fail(job, error)
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
        for job in list(self.waiting):
            if len(self.reader.jobs) + len(self.running) >= self.limits.max_batch:
                return
            if self._is_being_read(job.key) or not self._is_restored(job):
                continue  # soon in the cache
            if not self._make_room(job.cost):
                return
            self.waiting.remove(job)
            with self._isolated(job):
                self._begin(job)

    def _is_being_read(self, key: Key) -> bool:
        """Whether a prompt that begins like this one is on its way into the prefix cache."""
        if self.prefix is None:
            return False
        shared = max(
            (shared_prefix(key.values, job.key.values) for job in self.reader.jobs), default=0
        )
        return shared >= _WORTH_WAITING and shared - self.prefix.peek(key) >= _WORTH_WAITING

    def _is_restored(self, job: Job) -> bool:
        """Whether nothing of the job's prompt is on its way from the disk."""
        if self.prefix is None:
            return True
        if not job.asked_disk:
            job.asked_disk, job.restoring = True, self.prefix.restore(job.key)
        return job.restoring is None or job.restoring.done

    def _make_room(self, cost: Cost, own: Job | None = None) -> bool:
        """Whether a request of this cost may run too, after caches have given way.

        own: the job that has this cost, where it is active already.
        """
        others = self._costs(without=own)
        over = self.admission.together([cost, *others]) - self.admission.available
        if over > 0:
            return not others  # alone it was found to fit
        self._shrink_caches(over)
        return True

    def _costs(self, without: Job | None = None) -> list[Cost]:
        """What every active request may come to use; a prompt that is read needs no more."""
        reading, running = list(self.reader.jobs), list(self.running.values())
        costs = [job.cost for job in reading if job is not without]
        return costs + [job.cost.answering for job in running if job is not without]

    def _shrink_caches(self, over: int) -> None:
        """Let caches give way to requests that leave `-over` bytes."""
        excess = over + sum(cache.stats.bytes for cache in self.caches)
        for cache in self.caches:
            if excess > 0:
                before = cache.stats.bytes
                cache.shrink(max(0, before - excess))
                excess -= before - cache.stats.bytes

    def _begin(self, job: Job) -> None:
        match = Match(0, ())
        if self.prefix is not None:
            match = self.prefix.match(job.key, job.restoring)
            job.restoring = None
            job.cached = match.length
        layers = kv_cache.layers_with(match.layers, self.model.config.text, self.limits.kv_bits)
        job.prefill = Prefill(self.model, job.request.prompt, layers, job.cached)
        job.handle.phase = "prefilling"
        self.reader.add(job)

    # Prefilling -> running

    def _read_prompts(self) -> None:
        """Queue about as many tokens of prompts as the running rows may wait for."""
        alone = not self.batch.rows
        budget = self.limits.prefill_chunk if alone else self.limits.interleave
        done: list[tuple[Job, Drawn]] = []
        while budget > 0 and (job := self.reader.next()) is not None:
            with self._isolated(job):
                budget -= self.reader.advance(job, budget, wait=alone)
                if job.prefill is not None and job.prefill.hidden is not None:
                    done.append((job, self._first_token(job, job.prefill.hidden)))
        if done:
            self._join(done)
        if self.speculation is not None and budget > 0 and self.batch.rows:
            self.speculation.drafter.advance(budget)

    def _first_token(self, job: Job, last: mx.array) -> Drawn:
        """Draw a row's first token from its prompt's last hidden state (1, hidden_size)."""
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
                self.speculation.drafter.begin(job.row, job.request)
        self.batch.join(rows, layers, drawn)

    # Running

    def _decode(self) -> None:
        """Queue every row's next token, then read the ones queued before."""
        batch, before, speculation = self.batch, self.batch.unread, self.speculation
        assert before is not None
        if speculation is not None and (before.drafted or speculation.waits(batch.rows)):
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
                continue  # it ended while this token was on its way
            with self._isolated(job):
                if (reason := self._take(job, answer)) is not None:
                    self._finish(job, reason)

    def _take(self, job: Job, answer: Answered) -> FinishReason | None:
        """Hand a row's tokens to its job; why the answer ends with one of them, if it does."""
        row = answer.row
        for i, (token, arrays) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            logprob = None if arrays is None else to_host(arrays, token, self.tokenizer)
            reason = job.take(token, logprob)
            row.accepted += i < answer.accepted
            if reason is not None:
                return reason
        return "length" if row.length > job.reserved_length and not self._grow(job) else None

    def _grow(self, job: Job) -> bool:
        """Reserve room for more tokens than were predicted for a request without max_tokens."""
        more = job.grown(self.admission).answering
        if not self._make_room(more, job):
            return False
        job.cost = more
        return True

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
            self.speculation.drafter.keep(rows)

    def _remember(self, job: Job) -> None:
        """Put what a job has computed into the prefix cache."""
        if self.prefix is None:
            return
        if job.prefill is not None:
            if job.prefill.done > job.cached:
                layers = [kv_cache.layer_rows(layer) for layer in job.prefill.layers]
                self.prefix.insert(job.key, layers)
        elif job.row is not None and job.row in self.batch.rows:
            # Fed tokens are all read, but for one that a row leaving early may have on its way.
            key = job.key_with(job.row.tokens)
            self.prefix.insert(key, self.batch.rows_of(job.row, min(job.row.length, len(key))))
        self._shrink_caches(self.admission.together(self._costs()) - self.admission.available)

    # The end

    def _finish(self, job: Job, reason: FinishReason) -> None:
        try:
            chunks = job.end(reason)
        except Exception as error:  # noqa: BLE001
            self._fail(job, error)
            return
        self.counts.finished += 1
        self._forget(job)
        for chunk in chunks:
            job.handle.put(chunk)

    def _fail(self, job: Job, error: BaseException) -> None:
        self.counts.failed += 1
        self._forget(job, keep=False)
        job.handle.put(error)

    @contextmanager
    def _isolated(self, *jobs: Job) -> Iterator[None]:
        """What goes wrong inside ends these requests, and no other."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            for job in jobs:
                self._fail(job, error)

    def _forget(self, job: Job, *, keep: bool = True) -> None:
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
