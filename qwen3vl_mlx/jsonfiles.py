"""A checkpoint's JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_mlx.errors import CheckpointError


def read_json(path: Path) -> Any:
    """A file's value. Raises CheckpointError for what cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error


def read_config_values(folder: Path) -> Any:
    """config.json as it stands. Raises CheckpointError."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no config.json: give the folder of a Qwen3-VL checkpoint"
        )
    return read_json(path)


def read_generation_config(folder: Path) -> Mapping[str, Any]:
    """generation_config.json, or what config.json says in its place. May be empty."""
    for name, key in (("generation_config.json", None), ("config.json", "generation_config")):
        path = folder / name
        if not path.exists():
            continue
        values = read_json(path)
        values = values.get(key) if key and isinstance(values, dict) else values
        if isinstance(values, dict):
            return values
    return {}
