"""Which quantization of a model a Mac can hold, from config.json alone: `auto`, and its table.

Of the candidates that fit with the context and image asked for, the best in quality is chosen, bf16
included: nothing is quantized for its own sake. Fewer bits decode faster (every token reads all
weights it uses once), so who prefers speed names a quantization and does not ask for `auto`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.attention import SCORE_BYTES
from qwen3vl_mlx.models.config import ModelConfig, Quantization, TextConfig, VisionConfig
from qwen3vl_mlx.quant.apply import (
    Shape,
    Weight,
    assign,
    packed_bytes,
    parameter_shapes,
    quantizable_shapes,
    weigh,
)
from qwen3vl_mlx.quant.recipes import Recipe, parse_recipe

GIB = 2**30
DEFAULT_CONTEXT = 8192
DEFAULT_IMAGE_TOKENS = 2560  # what an image is scaled down to unless asked otherwise
PREFILL_CHUNK = 2048  # tokens of a prompt the engine reads at a time

# Best first, which is largest first: name, group size, tier. nvfp4 is as large as 4bit.
CANDIDATES: tuple[tuple[str, int | None, str], ...] = (
    ("bf16", None, "Baseline"),
    ("8bit", None, "Near-lossless"),
    ("mxfp8", None, "Near-lossless"),
    ("6bit", None, "Good"),
    ("5bit", None, "Good"),
    ("mixed_4_6", None, "Acceptable"),
    ("4bit", None, "Acceptable"),
    ("mxfp4", None, "Acceptable"),
    ("mixed_3_6", None, "Degraded"),
    ("3bit", None, "Degraded"),
    ("3bit", 128, "Degraded"),
    ("2bit", None, "Degraded"),
)
TIERS = ("Baseline", "Near-lossless", "Good", "Acceptable", "Degraded")  # mistral.rs' names
FITS, TIGHT, NO_FIT = "fits", "tight", "does not fit"

_ITEM = 2  # bytes of a bf16 number
_TIGHT_SHARE = 0.9  # of usable memory; more than this is tight
_RESERVE = GIB // 2  # MLX's kernels and kept buffers, sampling, the program itself
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{0,9})?)\s*([MGT])(?:i?B)?", re.ASCII | re.IGNORECASE)
_UNITS = {"M": 2**20, "G": GIB, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """A Mac's memory in bytes: all of it, and what its GPU may use."""

    total: int
    usable: int


@dataclass(frozen=True)
class Candidate:
    """One quantization. Sizes in bytes.

    recipe: None leaves the model whole. need: at its peak, loading or running with the context
    and image asked for. headroom: tokens of context that would fit instead of those asked for.
    """

    name: str
    tier: str
    recipe: Recipe | None
    nbytes: int
    bits_per_weight: float
    need: int
    headroom: int
    status: str


@dataclass(frozen=True)
class Plan:
    """All candidates, best quality first. Sizes in bytes.

    cache: keys and values of `context` tokens. working: buffers that come and go.
    """

    memory: Memory
    context: int
    image_tokens: int
    cache: int
    working: int
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """The best in quality that fits; None where nothing does."""
        return next((c for c in self.candidates if c.status != NO_FIT), None)

    def choose(self) -> Candidate:
        """`best`. Raises InputError naming the smallest need where nothing fits."""
        if self.best is not None:
            return self.best
        least = min(self.candidates, key=lambda candidate: candidate.need)
        raise InputError(
            f"this model does not fit: with {self.context:,} tokens of context and images of "
            f"{self.image_tokens:,} tokens even {least.name} needs {_gib(least.need)} GiB, and the "
            f"GPU of a Mac with {_gib(self.memory.total)} GiB may use "
            f"{_gib(self.memory.usable)} GiB; take a smaller model, less context or smaller images"
        )


def parse_memory(text: str) -> Memory:
    """Another Mac's memory: `16GB`, `16 GiB`, `1.5TB`. Raises InputError.

    Memory is sold in powers of two: a Mac with 16 GB has 16 GiB, and both spellings mean that.
    """
    match = _SIZE.fullmatch(text.strip())
    total = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not 0 < total <= 1024 * _UNITS["T"]:
        raise InputError(f"memory must be a size such as 16GB or 1.5TB, got {text!r}")
    return Memory(total, _usable(total))


