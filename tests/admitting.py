"""Checkpoints of the Hub before an `Admission`, by their configuration alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from qwen3vl_mlx.engine.admission import Admission
from qwen3vl_mlx.models.config import parse_config

GIB = 2**30
CHECKPOINTS = Path(__file__).parent / "data" / "checkpoints"


@cache
def real(name: str) -> Admission:
    """A checkpoint of the Hub in bf16, with all the memory it could want."""
    config = parse_config(json.loads((CHECKPOINTS / name / "config.json").read_text()))
    parameters = {"Qwen3-VL-2B-Instruct": 2.13e9, "Qwen3-VL-8B-Instruct": 8.77e9}[name]
    return Admission(config, limit=1000 * GIB, weights=int(2 * parameters))


SMALL, LARGE = "Qwen3-VL-2B-Instruct", "Qwen3-VL-8B-Instruct"
