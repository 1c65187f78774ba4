"""One request to a stream of chunks: prefill, decode, detokenize, stop, parse, account."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from qwen3vl_mlx.engine import generation
from qwen3vl_mlx.engine.output import Chunk, FinishReason, OutputParser, Scanner, make_usage
from qwen3vl_mlx.engine.sampling import Sampler, SamplingParams
from qwen3vl_mlx.engine.state import CacheState
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.processing.tokenizer import StreamingDecoder, Tokenizer


@dataclass(frozen=True)
class Request:
    """One question, laid out and ready to run."""

    prompt: Prompt
    params: SamplingParams
    max_tokens: int
    eos_token_ids: frozenset[int]
    thinking: bool  # the prompt opens a thought, so the answer begins inside it
    tools: bool  # parse tool calls
    preparation_sec: float  # what reading the pictures and laying out the prompt took


def answer(
    model: Model, tokenizer: Tokenizer, request: Request, state: CacheState
) -> Iterator[Chunk]:
    """Stream the answer; the last chunk has `finish_reason` and `usage`.

    Afterwards `state` holds prompt and answer, also where the iterator is closed early.
    """
    started = time.perf_counter() - request.preparation_sec
    prompt = request.prompt
    sampler = Sampler(request.params, prompt.token_ids, model.config.text.vocab_size)
    text_of = _TextStream(tokenizer, request)
    mx.reset_peak_memory()
    cached = state.reuse(prompt)
    logits = generation.prefill(model, prompt, state)
    tokens = generation.decode(model, state, prompt.rope_delta, logits, sampler, request.max_tokens)
    count, first = 0, 0.0
    for token in tokens:
        count += 1
        first = first or time.perf_counter()
        yield from text_of.push(token)
        if text_of.stopped:
            break
    tokens.close()
    yield from text_of.flush()
    usage = make_usage(
        prompt=len(prompt.token_ids),
        completion=count,
        cached=cached,
        started=started,
        first=first,
        ended=time.perf_counter(),
        peak=mx.get_peak_memory(),
    )
    yield Chunk(
        finish_reason=text_of.finish_reason,
        usage=usage,
        reasoning_closed=text_of.parser.reasoning_closed,
    )


class _TextStream:
    """Token ids to chunks of one answer, up to an end token or a stop string."""

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self.eos_token_ids = request.eos_token_ids
        self.decoder = StreamingDecoder(tokenizer)
        self.stops = Scanner(request.params.stop)
        self.parser = OutputParser(thinking=request.thinking, tools=request.tools)
        self.stopped = False
        self.found_stop = False

    @property
    def finish_reason(self) -> FinishReason:
        if self.parser.calls and not self.found_stop:
            return "tool_calls" if self.stopped else "length"
        return "stop" if self.stopped else "length"

    def push(self, token: int) -> Iterator[Chunk]:
        if token in self.eos_token_ids:
            self.stopped = True
            return
        yield from self._text(self.decoder.push(token))

    def flush(self) -> Iterator[Chunk]:
        if not self.found_stop:
            yield from self._text(self.decoder.flush())
        if not self.found_stop:
            yield from self.parser.push(self.stops.flush())
        yield from self.parser.flush()

    def _text(self, text: str) -> Iterator[Chunk]:
        ready, stop, _ = self.stops.push(text)
        yield from self.parser.push(ready)
        self.found_stop = stop is not None
        self.stopped = self.stopped or self.found_stop
