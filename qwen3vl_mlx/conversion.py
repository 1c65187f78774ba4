"""A checkpoint in any layout, written again: quantized or whole, for MLX or for transformers.

Tensors flow through block by block (see `stream`), into a folder that appears whole or not at all
(see `publish`).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3vl_mlx.card import CardFacts, hub_card, model_card, source_license
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import ConfigError, InputError
from qwen3vl_mlx.hub import Snapshot
from qwen3vl_mlx.jsonfiles import read_config_values, read_generation_config
from qwen3vl_mlx.layout import hub_pieces
from qwen3vl_mlx.loading import (
    plan,
    progress_bar,
    stored_config,
    stored_modules,
    weight_files,
)
from qwen3vl_mlx.models.config import ModelConfig, parse_config
from qwen3vl_mlx.publish import check_space, check_target, new_folder
from qwen3vl_mlx.quant.apply import (
    Assignment,
    Shape,
    Weight,
    as_assignment,
    config_section,
    parameter_shapes,
)
from qwen3vl_mlx.stream import Plan, Scaling, blocks, slots, stored_bytes
from qwen3vl_mlx.tensorfile import (
    ShardWriter,
    Slot,
    TensorReader,
    make_shards,
    raw_bytes,
    write_text,
)

SHARD_BYTES = 5 * 2**30
_WAITING = 3  # blocks made and not yet written
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}

# Configs, processor, tokenizer, template, licence.
_KEPT = ("*.json", "*.jinja", "*.txt", "LICENSE*", "NOTICE*")
_MADE = ("config.json", "model.safetensors.index.json", "README.md")
_DROPPED = (
    "_name_or_path",
    "torch_dtype",
    "quantization",
    "quantization_config",
    "generation_config",
)
_HOISTED = ("eos_token_id", "temperature", "top_p", "top_k", "do_sample")  # as mlx-vlm reads them


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert: where it came from, and what its config.json says."""

    snapshot: Snapshot
    values: Mapping[str, Any]
    config: ModelConfig

    @property
    def name(self) -> str:
        if self.snapshot.folder == CHECKPOINT:
            return "demo"
        return self.snapshot.repo_id or self.snapshot.folder.resolve().name


@dataclass(frozen=True)
class Report:
    """What a conversion made."""

    source: str
    commit: str | None
    output: str
    recipe: str
    parameters: int
    nbytes: int  # of tensors
    quantized: int  # modules
    whole: Mapping[str, str]  # modules that could not be quantized, and why
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "bits_per_weight": round(self.bits_per_weight, 4)}


def open_source(snapshot: Snapshot) -> Source:
    """Read a checkpoint's config and its tensors' headers. Raises CheckpointError."""
    values = read_config_values(snapshot.folder)
    if not isinstance(values, dict):
        raise ConfigError("config.json: the top level must be an object")
    config = stored_config(snapshot.folder, parse_config(values))
    return Source(snapshot, values, config)


def stored_assignment(source: Source) -> Assignment | None:
    """The quantization a checkpoint has already; None where it is whole."""
    return as_assignment(stored_modules(source.snapshot.folder, source.config))


