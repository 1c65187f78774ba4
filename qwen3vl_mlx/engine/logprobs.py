"""Log-probabilities of an answer's tokens, of the distribution before penalties and filters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.processing.tokenizer import Tokenizer

_LEAST = -9999.0  # what OpenAI has for a token that cannot come; JSON has no infinity


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens of a step. `bytes`: its UTF-8, which may end inside a character.

    `token` shows incomplete characters as U+FFFD.
    """

    token: str
    token_id: int
    logprob: float
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer and the likeliest ones in its place, likeliest first."""

    token: str
    token_id: int
    logprob: float
    bytes: tuple[int, ...]
    top: tuple[TopLogprob, ...] = ()


class LogprobArrays(NamedTuple):
    """One step's log-probabilities, on the device."""

    chosen: mx.array  # (1,) float32
    ids: mx.array  # (top,) uint32, likeliest first
    values: mx.array  # (top,) float32


def chosen_logprobs(logits: mx.array, token: mx.array, top: int) -> LogprobArrays:
    """Of the model's logits (vocab_size,) and the token drawn (1,). Lazy."""
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    top = min(top, logits.shape[0])
    ids = mx.zeros((0,), mx.uint32)
    if top:
        ids = mx.argpartition(-logits, kth=top - 1)[:top]
        ids = ids[mx.argsort(-logits[ids])]
    return LogprobArrays(logprobs[token], ids, logprobs[ids])


def to_host(arrays: LogprobArrays, token: int, tokenizer: Tokenizer) -> TokenLogprob:
    """Plain values. Waits for the device."""
    ids, values = np.array(arrays.ids).tolist(), np.array(arrays.values).tolist()
    top = []
    for id_, value in zip(ids, values, strict=True):
        text, raw = _shown(id_, tokenizer)
        top.append(TopLogprob(text, id_, max(value, _LEAST), raw))
    text, raw = _shown(token, tokenizer)
    chosen = float(np.array(arrays.chosen)[0])
    return TokenLogprob(text, token, max(chosen, _LEAST), raw, tuple(top))


def _shown(token: int, tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]]:
    raw = tokenizer.token_bytes(token, skip_special_tokens=False)
    return raw.decode(errors="replace"), tuple(raw)
