"""How checkpoints name and lay out their tensors, and what makes the module tree's parameters.

Layouts: the Hub's, the one transformers 5 re-saves (expert tensors transposed), FP8 in blocks with
`weight_scale_inv`, experts stored one by one, and MLX's own (mlx-vlm, mlx-community), quantized or
not. A `Piece` says which stored tensors become which parameters, for whole tensors and for blocks
of rows alike: loading applies it to lazy tensors, conversion to what it reads block by block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias

import mlx.core as mx

from qwen3vl_mlx.errors import WeightsError
from qwen3vl_mlx.models.config import ModelConfig, MoeConfig, Quantization
from qwen3vl_mlx.quant.apply import Shape, unpack

Weights = dict[str, mx.array]
Make: TypeAlias = Callable[[Sequence[mx.array], int], Weights]

_PREFIXES = (  # checkpoint prefix, module prefix; the first match renames
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "vision_tower."),
    ("lm_head.", "language_model.lm_head."),
)
_FUSED = re.compile(r"^(?P<mlp>.*\.mlp)\.experts\.(?P<kind>gate_up_proj|down_proj)(\.weight)?$")
_SINGLE = re.compile(
    r"^(?P<mlp>.*\.mlp)\.experts\.(?P<index>\d+)\.(?P<kind>(gate|up|down)_proj)\.weight$"
)
_SCALE = "_scale_inv"
CONV = "vision_tower.patch_embed.proj.weight"


@dataclass(frozen=True)
class Column:
    """One input of a piece: a tensor read by rows, several stacked as rows, or one read whole."""

    names: tuple[str, ...]
    kind: Literal["rows", "stack", "whole"] = "rows"


@dataclass(frozen=True)
class Piece:
    """Parameters that are made together, row by row, from the same rows of stored tensors.

    shapes: the parameters' names and full shapes; all have as many rows (first axis).
    make: from the columns' rows and the number of the first one, to the parameters' rows.
    """

    columns: tuple[Column, ...]
    shapes: Mapping[str, Shape]
    make: Make

    @property
    def rows(self) -> int:
        return next(iter(self.shapes.values()))[0]


@dataclass
class _Found:
    """Stored tensors by what they are; names in the module tree's spelling."""

    plain: dict[str, str] = field(default_factory=dict)
    fused: dict[str, dict[str, str]] = field(default_factory=dict)
    single: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)  # FP8: of the tensor so called


def module_name(name: str) -> str:
    """A tensor's name in any layout, as this package's module tree has it (experts aside)."""
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    return name


def hub_name(name: str) -> str:
    """The inverse of `module_name`: a module's parameter as the Hub names it (experts aside)."""
    for prefix, ours in _PREFIXES:
        if name.startswith(ours):
            return prefix + name[len(ours) :]
    return name


def pieces(
    stored: Mapping[str, Shape],
    config: ModelConfig,
    unpacked: Mapping[str, Quantization] | None = None,
    dtype: mx.Dtype = mx.bfloat16,
) -> list[Piece]:
    """What makes the model's parameters out of tensors of the shapes in `stored`, in their order.

    unpacked: settings of the stored quantized modules to make whole again, by path; the others
    stay as they are. dtype: of those whose scales do not tell, the model's own. Raises WeightsError
    for tensors that contradict each other or config.json.
    """
    unpacked = unpacked or {}
    found = _sort(stored)
    if (found.fused or found.single) and config.text.moe is None:
        mlp = next(iter(found.fused or found.single))
        raise WeightsError(f"{mlp}.experts is there, but config.json describes no experts")
    made: list[Piece] = []
    for name, source in found.plain.items():
        path, _, suffix = name.rpartition(".")
        if path in unpacked:
            parts = packed_parts(unpacked[path])
            if suffix == "weight":
                made.append(_dequantized(path, parts, stored, found.plain, unpacked[path], dtype))
            elif suffix not in parts:
                made.append(_plain(name, source, stored[source]))
        elif name in found.scales:
            made.append(_from_fp8(name, source, found.scales[name], stored))
        elif name == CONV and stored[source][1:] == _hub_conv(config):
            made.append(_channels_last(source, stored[source]))
        else:
            made.append(_plain(name, source, stored[source]))
    for mlp, pair in found.fused.items():
        assert config.text.moe is not None
        made += _fused_experts(mlp, pair, found.scales, stored, config)
    for mlp, kinds in found.single.items():
        assert config.text.moe is not None
        made += _single_experts(mlp, kinds, found.scales, stored, config.text.moe)
    _check_scales(found, made)
    twice = [
        name for name, count in Counter(n for p in made for n in p.shapes).items() if count > 1
    ]
    if twice:
        raise WeightsError(f"{min(twice)} is there twice, in two layouts")
    return made


