"""Which modules are quantized and how, as data: names of presets, and the policy around them.

Knows paths and widths of modules; no tensors and no files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.config import Quantization

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
FIXED_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # (group size, bits)
MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_5", "mixed_3_6", "mixed_3_8", "mixed_4_6", "mixed_4_8")

DEFAULT_GROUP = 64
EMBEDDING_BITS = 6  # at least: errors in embeddings and head reach every token
ROUTER_BITS = 8  # at least: a wrong expert is a wrong answer

_AFFINE_NAME = re.compile(r"(?:afq)?([0-9])(?:-?bits?)?(?:-g(32|64|128))?", re.ASCII)
_GGML_NAME = re.compile(r"q([0-9])_?(?:k(?:_[sml])?|0|1)")
_LAYER = re.compile(r"\.layers\.(\d+)\.")

Choice: TypeAlias = "Quantization | None"  # None: left whole


@dataclass(frozen=True)
class Recipe:
    """A policy: what every quantizable module of the model becomes.

    base: most of the decoder. embeddings: `embed_tokens` and `lm_head`. router: the MoE gate.
    vision: the tower and its mergers, None leaves them whole. high: `v_proj` and `down_proj` of
    `high_layers`. overrides: by module path, before every other rule.
    """

    name: str
    base: Quantization
    embeddings: Choice
    router: Choice
    vision: Choice = None
    high: Choice = None
    high_layers: frozenset[int] = frozenset()
    overrides: Mapping[str, Choice] = field(default_factory=dict)

    def choose(self, path: str) -> Choice:
        """Settings of the module at `path`; None leaves it whole."""
        if path in self.overrides:
            return self.overrides[path]
        if path.startswith("vision_tower."):
            return None if path.endswith(".pos_embed") else self.vision
        if path.endswith((".embed_tokens", ".lm_head")):
            return self.embeddings
        if path.endswith(".mlp.gate"):
            return self.router
        layer = _LAYER.search(path)
        if layer and int(layer[1]) in self.high_layers and path.endswith((".v_proj", ".down_proj")):
            return self.high
        return self.base


def valid_names() -> str:
    """All preset names, for messages."""
    return ", ".join([*(f"{bits}bit" for bits in AFFINE_BITS), *FIXED_MODES, *MIXED])


def parse_preset(name: str, group_size: int | None = None) -> Quantization:
    """A preset's settings: `4bit`, `mxfp4`, or a mistral.rs ISQ name (`4`, `afq4`, `q4k`, `Q8_0`).

    ggml's block formats have no counterpart in MLX: they become affine groups of the same bits.
    Raises InputError listing the valid names, or naming a group size the mode does not have.
    """
    plain = name.strip().lower()
    if plain in FIXED_MODES:
        group, bits = FIXED_MODES[plain]
        if group_size not in (None, group):
            raise InputError(f"{plain} has groups of {group}, not {group_size}")
        return Quantization(group, bits, plain)
    match = _AFFINE_NAME.fullmatch(plain) or _GGML_NAME.fullmatch(plain)
    if match is None or int(match[1]) not in AFFINE_BITS:
        raise InputError(f"no quantization {name!r}; valid names: {valid_names()}")
    if match.re is _AFFINE_NAME and match[2]:  # `3bit-g128`, as `preset_name` says it
        if group_size not in (None, int(match[2])):
            raise InputError(f"{name} has groups of {match[2]}, not {group_size}")
        group_size = int(match[2])
    return affine(int(match[1]), group_size)


def affine(bits: int, group_size: int | None = None) -> Quantization:
    """Affine settings. Raises InputError for bits or groups MLX does not have."""
    group = DEFAULT_GROUP if group_size is None else group_size
    if bits not in AFFINE_BITS:
        raise InputError(f"affine quantization has {_listed(AFFINE_BITS)} bits, not {bits}")
    if group not in AFFINE_GROUPS:
        raise InputError(f"affine groups have {_listed(AFFINE_GROUPS)} weights, not {group}")
    return Quantization(group, bits)


def check_settings(settings: Quantization) -> None:
    """Raise InputError for settings that MLX does not have."""
    if settings.mode == "affine":
        affine(settings.bits, settings.group_size)
    elif FIXED_MODES.get(settings.mode) != (settings.group_size, settings.bits):
        raise InputError(
            f"no quantization {settings.mode!r} of {settings.bits} bits in groups of "
            f"{settings.group_size}; valid names: {valid_names()}"
        )


def parse_recipe(
    name: str,
    num_layers: int,
    *,
    group_size: int | None = None,
    vision: bool = False,
) -> Recipe:
    """The policy a preset or mixed recipe (`mixed_3_6`) stands for.

    num_layers: of the decoder; a mixed recipe gives its higher bits to values and down projections
    of its first and last eighth and of every third layer between, as llama.cpp's Q4_K_M does.
    """
    plain = name.strip().lower()
    if plain not in MIXED:
        base = parse_preset(name, group_size)
        return default_recipe(base, vision=vision)
    low_bits, high_bits = (int(bits) for bits in plain.split("_")[1:])
    low, high = affine(low_bits, group_size), affine(high_bits, group_size)
    edge = num_layers // 8
    layers = range(num_layers)
    return Recipe(
        name=plain,
        base=low,
        embeddings=at_least(high, EMBEDDING_BITS),
        router=at_least(high, ROUTER_BITS),
        vision=high if vision else None,
        high=high,
        high_layers=frozenset(
            i for i in layers if i < edge or i >= 7 * num_layers // 8 or (i - edge) % 3 == 2
        ),
    )


def default_recipe(base: Quantization, *, vision: bool = False) -> Recipe:
    """The policy of every preset: `base`, with what small errors hurt most kept finer.

    A format of floating-point blocks (mxfp4, nvfp4) is promoted to affine groups of more bits.
    """
    return Recipe(
        name=preset_name(base),
        base=base,
        embeddings=at_least(base, EMBEDDING_BITS),
        router=at_least(base, ROUTER_BITS),
        vision=base if vision else None,
    )


def uniform_recipe(base: Quantization) -> Recipe:
    """`base` for every module outside the vision tower, as other converters do."""
    return Recipe(f"uniform {preset_name(base)}", base, embeddings=base, router=base)


def at_least(settings: Quantization, bits: int) -> Quantization:
    """The same settings, or affine groups of `bits` where those are more."""
    if settings.bits >= bits:
        return settings
    return Quantization(settings.group_size if settings.mode == "affine" else DEFAULT_GROUP, bits)


def preset_name(settings: Quantization) -> str:
    """`4bit`, `4bit-g32` or `mxfp4`."""
    if settings.mode != "affine":
        return settings.mode
    group = "" if settings.group_size == DEFAULT_GROUP else f"-g{settings.group_size}"
    return f"{settings.bits}bit{group}"


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