def convert(
    source: Source,
    target: Path,
    assignment: Assignment | None = None,
    *,
    dtype: mx.Dtype | None = None,
    scaling: Scaling | None = None,
    to_hf: bool = False,
    name: str | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Report:
    """Write `source` to the folder `target`: as MLX files, or with `to_hf` in the Hub's layout.

    assignment: the modules to quantize; None writes everything whole, whatever it was.
    dtype: of floating-point tensors; None keeps each as it is stored (FP8 becomes bfloat16).
    name: what the model card calls it, by default the folder's name.
    force: replace an existing checkpoint. shard_bytes: largest file, unless one tensor has more.
    Raises InputError, WeightsError, or OutputError where the disk is too small or fails; then
    `target` is as it was.
    """
    began = time.perf_counter()
    if to_hf and assignment is not None:
        raise InputError("the Hub's layout has whole weights: it excludes an assignment")
    check_target(target, source.snapshot.folder, force=force)
    modules = assignment.modules if assignment is not None else {}
    with TensorReader(weight_files(source.snapshot.folder)) as reader:
        work = plan(reader, source.config, modules, dtype, scaling)
        if to_hf:
            work = replace(work, pieces=hub_pieces(work.pieces))
        groups = slots(work, reader)
        shapes = parameter_shapes(source.config)
        facts = card_facts(source, target, assignment, groups, shapes, name)
        output = Output(
            source,
            target,
            groups,
            assignment,
            tied=source.config.tie_word_embeddings,
            to_hf=to_hf,
            force=force,
            shard_bytes=shard_bytes,
        )
        write_checkpoint(output, facts, lambda w: _write_weights(w, work, reader, progress))
    return Report(
        source=source.name,
        commit=source.snapshot.commit,
        output=str(target),
        recipe=facts.recipe,
        parameters=facts.weight.parameters,
        nbytes=facts.nbytes,
        quantized=len(modules),
        whole=assignment.whole if assignment is not None else {},
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class Output:
    """What a checkpoint's folder is to hold."""

    source: Source
    target: Path
    groups: Sequence[Sequence[Slot]]  # tensors, in groups that share a file
    assignment: Assignment | None
    tied: bool  # no output head of its own
    to_hf: bool = False
    force: bool = False
    shard_bytes: int = SHARD_BYTES


def write_checkpoint(
    output: Output, facts: CardFacts, write: Callable[[ShardWriter], None]
) -> None:
    """Make a checkpoint's folder, whole or not at all; `write` writes and checks its tensors."""
    with new_folder(output.target, force=output.force) as folder:
        shards = make_shards(output.groups, output.shard_bytes)
        writer = ShardWriter(folder, shards, {"format": "pt" if output.to_hf else "mlx"})
        check_space(folder, writer.nbytes)
        try:
            write(writer)
        finally:
            writer.close()
        copy_files(output.source.snapshot.folder, folder)
        generation = read_generation_config(output.source.snapshot.folder)
        path = folder / "generation_config.json"
        if generation and not path.exists():  # it stood in config.json alone
            write_text(path, json.dumps(generation, indent=2))
        values = output_config(output)
        write_text(folder / "config.json", json.dumps(values, indent=2, sort_keys=True))
        card = hub_card(facts) if output.to_hf else model_card(facts)
        write_text(folder / "README.md", card)


def _write_weights(writer: ShardWriter, work: Plan, reader: TensorReader, progress: bool) -> None:
    """Stream all tensors to disk and check what arrived there."""
    from concurrent.futures import Future, ThreadPoolExecutor

    pending: deque[Future[None]] = deque()

    def write(parts: Mapping[str, memoryview]) -> None:
        for name, data in parts.items():
            writer.write(name, data)

    with (
        progress_bar(stored_bytes(work, reader), "Converting", progress) as bar,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        for block in blocks(work, reader):
            parts = {name: raw_bytes(rows) for name, rows in block.parameters.items()}
            while len(pending) >= _WAITING:
                pending.popleft().result()
            pending.append(pool.submit(write, parts))
            bar.update(block.read_bytes)
            mx.clear_cache()
        while pending:
            pending.popleft().result()
    verify(writer, progress)


def verify(writer: ShardWriter, progress: bool) -> None:
    """Read everything back from disk. Raises OutputError."""
    with progress_bar(writer.nbytes, "Verifying", progress) as bar:
        writer.finish(bar.update)


def copy_files(source: Path, target: Path) -> None:
    """Everything beside the weights: processor, tokenizer, template, generation settings."""
    for pattern in _KEPT:
        for path in sorted(source.glob(pattern)):
            if path.name not in _MADE and path.is_file():
                shutil.copyfile(path, target / path.name)


def output_config(output: Output) -> dict[str, Any]:
    """config.json of the result, in the Hub's dialect, with MLX's `quantization` if there is any.

    Generation settings stand in it too, where mlx-vlm looks for them.
    """
    values = hub_dialect(output.source.values)
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = output.tied
    generation = read_generation_config(output.source.snapshot.folder)
    hoisted = {key: generation[key] for key in _HOISTED if key in generation}
    for key in (*_DROPPED, *hoisted):
        values.pop(key, None)
    if len(types := float_types(output.groups)) == 1:
        values["dtype"] = values["text_config"]["dtype"] = types[0]
    if output.to_hf:
        return values
    if generation:
        values |= {"generation_config": generation, **hoisted}
    if output.assignment is not None and output.assignment.modules:
        section = config_section(output.assignment)
        values |= {"quantization": section, "quantization_config": section}
    return values


def hub_dialect(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in the words of transformers 4.57, which every reader knows."""
    text, vision = dict(values["text_config"]), dict(values["vision_config"])
    if rope := text.pop("rope_parameters", None):
        text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
        text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if (experts := text.pop("num_local_experts", None)) is not None:
        text["num_experts"] = experts
    vision["model_type"] = values["model_type"]
    for section in (text, vision):
        section.pop("torch_dtype", None)
    return {**values, "text_config": text, "vision_config": vision}


def card_facts(
    source: Source,
    target: Path,
    assignment: Assignment | None,
    groups: Sequence[Sequence[Slot]],
    shapes: Mapping[str, Shape],
    name: str | None,
) -> CardFacts:
    """What the model card says."""
    nbytes = sum(slot.nbytes for group in groups for slot in group)
    return CardFacts(
        name=name or target.name,
        source=source.name,
        recipe=assignment.name if assignment is not None else "none: weights are whole",
        assignment=assignment,
        weight=Weight(sum(map(math.prod, shapes.values())), nbytes),
        shapes=shapes,
        nbytes=nbytes,
        dtype=", ".join(float_types(groups)),
        repo_id=source.snapshot.repo_id,
        commit=source.snapshot.commit,
        license=source_license(source.snapshot.folder, source.snapshot.repo_id),
    )


def float_types(groups: Iterable[Sequence[Slot]]) -> list[str]:
    """Names of the floating-point types in use, as config.json spells them."""
    used = {slot.dtype for group in groups for slot in group}
    return [name for name, dtype in DTYPES.items() if dtype in used]
