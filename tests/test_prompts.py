"""Messages to a prompt: ids as HF's tokenizer, template and processor make them, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stages import film, picture

import qwen3vl_mlx
from qwen3vl_mlx.errors import InputError, PromptError
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.processing.image import PixelBudget, image_input, video_input
from qwen3vl_mlx.processing.processor import DESKTOP_MAX_PIXELS, Processor
from qwen3vl_mlx.processing.video import Video

DEMO = Path(qwen3vl_mlx.__file__).parent / "demo" / "checkpoint"
PROCESSOR = Processor.from_folder(DEMO, read_config(DEMO))
SETTINGS = PROCESSOR.settings
TINY_BUDGET, RELEASED_BUDGET = PixelBudget(4096, 262144), PixelBudget(65536, 16777216)


@dataclass(frozen=True)
class Conversation:
    """Messages whose media are named by kind, in order."""

    messages: Sequence[dict[str, Any]]
    images: Sequence[Image.Image] = ()
    videos: Sequence[tuple[Sequence[Image.Image], float]] = ()
    options: dict[str, Any] | None = None

    def with_media(self) -> list[dict[str, Any]]:
        """What a caller of this package sends."""
        waiting = {
            "image": iter(self.images),
            "video": (Video(frames, fps=fps) for frames, fps in self.videos),
        }

        def filled(part: dict[str, Any]) -> dict[str, Any]:
            kind = part["type"]
            return {**part, kind: next(waiting[kind])} if kind in waiting else part

        return [
            {**message, "content": [filled(part) for part in message["content"]]}
            if isinstance(message["content"], list)
            else message
            for message in self.messages
        ]


def user(*parts: str) -> dict[str, Any]:
    """`image` and `video` stand for themselves, the rest is text."""
    content = [
        {"type": part} if part in ("image", "video") else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "You are terse."}
TOOL = {
    "type": "function",
    "function": {"name": "zoom", "description": "Zoom in", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"x": 1}}}
CONVERSATIONS = {
    "text": Conversation([user("What is 1 + 1?")]),
    "system": Conversation([SYSTEM, {"role": "user", "content": "Naïve 中文 🙂?"}]),
    "image": Conversation([user("image", "What is this?")], [picture(100, 70)]),
    "between": Conversation([user("Look: ", "image", " well?")], [picture(33, 330)]),
    "three images": Conversation(
        [user("image", "image", " and ", "image", "?")],
        [picture(96, 160), picture(40, 40), picture(500, 300)],
    ),
    "same grid": Conversation([user("image", "image")], [picture(96, 96), picture(96, 96, 1)]),
    "turns": Conversation(
        [SYSTEM, user("image", "One?"), said("Yes."), user("Two? ", "image")],
        [picture(200, 100), picture(10, 10)],
    ),
    "numbered": Conversation(
        [user("image", "video", "image")],
        [picture(96, 96), picture(96, 128)],
        [(film(3, 64, 64), 2.0)],
        {"add_vision_id": True},
    ),
    "video": Conversation([user("video", "What happens?")], (), [(film(5, 100, 70), 2.0)]),
    "slow video": Conversation([user("video")], (), [(film(6, 64, 96), 0.3)]),
    "two videos": Conversation(
        [user("video", "or", "video", "?")], (), [(film(4, 64, 64), 1.0), (film(2, 96, 64), 24.0)]
    ),
    "image and video": Conversation(
        [user("image", "then ", "video", "then ", "image")],
        [picture(96, 64), picture(64, 200)],
        [(film(7, 64, 64), 2.0)],
    ),
    "tools": Conversation(
        [
            user("image", "Zoom in."),
            said("", tool_calls=[CALL]),
            {"role": "tool", "content": [{"type": "text", "text": "done"}, {"type": "image"}]},
        ],
        [picture(96, 96), picture(64, 64)],
        (),
        {"tools": [TOOL]},
    ),
}


def test_a_videos_prompt() -> None:
    """A timestamp and a wrapped run per temporal patch, and no wrapper around them all."""
    frames = film(5, 64, 96)
    message = {"role": "user", "content": [{"type": "video", "video": Video(frames, fps=2.0)}]}
    prompt = PROCESSOR.prompt([message])
    (medium,) = prompt.media
    assert medium.grid_thw == (3, 4, 6)
    run = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    expected = "".join(f"<{time} seconds>{run}" for time in ("0.2", "1.2", "2.0"))
    text = PROCESSOR.tokenizer.decode(prompt.token_ids.tolist(), skip_special_tokens=False)
    assert f"<|im_start|>user\n{expected}<|im_end|>\n" in text
    ids = PROCESSOR.tokenizer.encode(text)
    assert prompt.token_ids.tolist() == ids
    assert [(span.rows, span.cols) for span in prompt.index.spans] == [(2, 3)] * 3
    assert [len(spans) for spans in prompt.media_spans] == [3]


@pytest.mark.parity
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_hfs(name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import hf

    conversation = CONVERSATIONS[name]
    options = conversation.options or {}
    prompt = PROCESSOR.prompt(conversation.with_media(), **options)
    theirs = hf.prompt_ids(
        DEMO, conversation.messages, conversation.images, conversation.videos, **options
    )
    assert prompt.token_ids.tolist() == theirs
    assert len(prompt.visual_rows) == sum(medium.num_tokens for medium in prompt.media)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_media_that_are_cut_already(name: str) -> None:
    """`read` cuts once; the prompt of what it returns is the same."""
    conversation = CONVERSATIONS[name]
    options = conversation.options or {}
    messages = conversation.with_media()
    prompt = PROCESSOR.prompt(messages, **options)
    again = PROCESSOR.prompt(PROCESSOR.read(messages, PROCESSOR.image_budget()), **options)
    assert np.array_equal(prompt.token_ids, again.token_ids)
    assert np.array_equal(prompt.position_ids, again.position_ids)
    assert [m.identity for m in prompt.media] == [m.identity for m in again.media]


IMAGE_ID, VIDEO_ID = PROCESSOR.config.image_token_id, PROCESSOR.config.video_token_id
STILL = image_input(picture(64, 64), SETTINGS, TINY_BUDGET)
FILM = video_input(film(4, 64, 64), 2.0, SETTINGS, TINY_BUDGET)


@pytest.mark.parametrize(
    ("token_ids", "media", "message"),
    [
        ([1, IMAGE_ID, 2], [], "1 image placeholders for 0 image frames"),
        ([1, 2], [STILL], "0 image placeholders for 1 image frames"),
        ([IMAGE_ID, IMAGE_ID], [STILL], "2 image placeholders for 1 image"),
        ([VIDEO_ID], [FILM], "1 video placeholders for 2 video frames"),
        ([VIDEO_ID], [STILL], "0 image placeholders for 1 image"),
        ([VIDEO_ID] * 3, [FILM], "3 video placeholders for 2 video"),
    ],
)
def test_placeholders_that_do_not_fit(token_ids: list[int], media: list[Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        PROCESSOR.layout(token_ids, media)


def test_placeholders_are_expanded_in_order() -> None:
    wide = image_input(picture(64, 96), SETTINGS, TINY_BUDGET)
    prompt = PROCESSOR.layout(
        [5, IMAGE_ID, 6, VIDEO_ID, 7, VIDEO_ID, IMAGE_ID], [wide, FILM, STILL]
    )
    assert prompt.token_ids.tolist() == [
        *(5, *[IMAGE_ID] * 6, 6, *[VIDEO_ID] * 4, 7, *[VIDEO_ID] * 4, *[IMAGE_ID] * 4)
    ]
    spans = [[(span.start, span.stop) for span in medium] for medium in prompt.media_spans]
    # Spans go by place, and each medium's are its own.
    assert spans == [[(1, 7)], [(8, 12), (13, 17)], [(17, 21)]]


# Pixel limits

DESKTOP = DESKTOP_MAX_PIXELS
LARGE = replace(PROCESSOR, settings=replace(SETTINGS, image=RELEASED_BUDGET))


@pytest.mark.parametrize(
    ("processor", "min_pixels", "max_pixels", "expected"),
    [
        (LARGE, None, None, (65536, DESKTOP)),
        (LARGE, None, "full", (65536, 16777216)),
        (LARGE, None, 1000000, (65536, 1000000)),
        (LARGE, None, 40000, (40000, 40000)),  # a lower ceiling lowers the floor
        (LARGE, 4096, None, (4096, DESKTOP)),
        (LARGE, 4096, 8192, (4096, 8192)),
        (PROCESSOR, None, None, (SETTINGS.image.min_pixels, SETTINGS.image.max_pixels)),
        (PROCESSOR, None, "full", (SETTINGS.image.min_pixels, SETTINGS.image.max_pixels)),
    ],
)
def test_pixel_limits(
    processor: Processor,
    min_pixels: int | None,
    max_pixels: Any,
    expected: tuple[int, int],
) -> None:
    assert processor.image_budget(min_pixels, max_pixels) == PixelBudget(*expected)


@pytest.mark.parametrize(
    ("min_pixels", "max_pixels", "message"),
    [
        (0, None, "min_pixels must be a positive"),
        (None, 0, "max_pixels must be a positive"),
        (None, -5, "max_pixels must be a positive"),
        (None, True, "max_pixels must be a positive"),
        (1.5, None, "min_pixels must be a positive"),
        (None, "many", "max_pixels must be a positive"),
        (float("nan"), None, "min_pixels must be a positive"),
        (None, float("inf"), "max_pixels must be a positive"),
        (9000, 8000, "9000.* is more than max_pixels .8000"),
        (400_000_000, None, "min_pixels may be at most 16,777,216"),
        (None, 10**12, "max_pixels may be at most 16,777,216"),
    ],
)
def test_impossible_pixel_limits(min_pixels: Any, max_pixels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LARGE.image_budget(min_pixels, max_pixels)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 44 * 57),  # the most below 2,560 of this shape
        ({"max_pixels": "full"}, 62 * 81),
        ({"max_pixels": 256 * 1024}, 14 * 18),
        ({"max_pixels": 4 * 1024}, 1 * 2),  # below the checkpoint's least: this wish wins
        ({"min_pixels": 6000 * 1024, "max_pixels": "full"}, 68 * 89),
    ],
)
def test_limits_reach_the_picture(options: dict[str, Any], tokens: int) -> None:
    content = [{"type": "image", "image": Image.new("RGB", (2600, 2000))}]
    prompt = LARGE.prompt([{"role": "user", "content": content}], **options)
    assert prompt.media[0].num_tokens == tokens == len(prompt.visual_rows)
