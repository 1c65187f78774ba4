"""From logits to the next token: penalties, filters and seeded draws, for a batch of requests.

Order as in HF and mistral.rs: DRY, frequency and presence, repetition, bias, grammar, temperature,
top-k, top-p, min-p, draw. The filters are our own because mlx-lm's take one value for a whole
batch and compile anew for each.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.engine.penalties import dry_penalties
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
    "dry_multiplier": (0, math.inf, False),
    "dry_base": (1, math.inf, False),
    "dry_allowed_length": (1, math.inf, False),
    "top_logprobs": (0, 20, False),
    "max_tokens": (1, math.inf, False),
    "thinking_budget": (0, math.inf, False),
    "seed": (0, 2**64 - 1, False),
}
_WHOLE = ("top_k", "dry_allowed_length", "top_logprobs", "max_tokens", "thinking_budget", "seed")
_OPTIONAL = ("max_tokens", "thinking_budget", "seed")
_SWITCHES = ("logprobs", "ignore_eos", "loop_guard")
_STRINGS = ("stop", "dry_sequence_breakers")
# Each is looked for in every answer's text, or in the vocabulary, while others wait.
_MOST_STRINGS = 64
_LONGEST_STRING = 256

_GREEDY_BELOW = 1e-6  # temperature
# A bias of -inf becomes this: never drawn, unless a grammar allows nothing else.
_FORBIDDEN = -1e9

_INSTRUCT_PRESENCE_PENALTY = 1.5  # model cards of Qwen3-VL Instruct, for tasks with pictures


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. `temperature` 0 is greedy; `top_k` 0 is off.

    max_tokens None generates until the model ends or its context is full; ignore_eos goes on past
    the model's end, but not past a grammar's. `thinking_budget` bounds the reasoning, in tokens.
    `loop_guard` ends an answer that repeats itself without end. DRY (text-generation-webui #5677)
    penalises the token that would continue a repeat of at least dry_allowed_length tokens. `stop`
    and `dry_sequence_breakers` are at most 64 strings, of at most 256 characters each. Raises
    InputError naming the parameter that is out of range.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over the output
    presence_penalty: float = 0.0  # over the output
    dry_multiplier: float = 0.0  # over prompt and output; 0 is off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False
    thinking_budget: int | None = None
    loop_guard: bool = False

    def __post_init__(self) -> None:
        for name in _RANGES:
            _check_range(name, getattr(self, name))
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InputError(f"{name} must be true or false, got {value!r}")
        for name in _STRINGS:
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(s, str) and s for s in value):
                raise InputError(f"{name} must be strings that are not empty, got {value!r}")
            if len(value) > _MOST_STRINGS or any(len(s) > _LONGEST_STRING for s in value):
                raise InputError(
                    f"{name} must be at most {_MOST_STRINGS} strings of {_LONGEST_STRING} "
                    f"characters each, got {len(value)}, the longest of {max(map(len, value))}"
                )
        if not _maps_ids(self.logit_bias):
            raise InputError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        if self.top_logprobs and not self.logprobs:
            raise InputError(f"top_logprobs {self.top_logprobs} needs logprobs: set it to true")

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
        for name in given.keys() & set(_STRINGS):
            value = given[name]
            given[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return replace(self, **given)


def default_params(
    generation_config: Mapping[str, Any], *, thinking: bool = False
) -> SamplingParams:
    """Defaults from generation_config.json. Without `do_sample: true` that is greedy, as in HF.

    The Instruct models' cards ask for a presence penalty with pictures, which their files do not
    say: without it answers run on more often. thinking: a Thinking model, whose card has none.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
    given = {name: generation_config.get(name) for name in names}
    if generation_config.get("do_sample") is not True:
        given["temperature"] = 0.0
    elif given["presence_penalty"] is None and not thinking:
        given["presence_penalty"] = _INSTRUCT_PRESENCE_PENALTY
    return SamplingParams().updated(given)


def asked_params(
    defaults: SamplingParams, sampling: Mapping[str, Any] | None, named: Mapping[str, Any]
) -> SamplingParams:
    """A request's wishes over a model's defaults: `sampling`, and over it those of `named` set.

    Raises InputError for unknown names and bad values.
    """
    if sampling is not None and not isinstance(sampling, Mapping):
        raise InputError(f"sampling must map names to values, got {type(sampling).__name__}")
    wishes = {**(sampling or {}), **{k: v for k, v in named.items() if v is not None}}
    wanted = defaults.updated(wishes)
    return wanted if wishes.get("presence_penalty") is not None else unbent(wanted, defaults)


