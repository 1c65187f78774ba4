"""What clients send to a server, and how to see that it is done with them."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import pytest
from live import Live
from PIL import Image

openai = pytest.importorskip("openai")

Messages: TypeAlias = "list[dict[str, Any]]"


def connect(live: Live, **options: Any) -> Any:
    """OpenAI's client, which does not try again by itself."""
    return openai.OpenAI(**{**_options(live), **options})


def connect_async(live: Live, **options: Any) -> Any:
    return openai.AsyncOpenAI(**{**_options(live), **options})


def _options(live: Live) -> dict[str, Any]:
    return {"api_key": "any", "base_url": f"{live.url}/v1/", "max_retries": 0, "timeout": 60}


def png(picture: Image.Image | np.ndarray) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(file, "PNG")
    return file.getvalue()


def base64_of(picture: Image.Image | np.ndarray) -> str:
    return base64.b64encode(png(picture)).decode()


def data_uri(picture: Image.Image | np.ndarray) -> str:
    return "data:image/png;base64," + base64_of(picture)


def image_url(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def asking(*parts: Any) -> Messages:
    """One user message of texts and parts."""
    content = [text(part) if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def sent(messages: Messages) -> Messages:
    """Messages with pictures in memory as a client sends them: as data URIs."""

    def as_sent(part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        if kind == "image":
            return image_url(data_uri(part[kind]))
        if kind == "video":
            return {"type": kind, kind: [data_uri(frame) for frame in part[kind]]}
        return part

    return [
        {**message, "content": [as_sent(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.005)


def at_rest(live: Live) -> bool:
    """Whether nothing is asked: no row, no lease, no memory promised."""
    model = live.serving.host.model
    assert model is not None
    load = model.engine.stats.load
    rows = load.waiting + load.prefilling + load.running
    users = live.serving.host.status().users
    return not (model.engine.busy or rows or users or load.reserved_bytes)


def memory(live: Live) -> int:
    """Bytes of MLX in use besides the caches."""
    model = live.serving.host.model
    assert model is not None
    model.engine.clear_caches()
    return mx.get_active_memory()


def ask(client: Any, messages: Messages, **fields: Any) -> Any:
    """A completion, or a stream of chunks. Fields that OpenAI has not go to `extra_body`."""
    asked = {"model": "default", "messages": messages, **fields}
    return client.chat.completions.create(**asked)


def said_by(answer: Any) -> str:
    (choice,) = answer.choices
    return str(choice.message.content)


def joined(chunks: Iterable[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = (choice for chunk in chunks for choice in chunk.choices if choice.index == index)
    return "".join(choice.delta.content or "" for choice in choices)