def this_memory() -> Memory:
    """This machine's: by Metal's own word where it gives one, which follows `iogpu.wired_limit_mb`.

    Without Metal, what a Mac with as much memory would allow.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = None
    if mx.metal.is_available():
        limit = mx.device_info().get("max_recommended_working_set_size")
    return Memory(total, int(limit) if limit else _usable(total))


def _usable(total: int) -> int:
    """`recommendedMaxWorkingSetSize` by default: two thirds of memory, three quarters from 36 GiB.

    As macOS has long set it (10.7 of 16 GiB, 27 of 36, 96 of 128); newer releases allow more.
    """
    return total * 3 // 4 if total >= 36 * GIB else total * 2 // 3


def plan(
    config: ModelConfig,
    memory: Memory,
    context: int = DEFAULT_CONTEXT,
    image_tokens: int = DEFAULT_IMAGE_TOKENS,
    *,
    vision: bool = False,
) -> Plan:
    """Weigh every candidate. Reads no tensor: shapes come from `config`, and weights are bf16.

    context: tokens in the cache, prompt and answer. image_tokens: of the largest image, or of
    several that are encoded together (up to 4096). vision: quantize the tower too.
    Raises InputError for a context the model or the images do not fit.
    """
    most = config.text.max_position_embeddings
    if not 1 <= context <= most:
        raise InputError(f"context must be 1 to {most:,} tokens for this model, got {context:,}")
    if not 0 <= image_tokens <= context:
        raise InputError(
            f"an image of {image_tokens:,} tokens must be at least 0 and fit the context, "
            f"{context:,} tokens"
        )
    layers = config.text.num_hidden_layers
    per_layer = 2 * config.text.num_key_value_heads * config.text.head_dim * _ITEM
    buffers = max(vision_bytes(config.vision, image_tokens), prefill_bytes(config.text, context))
    buffers += feature_bytes(config.vision, image_tokens)
    # A layer's keys and values are held twice while its cache grows.
    demand = _Demand(buffers, (layers + 1) * per_layer, context, most)
    return Plan(
        memory,
        context,
        image_tokens,
        cache=layers * per_layer * context,
        working=buffers + per_layer * context,
        candidates=tuple(_candidate(w, demand, memory) for w in weigh_all(config, vision)),
    )


@dataclass(frozen=True)
class _Demand:
    """What running takes beside the weights, in bytes; most: the model's longest context."""

    buffers: int
    per_token: int
    context: int
    most: int


@dataclass(frozen=True)
class Weighed:
    """A candidate before anything is known of the Mac. largest: bytes of its largest parameter."""

    name: str
    tier: str
    recipe: Recipe | None
    weight: Weight
    largest: int


def weigh_all(config: ModelConfig, vision: bool = False) -> tuple[Weighed, ...]:
    """Every candidate's size for this model."""
    shapes, modules = parameter_shapes(config), quantizable_shapes(config)
    found = []
    for name, group_size, tier in CANDIDATES:
        recipe = _recipe(name, group_size, config, vision)
        settings = assign(recipe, modules).modules if recipe else {}
        weight, largest = weigh(shapes, settings), _largest(shapes, settings)
        found.append(Weighed(recipe.name if recipe else name, tier, recipe, weight, largest))
    return tuple(found)


