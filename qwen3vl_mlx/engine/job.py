"""One request inside the engine: its state from submission to the last chunk."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import mlx.core as mx

from qwen3vl_mlx.engine.admission import Admission, Cost
from qwen3vl_mlx.engine.batch import Decoding
from qwen3vl_mlx.engine.constraints import GrammarCompiler, make_guide
from qwen3vl_mlx.engine.logprobs import TokenLogprob
from qwen3vl_mlx.engine.output import Chunk, FinishReason, make_usage
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.prefix_cache import Key, Restoring, prompt_key
from qwen3vl_mlx.engine.repetition import LoopGuard
from qwen3vl_mlx.engine.request import Handle
from qwen3vl_mlx.engine.sampling import Sampler
from qwen3vl_mlx.engine.text_stream import TextStream
from qwen3vl_mlx.models.vision import VisionFeatures
from qwen3vl_mlx.processing.tokenizer import Tokenizer

_GROWTH = 1024  # tokens reserved at a time beyond the first prediction


class Job:
    """Scheduling state of one request. `prefill` while its prompt is read, then `row`."""

    def __init__(
        self, handle: Handle, tokenizer: Tokenizer, submitted: float, admission: Admission
    ):
        self.handle = handle
        self.request = request = handle.request
        self.tokenizer = tokenizer
        self.started = submitted - request.preparation_sec
        self.deadline = math.inf if request.timeout is None else submitted + request.timeout
        self.first = 0.0  # when the first token was read
        self.key: Key = prompt_key(request.prompt)
        unbounded = request.params.max_tokens is None
        self.reserved_tokens = admission.reserve(request.max_tokens, unbounded=unbounded)
        self.cost: Cost = admission.cost(request.prompt, self.reserved_tokens)
        self.cached = 0
        self.asked_disk = False
        self.restoring: Restoring | None = None
        self.prefill: Prefill | None = None
        self.features: dict[str, VisionFeatures] = {}  # found, while others are being encoded
        self.row: Decoding | None = None
        self.text = TextStream(tokenizer, request)
        self.guard = LoopGuard() if request.params.loop_guard else None

    @property
    def reserved_length(self) -> int:
        return len(self.request.prompt.token_ids) + self.reserved_tokens

    def grown(self, admission: Admission) -> Cost:
        """What the request costs with more tokens than were reserved so far."""
        self.reserved_tokens = min(self.reserved_tokens + _GROWTH, self.request.max_tokens)
        return admission.cost(self.request.prompt, self.reserved_tokens)

    def key_with(self, answer: Sequence[int]) -> Key:
        """The key of prompt and answer."""
        return prompt_key(self.request.prompt, answer)

    def start(self, vocab_size: int, compiler: GrammarCompiler) -> Decoding:
        """The row that decodes the answer, once the prompt is read."""
        request, params = self.request, self.request.params
        sampler = Sampler(params, request.prompt.token_ids, vocab_size, request.breakers)
        self.row = Decoding(
            sampler=sampler,
            sampler_state=sampler.start(),
            guide=make_guide(
                compiler,
                request.grammar,
                thinking=request.thinking,
                thinking_budget=params.thinking_budget,
            ),
            rope_delta=request.prompt.rope_delta,
            max_tokens=request.max_tokens,
            top_logprobs=params.top_logprobs if params.logprobs else None,
            length=len(request.prompt.token_ids),
            end_tokens=frozenset() if params.ignore_eos else request.eos_token_ids,
        )
        return self.row

    def take(self, token: int, logprob: TokenLogprob | None) -> FinishReason | None:
        """Note a token of the answer, and say why the answer ends with it, if it does."""
        row = self.row
        assert row is not None
        self.first = self.first or time.perf_counter()
        row.tokens.append(token)
        self.handle.tokens.append(token)
        if row.guide is not None:
            row.guide.consume(token)
        for chunk in self.text.push(token, logprob):
            self.handle.put(chunk)
        if row.guide is not None and row.guide.failure is not None:
            return "constraint"
        if self.text.ended:
            return self.text.finish_reason
        if row.guide is not None and row.guide.complete:
            self.text.complete = True
            return self.text.finish_reason
        if self.guard is not None and self.guard.push(token):
            return "repetition"
        if len(row.tokens) >= row.max_tokens:
            return self.text.finish_reason
        return None

    def end(self, reason: FinishReason) -> list[Chunk]:
        """The last chunks; the very last has the reason and the numbers."""
        row, ended = self.row, time.perf_counter()
        chunks = self.text.flush()
        if self.text.found_stop:  # a stop string that ended only with the last character
            reason = "stop"
        usage = make_usage(
            prompt=len(self.request.prompt.token_ids),
            completion=len(row.tokens) if row is not None else 0,
            cached=self.cached,
            started=self.started,
            first=self.first or ended,
            ended=ended,
            peak=mx.get_peak_memory(),
            drafted=row.drafted if row is not None else 0,
            accepted=row.accepted if row is not None else 0,
            steps=row.steps if row is not None else 0,
        )
        closed = self.text.parser.reasoning_closed
        return [*chunks, Chunk(finish_reason=reason, usage=usage, reasoning_closed=closed)]
