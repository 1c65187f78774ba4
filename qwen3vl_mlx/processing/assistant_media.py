"""Pictures in what the assistant said: Qwen's templates show those of users and tools alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def media_as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """An assistant's message with the placeholders of its media written out in their places.

    Other messages stay as they are. The message must be normal, see `normalize_messages`.
    """
    content = message["content"]
    if message["role"] != "assistant" or isinstance(content, str):
        return message
    parts = [
        part
        if part["type"] == "text"
        else {"type": "text", "text": f"<|vision_start|><|{part['type']}_pad|><|vision_end|>"}
        for part in content
    ]
    return {**message, "content": parts}