def _sort(stored: Mapping[str, Shape]) -> _Found:
    found = _Found()
    for source in stored:
        name = module_name(source)
        if name.endswith(_SCALE):
            found.scales[name.removesuffix(_SCALE)] = source
        elif match := _FUSED.match(name):
            found.fused.setdefault(match["mlp"], {})[match["kind"]] = source
        elif match := _SINGLE.match(name):
            kinds = found.single.setdefault(match["mlp"], {})
            kinds.setdefault(match["kind"], {})[int(match["index"])] = source
        elif name in found.plain:
            raise WeightsError(f"{source} is there twice, under two naming schemes")
        else:
            found.plain[name] = source
    return found


def _plain(name: str, source: str, shape: Shape) -> Piece:
    return Piece((Column((source,)),), {name: shape}, lambda rows, _: {name: rows[0]})


def _channels_last(source: str, shape: Shape) -> Piece:
    """The Hub's (O, C, T, P, P) as (O, T, P, P, C), laid out so: a pass sums over the time axis."""
    out, channels, *kernel = shape
    return Piece(
        (Column((source,)),),
        {CONV: (out, *kernel, channels)},
        lambda rows, _: {CONV: mx.contiguous(rows[0].transpose(0, 2, 3, 4, 1))},
    )


def _hub_conv(config: ModelConfig) -> Shape:
    vision = config.vision
    return (vision.in_channels, vision.temporal_patch_size, *[vision.patch_size] * 2)


def packed_parts(settings: Quantization) -> tuple[str, ...]:
    """Names of the tensors a quantized weight is stored as."""
    return ("weight", "scales", "biases") if settings.mode == "affine" else ("weight", "scales")


