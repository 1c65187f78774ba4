"""`qwen3vl models info`: what a checkpoint is, from its small files; no weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_mlx import cli, hub
from qwen3vl_mlx.card import source_license
from qwen3vl_mlx.checkpoints import (
    LocalCheckpoint,
    cached_revisions,
    checkpoint_at,
    demo_checkpoint,
)
from qwen3vl_mlx.engine.sampling import default_params
from qwen3vl_mlx.errors import CheckpointError, HubError, InputError
from qwen3vl_mlx.hub_cache import cached_repo
from qwen3vl_mlx.jsonfiles import read_generation_config
from qwen3vl_mlx.models.config import ModelConfig, read_config
from qwen3vl_mlx.quant import policy
from qwen3vl_mlx.quant.apply import parameter_shapes
from qwen3vl_mlx.tables import short

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")


def describe(name: str, revision: str | None = None) -> dict[str, Any]:
    """All that is known of a checkpoint, for JSON. Sizes in bytes.

    Of a Hub id that is not on this machine only config.json is fetched, and the list of its files.
    Raises CheckpointError, ConfigError for another family, or HubError.
    """
    found = find(name, revision)
    config = read_config(found.folder)
    files = _files(found)
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    parameters = _parameters(config)
    return {
        **found.to_dict(),
        "architecture": _architecture(config),
        "vision": _vision(config),
        **parameters,
        "weight_bytes": weights or None,
        "bits_per_weight": round(8 * weights / parameters["parameters"], 4) if weights else None,
        "memory": _memory(config, weights) if weights else None,
        "sampling": _sampling(found),
        "license": source_license(found.folder, found.name if found.commit else None),
        "files": files,
    }


def find(name: str, revision: str | None = None) -> LocalCheckpoint:
    """A checkpoint by the name `load` takes; of one that is not here, its config is fetched."""
    folder = hub.local_folder(name, revision)
    if name == "demo":
        return demo_checkpoint()
    if folder is not None:
        return checkpoint_at(folder)
    folder = hub.config_folder(name, revision)
    read_config(folder)  # says of other families what they are
    for each in cached_revisions(cached_repo(name)):
        if each.folder.name == folder.name:
            return each
    raise CheckpointError(f"{folder} has gone meanwhile; try again")


def _files(found: LocalCheckpoint) -> dict[str, int]:
    """Names and sizes: of what is here, or, where that is not all, of what the Hub has."""
    here = {file.name: file.nbytes for file in found.files}
    if found.complete or found.source != "hub cache":
        return here
    try:
        return {file.name: file.nbytes for file in hub.remote_files(found.name, found.commit)}
    except HubError:  # what is known without it is shown all the same
        return {}


def _architecture(config: ModelConfig) -> dict[str, Any]:
    text = config.text
    return {
        "model_type": config.model_type,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "experts": text.moe.num_experts if text.moe else None,
        "experts_per_token": text.moe.num_experts_per_tok if text.moe else None,
        "context": text.max_position_embeddings,
        "vocabulary": text.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
    }


def _vision(config: ModelConfig) -> dict[str, Any]:
    vision = config.vision
    return {
        "blocks": vision.depth,
        "hidden_size": vision.hidden_size,
        "heads": vision.num_heads,
        "patch_size": vision.patch_size,
        "pixels_per_token_side": vision.patch_size * vision.spatial_merge_size,
        "deepstack_blocks": list(vision.deepstack_visual_indexes),
    }


def _parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters in all, and those that work on one token of text."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    total = sum(sizes.values())
    moe = config.text.moe
    if moe is None:
        return {"parameters": total, "active_parameters": total}
    experts = sum(size for name, size in sizes.items() if ".switch_mlp." in name)
    idle = experts - experts * moe.num_experts_per_tok // moe.num_experts
    return {"parameters": total, "active_parameters": total - idle}


def _memory(config: ModelConfig, weights: int) -> dict[str, Any]:
    """What running takes at its peak, with the planner's default context and image."""
    plan = policy.make_plan(config, policy.Request("auto"))
    # What comes on top of the weights, but where quantizing them while loading takes more.
    beside = min(candidate.need - candidate.nbytes for candidate in plan.candidates)
    return {
        "needed_bytes": weights + beside,
        "context": plan.context,
        "image_tokens": plan.image_tokens,
        "usable_bytes": plan.memory.usable,
        "fits": weights + beside <= plan.memory.usable,
    }


