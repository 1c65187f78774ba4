"""A checkpoint folder to a model, as it is stored or quantized on the way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.loading import (
    default_dtype,
    load_model,
    load_quantized,
    model_itemsize,
    stored_config,
    stored_modules,
)
from qwen3vl_mlx.models.config import ModelConfig
from qwen3vl_mlx.models.qwen3_vl import Model

if TYPE_CHECKING:
    from qwen3vl_mlx.quant.recipes import Recipe


def load_weights(
    folder: Path,
    config: ModelConfig,
    quantize: str | Recipe | None,
    topology: str | os.PathLike[str] | None,
    dtype: mx.Dtype | None,
    progress: bool,
) -> Model:
    """The weights that `api.load` describes, on this thread. Raises what it raises."""
    dtype = dtype or default_dtype()
    if quantize is None and topology is not None:
        raise InputError('a topology file holds exceptions: say from what, quantize="4bit"')
    if quantize is not None:
        from qwen3vl_mlx.quant import policy
        from qwen3vl_mlx.quant.apply import as_assignment

        request = policy.Request(quantize, topology=topology)
        config = stored_config(folder, config)
        stored = as_assignment(stored_modules(folder, config))
        if progress:
            policy.tell_plan(config, request)
        assignment = policy.choose(config, request, stored)
        if progress:
            policy.tell(config, request, assignment, stored, model_itemsize(folder))
        if assignment is not None and assignment != stored:
            return load_quantized(
                folder, assignment.modules, dtype, config=config, progress=progress
            )
    return load_model(folder, dtype, config=config, progress=progress)
