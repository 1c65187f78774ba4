"""Grammars made ready for one tokenizer and model, and masks over its tokens."""

from __future__ import annotations

import json
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Final

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import tokenizers

from qwen3vl_mlx.engine.grammar import Grammar, llguidance_module, parser_limits, shortened
from qwen3vl_mlx.engine.output import TOOL_END, TOOL_START
from qwen3vl_mlx.engine.thinking import spelled
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

Bits = npt.NDArray[np.uint32]  # (W,) one bit per token of the model's vocabulary, lowest first

_KEPT: Final = 64  # compiled grammars
BLANK_LINE: Final = 2  # newlines that a model writes after </think>, at most


class GrammarCompiler:
    """Compiles grammars for one tokenizer and model. For use from any thread.

    `vocab_size` is the model's, which is larger than the tokenizer's; tokens without text are
    never allowed. llguidance's view of the tokenizer is made when a grammar first needs it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(sorted(eos_token_ids))
        self.tool_start = tokenizer.added_tokens.get(TOOL_START, -1)
        self.tool_end = tokenizer.added_tokens.get(TOOL_END, -1)
        # Also those that decoding shows, such as <tool_call>: no grammar's text may hold them.
        self.added_ids = frozenset(tokenizer.added_tokens.values())
        self._lock = threading.Lock()
        self._lexicon_lock = threading.Lock()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> None:
        """Compile ahead, so that a request is refused before it runs. InputError says why."""
        if grammar.content is not None:
            self.matcher(grammar.content)
        if grammar.tools is not None:
            if -1 in (self.tool_start, self.tool_end):
                raise InputError(
                    f"this checkpoint's tokenizer has no {TOOL_START}; it cannot call tools. "
                    'Leave tool_choice at "auto" and strict off'
                )
            self.matcher(grammar.tools.body)
            for tag in (TOOL_START, TOOL_END):
                self.completing(tag, 0)  # takes a while at first, so not while others wait

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A parser at the beginning of `grammar`, the caller's own."""
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)  # may take long, so not under the lock
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return compiled.deep_copy()

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        matcher: llguidance.LLMatcher = llguidance_module().LLMatcher(
            self.lexicon, grammar, log_level=0, limits=parser_limits()
        )
        begins = not matcher.is_error() and self.allowed_by(matcher).any()
        fault = shortened(matcher.get_error())
        if fault.startswith("NoExtension") or not (fault or begins):
            raise InputError("the grammar matches no text at all; there is nothing to answer with")
        if fault:
            raise InputError(f"the grammar cannot be used: {fault}")
        return matcher

    @cached_property
    def token_texts(self) -> tuple[bytes, ...]:
        """(vocab_size,) bytes of every token; empty where the tokenizer has none."""
        return tuple(self.text_of(token) for token in range(self.vocab_size))

    def text_of(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token, skip_special_tokens=False)

    def shown_text_of(self, token: int) -> bytes:
        """What a reader of the answer sees of a token; nothing of a special one."""
        return self.tokenizer.token_bytes(token)

    @property
    def lexicon(self) -> llguidance.LLTokenizer:
        """llguidance's view of the tokenizer; about a second at first."""
        with self._lexicon_lock:
            return self._lexicon

    @cached_property
    def _lexicon(self) -> llguidance.LLTokenizer:
        module = llguidance_module()
        view = module.TokenizerWrapper(_TokenizerView(self))
        lexicon: llguidance.LLTokenizer = module.LLTokenizer(
            view, eos_token=list(self.eos_token_ids)
        )
        return lexicon

    def tokens_of(self, text: bytes) -> list[int]:
        """Tokens that spell `text`."""
        return self.lexicon.tokenize_bytes(text)

    def none(self) -> Bits:
        """Bits that allow nothing."""
        return np.zeros((self.vocab_size + 31) // 32, dtype=np.uint32)

    def only(self, *tokens: int) -> Bits:
        """Bits that allow these tokens."""
        bits = self.none()
        for token in tokens:
            bits[token // 32] |= np.uint32(1 << token % 32)
        return bits

    def allowed_by(self, matcher: llguidance.LLMatcher) -> Bits:
        """Bits that `matcher` allows next; end tokens where it may end."""
        bits = self.none()
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return bits

    @cached_property
    def end_bits(self) -> Bits:
        return self.only(*self.eos_token_ids)

    @cached_property
    def all_but_end(self) -> Bits:
        return ~self.end_bits

    @cached_property
    def all_but_call(self) -> Bits:
        return ~self.only(self.tool_start) if self.tool_start >= 0 else ~self.none()

    @cached_property
    def newline_tokens(self) -> dict[int, int]:
        """Tokens of nothing but newlines: id -> how many."""
        spelled_out = [self.tokenizer.encode("\n" * n) for n in range(1, BLANK_LINE + 1)]
        return {ids[0]: n for n, ids in enumerate(spelled_out, 1) if len(ids) == 1}

    def completing(self, tag: str, progress: int) -> Bits:
        """Bits of the text tokens that complete `tag`, `progress` bytes of it being there."""
        return (self._start_spellings if tag == TOOL_START else self._end_spellings)[progress]

    @cached_property
    def _start_spellings(self) -> tuple[Bits, ...]:
        return self._spellings(TOOL_START.encode())

    @cached_property
    def _end_spellings(self) -> tuple[Bits, ...]:
        return self._spellings(TOOL_END.encode())

    def _spellings(self, tag: bytes) -> tuple[Bits, ...]:
        """For each number of bytes of `tag` that are there, the text tokens that complete it."""
        candidates = [
            (token, text)
            for token, text in enumerate(self.token_texts)
            if tag[-1:] in text and token not in self.added_ids
        ]
        return tuple(
            self.only(*(t for t, text in candidates if spelled(tag, at, text)[1] is not None))
            for at in range(len(tag))
        )


class _TokenizerView:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, compiler: GrammarCompiler):
        self.eos_token_id = compiler.eos_token_ids[0]
        self.bos_token_id = None
        self.tokens = compiler.token_texts
        self.special_token_ids = sorted(compiler.added_ids)
        self._tokenizer = compiler.tokenizer

    def __call__(self, text: str) -> list[int]:
        if unicodedata.is_normalized("NFC", text):
            return self._tokenizer.encode(text)
        return list(self._exact.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _exact(self) -> tokenizers.Tokenizer:
        """Without Qwen's NFC: what a grammar forces has to be spelled byte for byte."""
        values = json.loads(self._tokenizer.backend.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps({**values, "normalizer": None}))


def expand(bits: Bits, vocab_size: int) -> mx.array:
    """Packed bits (W,) or (B, W) as booleans (vocab_size,) or (B, vocab_size) on the device."""
    words = mx.array(bits)[..., None]  # (..., W, 1)
    flags = (words >> mx.arange(32, dtype=mx.uint32)) & 1  # (..., W, 32)
    return flags.reshape(*bits.shape[:-1], -1)[..., :vocab_size].astype(mx.bool_)