def _candidate(weighed: Weighed, demand: _Demand, memory: Memory) -> Candidate:
    rest = weighed.weight.nbytes + _RESERVE
    loading = 2 * weighed.largest  # see loading.load_quantized
    need = rest + max(demand.buffers + demand.per_token * demand.context, loading)
    headroom = 0
    if rest + max(demand.buffers, loading) <= memory.usable:
        room = memory.usable - rest - demand.buffers
        headroom = min(room // demand.per_token, demand.most)
    return Candidate(
        weighed.name,
        weighed.tier,
        weighed.recipe,
        weighed.weight.nbytes,
        weighed.weight.bits_per_weight,
        need,
        headroom,
        _status(need, memory),
    )


def _recipe(name: str, group_size: int | None, config: ModelConfig, vision: bool) -> Recipe | None:
    if name == "bf16":
        return None
    layers = config.text.num_hidden_layers
    return parse_recipe(name, layers, group_size=group_size, vision=vision)


def _largest(shapes: Mapping[str, Shape], settings: Mapping[str, Quantization]) -> int:
    """Bytes of the largest parameter, packed where it is."""
    packed = [packed_bytes(shapes[f"{path}.weight"], chosen) for path, chosen in settings.items()]
    whole = [
        math.prod(shape) * _ITEM
        for name, shape in shapes.items()
        if name.removesuffix(".weight") not in settings
    ]
    return max(packed + whole)


def _status(need: int, memory: Memory) -> str:
    if need > memory.usable:
        return NO_FIT
    return TIGHT if need > _TIGHT_SHARE * memory.usable else FITS


# Buffers. MLX encodes ahead of the device and frees what a kernel read only after it ran, so all
# that one block makes is counted as held at once. On Metal attention holds no scores beyond
# SCORE_BYTES; softmax weights of the decoder's fused kernel are never written out.


def vision_bytes(config: VisionConfig, image_tokens: int, itemsize: int = _ITEM) -> int:
    """Peak of the vision tower's own buffers for one pass over `image_tokens` visual tokens."""
    patches = image_tokens * config.spatial_merge_size**2
    hidden, inner = config.hidden_size, config.intermediate_size
    pixels = config.in_channels * config.patch_size**2 * (1 + itemsize)  # uint8, and normalised
    embedding = 7 * hidden  # patches, four rows of the position table, their blend, the sum
    # Norms 2, q k v 3, q and k turned 4, attended, projected, sums 2, fc2; fc1 and its activation.
    block = 14 * hidden + 2 * inner
    row = config.num_heads * patches * 4
    scores = min(SCORE_BYTES, patches * row)
    return patches * (pixels + itemsize * (hidden + max(embedding, block))) + scores


def feature_bytes(config: VisionConfig, image_tokens: int, itemsize: int = _ITEM) -> int:
    """Features of `image_tokens` visual tokens, held until the prompt is read."""
    levels = 1 + len(config.deepstack_visual_indexes)
    return image_tokens * config.out_hidden_size * levels * itemsize


def prefill_bytes(config: TextConfig, context: int, itemsize: int = _ITEM) -> int:
    """Peak of the decoder's own buffers for one chunk of a prompt, and the logits it ends in."""
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    # Embeddings, norms, sums, o and down projections; q and k projected, normalised, turned.
    numbers = 7 * hidden + 6 * queries + 7 * keys
    if config.moe is None:
        numbers += 3 * config.intermediate_size
    else:  # tokens sorted by expert, their outputs, those in order again, and weighted
        inner = config.moe.moe_intermediate_size
        numbers += config.moe.num_experts_per_tok * (4 * hidden + 3 * inner)
    return min(PREFILL_CHUNK, context) * numbers * itemsize + 12 * config.vocab_size


# What is shown.


def table(plan: Plan) -> str:
    """The plan for a terminal: what was assumed, and a row for each candidate."""
    memory = plan.memory
    rows = [("", "name", "GiB", "bits/weight", "needs GiB", "room, tokens", "quality", "status")]
    rows += [
        (
            "->" if candidate is plan.best else "",
            candidate.name,
            f"{candidate.nbytes / GIB:.2f}",
            f"{candidate.bits_per_weight:.2f}",
            f"{candidate.need / GIB:.2f}",
            f"{candidate.headroom:,}",
            candidate.tier,
            candidate.status,
        )
        for candidate in plan.candidates
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"Memory {_gib(memory.total)} GiB, of which the GPU may use {_gib(memory.usable)} GiB.",
        f"Context {plan.context:,} tokens: {plan.cache / GIB:.2f} GiB of keys and values. "
        f"Images of {plan.image_tokens:,} tokens: {plan.working / GIB:.2f} GiB of working memory.",
        "",
    ]
    return "\n".join(lines + [_row(row, widths) for row in rows])


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    numbers = range(2, 6)  # to the right
    padded = [
        cell.rjust(width) if i in numbers else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f}".removesuffix(".0")


def to_dict(plan: Plan) -> Mapping[str, Any]:
    """The plan as one JSON object. Sizes in bytes."""
    return {
        "memory_bytes": plan.memory.total,
        "usable_bytes": plan.memory.usable,
        "context": plan.context,
        "image_tokens": plan.image_tokens,
        "cache_bytes": plan.cache,
        "working_bytes": plan.working,
        "chosen": plan.best.name if plan.best else None,
        "candidates": [
            {
                "name": candidate.name,
                "quality": candidate.tier,
                "weight_bytes": candidate.nbytes,
                "bits_per_weight": round(candidate.bits_per_weight, 4),
                "needed_bytes": candidate.need,
                "headroom_tokens": candidate.headroom,
                "status": candidate.status,
            }
            for candidate in plan.candidates
        ],
    }
