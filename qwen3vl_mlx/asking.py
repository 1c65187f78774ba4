"""Conversations to requests: what `generate`, a chat and a server share before the engine runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from qwen3vl_mlx.engine.constraints import GrammarCompiler
from qwen3vl_mlx.engine.grammar import Grammar, parse_grammar
from qwen3vl_mlx.engine.penalties import breaker_tokens
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.engine.sampling import SamplingParams
from qwen3vl_mlx.errors import InputError, PromptError, TooLongError
from qwen3vl_mlx.processing.lengths import CHARACTERS_PER_TOKEN, least_tokens
from qwen3vl_mlx.processing.processor import MaxPixels, Messages, Processor
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.processing.truncation import shorten

_ANSWER_ROOM = 1024  # tokens that truncation leaves for an answer of no stated length
_SETS_OF_BREAKERS = 16  # kept as tokens


@dataclass(frozen=True)
class Form:
    """What an answer may say: tools and a grammar, as `parse_grammar` reads them."""

    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: Mapping[str, Any] | None = None
    grammar: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Look:
    """How pictures are shown: pixel limits, and whether each is given a number."""

    min_pixels: int | None = None
    max_pixels: MaxPixels = None
    add_vision_id: bool = False


@dataclass(frozen=True)
class Asking:
    """Lays out requests for one model."""

    processor: Processor
    compiler: GrammarCompiler
    eos_token_ids: frozenset[int]
    context_length: int
    vocab_size: int

    def prompt(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, look: Look
    ) -> Prompt:
        """Lay out messages as they are. Raises TooLongError where they fill the context."""
        if least_tokens(messages, tools) >= self.context_length:
            raise self._too_long(f"over {CHARACTERS_PER_TOKEN * self.context_length:,} characters")
        prompt = self.processor.prompt(
            messages,
            tools=tools,
            min_pixels=look.min_pixels,
            max_pixels=look.max_pixels,
            add_vision_id=look.add_vision_id,
        )
        if len(prompt.token_ids) >= self.context_length:
            raise self._too_long(f"{len(prompt.token_ids)} tokens")
        return prompt

    def _too_long(self, size: str) -> TooLongError:
        return TooLongError(
            # Clients know these words, and shorten what they send.
            f"prompt is too long: {size}, and the model's context holds {self.context_length} "
            "tokens, answer included; shorten it or lower max_pixels, or let truncate drop the "
            "oldest turns"
        )

    def prepare(
        self,
        messages: Messages,
        params: SamplingParams,
        form: Form,
        look: Look,
        *,
        truncate: bool,
        timeout: float | None,
        started: float,
    ) -> Request:
        """Check and lay out all that is asked. Raises InputError, before pictures are read.

        started: on the clock of time.perf_counter.
        """
        if params.thinking_budget is not None and not self.processor.template.opens_thinking:
            raise InputError("thinking_budget is for Thinking models; this one does not think")
        grammar = parse_grammar(
            form.response_format,
            form.grammar,
            form.tools,
            form.tool_choice,
            parallel_tool_calls=form.parallel_tool_calls,
        )
        request = partial(self.request, params=params, grammar=grammar, timeout=timeout)
        self._check(params, grammar, timeout)
        # What the model does not see it does not call.
        tools = None if form.tool_choice == "none" else form.tools
        if truncate:
            messages = self._shortened(messages, tools, look, params.max_tokens)
            look = Look(add_vision_id=look.add_vision_id)  # the pictures are cut by now
        return request(self.prompt(messages, tools, look), tools=bool(tools), started=started)

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        tools: bool,
        grammar: Grammar | None = None,
        timeout: float | None = None,
        started: float,
    ) -> Request:
        """What the engine runs. tools: whether calls are to be read from the answer."""
        self._check(params, grammar, timeout)
        if not len(prompt.token_ids):
            raise PromptError("the prompt is empty: there is no token to go on from")
        room = self.context_length - len(prompt.token_ids)
        return Request(
            prompt=prompt,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            eos_token_ids=self.eos_token_ids,
            thinking=self.processor.template.opens_thinking,
            tools=tools,
            preparation_sec=time.perf_counter() - started,
            grammar=grammar,
            timeout=timeout,
            breakers=self.breakers(params),
        )

    def _check(
        self, params: SamplingParams, grammar: Grammar | None, timeout: float | None
    ) -> None:
        params.check_vocabulary(self.vocab_size)
        check_timeout(timeout)
        if grammar is not None:
            self.compiler.compile(grammar)  # here, not while others wait for their tokens

    def breakers(self, params: SamplingParams) -> frozenset[int]:
        """DRY's breakers as tokens; the vocabulary is read once for each of the last sets."""
        if not params.dry_multiplier:
            return frozenset()
        return self._breakers(params.dry_sequence_breakers)

    @cached_property
    def _breakers(self) -> Callable[[tuple[str, ...]], frozenset[int]]:
        return lru_cache(_SETS_OF_BREAKERS)(partial(breaker_tokens, self.processor.tokenizer))

    def _shortened(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None,
        look: Look,
        max_tokens: int | None,
    ) -> Messages:
        """The newest turns that fit the context beside an answer."""
        wanted = _ANSWER_ROOM if max_tokens is None else max_tokens
        answer = min(wanted, self.context_length // 4)
        seen = self.processor.read(
            messages, self.processor.image_budget(look.min_pixels, look.max_pixels)
        )
        layout = partial(self.processor.prompt, tools=tools, add_vision_id=look.add_vision_id)
        return shorten(seen, layout, self.context_length - answer)


def check_timeout(timeout: float | None) -> None:
    """Raise InputError for what is no number of seconds."""
    if timeout is not None:
        number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if not (number and 0 < timeout < math.inf):
            raise InputError(f"timeout must be a number of seconds above 0, got {timeout!r}")
