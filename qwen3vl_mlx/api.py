"""The library in one object: load a checkpoint, ask, stream, chat.

from qwen3vl_mlx import load
model = load("demo")
print(model.generate("What is this?", images=["photo.jpg"]).text)
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx import hub
from qwen3vl_mlx.conversation import Chat, VideoSource, as_messages
from qwen3vl_mlx.engine import generation
from qwen3vl_mlx.engine.answer import Request, answer
from qwen3vl_mlx.engine.memory import wire_memory
from qwen3vl_mlx.engine.output import Chunk, Completion, collect
from qwen3vl_mlx.engine.sampling import SamplingParams, default_params
from qwen3vl_mlx.engine.state import CacheState
from qwen3vl_mlx.errors import CheckpointError, InputError, PromptError
from qwen3vl_mlx.jsonfiles import read_generation_config
from qwen3vl_mlx.loading import (
    default_dtype,
    load_model,
    load_quantized,
    model_itemsize,
    stored_config,
    stored_modules,
)
from qwen3vl_mlx.media import ImageSource
from qwen3vl_mlx.models.config import ModelConfig, read_config
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.processor import MaxPixels, Messages, Processor
from qwen3vl_mlx.processing.prompt import Prompt

if TYPE_CHECKING:
    from qwen3vl_mlx.quant.recipes import Recipe

_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    quantize: str | Recipe | None = None,
    topology: str | os.PathLike[str] | None = None,
    dtype: mx.Dtype | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> Qwen3VL:
    """Load a checkpoint: a folder, a Hub id, or "demo".

    None is $QWEN3VL_MODEL, or mlx-community/Qwen3-VL-4B-Instruct-4bit. quantize: "2bit" to "8bit",
    "mxfp4", "mxfp8", "nvfp4", "mixed_3_6", "auto" (the best that fits this machine), a name of
    mistral.rs ("q4k"), or a `Recipe`: weights are quantized as they are read, and the whole model
    is never held. topology: a YAML file of exceptions to it. dtype None keeps the checkpoint's
    floating-point type on a GPU and is float32 on a CPU. progress shows a bar on a terminal where
    reading the weights takes over a second. Raises CheckpointError, ConfigError, WeightsError,
    HubError, or InputError for an unknown quantization.
    """
    source = hub.snapshot(hub.default_model() if model is None else model, revision)
    config = read_config(source.folder)
    # A tokenizer of 150,000 tokens takes as long to read as a small model's weights.
    with ThreadPoolExecutor(max_workers=1) as pool:
        processor = pool.submit(Processor.from_folder, source.folder, config)
        weights = _load_weights(source.folder, config, quantize, topology, dtype, progress)
    wire_memory()
    generation_config = read_generation_config(source.folder)
    return Qwen3VL(weights, processor.result(), generation_config, source)


def _load_weights(
    folder: Path,
    config: ModelConfig,
    quantize: str | Recipe | None,
    topology: str | os.PathLike[str] | None,
    dtype: mx.Dtype | None,
    progress: bool,
) -> Model:
    dtype = dtype or default_dtype()
    if quantize is None and topology is not None:
        raise InputError('a topology file holds exceptions: say from what, quantize="4bit"')
    if quantize is not None:
        from qwen3vl_mlx.quant import policy
        from qwen3vl_mlx.quant.apply import as_assignment

        request = policy.Request(quantize, topology=topology)
        config = stored_config(folder, config)
        stored = as_assignment(stored_modules(folder, config))
        if progress:
            policy.tell_plan(config, request)
        assignment = policy.choose(config, request, stored)
        if progress:
            policy.tell(config, request, assignment, stored, model_itemsize(folder))
        if assignment is not None and assignment != stored:
            return load_quantized(
                folder, assignment.modules, dtype, config=config, progress=progress
            )
    return load_model(folder, dtype, config=config, progress=progress)


class Qwen3VL:
    """A loaded model. Holds weights and settings; every request brings its own state."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        generation_config: Mapping[str, Any],
        source: hub.Snapshot,
    ):
        self.model = model
        self.processor = processor
        self.source = source
        self._running = 0
        try:
            self.default_params = default_params(generation_config)
        except InputError as error:
            raise CheckpointError(f"generation_config.json: {error}") from error
        self.eos_token_ids = eos_token_ids(generation_config, processor)

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
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        add_vision_id: bool = False,
    ) -> Completion:
        """Answer a prompt about `images` and `videos`, or a list of OpenAI chat messages.

        Images are paths, URLs, data URIs, base64, bytes, PIL images or arrays; videos are lists
        of frames or `Video`. Sampling parameters left unset come from generation_config.json.
        max_pixels None is the desktop budget, "full" the checkpoint's. Raises InputError.
        """
        return collect(
            self.stream(
                messages,
                images=images,
                videos=videos,
                tools=tools,
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
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                add_vision_id=add_vision_id,
            )
        )

    def stream(
        self,
        messages: str | Messages,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
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
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        add_vision_id: bool = False,
    ) -> Iterator[Chunk]:
        """`generate`, chunk by chunk. Closing the iterator stops the work.

        The request is checked, and its images are read, before this returns.
        """
        started = time.perf_counter()
        params = self.default_params.updated(
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
            }
        )
        prompt = self.processor.prompt(
            as_messages(messages, images, videos),
            tools=tools,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            add_vision_id=add_vision_id,
        )
        request = self.request(prompt, params, tools=bool(tools), started=started)
        return self.run(request, self.new_state())

    def run(self, request: Request, state: CacheState) -> Generator[Chunk, None, None]:
        """Answer a request from `request()`, on a state from `new_state()` or an earlier turn."""
        self._running += 1
        try:
            yield from answer(self.model, self.processor.tokenizer, request, state)
        finally:
            self._running -= 1

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
        if self._running:
            raise InputError(
                f"answers are being generated ({self._running}): requantize when they have ended"
            )
        if quantize is None:
            raise InputError('requantize takes a quantization such as "4bit"')
        config = read_config(self.source.folder)
        dtype = self.model.vision_tower.patch_embed.proj.weight.dtype
        self.model = _load_weights(self.source.folder, config, quantize, topology, dtype, progress)
        mx.clear_cache()
        wire_memory()

    def save(
        self, folder: str | os.PathLike[str], *, force: bool = False, progress: bool = False
    ) -> None:
        """Write the model as it is now, quantized or not, to a folder that `load` reads back.

        It loads bit-equal here, and in mlx-vlm. force replaces an existing checkpoint. Raises
        InputError, or OutputError where the disk does not take it; then nothing is changed.
        """
        from qwen3vl_mlx.saving import save_model

        save_model(self.model, self.source, Path(folder).expanduser(), force, progress)

    def request(
        self, prompt: Prompt, params: SamplingParams, *, tools: bool, started: float
    ) -> Request:
        """What the engine runs. Raises PromptError for a prompt that fills the context."""
        params.check_vocabulary(self.model.config.text.vocab_size)
        room = self._room(prompt)
        return Request(
            prompt=prompt,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            eos_token_ids=self.eos_token_ids,
            thinking=self.processor.template.opens_thinking,
            tools=tools,
            preparation_sec=time.perf_counter() - started,
        )

    def _room(self, prompt: Prompt) -> int:
        """Tokens the answer may have. Raises PromptError for a prompt that fills the context."""
        length = len(prompt.token_ids)
        if length >= self.context_length:
            raise PromptError(
                f"the prompt has {length} tokens and the model's context holds "
                f"{self.context_length}, answer included; shorten it or lower max_pixels"
            )
        return self.context_length - length

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

        Returns (L, vocab_size). Raises InputError as `generate` does.
        """
        prompt = self.processor.prompt(
            as_messages(messages, images, videos),
            tools=tools,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            add_vision_id=add_vision_id,
        )
        self._room(prompt)
        state = self.new_state()
        hidden = generation.forward(self.model, prompt, state, 0, generation.PREFILL_CHUNK)
        logits = (self.model.language_model.logits(part)[0] for part in hidden)
        return np.concatenate([np.array(part.astype(mx.float32)) for part in logits])

    def new_state(self) -> CacheState:
        """An empty cache for one conversation."""
        return CacheState.empty(self.model.config.text.num_hidden_layers)


def eos_token_ids(generation_config: Mapping[str, Any], processor: Processor) -> frozenset[int]:
    """Every id that ends an answer: the file's, and the two all Qwen3-VL models end with."""
    given = generation_config.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(token) is not int for token in ids):
        raise CheckpointError(
            f"generation_config.json: eos_token_id must be one or more token ids, got {given!r}"
        )
    added = processor.tokenizer.added_tokens
    return frozenset([*ids, *(added[name] for name in _END_TOKENS if name in added)])
