"""Prompts on their way into their caches: pictures encoded, tokens prefilled, turn about."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import mlx.core as mx

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.feature_cache import FeatureCache
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.vision import Encoding
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.models.vision import VisionFeatures


class Reading(Protocol):
    """One whose prompt is to be read."""

    prefill: Prefill | None
    features: dict[str, VisionFeatures]  # found, while others are being encoded


Reader = TypeVar("Reader", bound=Reading)


class PromptReader(Generic[Reader]):
    """The jobs whose prompts are being read."""

    def __init__(self, model: Model, features: FeatureCache):
        self.model = model
        self.features = features
        self.jobs: deque[Reader] = deque()
        self.changes = 0  # how often a job came or went
        self._encoding: tuple[Reader, Encoding] | None = None
        self._queued: mx.array | None = None  # the last chunk, which may not have run yet

    def add(self, job: Reader) -> None:
        self.jobs.append(job)
        self.changes += 1

    def remove(self, job: Reader) -> None:
        """Let a job go, with what was encoded for it so far."""
        self.jobs.remove(job)
        self.changes += 1
        if self._encoding is not None and self._encoding[0] is job:
            self._encoding = None

    def clear(self) -> None:
        self.jobs.clear()
        self.changes += 1
        self._encoding = self._queued = None

    def next(self) -> Reader | None:
        """The next job that has work: each in turn, so that a short prompt overtakes a long one."""
        for _ in range(len(self.jobs)):
            job = self.jobs[0]
            self.jobs.rotate(-1)
            assert job.prefill is not None
            if job.prefill.remaining and (job.prefill.ready or self._may_encode(job)):
                return job
        return None

    def _may_encode(self, job: Reader) -> bool:
        """Whether the job has nothing to encode, or no other job's pictures are being encoded."""
        assert job.prefill is not None
        if self._encoding is None or self._encoding[0] is job:
            return True
        return all(medium.identity in self.features for medium in job.prefill.media)

    def advance(self, job: Reader, budget: int, *, wait: bool) -> int:
        """Queue a job's next work; returns the tokens' worth that was.

        wait: nobody decodes, so that the host may wait for the chunk before. All of a prompt is
        read when its `prefill.hidden` is there.
        """
        prefill = job.prefill
        assert prefill is not None
        if not prefill.ready:
            return self._encode(job, budget)
        spent = min(budget, prefill.remaining)
        last = prefill.step(budget)[:, -1]  # (1, hidden_size)
        mx.async_eval(last, kv_cache.arrays(prefill.layers))
        if wait and self._queued is not None:
            mx.eval(self._queued)  # two chunks in flight: the device is busy, memory is bounded
        self._queued = last if prefill.remaining else None
        return spent

    def _encode(self, job: Reader, budget: int) -> int:
        """Encode what a prompt's pictures still need, on behalf of all who will need it."""
        assert job.prefill is not None
        if self._encoding is None or self._encoding[0] is not job:
            media = {medium.identity: medium for medium in job.prefill.media}
            known = {key: self.features.get(key) for key in media}
            job.features = {key: value for key, value in known.items() if value is not None}
            missing = [media[key] for key in media if key not in job.features]
            if not missing:
                _give(job, {})
                return 0
            assert self._encoding is None  # see `next`
            self._encoding = (job, Encoding(self.model.vision_tower, missing))
        encoding = self._encoding[1]
        work = encoding.tokens_left
        if encoding.step(budget):
            self._encoding = None
            for key, value in encoding.features.items():
                self.features.put(key, value)
            _give(job, encoding.features)
        return max(1, work - encoding.tokens_left)


def _give(job: Reading, encoded: Mapping[str, VisionFeatures]) -> None:
    """Hand a job's prompt its features: those found in the cache, and those encoded since."""
    assert job.prefill is not None
    features = {**job.features, **encoded}
    job.features = {}
    media = job.prefill.media
    job.prefill.give(VisionFeatures.concatenate([features[m.identity] for m in media]))
