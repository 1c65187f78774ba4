"""One answer's tokens to chunks of text, up to an end token or a stop string."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qwen3vl_mlx.engine.logprobs import TokenLogprob
from qwen3vl_mlx.engine.output import Chunk, FinishReason, OutputParser, Scanner
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.processing.tokenizer import StreamingDecoder, Tokenizer


class TextStream:
    """Detokenizes, stops and parses one answer. `ended` says why it is over, once it is."""

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self.request = request
        self.decoder = StreamingDecoder(tokenizer)
        self.stops = Scanner(request.params.stop)
        self.parser = OutputParser(thinking=request.thinking, tools=request.tools)
        self.stop: str | None = None  # the stop string that was found
        self.found_eos = False
        self.complete = False  # a grammar is satisfied, and only an end token could follow
        self.logprobs: list[TokenLogprob] = []  # of tokens whose text has not come out yet

    @property
    def ended(self) -> bool:
        return self.stop is not None or self.found_eos or self.complete

    @property
    def finish_reason(self) -> FinishReason:
        """Why the text ended, as far as the text can tell."""
        if not self.ended:
            return "length"
        return "tool_calls" if self.parser.calls and self.stop is None else "stop"

    def push(self, token: int, logprob: TokenLogprob | None = None) -> list[Chunk]:
        if token in self.request.eos_token_ids and not self.request.params.ignore_eos:
            self.found_eos = True
            return []
        if logprob is not None:
            self.logprobs.append(logprob)
        return self._with_logprobs(self._text(self.decoder.push(token)))

    def flush(self) -> list[Chunk]:
        """What was held back, when no more tokens come."""
        chunks: list[Chunk] = []
        if self.stop is None:
            chunks += self._text(self.decoder.flush())
        if self.stop is None:
            chunks += self.parser.push(self.stops.flush())
        chunks += self.parser.flush()
        if self.logprobs and self.stop is None and not chunks:
            chunks = [Chunk()]
        return self._with_logprobs(chunks)

    def _text(self, text: str) -> list[Chunk]:
        ready, self.stop, _ = self.stops.push(text)
        return self.parser.push(ready)

    def _with_logprobs(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        chunks = list(chunks)
        if chunks and self.logprobs:
            chunks[0] = replace(chunks[0], logprobs=tuple(self.logprobs))
            self.logprobs = []
        return chunks
