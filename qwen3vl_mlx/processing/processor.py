"""Chat messages with images and videos to a `Prompt`. Knows no weights and no device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from qwen3vl_mlx.errors import CheckpointError, InputError, PromptError
from qwen3vl_mlx.media import ImageSource, load_image
from qwen3vl_mlx.models.config import ModelConfig
from qwen3vl_mlx.models.positions import rope_index
from qwen3vl_mlx.processing.image import (
    PixelBudget,
    VisionSettings,
    VisualInput,
    image_input,
    read_settings,
    video_input,
)
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.processing.template import ChatTemplate, part_kind
from qwen3vl_mlx.processing.tokenizer import Tokenizer
from qwen3vl_mlx.processing.tool_results import results_in_order
from qwen3vl_mlx.processing.video import DEFAULT_FPS, Video

Messages: TypeAlias = Sequence[Mapping[str, Any]]
MaxPixels: TypeAlias = "int | Literal['full'] | None"

# 2,560 visual tokens. The models take 16,384, which a desktop pays for in minutes and gigabytes.
DESKTOP_MAX_PIXELS = 2560 * 32 * 32

_DECODERS = 4  # pictures in decoding at once; each holds its full size in memory

Source = TypeVar("Source")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processor:
    """A checkpoint's tokenizer, chat template and image settings."""

    tokenizer: Tokenizer
    template: ChatTemplate
    settings: VisionSettings
    config: ModelConfig

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig) -> Processor:
        """Read a checkpoint folder. Raises CheckpointError naming the file at fault."""
        tokenizer = Tokenizer.from_folder(folder)
        for key in ("image_token_id", "video_token_id", "vision_start_token_id"):
            if getattr(config, key) not in tokenizer.added_tokens.values():
                raise CheckpointError(
                    f"config.json: {key} {getattr(config, key)} is not an added token of "
                    f"{folder / 'tokenizer.json'}; the two belong to different models"
                )
        template = ChatTemplate.from_folder(folder, tokenizer)
        return cls(tokenizer, template, read_settings(folder, config.vision), config)

    def image_budget(
        self, min_pixels: int | None = None, max_pixels: MaxPixels = None
    ) -> PixelBudget:
        """Pixel limits of one image for a request's own wishes.

        max_pixels None is the desktop default, "full" the checkpoint's own limit.
        """
        budget = self.settings.image
        if max_pixels == "full":
            return budget.limited(min_pixels, budget.max_pixels)
        desktop = replace(budget, max_pixels=min(budget.max_pixels, DESKTOP_MAX_PIXELS))
        return desktop.limited(min_pixels, max_pixels)

    def prompt(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        min_pixels: int | None = None,
        max_pixels: MaxPixels = None,
        add_vision_id: bool = False,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Lay out OpenAI chat messages. Parts keep their order.

        An image part holds any `ImageSource` under `image` or `image_url`; a video part holds a
        list of frames, or a `Video`, under `video`, with `fps` beside it.
        Raises PromptError or ImageError naming what is wrong.
        """
        messages = results_in_order(messages)
        rendered = self.template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            add_vision_id=add_vision_id,
        )
        budget = self.image_budget(min_pixels, max_pixels)
        media = self._visual_inputs(messages, budget)
        limited = min_pixels is not None or max_pixels is not None
        if limited and media and all(medium.kind == "video" for medium in media):
            raise InputError(
                "min_pixels and max_pixels limit images; limit a video by Video(max_pixels=...)"
            )
        stamps = [medium.timestamps for medium in media if medium.kind == "video"]
        pieces = self._expand_videos(rendered.pieces, stamps)
        ids = [token for piece in pieces for token in self.tokenizer.encode(piece)]
        return self.layout(ids, media)

    def visual_input(
        self, source: ImageSource | Video | VisualInput, budget: PixelBudget
    ) -> VisualInput:
        """Decode, resize and cut one image or video; what is cut already stays as it is."""
        if isinstance(source, VisualInput):
            return source
        if isinstance(source, Video):
            together = not Medium(source).holds_lazy_image
            frames = _in_threads(load_image, source.frames, together=together)
            limits = self.settings.video.limited(None, source.max_pixels)
            return video_input(frames, source.fps, self.settings, limits)
        return image_input(load_image(source), self.settings, budget)

    def _visual_inputs(self, messages: Messages, budget: PixelBudget) -> list[VisualInput]:
        media = list(media_sources(messages))
        # Pillow decodes an opened image when it is first used, and not in two threads at once.
        together = not any(medium.holds_lazy_image for medium in media)
        return _in_threads(
            lambda medium: self._visual_input(medium, budget), media, together=together
        )

    def _visual_input(self, medium: Medium, budget: PixelBudget) -> VisualInput:
        limits = budget.limited(medium.min_pixels, medium.max_pixels)
        return self.visual_input(medium.source, limits)

    def read(self, messages: Messages, budget: PixelBudget) -> list[dict[str, Any]]:
        """Copies of messages whose media are cut, so that later prompts need not do it again."""
        media = iter(self._visual_inputs(messages, budget))
        copies: list[dict[str, Any]] = []
        for message in messages:
            content = message.get("content")
            if content is not None and not isinstance(content, str):
                kinds = [part_kind(part) for part in content]
                content = [
                    part if kind == "text" else {"type": kind, kind: next(media)}
                    for kind, part in zip(kinds, content, strict=True)
                ]
            copies.append({**message, "content": content})
        return copies

    def layout(self, token_ids: Sequence[int], media: Sequence[VisualInput]) -> Prompt:
        """A prompt from ids with one placeholder per image and per temporal patch of a video."""
        config = self.config
        ids = np.asarray(token_ids, np.int32)
        grids = {kind: [m.grid_thw for m in media if m.kind == kind] for kind in ("image", "video")}
        merge = self.settings.merge_size**2
        counts = np.ones(len(ids), np.int64)
        for kind, token in (("image", config.image_token_id), ("video", config.video_token_id)):
            frames = [h * w // merge for t, h, w in grids[kind] for _ in range(t)]
            places = np.flatnonzero(ids == token)
            if len(places) != len(frames):
                raise PromptError(
                    f"the chat template wrote {len(places)} {kind} placeholders for "
                    f"{len(frames)} {kind} frames; put pictures into user messages"
                )
            counts[places] = frames
        ids = np.repeat(ids, counts)
        index = rope_index(
            ids,
            grids["image"],
            grids["video"],
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            spatial_merge_size=self.settings.merge_size,
        )
        return Prompt(ids, index, tuple(media))

    def _expand_videos(
        self, pieces: Sequence[str], stamps: Sequence[Sequence[float]]
    ) -> Iterator[str]:
        """Replace each video placeholder by one per temporal patch, each behind its time.

        This is the form of transformers 4.57, which the models were trained on.
        """
        names = {token_id: text for text, token_id in self.tokenizer.added_tokens.items()}
        config = self.config
        start, pad, end = (
            names.get(token_id, "")
            for token_id in (
                config.vision_start_token_id,
                config.video_token_id,
                config.vision_end_token_id,
            )
        )
        waiting = iter(stamps)
        for piece in pieces:
            before, *rest = piece.split(start + pad + end)
            for text in rest:
                times = next(waiting, None)
                if times is None:
                    raise PromptError("the prompt has more video placeholders than videos given")
                before += "".join(f"<{time:.1f} seconds>{start}{pad}{end}" for time in times) + text
            yield before


def _in_threads(
    work: Callable[[Source], Result], items: Sequence[Source], *, together: bool
) -> list[Result]:
    """`work` on every item, in order; Pillow decodes and resizes without Python's lock."""
    if len(items) < 2 or not together:
        return [work(item) for item in items]
    with ThreadPoolExecutor(max_workers=_DECODERS) as pool:
        return list(pool.map(work, items))


@dataclass(frozen=True)
class Medium:
    """An image or video as a message has it, with limits of its own (Qwen's `min_pixels`)."""

    source: ImageSource | Video | VisualInput
    min_pixels: int | None = None
    max_pixels: int | None = None

    @property
    def holds_lazy_image(self) -> bool:
        from PIL.Image import Image

        sources = self.source.frames if isinstance(self.source, Video) else (self.source,)
        return any(isinstance(source, Image) for source in sources)


def media_sources(messages: Messages) -> Iterator[Medium]:
    """The images and videos of messages, in order. Raises PromptError for an empty part."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        for place, part in enumerate(content):
            kind = part_kind(part)
            if kind == "text":
                continue
            where = f"messages[{number}].content[{place}]"
            keys = ("image", "image_url") if kind == "image" else ("video", "video_url")
            source = next((part[key] for key in keys if part.get(key) is not None), None)
            if isinstance(source, Mapping):
                source = source.get("url")
            if source is None:
                raise PromptError(f"{where} has no {keys[0]}; give it under {keys[0]!r}")
            if kind == "video":
                yield Medium(_video(source, part, where))
            else:
                yield Medium(source, part.get("min_pixels"), part.get("max_pixels"))


def _video(source: Any, part: Mapping[str, Any], where: str) -> Video | VisualInput:
    if isinstance(source, (Video, VisualInput)):
        return source
    if isinstance(source, (str, bytes)) or not isinstance(source, Sequence):
        raise PromptError(
            f"{where}: a video is a list of frames, got {type(source).__name__}; video files "
            "cannot be decoded yet"
        )
    fps = part.get("fps")
    return Video(source, DEFAULT_FPS if fps is None else fps, part.get("max_pixels"))
