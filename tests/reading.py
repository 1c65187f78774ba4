"""Messages with pictures as clients send them, read as the server does."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from typing import Any

from tiny import DEMO

from qwen3vl_mlx.asking import Look
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.processing.image import PixelBudget, VisualInput
from qwen3vl_mlx.processing.processor import Messages, Processor
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.pictures import Pictures

_DEMO = Processor.from_folder(DEMO, read_config(DEMO))
PROCESSOR = replace(
    _DEMO, settings=replace(_DEMO.settings, image=PixelBudget(65536, 16777216))
)  # with the limits of released checkpoints


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image(url: str, **others: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **others}}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def images(*urls: str) -> list[dict[str, Any]]:
    """A message for each."""
    return [message for url in urls for message in user(image(url))]


def read(messages: Messages, look: Look | None = None, **options: Any) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        reader = Pictures(ServerOptions(**options))
        try:
            return await reader.read(messages, PROCESSOR, look or Look())
        finally:
            reader.close()

    return asyncio.run(run())


def visuals(messages: Messages) -> list[VisualInput]:
    return [
        part[part["type"]]
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] in ("image", "video")
    ]


def cut(*urls: str, **options: Any) -> list[VisualInput]:
    return visuals(read(images(*urls), **options))
