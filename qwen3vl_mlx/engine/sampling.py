"""From logits to the next token: penalties, filters, seeded draws, all on the device.

Order as in HF and vLLM: penalties, temperature, top-k, top-p, min-p, draw. Filters are mlx-lm's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx._mlx_lm.sample_utils import apply_min_p, apply_top_p
from qwen3vl_mlx.errors import InputError

# name: (least, most, least itself excluded)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, math.inf, False),
    "top_p": (0, 1, True),
    "top_k": (0, math.inf, False),
    "min_p": (0, 1, False),
    "repetition_penalty": (0, math.inf, True),
    "frequency_penalty": (-2, 2, False),
    "presence_penalty": (-2, 2, False),
    "max_tokens": (1, math.inf, False),
    "seed": (0, 2**64 - 1, False),
}
_WHOLE = ("top_k", "max_tokens", "seed")


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. `temperature` 0 is greedy; `top_k` 0 is off.

    max_tokens None generates until the model ends or its context is full. Raises InputError
    naming the parameter that is out of range.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over the output
    presence_penalty: float = 0.0  # over the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most, open_end) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "seed"):
                continue
            kinds = int if name in _WHOLE else (int, float)
            valid = isinstance(value, kinds) and not isinstance(value, bool) and value < math.inf
            if not (valid and least <= value <= most and not (open_end and value == least)):
                kind = "a whole number" if name in _WHOLE else "a number"
                above = "above" if open_end else "of at least"
                below = "" if most == math.inf else f" and at most {most:g}"
                raise InputError(f"{name} must be {kind} {above} {least:g}{below}, got {value!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise InputError(f"stop must be strings that are not empty, got {self.stop!r}")
        if not _maps_ids(self.logit_bias):
            raise InputError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")

    def check_vocabulary(self, size: int) -> None:
        """Raise InputError for a biased token that a model of `size` tokens does not have."""
        if outside := [token for token in self.logit_bias if not 0 <= token < size]:
            raise InputError(f"logit_bias: token {outside[0]} is not in the vocabulary of {size}")

    def updated(self, changes: Mapping[str, Any]) -> SamplingParams:
        """With the changes that are not None. Raises InputError for an unknown name."""
        names = {f.name for f in fields(self)}
        if unknown := changes.keys() - names:
            raise InputError(
                f"unknown sampling parameter {min(unknown)!r}; known: {', '.join(sorted(names))}"
            )
        given = {name: value for name, value in changes.items() if value is not None}
        if "stop" in given:
            stop = given["stop"]
            given["stop"] = tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
        return replace(self, **given)


def default_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """Defaults from generation_config.json. Without `do_sample: true` that is greedy, as in HF."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation_config.get(name) for name in names}
    if generation_config.get("do_sample") is not True:
        given["temperature"] = 0.0
    return SamplingParams().updated(given)


class Sampler:
    """One request's sampler: its penalties' counts and its random key. Never syncs the device."""

    def __init__(self, params: SamplingParams, prompt_ids: npt.NDArray[np.int32], vocab_size: int):
        self.params = params
        self.vocab_size = vocab_size
        seed = params.seed
        self.key = mx.random.key(seed) if seed is not None else _fresh_key()
        self.counts = mx.zeros((vocab_size,)) if _counts_output(params) else None
        self.seen: mx.array | None = None
        if params.repetition_penalty != 1.0:
            self.seen = mx.zeros((vocab_size,), mx.bool_)
            self.seen[mx.array(prompt_ids)] = True
        self.bias: mx.array | None = None
        if params.logit_bias:
            params.check_vocabulary(vocab_size)
            self.bias = mx.zeros((vocab_size,))
            self.bias[mx.array(list(params.logit_bias))] = mx.array(
                list(params.logit_bias.values()), mx.float32
            )

    def __call__(self, logits: mx.array) -> mx.array:
        """logits (vocab_size,) to a token id (1,), int32 or uint32. Counts it at once."""
        token = self._draw(self._penalised(logits)).reshape(1)
        if self.counts is not None:
            self.counts = self.counts.at[token].add(1)
        if self.seen is not None:
            self.seen[token] = True
        return token

    def _penalised(self, logits: mx.array) -> mx.array:
        params = self.params
        if self.seen is None and self.counts is None and self.bias is None:
            return logits
        logits = logits.astype(mx.float32)  # bfloat16 would round penalties away
        if self.seen is not None:
            penalty = params.repetition_penalty
            shrunk = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(self.seen, shrunk, logits)
        if self.counts is not None:
            logits = logits - params.frequency_penalty * self.counts
            logits = logits - params.presence_penalty * (self.counts > 0)
        if self.bias is not None:
            logits = logits + self.bias
        return logits

    def _draw(self, logits: mx.array) -> mx.array:
        params = self.params
        if params.temperature < 1e-6 or params.top_k == 1:
            return mx.argmax(logits)
        logits = logits.astype(mx.float32) / params.temperature
        survivors: mx.array | None = None
        if 0 < params.top_k < self.vocab_size:
            # The filters below then sort top_k values, not the whole vocabulary.
            survivors = mx.argpartition(-logits, kth=params.top_k - 1)[: params.top_k]
            logits = logits[survivors]
        if params.top_p < 1:
            logits = apply_top_p(_log_softmax(logits)[None], params.top_p)[0]
        if params.min_p > 0:
            logits = apply_min_p(_log_softmax(logits)[None], params.min_p)[0]
        self.key, now = mx.random.split(self.key)
        choice = mx.random.categorical(logits, key=now)
        return choice if survivors is None else survivors[choice]


def _maps_ids(bias: object) -> bool:
    """Whether a logit bias is one; -inf forbids a token, and NaN is no number."""
    return isinstance(bias, Mapping) and all(
        type(token) is int and isinstance(value, (int, float)) and value < math.inf
        for token, value in bias.items()
    )


def _counts_output(params: SamplingParams) -> bool:
    return params.frequency_penalty != 0 or params.presence_penalty != 0


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _fresh_key() -> mx.array:
    """A key no other request has: unseeded requests must differ, also across processes."""
    import secrets

    return mx.random.key(secrets.randbits(63))
