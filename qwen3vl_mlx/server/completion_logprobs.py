"""Log-probabilities as OpenAI's legacy completions have them: lists, with one entry a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from qwen3vl_mlx.engine.logprobs import TokenLogprob
from qwen3vl_mlx.processing.tokenizer import StreamingDecoder, Tokenizer

Lists: TypeAlias = "dict[str, list[Any] | None]"


class LegacyLogprobs:
    """Lists tokens as they come. Offsets are in characters, from the prompt's first one on.

    OpenAI counts them so whether the prompt is echoed or not. top: how many likely tokens are
    named. special: special tokens are text, as they are in a prompt.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int, top: int, *, special: bool = False):
        self._decoder = StreamingDecoder(tokenizer, skip_special_tokens=not special)
        self._offset = offset
        self._top = top

    def lists(self, entries: Sequence[TokenLogprob]) -> Lists:
        """The next tokens of the text."""
        return {
            "tokens": [token_name(entry.bytes) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [_likely(entry) for entry in entries] if self._top else None,
            "text_offset": [self._pushed(entry.token_id) for entry in entries],
        }

    def _pushed(self, token_id: int) -> int:
        """Where a token begins; inside a character that is where the character does."""
        offset = self._offset
        self._offset += len(self._decoder.push(token_id))
        return offset


def prompt_lists(
    tokenizer: Tokenizer, token_id: int, scores: Sequence[TokenLogprob], top: int
) -> Lists:
    """All of a prompt: its first token, which follows nothing and has no score, and the others."""
    raw = tokenizer.token_bytes(token_id, skip_special_tokens=False)
    first = TokenLogprob("", token_id, 0.0, tuple(raw))
    lists = LegacyLogprobs(tokenizer, 0, top, special=True).lists([first, *scores])
    for name in ("token_logprobs", "top_logprobs"):
        if entries := lists[name]:
            entries[0] = None
    return lists


def joined(first: Lists | None, second: Lists | None) -> Lists | None:
    """One after the other."""
    if first is None or second is None:
        return first or second
    both = {}
    for name, entries in first.items():
        more = second[name]
        both[name] = None if entries is None or more is None else entries + more
    return both


def token_name(raw: Sequence[int]) -> str:
    r"""A token's text, or `bytes:\xe2\x80` where it ends inside a character, as OpenAI has it.

    So no two tokens share a name, and names can be keys.
    """
    try:
        return bytes(raw).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _likely(entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the one that came where it is not among them."""
    likely = {token_name(other.bytes): other.logprob for other in entry.top}
    return {**likely, token_name(entry.bytes): entry.logprob}