def _dequantized(
    path: str,
    suffixes: Sequence[str],
    stored: Mapping[str, Shape],
    plain: Mapping[str, str],
    settings: Quantization,
    dtype: mx.Dtype,
) -> Piece:
    """A quantized weight made whole, in the type of its affine scales, or in `dtype`."""
    if missing := [key for key in suffixes if f"{path}.{key}" not in plain]:
        raise WeightsError(f"{path}.{missing[0]} is missing: the weight is {settings.mode}")
    sources = [plain[f"{path}.{key}"] for key in suffixes]
    *rows, packed = stored[sources[0]]
    width = packed * 32 // settings.bits
    expected = (*rows, width // settings.group_size)
    if any(stored[source] != expected for source in sources[1:]):
        raise WeightsError(
            f"{path}.weight has shape {stored[sources[0]]}, which does not go with its scales in "
            f"{settings.bits} bits and groups of {settings.group_size}"
        )

    def make(columns: Sequence[mx.array], _: int) -> Weights:
        parts = dict(zip(suffixes, columns, strict=True))
        whole = parts["scales"].dtype if settings.mode == "affine" else dtype
        return {f"{path}.weight": unpack(parts, settings, whole)}

    return Piece(
        tuple(Column((source,)) for source in sources),
        {f"{path}.weight": (*rows, width)},
        make,
    )


def _from_fp8(name: str, source: str, scale: str, stored: Mapping[str, Shape]) -> Piece:
    def make(columns: Sequence[mx.array], start: int) -> Weights:
        return {name: dequantize_fp8(columns[0], columns[1], start)}

    _check_blocks(source, stored[source], stored[scale])
    columns = (Column((source,)), Column((scale,), "whole"))
    return Piece(columns, {name: stored[source]}, make)


def dequantize_fp8(codes: mx.array, scale: mx.array, start: int = 0) -> mx.array:
    """float8_e4m3 codes (..., rows, cols), uint8, times their blocks' scales, in bfloat16.

    scale: (..., R, C), one a block of the whole matrix; `codes` may be its rows from `start` on.
    The block is 128 x 128, as in DeepSeek-V3 and HF `FineGrainedFP8`.
    """
    rows, cols = codes.shape[-2:]
    scale = scale.astype(mx.float32)[..., (mx.arange(rows) + start) // FP8_BLOCK, :]
    scale = mx.repeat(scale, FP8_BLOCK, axis=-1)[..., :cols]
    return (mx.from_fp8(codes, mx.float32) * scale).astype(mx.bfloat16)


FP8_BLOCK = 128


def _check_blocks(source: str, shape: Shape, scale: Shape) -> None:
    *lead, rows, cols = shape
    expected = (*lead, -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
    if scale != expected:
        raise WeightsError(
            f"{source} has FP8 scales of shape {scale}, expected {expected}: one for every block "
            f"of {FP8_BLOCK} x {FP8_BLOCK}"
        )


def _check_scales(found: _Found, made: Sequence[Piece]) -> None:
    """Every FP8 scale must have found its tensor."""
    used = {name for piece in made for column in piece.columns for name in column.names}
    if left := [source for source in found.scales.values() if source not in used]:
        raise WeightsError(f"{min(left)} belongs to no tensor of the checkpoint")


def _fused_experts(
    mlp: str,
    pair: Mapping[str, str],
    scales: Mapping[str, str],
    stored: Mapping[str, Shape],
    config: ModelConfig,
) -> list[Piece]:
    """One layer's fused tensors as `switch_mlp.{gate,up,down}_proj`, each (E, out, in).

    The Hub keeps (E, H, 2I) and (E, I, H), transformers 5 (E, 2I, H) and (E, H, I). Where 2I = H
    or I = H one tensor fits both, never the two together.
    """
    assert config.text.moe is not None
    if missing := {"gate_up_proj", "down_proj"} - pair.keys():
        raise WeightsError(f"{mlp}.experts.{missing.pop()} is missing")
    moe, hidden = config.text.moe, config.text.hidden_size
    count, inner = moe.num_experts, moe.moe_intermediate_size
    got = (stored[pair["gate_up_proj"]], stored[pair["down_proj"]])
    hub = ((count, hidden, 2 * inner), (count, inner, hidden))
    resaved = ((count, 2 * inner, hidden), (count, hidden, inner))
    if got not in (hub, resaved):
        raise WeightsError(
            f"{mlp}.experts gate_up_proj and down_proj have shapes {got[0]} and {got[1]}, "
            f"expected {hub[0]} and {hub[1]}, or {resaved[0]} and {resaved[1]}"
        )
    made: list[Piece] = []
    for kind, source in pair.items():
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        columns = [Column((source,))]
        if scale := scales.get(f"{mlp}.experts.{kind}") or scales.get(
            f"{mlp}.experts.{kind}.weight"
        ):
            _check_blocks(source, stored[source], stored[scale])
            columns.append(Column((scale,)))
        shape = (count, hidden, inner) if kind == "down_proj" else (count, inner, hidden)
        targets = [f"{mlp}.switch_mlp.{name}.weight" for name in names]
        make = partial(_split_experts, targets=targets, turned=got == hub)
        made.append(Piece(tuple(columns), dict.fromkeys(targets, shape), make))
    return made


def _split_experts(
    columns: Sequence[mx.array], start: int, *, targets: Sequence[str], turned: bool
) -> Weights:
    tensor = dequantize_fp8(columns[0], columns[1]) if len(columns) > 1 else columns[0]
    if turned:
        tensor = tensor.swapaxes(1, 2)
    parts = mx.split(tensor, len(targets), axis=1)
    return {name: mx.contiguous(part) for name, part in zip(targets, parts, strict=True)}


def _single_experts(
    mlp: str,
    kinds: Mapping[str, Mapping[int, str]],
    scales: Mapping[str, str],
    stored: Mapping[str, Shape],
    moe: MoeConfig,
) -> list[Piece]:
    """Experts stored one by one, `experts.{i}.{gate,up,down}_proj.weight`, stacked."""
    made: list[Piece] = []
    for kind, by_index in kinds.items():
        if missing := set(range(moe.num_experts)) ^ by_index.keys():
            raise WeightsError(
                f"{mlp}.experts has {len(by_index)} tensors of {kind}, not one for each of the "
                f"{moe.num_experts} experts; the first that does not fit is {min(missing)}"
            )
        sources = tuple(by_index[i] for i in range(moe.num_experts))
        columns = [Column(sources, "stack")]
        own = [scales.get(f"{mlp}.experts.{i}.{kind}.weight") for i in range(moe.num_experts)]
        beside = tuple(name for name in own if name is not None)
        shapes = {stored[source] for source in sources}
        if len(shapes) > 1 or len(beside) not in (0, len(sources)):
            raise WeightsError(f"{mlp}.experts: the tensors of {kind} differ in shape or type")
        for source, scale in zip(sources, beside, strict=False):
            _check_blocks(source, stored[source], stored[scale])
        if beside:
            columns.append(Column(beside, "stack"))
        target = f"{mlp}.switch_mlp.{kind}.weight"
        make = partial(_split_experts, targets=[target], turned=False)
        made.append(Piece(tuple(columns), {target: (len(sources), *shapes.pop())}, make))
    return made


def hub_pieces(made: Sequence[Piece]) -> list[Piece]:
    """Pieces of whole parameters, turned into what makes the Hub's tensors of them."""
    hub: list[Piece] = []
    gated: dict[str, list[Piece]] = {}  # by layer: what makes its gate and up projections
    for piece in made:
        name = next(iter(piece.shapes))
        mlp, _, kind = name.removesuffix("_proj.weight").rpartition(".switch_mlp.")
        if not mlp:
            hub.append(_hub_piece(piece, name))
        elif kind == "down":
            hub.append(_hub_experts(f"{mlp}.experts.down_proj", [piece], [name]))
        else:
            gated.setdefault(mlp, []).append(piece)
    for mlp, parts in gated.items():
        names = [f"{mlp}.switch_mlp.{kind}_proj.weight" for kind in ("gate", "up")]
        hub.append(_hub_experts(f"{mlp}.experts.gate_up_proj", parts, names))
    return hub


def _hub_piece(piece: Piece, name: str) -> Piece:
    target = hub_name(name)
    if name != CONV:
        return replace(
            piece,
            shapes={target: piece.shapes[name]},
            make=lambda rows, start: {target: piece.make(rows, start)[name]},
        )
    out, *kernel, channels = piece.shapes[name]
    return replace(
        piece,
        shapes={target: (out, channels, *kernel)},
        make=lambda rows, start: {target: piece.make(rows, start)[name].transpose(0, 4, 1, 2, 3)},
    )


def _hub_experts(module: str, parts: Sequence[Piece], names: Sequence[str]) -> Piece:
    """(E, out, in) parameters side by side, turned, as the Hub's one (E, in, outs)."""
    target = hub_name(module)

    def make(columns: Sequence[mx.array], start: int) -> Weights:
        found: Weights = {}
        left = list(columns)
        for part in parts:
            own, left = left[: len(part.columns)], left[len(part.columns) :]
            found.update(part.make(own, start))
        return {target: mx.concatenate([found[name] for name in names], axis=1).swapaxes(1, 2)}

    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    count, out, inner = shapes[names[0]]
    columns = tuple(column for part in parts for column in part.columns)
    return Piece(columns, {target: (count, inner, out * len(names))}, make)
