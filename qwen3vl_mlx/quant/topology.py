"""Topology files: YAML that gives layers, named modules and /regex/ matches their own settings.

    0-8: 6bit                               # decoder layers 0 to 7: the end is exclusive
    27: {isq: Q8_0}                         # one layer; isq takes any preset or ISQ name
    /v_proj|down_proj/: {bits: 8, group_size: 32}
    lm_head: none                           # by name; left whole

The format and its precedence are mistral.rs' (docs/TOPOLOGY.md): among ranges the higher end wins,
then the later entry; of what matches by pattern the later entry. Here a pattern or a name beats a
range, whatever their order, and all of them beat what the recipe promotes or leaves whole. One rule
of the recipe stands: the router of experts is never quantized to less than 8 bits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.layout import hub_name
from qwen3vl_mlx.models.config import Quantization
from qwen3vl_mlx.quant.apply import Shape
from qwen3vl_mlx.quant.recipes import (
    FIXED_MODES,
    MIXED,
    ROUTER_BITS,
    Choice,
    affine,
    at_least,
    parse_preset,
)

if TYPE_CHECKING:
    from yaml.nodes import Node

FIELDS = ("isq", "bits", "group_size", "mode")
_WHOLE = ("", "~", "null", "none")
_RANGE = re.compile(r"(\d{1,9})\s*-\s*(\d{1,9})|(\d{1,9})", re.ASCII)
_NAME = re.compile(r"(?!\d+$)\w+(\.\w+)*", re.ASCII)
_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.")
_EXPERTS = re.compile(r"\.switch_mlp\.(gate|up|down)_proj\b")


@dataclass(frozen=True)
class _Entry:
    """One line of the file. end: of a range of layers, which ranks it; None for other selectors."""

    choice: Choice
    paths: tuple[str, ...]
    end: int | None


def read_topology(
    path: str | os.PathLike[str], shapes: Mapping[str, Shape], group_size: int | None = None
) -> dict[str, Quantization | None]:
    """Overrides by module path, for `Recipe.overrides`; None leaves a module whole.

    shapes: of the weights that can be quantized, by module path (`apply.quantizable_shapes`).
    group_size: of affine entries that give none.

    A layer takes in every quantizable module of that decoder layer. A /regex/ is searched for in
    module paths as this package and as the Hub spell them, with `.weight` and without; vision
    modules too. A name is the last part of a text module's path (`lm_head`, `self_attn.q_proj`), or
    any module's whole path. Where groups do not divide a width, a module asked for by name is an
    error; others are left to `apply.assign`, which leaves them whole and says so.

    Raises InputError naming the line: unreadable file, bad YAML, unknown fields or values, layers
    the model does not have, and entries that match nothing.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"topology file {path} cannot be read: {error}") from error
    try:
        entries = [_entry(key, node, shapes, group_size) for key, node in _parsed(text)]
    except InputError as error:
        raise InputError(f"topology file {path}: {error}") from None
    ranked = sorted((e for e in entries if e.end is not None), key=lambda e: e.end or 0)  # stable
    ranked += [e for e in entries if e.end is None]
    return {module: _kept_fine(module, entry.choice) for entry in ranked for module in entry.paths}


def _kept_fine(path: str, choice: Choice) -> Choice:
    if choice is None or not path.endswith(".mlp.gate"):
        return choice
    return at_least(choice, ROUTER_BITS)


def _entry(key: Node, node: Node, shapes: Mapping[str, Shape], group_size: int | None) -> _Entry:
    selector = _scalar(key)
    value = _fields(node) if isinstance(node.value, list) else _scalar(node)
    try:
        return _meant(selector, _choice(value, group_size), shapes)
    except InputError as error:
        raise InputError(f"line {_line(key)}, {selector!r}: {error}") from None


# The file: scalars stay strings, as `0-8` and `4` would in any reading, and keep their lines.


def _parsed(text: str) -> list[tuple[Node, Node]]:
    """The top level's keys and values."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        raise InputError("there is nothing in it; give entries such as '0-8: 4bit'")
    return _pairs(root)


def _pairs(node: Node) -> list[tuple[Node, Node]]:
    """A mapping's keys, no two equal, and values."""
    from yaml import MappingNode

    if not isinstance(node, MappingNode):
        raise InputError(f"line {_line(node)}: expected a mapping such as '0-8: 4bit'")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name = _scalar(key)
        if name in lines:
            raise InputError(f"line {_line(key)}: {name!r} stands in line {lines[name]} too")
        lines[name] = _line(key)
    return list(node.value)


def _fields(node: Node) -> dict[str, str]:
    return {_scalar(key): _scalar(value) for key, value in _pairs(node)}


def _scalar(node: Node) -> str:
    if not isinstance(node.value, str):
        raise InputError(f"line {_line(node)}: expected one word or number, not a list of them")
    return node.value.strip()


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


# What an entry gives.


