"""From what a user asks for ("4bit", "q4k", "auto", a recipe, a topology file) to an assignment."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import TypeAlias

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.config import ModelConfig
from qwen3vl_mlx.quant.apply import (
    Assignment,
    assign,
    parameter_shapes,
    quantizable_shapes,
    weigh,
)
from qwen3vl_mlx.quant.plan import (
    DEFAULT_CONTEXT,
    DEFAULT_IMAGE_TOKENS,
    Memory,
    Plan,
    plan,
    table,
    this_memory,
)
from qwen3vl_mlx.quant.recipes import Recipe, parse_recipe
from qwen3vl_mlx.quant.topology import read_topology

Quantize: TypeAlias = "str | Recipe"
AUTO = "auto"


@dataclass(frozen=True)
class Request:
    """What to quantize a model to.

    quantize: a preset, an ISQ name, a mixed recipe, "auto", or a `Recipe`. group_size: of affine
    groups. vision: the tower too. topology: a YAML file of exceptions. memory, context and
    image_tokens: what "auto" plans for; None is this machine and the planner's defaults.
    """

    quantize: Quantize
    group_size: int | None = None
    vision: bool = False
    topology: str | os.PathLike[str] | None = None
    memory: Memory | None = None
    context: int | None = None
    image_tokens: int | None = None


def choose(
    config: ModelConfig, request: Request, stored: Assignment | None = None
) -> Assignment | None:
    """The modules' settings; None where "auto" finds that the model fits whole.

    stored: what the checkpoint is quantized to already; "auto" never makes more bytes of it.
    Raises InputError for unknown names, a bad topology file, or a model that does not fit.
    """
    recipe = choose_recipe(config, request)
    shapes = quantizable_shapes(config)
    if recipe is None:
        if request.topology is not None:
            raise InputError("auto leaves this model whole: a topology file needs a named preset")
        return stored
    if request.topology is not None:
        chosen = read_topology(request.topology, shapes, request.group_size)
        recipe = replace(recipe, overrides={**recipe.overrides, **chosen})
    assignment = assign(recipe, shapes)
    if stored is not None and _is_auto(request):
        every = parameter_shapes(config)
        if weigh(every, stored.modules).nbytes <= weigh(every, assignment.modules).nbytes:
            return stored
    return assignment


def _is_auto(request: Request) -> bool:
    return isinstance(request.quantize, str) and request.quantize.strip().lower() == AUTO


def choose_recipe(config: ModelConfig, request: Request) -> Recipe | None:
    """The recipe asked for, before any topology; None is the whole model."""
    if isinstance(request.quantize, Recipe):
        return request.quantize
    if not isinstance(request.quantize, str):
        raise InputError(f'quantize is a name such as "4bit", got {request.quantize!r}')
    if _is_auto(request):
        return make_plan(config, request).choose().recipe
    return parse_recipe(
        request.quantize,
        config.text.num_hidden_layers,
        group_size=request.group_size,
        vision=request.vision,
    )


def make_plan(config: ModelConfig, request: Request) -> Plan:
    """The candidates for "auto". A default that is more than the model holds is cut to that."""
    context = request.context
    if context is None:
        context = min(DEFAULT_CONTEXT, config.text.max_position_embeddings)
    image_tokens = request.image_tokens
    if image_tokens is None:
        image_tokens = min(DEFAULT_IMAGE_TOKENS, context)
    return plan(
        config,
        request.memory or this_memory(),
        context,
        image_tokens,
        vision=request.vision,
    )


def tell_plan(config: ModelConfig, request: Request) -> None:
    """On stderr: what "auto" chooses from, before it acts."""
    if _is_auto(request):
        print(table(make_plan(config, request)), file=sys.stderr)


def tell(
    config: ModelConfig,
    request: Request,
    assignment: Assignment | None,
    stored: Assignment | None,
    itemsize: int,
) -> None:
    """On stderr: what was chosen, and whether it is a second rounding."""
    print(describe(config, request, assignment, itemsize), file=sys.stderr)
    if stored is not None and assignment not in (None, stored):
        print(
            "note: the source is quantized already, and its errors stay; better take the original",
            file=sys.stderr,
        )


def describe(
    config: ModelConfig, request: Request, assignment: Assignment | None, itemsize: int
) -> str:
    """One line: what the request became, and what the model weighs then.

    itemsize: bytes of a parameter that is not quantized.
    """
    modules = assignment.modules if assignment is not None else {}
    weight = weigh(parameter_shapes(config), modules, itemsize)
    name = assignment.name if assignment is not None else "whole"
    asked = request.quantize if isinstance(request.quantize, str) else request.quantize.name
    was = f"{asked} is {name} here: " if asked.strip().lower() != name else f"{name}: "
    default = ""
    if assignment is not None:
        q = assignment.default
        default = f"{q.mode} {q.bits}-bit, groups of {q.group_size}; "
    return (
        f"{was}{default}{weight.bits_per_weight:.2f} bits per weight over all parameters, "
        f"{weight.nbytes / 1e6:,.2f} MB"
    )
