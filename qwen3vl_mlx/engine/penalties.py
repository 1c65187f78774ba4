"""DRY ("don't repeat yourself"): the tokens that would continue a repeat, and by how much to
lower them.

After https://github.com/oobabooga/text-generation-webui/pull/5677, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.processing.tokenizer import Tokenizer

_LONGEST_REPEAT = 50  # tokens compared; a longer repeat costs no more than this one
# Finite, so that a grammar that allows nothing else still can take the token.
_MAX_PENALTY = 1e6


def dry_penalties(
    tokens: npt.NDArray[np.int32],
    multiplier: float,
    base: float,
    allowed_length: int,
    breakers: frozenset[int],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Token ids (k,) to lower and what to subtract from their logits (k,), for tokens (n,) so far.

    A token that followed an earlier occurrence of the last m tokens loses
    multiplier * base ** (m - allowed_length), m its longest such repeat, if that is at least
    allowed_length. No repeat reaches over one of `breakers`, and none of them is ever lowered.
    """
    recent = tokens[: -_LONGEST_REPEAT - 1 : -1]  # latest first
    cut = np.flatnonzero(np.isin(recent, list(breakers)))
    reach = int(cut[0]) if len(cut) else len(recent)
    ends = np.flatnonzero(tokens[:-1] == tokens[-1]) if reach else np.array([], np.int64)
    following = tokens[ends + 1]
    usable = ~np.isin(following, list(breakers))
    ends, following = ends[usable], following[usable]
    lengths = np.ones(len(ends), np.int64)
    alive = np.arange(len(ends))
    for length in range(1, reach):
        alive = alive[ends[alive] >= length]
        alive = alive[tokens[ends[alive] - length] == recent[length]]
        if not len(alive):
            break
        lengths[alive] += 1
    ids, place = np.unique(following[lengths >= allowed_length], return_inverse=True)
    longest = np.zeros(len(ids), np.int64)
    np.maximum.at(longest, place, lengths[lengths >= allowed_length])
    with np.errstate(over="ignore"):
        penalties = multiplier * np.power(float(base), longest - allowed_length)
    return ids.astype(np.int32), np.minimum(penalties, _MAX_PENALTY).astype(np.float32)


def breaker_tokens(tokenizer: Tokenizer, breakers: Sequence[str]) -> frozenset[int]:
    """Tokens that break a repeat: all that hold one of `breakers`, and the special tokens.

    A breaker longer than a token stands for its last one, too. Reads the whole vocabulary: keep
    the result.
    """
    found = {tokenizer.added_tokens[name] for name in tokenizer.special_tokens}
    found |= tokenizer.tokens_with(*breakers)
    found |= {token for text in breakers for token in tokenizer.encode(text)[-1:]}
    return frozenset(found)