def _choice(value: str | dict[str, str], group_size: int | None) -> Choice:
    """Settings from a word (`4bit`, `none`) or fields (`{bits: 4, group_size: 32}`)."""
    if isinstance(value, str):
        return _named(value, None, group_size)
    if "device" in value:
        raise InputError("'device' has no meaning here: a Mac has one GPU with all its memory")
    if unknown := value.keys() - set(FIELDS):
        raise InputError(f"no field {min(unknown)!r}; fields are {', '.join(FIELDS)}")
    own_group = _integer(value, "group_size")
    if "isq" in value:
        if value.keys() & {"bits", "mode"}:
            raise InputError("give 'isq', or 'bits' and 'mode', not both")
        return _named(value["isq"], own_group, group_size)
    bits, mode = _integer(value, "bits"), value.get("mode", "affine")
    if mode in FIXED_MODES:
        if bits not in (None, FIXED_MODES[mode][1]):
            raise InputError(f"{mode} has {FIXED_MODES[mode][1]} bits, not {bits}")
        return parse_preset(mode, own_group)
    if mode != "affine":
        raise InputError(f"no mode {mode!r}; modes are affine, {', '.join(FIXED_MODES)}")
    if bits is None:
        raise InputError("give 'isq', 'bits', or a mode other than affine")
    return affine(bits, own_group or group_size)


def _named(name: str, own_group: int | None, group_size: int | None) -> Choice:
    plain = name.lower()
    if plain in _WHOLE:
        if own_group is not None:
            raise InputError("'group_size' has no meaning for modules that are left whole")
        return None
    if plain in MIXED:
        raise InputError(f"{name} is a recipe for a whole model; give bits or a mode here")
    if plain in FIXED_MODES:
        return parse_preset(plain, own_group)
    return parse_preset(name, own_group or group_size)


def _integer(value: Mapping[str, str], field: str) -> int | None:
    if field not in value:
        return None
    if not re.fullmatch(r"[1-9]\d{0,5}", value[field], re.ASCII):
        raise InputError(f"{field} must be a whole number above 0, got {value[field]!r}")
    return int(value[field])


# What an entry means.


def _meant(key: str, choice: Choice, shapes: Mapping[str, Shape]) -> _Entry:
    if len(key) > 1 and key.startswith("/") and key.endswith("/"):
        return _Entry(choice, _matching(key, shapes), end=None)
    if layers := _RANGE.fullmatch(key):
        start = int(layers[1] or layers[3])
        end = int(layers[2]) if layers[2] else start + 1
        return _Entry(choice, _in_layers(start, end, shapes), end)
    if _NAME.fullmatch(key):
        paths = _named_modules(key, shapes)
        if choice is not None:
            _check_widths(paths, choice, shapes)
        return _Entry(choice, paths, end=None)
    raise InputError("not a layer (3), a range of layers (0-8), a /regex/ or a module's name")


def _in_layers(start: int, end: int, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    if start >= end:
        raise InputError(f"the range is empty: its end, {end}, is exclusive")
    layers = {path: int(found[1]) for path in shapes if (found := _LAYER.match(path))}
    count = max(layers.values(), default=-1) + 1
    if end > count:
        raise InputError(f"the model has {count} decoder layers, 0 to {count - 1}")
    return tuple(path for path, layer in layers.items() if start <= layer < end)


def _matching(key: str, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    try:
        pattern = re.compile(key[1:-1])
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"not a regular expression: {error}") from error
    return _found(shapes, lambda path: any(map(pattern.search, _spellings(path))))


def _named_modules(key: str, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    name = key.removesuffix(".weight")

    def wanted(path: str) -> bool:
        if not path.startswith("language_model."):
            return name in _spellings(path)
        return any(f".{spelling}".endswith(f".{name}") for spelling in _spellings(path))

    return _found(shapes, wanted)


def _found(shapes: Mapping[str, Shape], wanted: Callable[[str], bool]) -> tuple[str, ...]:
    if paths := tuple(path for path in shapes if wanted(path)):
        return paths
    raise InputError(
        "no module that can be quantized matches; paths look like "
        f"{next(iter(shapes), 'language_model.model.embed_tokens')}, and a model whose output head "
        "is tied to its embeddings has no lm_head"
    )


def _spellings(path: str) -> tuple[str, ...]:
    """A module's names: this package's, the Hub's, and both as tensors."""
    ours = f"{path}.weight"
    hub = hub_name(ours)
    if expert := _EXPERTS.search(hub):  # the Hub joins gate and up, and says no `.weight`
        kind = "down" if expert[1] == "down" else "gate_up"
        return path, ours, f"{hub[: expert.start()]}.experts.{kind}_proj"
    return path, ours, hub.removesuffix(".weight"), hub


def _check_widths(
    paths: tuple[str, ...], choice: Quantization, shapes: Mapping[str, Shape]
) -> None:
    for path in paths:
        if shapes[path][-1] % choice.group_size:
            raise InputError(
                f"groups of {choice.group_size} do not divide the width of {path}, "
                f"{shapes[path][-1]}: give a group_size that does, or 'none'"
            )
