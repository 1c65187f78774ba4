"""What reaches a decoder layer's linear modules, and scales that make their weights round better.

Activation-aware scaling (AWQ, arXiv:2306.00978): the columns of a weight are multiplied by scales
that the operation before divides by, so that the layer computes the same, and columns with large
inputs lose less when the weight is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.models.config import Quantization, TextConfig
from qwen3vl_mlx.models.text import DecoderLayer
from qwen3vl_mlx.quant.apply import unpack
from qwen3vl_mlx.quant.rounding import Sensitivity, block_width, round_rows, sensitivity
from qwen3vl_mlx.quant.streamed import LayerInput

Floats = npt.NDArray[np.float64]

DAMPING = 0.1
_RATIOS = (0.0, 0.15, 0.3, 0.5, 0.75)  # exponents of a column's root mean square
_SEARCH_BITS = 5  # from here on scales gain nothing that can be measured
_SAMPLE_ROWS = 256  # of each weight, that a ratio is tried on
_EXPERTS_DOWN = "mlp.switch_mlp.down_proj"


@dataclass(frozen=True)
class Site:
    """A place in a decoder layer where one activation feeds linear modules.

    name: the first module it feeds. producer: the parameter whose rows give its channels.
    """

    name: str
    modules: tuple[str, ...]
    producer: str


ATTENTION_SITES = (
    Site(
        "self_attn.q_proj",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "input_layernorm",
    ),
    Site("self_attn.o_proj", ("self_attn.o_proj",), "self_attn.v_proj"),
)
DENSE_SITES = (
    *ATTENTION_SITES,
    Site("mlp.gate_proj", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Site("mlp.down_proj", ("mlp.down_proj",), "mlp.up_proj"),
)
SPARSE_SITES = (
    *ATTENTION_SITES,
    Site(
        "mlp.gate",
        ("mlp.gate", "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"),
        "post_attention_layernorm",
    ),
    Site(_EXPERTS_DOWN, (_EXPERTS_DOWN,), "mlp.switch_mlp.up_proj"),
)


def layer_sites(layer: DecoderLayer) -> tuple[Site, ...]:
    return SPARSE_SITES if "switch_mlp" in layer.mlp else DENSE_SITES


# -- what reaches the sites --------------------------------------------------------------------


class Moments:
    """Weighted second moments of activations (..., width), within blocks of b channels.

    blocks: (n, b, b); or with experts, for each only the squares: (experts, width).
    """

    def __init__(self, width: int, limit: int, experts: int = 0):
        size = block_width(width, limit)
        shape = (experts, width) if experts else (width // size, size, size)
        self.blocks = mx.zeros(shape)
        self.experts = experts

    def add(self, x: mx.array, weights: mx.array, chosen: mx.array | None = None) -> None:
        """x: (T, width), weights: (T,), chosen: (T,), the expert of each row."""
        x = x.astype(mx.float32)
        if chosen is not None:
            self.blocks = self.blocks.at[chosen].add(mx.square(x) * weights[:, None])
        else:
            parts = x.reshape(x.shape[0], -1, self.blocks.shape[-1]).swapaxes(0, 1)  # (n, T, b)
            self.blocks = self.blocks + (parts * weights[:, None]).swapaxes(1, 2) @ parts
        mx.eval(self.blocks)

    def array(self) -> Floats:
        return np.array(self.blocks).astype(np.float64)


class _Watch(nn.Module):
    """Stands in for a module and keeps what it is given."""

    def __init__(self, module: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = module
        self.inputs: list[tuple[Any, ...]] = []

    def __call__(self, *inputs: Any, **settings: Any) -> mx.array:
        self.inputs.append(inputs)
        return self.watched(*inputs, **settings)  # type: ignore[no-any-return]


def submodule(layer: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        layer = layer[int(name) if name.isdigit() else name]
    return layer


@contextmanager
def watching(layer: DecoderLayer, paths: Sequence[str]) -> Iterator[dict[str, _Watch]]:
    """Within, modules of `layer` keep their inputs."""
    watches: dict[str, _Watch] = {}
    try:
        for path in paths:
            watches[path] = _Watch(submodule(layer, path))
            _replace(layer, path, watches[path])
        yield watches
    finally:
        for path, watch in watches.items():
            _replace(layer, path, watch.watched)


def _replace(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(submodule(layer, parent), name, module)


def measure(
    layer: DecoderLayer, inputs: Sequence[LayerInput], weights: Sequence[mx.array], limit: int
) -> dict[str, Floats]:
    """Second moments at each site of `layer`, by name: see `Moments`.

    weights: one per input, (L,), what each token counts. limit: most channels of a block.
    """
    names = [site.name for site in layer_sites(layer) if site.name != _EXPERTS_DOWN]
    sparse = "switch_mlp" in layer.mlp
    moments = {
        name: Moments(whole_weight(submodule(layer, name)).shape[-1], limit) for name in names
    }
    if sparse:
        experts, _, width = whole_weight(submodule(layer, _EXPERTS_DOWN)).shape
        moments[_EXPERTS_DOWN] = Moments(width, limit, experts)
    with watching(layer, [*names, "mlp.switch_mlp"] if sparse else names) as watches:
        for item, counts in zip(inputs, weights, strict=True):
            mx.eval(item.through(layer))
            for name in names:
                (x,) = watches[name].inputs.pop()  # (1, L, width)
                moments[name].add(x[0], counts)
            if sparse:
                x, chosen = watches["mlp.switch_mlp"].inputs.pop()  # (1, L, H), (1, L, k)
                inner = _expert_inner(watches["mlp.switch_mlp"].watched, x[0], chosen[0])
                counts = mx.repeat(counts, chosen.shape[-1])
                moments[_EXPERTS_DOWN].add(inner, counts, chosen.flatten())
    return {name: found.array() for name, found in moments.items()}


def _expert_inner(switch: nn.Module, x: mx.array, chosen: mx.array) -> mx.array:
    """What the experts' down projections get: (T * k, inner), for x (T, H), chosen (T, k)."""
    x = mx.expand_dims(x, (-2, -3))
    inner: mx.array = switch.activation(switch.up_proj(x, chosen), switch.gate_proj(x, chosen))
    return inner.reshape(-1, inner.shape[-1])


