"""The bundled checkpoint: a tiny Qwen3-VL that knows coloured shapes and large text."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
EXAMPLE = Path(__file__).parent / "example.png"
