"""One request inside the engine: its state from submission to the last chunk."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.admission import Admission, Cost
from qwen3vl_mlx.engine.batch import Batch, Decoding
from qwen3vl_mlx.engine.constraints import GrammarCompiler, make_guide
from qwen3vl_mlx.engine.logprobs import TokenLogprob
from qwen3vl_mlx.engine.output import Chunk, FinishReason, make_usage
from qwen3vl_mlx.engine.prefill import Prefill
from qwen3vl_mlx.engine.prefix_cache import Key, Restoring, prompt_key
from qwen3vl_mlx.engine.repetition import LoopGuard
from qwen3vl_mlx.engine.request import Handle, Request
from qwen3vl_mlx.engine.sampling import Sampler, SamplerState
from qwen3vl_mlx.engine.text_stream import TextStream
from qwen3vl_mlx.models.positions import RopeIndex
from qwen3vl_mlx.models.vision import VisionFeatures
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.processing.tokenizer import Tokenizer

_GROWTH = 1024  # tokens reserved at a time beyond the first prediction
_RESUMED_CHUNK = 256  # tokens read at a time of what was put back: it needs little room to go on


def first_reserve(request: Request, admission: Admission) -> int:
    """Tokens of answer that are reserved when a request begins."""
    unbounded = request.params.max_tokens is None
    return admission.reserve(request.max_tokens, unbounded=unbounded)


def continued(prompt: Prompt, answer: list[int]) -> Prompt:
    """A prompt with the beginning of its answer behind it, which is text."""
    length, stop = len(prompt.token_ids), len(prompt.token_ids) + len(answer)
    token_ids = np.concatenate([prompt.token_ids, np.asarray(answer, prompt.token_ids.dtype)])
    tail = np.arange(length, stop, dtype=np.int32) + prompt.rope_delta
    positions = np.concatenate([prompt.position_ids, np.tile(tail, (3, 1))], axis=1)
    index = RopeIndex(positions.astype(np.int32), prompt.rope_delta, prompt.index.spans)
    return replace(prompt, token_ids=token_ids, index=index)


def _chunk(admission: Admission) -> int:
    return min(admission.chunk, _RESUMED_CHUNK)


class Job:
    """Scheduling state of one request. `prefill` while its prompt is read, then `row`.

    A job that had to make room waits again, with its row, and what it has said is read with the
    prompt when there is room.
    """

    def __init__(
        self, handle: Handle, tokenizer: Tokenizer, submitted: float, admission: Admission
    ):
        self.handle = handle
        self.request = request = handle.request
        self.tokenizer = tokenizer
        self.started = submitted - request.preparation_sec
        self.deadline = math.inf if request.timeout is None else submitted + request.timeout
        self.first = 0.0  # when the first token was read
        self.prompt = request.prompt  # what is to be read
        self.key: Key = prompt_key(request.prompt)
        self.reserved_tokens = first_reserve(request, admission)
        self.cost: Cost = admission.cost(request.prompt, self.reserved_tokens)
        self.chunk = admission.chunk  # tokens of it that may be read in one pass
        self.begun = False  # it left the queue once
        self.ended = False
        self.cached = 0
        self.held = 0  # tokens that need not be read
        self.asked_disk = False
        self.restoring: Restoring | None = None
        self.awaits: tuple[int, bool] | None = None  # of PromptReader.changes; the verdict then
        self.prefill: Prefill | None = None
        self.features: dict[str, VisionFeatures] = {}  # found, while others are being encoded
        self.row: Decoding | None = None
        self.state: SamplerState | None = None  # after the last token that was taken
        self.text = TextStream(tokenizer, request)
        self.guard = LoopGuard() if request.params.loop_guard else None

    @property
    def reserved_length(self) -> int:
        return len(self.request.prompt.token_ids) + self.reserved_tokens

    @property
    def grown_tokens(self) -> int:
        """Tokens to reserve where those reserved are not enough."""
        return min(self.reserved_tokens + _GROWTH, self.request.max_tokens)

    def grown(self, admission: Admission) -> Cost:
        """What the running request costs with more tokens than were reserved so far."""
        return admission.cost(self.request.prompt, self.grown_tokens).answering

    def resumed(self, admission: Admission) -> Cost:
        """What the request costs if it is put back now and its answer read again.

        At least one more token is reserved than it has.
        """
        if self.row is None:
            return self.cost
        said = self.row.tokens
        return replace(admission, chunk=_chunk(admission)).cost(
            continued(self.request.prompt, said), self._next_reserve() - len(said)
        )

    def _next_reserve(self) -> int:
        assert self.row is not None
        full = len(self.row.tokens) >= self.reserved_tokens
        return self.grown_tokens if full else self.reserved_tokens

    def put_back(self, admission: Admission) -> None:
        """Wait again; the answer goes on from its last token that was taken."""
        self.prefill = None
        self.features = {}
        self.asked_disk, self.restoring, self.awaits = False, None, None
        self.handle.phase = "waiting"
        row = self.row
        if row is None:
            return
        assert self.state is not None
        self.cost, self.reserved_tokens = self.resumed(admission), self._next_reserve()
        self.chunk = _chunk(admission)
        self.prompt = continued(self.request.prompt, row.tokens)
        self.key = self.whole_key
        # Another object: a token of the old one may be on its way.
        self.row = replace(
            row,
            sampler_state=self.state,
            drawn=len(row.tokens),
            length=len(self.prompt.token_ids),
        )

    def computed(self, batch: Batch) -> list[tuple[mx.array, ...]] | None:
        """Keys and values of the first tokens of `whole_key`, layer by layer; None: nothing new."""
        if self.prefill is not None:
            if self.prefill.done <= self.held:
                return None
            return [kv_cache.layer_rows(layer) for layer in self.prefill.layers]
        if self.row is None or self.row not in batch.rows:
            return None
        # Fed tokens are all read, but for one that a row leaving early may have on its way.
        return batch.rows_of(self.row, min(self.row.length, len(self.whole_key)))

    @property
    def whole_key(self) -> Key:
        """The key of the prompt and of all that was answered so far."""
        return prompt_key(self.request.prompt, self.row.tokens if self.row is not None else ())

    def start(self, vocab_size: int, compiler: GrammarCompiler) -> Decoding:
        """The row that decodes the answer, once the prompt is read."""
        request, params = self.request, self.request.params
        sampler = Sampler(params, request.prompt.token_ids, vocab_size, request.breakers)
        self.state = sampler.start()
        self.row = Decoding(
            sampler=sampler,
            sampler_state=self.state,
            guide=make_guide(
                compiler,
                request.grammar,
                thinking=request.thinking,
                thinking_budget=params.thinking_budget,
                end_tokens=frozenset() if params.ignore_eos else request.eos_token_ids,
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
        if self.text.stop is not None:  # a stop string that ended only with the last character
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
        last = Chunk(
            finish_reason=reason,
            stop=self.text.stop,
            usage=usage,
            reasoning_closed=self.text.parser.reasoning_closed,
        )
        return [*chunks, last]