def whole_weight(module: nn.Module) -> mx.array:
    """A module's weight, made whole where it is quantized. Lazy."""
    weight: mx.array = module.weight
    if "scales" not in module:
        return weight
    settings = Quantization(module.group_size, module.bits, module.mode)
    parts = {
        key: module[key] for key in ("weight", "scales", "biases") if module.get(key) is not None
    }
    return unpack(parts, settings, mx.float32)


# -- scales ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerScales:
    """columns: (in,) by site, what its modules' columns are multiplied by. rows: by producer, what
    its rows are divided by."""

    columns: dict[str, mx.array]
    rows: dict[str, mx.array]


def layer_scales(
    layer: DecoderLayer,
    moments: Mapping[str, Floats],
    chosen: Mapping[str, Quantization],
    config: TextConfig,
    dtype: mx.Dtype,
) -> LayerScales:
    """The scales of one layer that cost least in its modules' outputs.

    chosen: settings by path within the layer. dtype: that norms and affine scales are stored in:
    scales are such that a norm divided by them is exact in it.
    """
    found = LayerScales({}, {})
    for site in layer_sites(layer):
        fed = [path for path in site.modules if path in chosen]
        if site.name == _EXPERTS_DOWN or all(chosen[p].bits >= _SEARCH_BITS for p in fed):
            continue
        repeats = 1
        if site.producer == "self_attn.v_proj":  # query heads of a group share a value head
            repeats = config.num_attention_heads // config.num_key_value_heads
        tried = [(sample_rows(whole_weight(submodule(layer, path))), chosen[path]) for path in fed]
        scales = _search(tried, moments[site.name], repeats, config.head_dim, dtype)
        if site.producer.endswith("layernorm"):
            norm = submodule(layer, site.producer).weight.astype(mx.float32)
            divided = (norm / scales).astype(dtype).astype(mx.float32)
            scales = mx.where(divided == 0, 1.0, norm / mx.where(divided == 0, 1.0, divided))
        found.columns[site.name] = scales
        per_head = scales.reshape(-1, repeats, config.head_dim if repeats > 1 else 1)
        found.rows[site.producer] = per_head[:, 0].flatten()
        mx.eval(found.columns[site.name], found.rows[site.producer])
    return found


def sample_rows(weight: mx.array) -> mx.array:
    """At most _SAMPLE_ROWS rows (out, in) of a weight, evenly spread, over experts too."""
    rows = weight.reshape(-1, weight.shape[-1])
    return rows[:: -(-rows.shape[0] // _SAMPLE_ROWS)].astype(mx.float32)


def _search(
    weights: Sequence[tuple[mx.array, Quantization]],
    moments: Floats,
    repeats: int,
    head_dim: int,
    dtype: mx.Dtype,
) -> mx.array:
    """Scales (in,) from powers of the inputs' root mean square, with a geometric mean of one."""
    near = narrowed(moments, 128)
    size = np.sqrt(np.einsum("nii->ni", near)).reshape(-1)
    log_size = np.log(np.maximum(size, 1e-4 * size.max() + 1e-12))
    if repeats > 1:
        heads = log_size.reshape(-1, repeats, head_dim)
        log_size = np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)
    log_size = log_size - log_size.mean()
    best, least = np.ones_like(size), np.inf
    for ratio in _RATIOS:
        scales = np.exp(ratio * log_size)
        cost = _cost(weights, scaled(near, scales), mx.array(scales.astype(np.float32)), dtype)
        if cost < least:
            best, least = scales, cost
    return mx.array(best.astype(np.float32))


def _cost(
    weights: Sequence[tuple[mx.array, Quantization]],
    moments: Floats,
    scales: mx.array,
    dtype: mx.Dtype,
) -> float:
    """Mean square of the errors in the modules' outputs, by rows and modules."""
    known = sensitivity(moments, DAMPING)
    return sum(
        output_error(rows * scales, settings, dtype, known, moments) for rows, settings in weights
    )


def output_error(
    rows: mx.array, settings: Quantization, dtype: mx.Dtype, known: Sensitivity, moments: Floats
) -> float:
    """What quantizing rows (R, in) changes in their outputs: the sum of mean squares."""
    rounded = unpack(round_rows(rows, settings, dtype, known), settings, mx.float32)
    count, size, _ = moments.shape
    errors = (rounded - rows).reshape(-1, count, size).swapaxes(0, 1)  # (n, R, b)
    costs = (errors @ mx.array(moments.astype(np.float32))) * errors
    return float(costs.sum())


def scaled(moments: Floats, scales: npt.NDArray[np.floating[Any]]) -> Floats:
    """Moments (n, b, b) of inputs that are divided by scales (n * b,)."""
    parts = scales.astype(np.float64).reshape(moments.shape[:2])
    return moments / parts[:, :, None] / parts[:, None]


def narrowed(moments: Floats, limit: int) -> Floats:
    """The same moments within blocks of at most `limit` channels."""
    count, size, _ = moments.shape
    width = block_width(size, limit)
    inner = moments.reshape(count, size // width, width, size // width, width)
    diagonal: Floats = np.einsum("nikil->nikl", inner)
    return diagonal.reshape(-1, width, width)