def _sampling(found: LocalCheckpoint) -> dict[str, float] | None:
    """What an answer is sampled with unless the question says otherwise; None where unknown."""
    if not found.complete:
        return None
    try:
        values = read_generation_config(found.folder)
        defaults = default_params(values, thinking=found.kind == "Thinking")
    except InputError as error:
        raise CheckpointError(f"generation_config.json: {error}") from error
    return {name: getattr(defaults, name) for name in _SAMPLING}


def show(facts: Mapping[str, Any]) -> None:
    """Print what `describe` found, for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(facts):
        table.add_row(label, Text(value))
    console = Console(highlight=False)
    if not console.is_terminal:
        for label, value in _rows(facts):
            print(f"{label:<14}{value}")
        return
    console.print(table)


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    text, vision = facts["architecture"], facts["vision"]
    side = vision["pixels_per_token_side"]
    rows = [
        ("name", facts["name"]),
        ("model", ", ".join(filter(None, (facts["model"], facts["quantization"]))) or "unknown"),
        ("state", _state(facts)),
        ("folder", short(Path(facts["folder"]))),
    ]
    if facts["commit"]:
        refs = f" ({', '.join(facts['refs'])})" if facts["refs"] else ""
        rows.append(("commit", f"{facts['commit']}{refs}"))
    rows += [
        ("decoder", _decoder(text)),
        ("context", f"{text['context']:,} tokens"),
        (
            "vision",
            f"{vision['blocks']} blocks of {vision['hidden_size']:,}; one token for {side} x "
            f"{side} pixels",
        ),
        ("parameters", _count(facts)),
        ("weights", _weights(facts)),
        ("memory", _needs(facts["memory"])),
        ("sampling", _defaults(facts["sampling"])),
        ("license", facts["license"] or "not said"),
        ("files", _largest(facts["files"])),
    ]
    return rows


def _state(facts: Mapping[str, Any]) -> str:
    if facts["complete"]:
        return "complete, on this machine"
    if facts["source"] != "hub cache":
        return f"not complete: {', '.join(facts['missing'])} missing"
    revision = f" --revision {facts['revision']}" if facts["revision"] else ""
    return f"not on this machine: qwen3vl models download {facts['name']}{revision}"


def _decoder(text: Mapping[str, Any]) -> str:
    shape = (
        f"{text['layers']} layers of {text['hidden_size']:,}, {text['heads']} heads of "
        f"{text['head_dim']}, {text['kv_heads']} of keys and values"
    )
    if text["experts"]:
        return f"{shape}; {text['experts']} experts, {text['experts_per_token']} for each token"
    return shape


def _count(facts: Mapping[str, Any]) -> str:
    total, active = facts["parameters"], facts["active_parameters"]
    part = f", {_billions(active)} of them for each token" if active != total else ""
    return f"{_billions(total)}{part}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"


def _weights(facts: Mapping[str, Any]) -> str:
    if facts["weight_bytes"] is None:
        return "unknown until they are downloaded"
    return f"{cli.size(facts['weight_bytes'])}, {facts['bits_per_weight']:.2f} bits per parameter"


def _needs(memory: Mapping[str, Any] | None) -> str:
    if memory is None:
        return "unknown until the weights are"
    verdict = "which fits" if memory["fits"] else "which does not fit"
    return (
        f"{cli.size(memory['needed_bytes'])} with {memory['context']:,} tokens of context and "
        f"images of {memory['image_tokens']:,}, {verdict} here: a model may use "
        f"{cli.size(memory['usable_bytes'])}"
    )


def _defaults(sampling: Mapping[str, float] | None) -> str:
    if sampling is None:
        return "unknown until it is downloaded"
    if sampling["temperature"] == 0:
        return "greedy"
    off = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
    used = {name: value for name, value in sampling.items() if off.get(name) != value}
    return ", ".join(f"{name} {value:g}" for name, value in used.items())


def _largest(files: Mapping[str, int]) -> str:
    if not files:
        return "unknown: the Hub did not say"
    largest = sorted(files, key=lambda name: -files[name])
    names = ", ".join(f"{name} {cli.size(files[name])}" for name in largest[:3])
    more = f" and {len(largest) - 3} smaller ones" if len(largest) > 3 else ""
    return f"{names}{more}; {cli.size(sum(files.values()))} in all"
