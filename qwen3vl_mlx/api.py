"""The library in one object: load a checkpoint, ask, stream, chat.

from qwen3vl_mlx import load
model = load("demo")
print(model.generate("What is this?", images=["photo.jpg"]).text)
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx import hub
from qwen3vl_mlx.asking import Asking, Form, Look
from qwen3vl_mlx.conversation import Chat, VideoSource, as_messages
from qwen3vl_mlx.engine.constraints import GrammarCompiler
from qwen3vl_mlx.engine.draft_model import DraftCheckpoint
from qwen3vl_mlx.engine.engine import Engine, EngineOptions
from qwen3vl_mlx.engine.full_pass import full_logits
from qwen3vl_mlx.engine.memory import wire_memory
from qwen3vl_mlx.engine.output import Completion, collect
from qwen3vl_mlx.engine.request import Request, Stream
from qwen3vl_mlx.engine.sampling import SamplingParams, asked_params, default_params
from qwen3vl_mlx.errors import CheckpointError, InputError
from qwen3vl_mlx.forks import check_not_forked
from qwen3vl_mlx.jsonfiles import read_generation_config
from qwen3vl_mlx.media import ImageSource
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.processor import MaxPixels, Messages, Processor
from qwen3vl_mlx.processing.tokenizer import Tokenizer, end_token_ids
from qwen3vl_mlx.shared_models import shared_models
from qwen3vl_mlx.tasks import PictureTasks
from qwen3vl_mlx.tasks_wording import read_wording
from qwen3vl_mlx.weights import load_weights

if TYPE_CHECKING:
    from qwen3vl_mlx.quant.recipes import Recipe


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    quantize: str | Recipe | None = None,
    topology: str | os.PathLike[str] | None = None,
    dtype: mx.Dtype | None = None,
    revision: str | None = None,
    engine: EngineOptions | None = None,
    draft: str | os.PathLike[str] | None = None,
    progress: bool = False,
    shared: bool = False,
) -> Qwen3VL:
    """Load a checkpoint: a folder, a Hub id, or "demo".

    None is $QWEN3VL_MODEL, or mlx-community/Qwen3-VL-4B-Instruct-4bit. quantize: "2bit" to "8bit",
    "mxfp4", "mxfp8", "nvfp4", "mixed_3_6", "auto" (the best that fits this machine), a name of
    mistral.rs ("q4k"), or a `Recipe`: weights are quantized as they are read, and the whole model
    is never held. topology: a YAML file of exceptions to it. dtype None keeps the checkpoint's
    floating-point type on a GPU and is float32 on a CPU. engine: caches, batch size and memory
    limit, see `EngineOptions`. draft: a smaller checkpoint of the family that guesses ahead; the
    answers stay what they are, and come faster where it guesses well. progress shows a bar on a
    terminal where reading the weights takes over a second. shared: the same object for all who
    ask for the same checkpoint in the same way, from any thread, as long as somebody holds it.
    Raises CheckpointError, ConfigError, WeightsError, HubError, InputError for an unknown
    quantization, or ForkedProcessError in a fork of a process that has loaded a model.
    """
    check_not_forked()
    source = hub.snapshot(hub.default_model() if model is None else model, revision)
    load_source = partial(_load, source, quantize, topology, dtype, engine, draft, progress)
    if not shared:
        return load_source()
    wishes = (quantize, topology, dtype, engine, draft)  # a recipe is not hashable
    return shared_models().get((source.folder.resolve(), repr(wishes)), load_source)


def _load(
    source: hub.Snapshot,
    quantize: str | Recipe | None,
    topology: str | os.PathLike[str] | None,
    dtype: mx.Dtype | None,
    engine: EngineOptions | None,
    draft: str | os.PathLike[str] | None,
    progress: bool,
) -> Qwen3VL:
    config = read_config(source.folder)
    # A tokenizer of 150,000 tokens takes as long to read as a small model's weights.
    with ThreadPoolExecutor(max_workers=1) as pool:
        processor = pool.submit(Processor.from_folder, source.folder, config)
        weights = load_weights(source.folder, config, quantize, topology, dtype, progress)
    options = engine or EngineOptions()
    if draft is not None:
        options = replace(options, draft=_load_draft(draft, dtype, progress))
    wire_memory()
    generation_config = read_generation_config(source.folder)
    return Qwen3VL(weights, processor.result(), generation_config, source, options)


def _load_draft(
    draft: str | os.PathLike[str], dtype: mx.Dtype | None, progress: bool
) -> DraftCheckpoint:
    folder = hub.snapshot(draft).folder
    config = read_config(folder)
    model = load_weights(folder, config, None, None, dtype, progress)
    return DraftCheckpoint(model, Tokenizer.from_folder(folder))


class Qwen3VL(PictureTasks):
    """A loaded model. Any number of threads may ask it at once: one engine answers them all."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        generation_config: Mapping[str, Any],
        source: hub.Snapshot,
        options: EngineOptions | None = None,
    ):
        self.model = model
        self.processor = processor
        self.source = source
        self.wording = read_wording(source.folder)
        try:
            self.default_params = default_params(
                generation_config, thinking=processor.template.opens_thinking
            )
        except InputError as error:
            raise CheckpointError(f"generation_config.json: {error}") from error
        self.eos_token_ids = end_token_ids(generation_config, processor.tokenizer)
        vocab_size = model.config.text.vocab_size
        self.asking = Asking(
            processor,
            GrammarCompiler(processor.tokenizer, vocab_size, self.eos_token_ids),
            self.eos_token_ids,
            self.context_length,
            vocab_size,
        )
        self._use(self._new_engine(model, options or EngineOptions()))

    def _new_engine(self, model: Model, options: EngineOptions) -> Engine:
        return Engine(model, self.processor.tokenizer, self.asking.compiler, options)

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        self._stop = weakref.finalize(self, engine.close)  # its thread would hold the weights

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.text.max_position_embeddings

    def generate(
        self,
        messages: str | Messages,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        thinking_budget: int | None = None,
        timeout: float | None = None,
        truncate: bool = False,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        add_vision_id: bool = False,
        n: int = 1,
    ) -> Completion:
        """Answer a prompt about `images` and `videos`, or a list of OpenAI chat messages.

        Images are paths, URLs, data URIs, base64, bytes, PIL images or arrays; videos are lists
        of frames or `Video`. Sampling parameters left unset come from generation_config.json;
        `sampling` takes those without a name here: see `SamplingParams`. response_format,
        tool_choice: as OpenAI has them; grammar: {"type": "regex" | "lark" | "json_schema",
        "value": ...}. thinking_budget: tokens of thought at most. timeout: seconds after which the
        answer is cut off. truncate drops the oldest turns of a conversation that is too long.
        max_pixels None is the desktop budget, "full" the checkpoint's. n: answers wanted; those
        after the first are its `alternatives`.
        Raises InputError.
        """
        if type(n) is not int or n < 1:
            raise InputError(f"n must be a whole number of at least 1, got {n!r}")
        with (
            self.stream(
                messages,
                images=images,
                videos=videos,
                tools=tools,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                response_format=response_format,
                grammar=grammar,
                sampling=sampling,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                frequency_penalty=frequency_penalty,
                presence_penalty=presence_penalty,
                logit_bias=logit_bias,
                stop=stop,
                seed=seed,
                logprobs=logprobs,
                top_logprobs=top_logprobs,
                thinking_budget=thinking_budget,
                timeout=timeout,
                truncate=truncate,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                add_vision_id=add_vision_id,
            ) as first,
            ExitStack() as stack,
        ):
            others = [stack.enter_context(other) for other in self.repeat(first, n - 1)]
            answer = collect(first)
            return replace(answer, alternatives=tuple(map(collect, others))) if others else answer

    def stream(
        self,
        messages: str | Messages,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        thinking_budget: int | None = None,
        timeout: float | None = None,
        truncate: bool = False,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        add_vision_id: bool = False,
    ) -> Stream:
        """`generate`, chunk by chunk. The work has begun when this returns; closing stops it.

        The request is checked, and its images are read, before this returns.
        """
        started = time.perf_counter()
        wanted = asked_params(
            self.default_params,
            sampling,
            {
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "frequency_penalty": frequency_penalty,
                "presence_penalty": presence_penalty,
                "logit_bias": logit_bias,
                "stop": stop,
                "seed": seed,
                "logprobs": logprobs,
                "top_logprobs": top_logprobs,
                "thinking_budget": thinking_budget,
            },
        )
        request = self.asking.prepare(
            as_messages(messages, images, videos),
            wanted,
            Form(tools, tool_choice, parallel_tool_calls, response_format, grammar),
            Look(min_pixels, max_pixels, add_vision_id),
            truncate=truncate,
            timeout=timeout,
            started=started,
        )
        return self.run(request)

    def run(self, request: Request) -> Stream:
        """Answer a request from `asking`. Raises InputError where it can never fit."""
        return Stream(self.engine.submit(request), self)

    def repeat(self, stream: Stream, count: int) -> list[Stream]:
        """The same request `count` more times, with the seeds that follow its own.

        The prompt is read once, for all of them.
        """
        request = stream.handle.request
        seed = request.params.seed
        again = [
            replace(request.params, seed=None if seed is None else (seed + i) % 2**64)
            for i in range(1, count + 1)
        ]
        return [self.run(replace(request, params=params)) for params in again]

    def close(self) -> None:
        """End all answers as cancelled, and write what `cache_folder` is to keep."""
        self._stop()

    def requantize(
        self,
        quantize: str | Recipe,
        *,
        topology: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> None:
        """Read the source again and quantize it to other bits: see `load`.

        Old and new weights are held together until the new ones are complete, so that a failure
        changes nothing. Chats go on, computing their earlier turns anew. Raises InputError while
        an answer is being generated.
        """
        if quantize is None:
            raise InputError('requantize takes a quantization such as "4bit"')
        refusal = "answers are being generated: requantize when they have ended"
        self.engine.call(lambda: None)  # what was cancelled before has ended then
        if self.engine.busy:
            raise InputError(refusal)
        config = read_config(self.source.folder)
        dtype = self.model.vision_tower.patch_embed.proj.weight.dtype
        model = load_weights(self.source.folder, config, quantize, topology, dtype, progress)
        engine = self._new_engine(model, self.engine.options)
        if not self.engine.close_if_idle():
            raise InputError(refusal)
        self._stop()
        self.model = model
        self._use(engine)
        mx.clear_cache()
        wire_memory()

    def save(
        self, folder: str | os.PathLike[str], *, force: bool = False, progress: bool = False
    ) -> None:
        """Write the model as it is now, quantized or not, to a folder that `load` reads back.

        It loads bit-equal here, and in mlx-vlm. force replaces an existing checkpoint. Raises
        InputError, or OutputError where the disk does not take it; then nothing is changed.
        """
        check_not_forked()
        from qwen3vl_mlx.saving import save_model

        save_model(self.model, self.source, Path(folder).expanduser(), force, progress)

    def chat(
        self,
        system: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        params: SamplingParams | None = None,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
    ) -> Chat:
        """A conversation that remembers its turns, their pictures and their cache.

        params: sampling of every turn, by default the checkpoint's own; `chat.params` may be
        replaced between turns.
        """
        return Chat(self, system, tools, params or self.default_params, min_pixels, max_pixels)

    def logits(
        self,
        messages: str | Messages,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        add_vision_id: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Next-token logits at every position of the prompt that `generate` would answer.

        Returns (L, vocab_size). Answers that are being generated go on meanwhile. Raises InputError
        as `generate` does.
        """
        look = Look(min_pixels, max_pixels, add_vision_id)
        prompt = self.asking.prompt(as_messages(messages, images, videos), tools, look)
        return full_logits(self.engine, self.model, prompt)
