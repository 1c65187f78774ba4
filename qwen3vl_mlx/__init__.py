"""Run the Qwen3-VL vision-language models on Apple silicon with MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL, load
    from qwen3vl_mlx.conversation import Chat
    from qwen3vl_mlx.drawing import draw
    from qwen3vl_mlx.engine.engine import EngineOptions
    from qwen3vl_mlx.engine.output import Chunk, Completion, ToolCall, Usage
    from qwen3vl_mlx.engine.request import Stream
    from qwen3vl_mlx.engine.sampling import SamplingParams
    from qwen3vl_mlx.errors import (
        CheckpointError,
        EngineClosedError,
        ForkedProcessError,
        HubError,
        InputError,
        QueueFullError,
        Qwen3VLError,
    )
    from qwen3vl_mlx.processing.video import Video
    from qwen3vl_mlx.tasks_json import TaskError
    from qwen3vl_mlx.tasks_parsing import Box, Point
    from qwen3vl_mlx.tasks_wording import Wording

__version__ = "0.1.0"

_EXPORTS = {
    "Box": "tasks_parsing",
    "Chat": "conversation",
    "CheckpointError": "errors",
    "Chunk": "engine.output",
    "Completion": "engine.output",
    "EngineClosedError": "errors",
    "EngineOptions": "engine.engine",
    "ForkedProcessError": "errors",
    "HubError": "errors",
    "InputError": "errors",
    "Point": "tasks_parsing",
    "QueueFullError": "errors",
    "Qwen3VL": "api",
    "Qwen3VLError": "errors",
    "SamplingParams": "engine.sampling",
    "Stream": "engine.request",
    "TaskError": "tasks_json",
    "ToolCall": "engine.output",
    "Usage": "engine.output",
    "Video": "processing.video",
    "Wording": "tasks_wording",
    "draw": "drawing",
    "load": "api",
}
__all__ = [
    "Box",
    "Chat",
    "CheckpointError",
    "Chunk",
    "Completion",
    "EngineClosedError",
    "EngineOptions",
    "ForkedProcessError",
    "HubError",
    "InputError",
    "Point",
    "QueueFullError",
    "Qwen3VL",
    "Qwen3VLError",
    "SamplingParams",
    "Stream",
    "TaskError",
    "ToolCall",
    "Usage",
    "Video",
    "Wording",
    "__version__",
    "draw",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package costs nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