def unbent(params: SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """Greedy params without the presence penalty that belongs to the model's own sampling."""
    if params.temperature == 0 and params.presence_penalty == defaults.presence_penalty:
        return replace(params, presence_penalty=0.0)
    return params


@dataclass(frozen=True, eq=False)
class SamplerState:
    """Where one answer is: what the next draw depends on besides the logits."""

    step: int  # tokens drawn
    counts: mx.array | None  # (vocab_size,) float32, how often each was drawn; None if not needed


class Sampler:
    """How one request draws; nothing in it changes after construction.

    `plain_greedy`: the largest logit is the answer. `needs_history`: draws need the tokens so far
    on the host (DRY). The random numbers of step i come from (seed, i) alone, so that the same
    seed gives the same answer however steps are grouped, retried or verified several at once.
    `breakers`: tokens that end a repeat for DRY, see `penalties.breaker_tokens`. Raises InputError
    for a bias on a token that is not there.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: npt.NDArray[np.int32],
        vocab_size: int,
        breakers: frozenset[int] = frozenset(),
    ):
        params.check_vocabulary(vocab_size)
        self.params = params
        self.prompt_ids = prompt_ids
        self.vocab_size = vocab_size
        self.breakers = breakers
        # Unseeded requests must differ, also across processes.
        self.seed = params.seed if params.seed is not None else secrets.randbits(64)
        self.greedy = params.temperature < _GREEDY_BELOW or params.top_k == 1
        self.needs_history = params.dry_multiplier > 0
        self._penalises_output = bool(params.frequency_penalty or params.presence_penalty)
        repeats = params.repetition_penalty != 1
        self._counts_output = self._penalises_output or repeats
        self.adjusts = self.needs_history or self._counts_output or bool(params.logit_bias)
        self.plain_greedy = self.greedy and not self.adjusts
        self._in_prompt: mx.array | None = None  # (vocab_size,) bool
        if repeats:
            seen = np.zeros(vocab_size, np.bool_)
            seen[prompt_ids] = True
            self._in_prompt = mx.array(seen)
        self._bias: mx.array | None = None  # (vocab_size,) float32
        if params.logit_bias:
            bias = np.zeros(vocab_size, np.float32)
            values = np.array(list(params.logit_bias.values()), np.float64)
            bias[list(params.logit_bias)] = np.clip(values, _FORBIDDEN, -_FORBIDDEN)
            self._bias = mx.array(bias)

    def start(self) -> SamplerState:
        """The state before the first draw. Any thread: from numpy, as MLX's own zeros are lazy."""
        if not self._counts_output:
            return SamplerState(0, None)
        return SamplerState(0, mx.array(np.zeros(self.vocab_size, np.float32)))

    def after(self, state: SamplerState, token: mx.array | int) -> SamplerState:
        """The state once `token`, a number or an array of one, is drawn."""
        counts = state.counts if state.counts is None else state.counts.at[token].add(1)
        return SamplerState(state.step + 1, counts)

    def key(self, state: SamplerState) -> list[int]:
        """Random key of the state's draw: two numbers of 32 bits."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(state.step,))
        return [int(word) for word in sequence.generate_state(2)]

    def adjusted(
        self, logits: mx.array, state: SamplerState, history: Sequence[int] | None
    ) -> mx.array:
        """logits (vocab_size,) float32 with penalties and bias."""
        params = self.params
        if self.needs_history:
            if history is None:
                raise ValueError("DRY needs the tokens so far: give `history`")
            tokens = np.concatenate([self.prompt_ids, np.asarray(history, np.int32)])
            ids, penalties = dry_penalties(
                tokens,
                params.dry_multiplier,
                params.dry_base,
                params.dry_allowed_length,
                self.breakers,
            )
            if len(ids):
                logits = logits.at[mx.array(ids)].subtract(mx.array(penalties))
        counts = state.counts
        if counts is not None and self._penalises_output:
            logits = logits - params.frequency_penalty * counts
            logits = logits - params.presence_penalty * (counts > 0)
        if counts is not None and self._in_prompt is not None:
            penalty = params.repetition_penalty
            shrunk = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(self._in_prompt | (counts > 0), shrunk, logits)
        return logits if self._bias is None else logits + self._bias


class Row(NamedTuple):
    """One row of a batch. `history`: tokens drawn so far, where the sampler needs them.

    `allowed` (vocab_size,) bool: what a grammar lets through. It has the last word over bias and
    penalties, but filters see only what it leaves.
    """

    sampler: Sampler
    state: SamplerState
    history: Sequence[int] | None = None
    allowed: mx.array | None = None


def draw(logits: mx.array, rows: Sequence[Row]) -> tuple[mx.array, list[SamplerState]]:
    """logits (B, vocab_size) to the rows' tokens (B,) int32 and their next states. Never syncs.

    A row's token does not depend on its neighbours: they share passes, not numbers.
    """
    if any(row.sampler.adjusts or row.allowed is not None for row in rows):
        logits = mx.stack([_constrained(logits[i], row) for i, row in enumerate(rows)])
    groups: dict[tuple[int, bool] | None, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_filter_group(row.sampler), []).append(i)
    parts = []
    for kind, members in groups.items():
        some = logits if len(groups) == 1 else logits[mx.array(members)]  # (G, vocab_size)
        if kind is None:
            parts.append(mx.argmax(some, axis=-1))
        else:
            parts.append(_draw_group(some, [rows[i] for i in members], *kind))
    tokens = parts[0]
    if len(parts) > 1:
        place = np.argsort(np.concatenate([np.array(g) for g in groups.values()]))
        tokens = mx.concatenate(parts)[mx.array(place)]
    tokens = tokens.astype(mx.int32)  # (B,)
    # A slice for each row is work: only for those who count.
    counted = (0 if row.state.counts is None else tokens[i] for i, row in enumerate(rows))
    return tokens, [row.sampler.after(row.state, x) for row, x in zip(rows, counted, strict=True)]


def _constrained(logits: mx.array, row: Row) -> mx.array:
    logits = logits.astype(mx.float32)  # bfloat16 would round penalties away
    if row.sampler.adjusts:
        logits = row.sampler.adjusted(logits, row.state, row.history)
    return logits if row.allowed is None else mx.where(row.allowed, logits, -mx.inf)


def _filter_group(sampler: Sampler) -> tuple[int, bool] | None:
    """(how many of the largest survive, 0 for all; whether they must be sorted); None: greedy.

    It follows from the row alone, as it decides which random number falls to which token.
    """
    if sampler.greedy:
        return None
    top_k = sampler.params.top_k if sampler.params.top_k < sampler.vocab_size else 0
    return top_k, top_k > 0 or sampler.params.top_p < 1


def _draw_group(logits: mx.array, rows: Sequence[Row], top_k: int, ordered: bool) -> mx.array:
    """logits (G, vocab_size) to tokens (G,) by the Gumbel-max trick."""
    params = [row.sampler.params for row in rows]
    logits = logits.astype(mx.float32)  # at once: a neighbour's penalties may have done so already
    ids: mx.array | None = None
    if top_k:
        ids = mx.argpartition(-logits, kth=top_k - 1, axis=-1)[:, :top_k]
        logits = mx.take_along_axis(logits, ids, axis=-1)  # (G, top_k)
    if ordered:
        order = mx.argsort(-logits, axis=-1)
        logits = mx.take_along_axis(logits, order, axis=-1)  # largest first
        ids = order if ids is None else mx.take_along_axis(ids, order, axis=-1)
    logits = logits / _column([p.temperature for p in params])
    logits = logits - logits.max(axis=-1, keepdims=True)
    keep = logits >= _column([math.log(p.min_p) if p.min_p else -math.inf for p in params])
    if ordered:
        keep = keep & nucleus(logits, _column([p.top_p for p in params]))
    logits = mx.where(keep, logits, -mx.inf)
    keys = mx.array([row.sampler.key(row.state) for row in rows], mx.uint32)  # (G, 2)
    width = logits.shape[-1]
    noise = mx.vmap(lambda key: mx.random.gumbel((width,), key=key))(keys)  # (G, width)
    choice = mx.argmax(logits + noise, axis=-1)
    return choice if ids is None else mx.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]


def nucleus(logits: mx.array, top_p: mx.array) -> mx.array:
    """Of logits (G, n), largest first, those with less than top_p (G, 1) of the mass above."""
    weights = mx.exp(logits)
    above = mx.cumsum(weights, axis=-1, inclusive=False)
    total = above[:, -1:] + weights[:, -1:]
    return (above < top_p * total) | (top_p >= 1)


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(list(values), mx.float32)[:, None]  # (G, 1)


def _check_range(name: str, value: object) -> None:
    if value is None and name in _OPTIONAL:
        return
    least, most, open_end = _RANGES[name]
    kinds = int if name in _WHOLE else (int, float)
    inside = (
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and least <= value <= most
        and value < math.inf
        and not (open_end and value == least)
    )
    if not inside:
        kind = "a whole number" if name in _WHOLE else "a number"
        above = "above" if open_end else "of at least"
        below = "" if most == math.inf else f" and at most {most:g}"
        raise InputError(f"{name} must be {kind} {above} {least:g}{below}, got {value!r}")


def _maps_ids(bias: object) -> bool:
    """Whether a logit bias is one; -inf forbids a token, and NaN is no number."""
    return isinstance(bias, Mapping) and all(
        type(token) is int and isinstance(value, (int, float)) and value < math.inf
        for token, value in bias.items()
    )
