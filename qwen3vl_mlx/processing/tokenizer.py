"""tokenizer.json read by Hugging Face `tokenizers`, and a decoder for streams of tokens.

Qwen's tokenizer is a byte-level BPE: every ordinary token is a run of bytes, each written as one
printable character (the byte alphabet of GPT-2), and may end inside a character.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import tokenizers

from qwen3vl_mlx.errors import CheckpointError, InputError, PromptError


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: visible Latin-1 bytes stand for themselves, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(0x100)) - set(visible))
    shifted = {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in visible} | shifted


_BYTE_OF_CHARACTER: Final[Mapping[str, int]] = MappingProxyType(_byte_alphabet())
_CHARACTER_OF_BYTE: Final[Mapping[int, str]] = MappingProxyType(
    {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}
)
# Characters that no text should hold; one that is absent from a prompt can mark places in it.
_PRIVATE_USE: Final = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_END_TOKENS: Final = ("<|im_end|>", "<|endoftext|>")
_SHORT: Final = 4096  # characters that are read in a few milliseconds
_PROBE: Final = "Aé中🙂 \n"  # one, two, three and four bytes, a space and a control character


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer: text to ids and back, without transformers.

    `added_tokens` maps the literal of every added token (`<|im_end|>`, `<think>`, ...) to its id;
    `special_tokens` holds those marked special, which decoding leaves out. `vocab_size` counts
    tokens; models have more embedding rows, and ids without a token decode to nothing.
    """

    backend: tokenizers.Tokenizer
    added_tokens: Mapping[str, int]
    special_tokens: frozenset[str]
    vocab_size: int

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `folder`/tokenizer.json. CheckpointError when it is missing, damaged or foreign."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing; a checkpoint folder holds its tokenizer there. "
                "Download the checkpoint again, or copy tokenizer.json from the original model"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class for every fault
            raise CheckpointError(
                f"{path} cannot be read as a tokenizer ({error}); it is damaged or incomplete. "
                "Delete it and download the checkpoint again"
            ) from error
        # Training leaves these on in some saved files; a prompt is never cut or padded.
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        tokenizer = cls(
            backend=backend,
            added_tokens=MappingProxyType({token.content: id_ for id_, token in added.items()}),
            special_tokens=frozenset(token.content for token in added.values() if token.special),
            vocab_size=backend.get_vocab_size(with_added_tokens=True),
        )
        probe = b"".join(map(tokenizer.token_bytes, tokenizer.encode(_PROBE)))
        if probe != _PROBE.encode():
            raise CheckpointError(
                f"{path} is not a byte-level BPE tokenizer, the kind Qwen3-VL uses. "
                "Take tokenizer.json from the original Qwen3-VL model"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Literals of added tokens become those tokens; nothing is added.

        InputError when `text` is not Unicode: JSON can carry half of a surrogate pair.
        """
        try:
            if len(text) <= _SHORT:
                return list(self.backend.encode(text, add_special_tokens=False).ids)
            # The same ids, without Python's lock: a long text takes seconds.
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=False)
            return list(encoding.ids)
        except TypeError as error:
            raise InputError(
                "the text is not valid Unicode: it holds a lone surrogate (half of an emoji cut "
                "in two, such as \\ud83d); send whole characters"
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """Bytes that one token adds to the text; none for a special or an unknown token."""
        token = self.backend.id_to_token(token_id)
        if token is None or (skip_special_tokens and token in self.special_tokens):
            return b""
        try:
            return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))
        except KeyError:  # an added token with a space or a letter beyond the alphabet
            return token.encode()

    def tokens_with(self, *texts: str) -> set[int]:
        """Ids of all ordinary tokens whose bytes hold those of one of `texts`.

        Reads the whole vocabulary.
        """
        written = ["".join(map(_CHARACTER_OF_BYTE.__getitem__, text.encode())) for text in texts]
        vocabulary = self.backend.get_vocab(with_added_tokens=False)
        return {id_ for token, id_ in vocabulary.items() if any(part in token for part in written)}


class StreamingDecoder:
    """Streaming detokenizer: turns ids into text one at a time, never half a character.

    All that `push` and `flush` returned, joined, equals `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character is unfinished."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, self._skip_special_tokens))

    def flush(self) -> str:
        """What remains at the end: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def literal_start(literals: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of every occurrence of a literal, overlapping ones too.

    A literal of one character cannot be cut, and is left alone.
    """
    tails: dict[str, list[str]] = {}
    for literal in sorted(literals):
        if len(literal) > 1:
            tails.setdefault(literal[0], []).append(re.escape(literal[1:]))
    branches = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in tails.items()]
    return re.compile("|".join(branches) or r"(?!)")


def cut_literals(texts: Sequence[str], literal: re.Pattern[str], mark: str) -> list[str]:
    """`texts`, with `mark` after each match of `literal_start` in all of them joined.

    Split there, no piece of the joined text holds a whole literal any more.
    """
    cuts = [first.end() for first in literal.finditer("".join(texts))]
    if not cuts:
        return list(texts)
    marked, start = [], 0
    for text in texts:
        end = start + len(text)
        inside = cuts[bisect_right(cuts, start) : bisect_right(cuts, end)]
        bounds = [0, *(cut - start for cut in inside), len(text)]
        marked.append(mark.join(text[left:right] for left, right in pairwise(bounds)))
        start = end
    return marked


def absent_character(texts: Iterable[str]) -> str:
    """A private-use character that none of `texts` holds."""
    used = set().union(*texts)
    for code in (code for block in _PRIVATE_USE for code in block):
        if chr(code) not in used:
            return chr(code)
    raise PromptError("the messages hold every private-use character of Unicode; send text")


def end_token_ids(generation_config: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """Every id that ends an answer: the file's, and the two all Qwen3-VL models end with."""
    given = generation_config.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(token) is not int for token in ids):
        raise CheckpointError(
            f"generation_config.json: eos_token_id must be one or more token ids, got {given!r}"
        )
    added = tokenizer.added_tokens
    return frozenset([*ids, *(added[name] for name in _END_TOKENS if name in added)])
