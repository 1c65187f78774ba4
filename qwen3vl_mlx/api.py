"""The library in one object: load a checkpoint, ask, stream, chat.

from qwen3vl_mlx import load
model = load("demo")
print(model.generate("What is this?", images=["photo.jpg"]).text)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx import hub
from qwen3vl_mlx.engine import generation
from qwen3vl_mlx.engine.answer import Request, answer
from qwen3vl_mlx.engine.memory import wire_memory
from qwen3vl_mlx.engine.output import Chunk, Completion, collect
from qwen3vl_mlx.engine.sampling import SamplingParams, default_params
from qwen3vl_mlx.engine.state import CacheState
from qwen3vl_mlx.errors import CheckpointError, InputError, PromptError
from qwen3vl_mlx.loading import default_dtype, load_model
from qwen3vl_mlx.media import ImageSource
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.processor import MaxPixels, Messages, Processor
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.processing.video import Video

VideoSource: TypeAlias = "Video | Sequence[ImageSource]"

_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: mx.Dtype | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> Qwen3VL:
    """Load a checkpoint: a folder, a Hub id, or "demo".

    None is $QWEN3VL_MODEL, or mlx-community/Qwen3-VL-4B-Instruct-4bit. dtype None keeps the
    checkpoint's floating-point type on a GPU and is float32 on a CPU. progress shows a bar on a
    terminal where reading the weights takes over a second. Raises CheckpointError, ConfigError,
    WeightsError or HubError.
    """
    folder = hub.resolve(hub.default_model() if model is None else model, revision)
    config = read_config(folder)
    # A tokenizer of 150,000 tokens takes as long to read as a small model's weights.
    with ThreadPoolExecutor(max_workers=1) as pool:
        processor = pool.submit(Processor.from_folder, folder, config)
        weights = load_model(folder, dtype or default_dtype(), config=config, progress=progress)
    wire_memory()
    return Qwen3VL(weights, processor.result(), read_generation_config(folder))


def read_generation_config(folder: Path) -> Mapping[str, Any]:
    """generation_config.json, or what config.json says in its place. May be empty."""
    for name, key in (("generation_config.json", None), ("config.json", "generation_config")):
        path = folder / name
        if not path.exists():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        values = values.get(key) if key and isinstance(values, dict) else values
        if isinstance(values, dict):
            return values
    return {}


class Qwen3VL:
    """A loaded model. Holds weights and settings; every request brings its own state."""

    def __init__(self, model: Model, processor: Processor, generation_config: Mapping[str, Any]):
        self.model = model
        self.processor = processor
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
        return answer(self.model, self.processor.tokenizer, request, self.new_state())

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


class Chat:
    """A conversation with one model. Earlier turns are not computed again."""

    def __init__(
        self,
        model: Qwen3VL,
        system: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        params: SamplingParams,
        min_pixels: int | None,
        max_pixels: MaxPixels,
    ):
        self.model = model
        self.tools = tools
        self.params = params
        self.budget = model.processor.image_budget(min_pixels, max_pixels)
        self.messages: list[Mapping[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.state = model.new_state()
        self._running: Generator[Chunk, None, None] | None = None

    def send(
        self,
        content: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
    ) -> Completion:
        """Say something, with pictures if you like, and return the whole answer.

        content None adds no turn: the model goes on after `add_tool_result`.
        """
        return collect(self.stream(content, images=images, videos=videos))

    def stream(
        self,
        content: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
    ) -> Iterator[Chunk]:
        """`send`, chunk by chunk. Closing the iterator keeps the turn and what was said so far.

        A turn that fails before its first token leaves no trace. A chat gives one answer at a
        time: asking again closes an answer that is still open.
        """
        started = time.perf_counter()
        if self._running is not None:
            self._running.close()
        turn: list[Mapping[str, Any]] = []
        if content is not None:
            if not isinstance(content, str):
                raise InputError(f"send() takes a text, got {type(content).__name__}")
            seen = self.model.processor.read(as_messages(content, images, videos), self.budget)
            turn.extend(seen)
        elif images or videos:
            raise InputError("images and videos need a text: send(content, images=...)")
        messages = [*self.messages, *turn]
        prompt = self.model.processor.prompt(messages, tools=self.tools)
        request = self.model.request(prompt, self.params, tools=bool(self.tools), started=started)
        self._running = self._record(turn, request)
        return self._running

    def add_tool_result(
        self, call_id: str, content: str, *, images: Sequence[ImageSource] = ()
    ) -> None:
        """Note a tool's answer to the call `call_id`; `send()` lets the model read it."""
        if not isinstance(content, str):
            raise InputError(f"a tool's result is a text, got {type(content).__name__}")
        message = as_messages(content, images, ())[0]
        seen = self.model.processor.read([message], self.budget)[0]
        self.messages.append({**seen, "role": "tool", "tool_call_id": call_id})

    def _record(
        self, turn: Sequence[Mapping[str, Any]], request: Request
    ) -> Generator[Chunk, None, None]:
        chunks: list[Chunk] = []
        try:
            for chunk in answer(
                self.model.model, self.model.processor.tokenizer, request, self.state
            ):
                chunks.append(chunk)
                yield chunk
        finally:
            if chunks:
                self.messages += [*turn, _assistant_message(chunks)]


def _assistant_message(chunks: Sequence[Chunk]) -> Mapping[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(chunk.text for chunk in chunks),
    }
    if reasoning := "".join(chunk.reasoning for chunk in chunks):
        message["reasoning_content"] = reasoning
    if calls := [call for chunk in chunks for call in chunk.tool_calls]:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
    return message


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


def as_messages(
    messages: str | Messages, images: Sequence[ImageSource], videos: Sequence[VideoSource]
) -> Messages:
    """A plain prompt with its pictures as one user message; messages as they are."""
    if not isinstance(messages, str):
        if images or videos:
            raise InputError("images= and videos= go with a plain prompt; put them into messages")
        return messages
    for name, value in (("images", images), ("videos", videos)):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise InputError(f"{name} must be a list, got {type(value).__name__}: {name}=[...]")
    return [
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": image} for image in images),
                *({"type": "video", "video": video} for video in videos),
                {"type": "text", "text": messages},
            ],
        }
    ]
