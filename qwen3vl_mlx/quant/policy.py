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


def choose(config: ModelConfig, request: Request) -> Assignment | None:
    """The modules' settings; None where "auto" finds that the model fits whole.

    Raises InputError for unknown names, a bad topology file, or a model that does not fit.
    """
    recipe = choose_recipe(config, request)
    shapes = quantizable_shapes(config)
    if recipe is None:
        if request.topology is not None:
            raise InputError("auto leaves this model whole: a topology file needs a named preset")
        return None
    if request.topology is not None:
        chosen = read_topology(request.topology, shapes, request.group_size)
        recipe = replace(recipe, overrides={**recipe.overrides, **chosen})
    return assign(recipe, shapes)


def smaller(
    config: ModelConfig, stored: Assignment, chosen: Assignment | None
) -> Assignment | None:
    """What "auto" makes of a checkpoint that is quantized already: never more than it has."""
    shapes = parameter_shapes(config)
    if chosen is None:
        return stored
    sizes = [weigh(shapes, assignment.modules).nbytes for assignment in (stored, chosen)]
    return stored if sizes[0] <= sizes[1] else chosen


def choose_recipe(config: ModelConfig, request: Request) -> Recipe | None:
    """The recipe asked for, before any topology; None is the whole model."""
    if isinstance(request.quantize, Recipe):
        return request.quantize
    if not isinstance(request.quantize, str):
        raise InputError(f'quantize is a name such as "4bit", got {request.quantize!r}')
    if request.quantize.strip().lower() == AUTO:
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


def tell(config: ModelConfig, request: Request, assignment: Assignment | None) -> None:
    """On stderr: what was chosen, and for "auto" from what."""
    if request.quantize == AUTO:
        print(table(make_plan(config, request)), file=sys.stderr)
    print(describe(config, request, assignment), file=sys.stderr)


def describe(
    config: ModelConfig, request: Request, assignment: Assignment | None, itemsize: int = 2
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
