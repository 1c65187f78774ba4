"""Bits where they matter: what rounding each part of a model costs, and the best use of a budget.

A part is some modules of one layer, the embeddings or the head. Its loss is measured once, as the
KL divergence of the model's answers when that part alone is rounded; from there to other settings
the loss goes as the squared rounding error, which needs no pass. The model is held in memory. Each
measurement is a pass of the examples through the layers from the part's own on: for a model of n
layers and dense MLPs together about 2.5 n passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.engine.vision import encode
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.loading import (
    default_dtype,
    effective_config,
    load_model,
    model_itemsize,
    progress_bar,
    stored_settings,
    weight_files,
)
from qwen3vl_mlx.models.config import Quantization, read_config
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.models.rope import Rotation
from qwen3vl_mlx.models.text import VisualTokens, add_rows, set_rows
from qwen3vl_mlx.quant.apply import Shape, packed_bytes, parameter_shapes, unpack, weigh
from qwen3vl_mlx.quant.apply import pack as pack_plain
from qwen3vl_mlx.quant.awq import sample_rows, submodule, whole_weight
from qwen3vl_mlx.quant.examples import Example
from qwen3vl_mlx.quant.recipes import AFFINE_BITS, AFFINE_GROUPS, ROUTER_BITS
from qwen3vl_mlx.tensorfile import TensorReader

CANDIDATES = tuple(Quantization(group, bits) for bits in AFFINE_BITS for group in AFFINE_GROUPS)
PROBE_BITS = 4  # at most: what finer rounding costs is lost in that of arithmetic
_PARTS = (
    ("self_attn.q_proj", "self_attn.k_proj"),
    ("self_attn.v_proj",),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
    ("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"),
    ("mlp.switch_mlp.down_proj",),
)
_BUDGET_STEPS = 4000
_EMBEDDINGS = "language_model.model.embed_tokens"
_HEAD = "language_model.lm_head"

Pack = Callable[[str, mx.array, Quantization, int], dict[str, mx.array]]
Costs = Callable[[str, int], mx.array]  # path, width -> (width,)


@dataclass(frozen=True)
class Option:
    """What a part may become: its settings, bytes, and the loss foreseen, in nats."""

    settings: Quantization
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Part:
    """Modules that get the same settings, and what those may be."""

    paths: tuple[str, ...]
    options: tuple[Option, ...]


def allocate(parts: Sequence[Part], budget: int) -> list[Option]:
    """The option of each part such that their loss is least and their bytes are within `budget`.

    A knapsack over the budget in small steps, sizes rounded up. More budget never costs more loss.
    Raises InputError where not even the smallest options fit.
    """
    least = sum(min(option.nbytes for option in part.options) for part in parts)
    if least > budget:
        raise InputError(
            f"the target leaves {budget} bytes for what can be quantized, which takes {least} at "
            "least; give a higher target"
        )
    spare = budget - least
    step = max(1, -(-spare // _BUDGET_STEPS))
    size = spare // step + 1
    best = np.zeros(size)  # least loss with so many steps of spare bytes or fewer
    choices = []
    for part in parts:
        smallest = min(option.nbytes for option in part.options)
        totals = np.full((len(part.options), size), np.inf)
        for row, option in zip(totals, part.options, strict=True):
            extra = -(-(option.nbytes - smallest) // step)
            if extra < size:
                row[extra:] = best[: size - extra] + option.loss
        choices.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    chosen = []
    left = size - 1
    for part, choice in zip(reversed(parts), reversed(choices), strict=True):
        option = part.options[int(choice[left])]
        left -= -(-(option.nbytes - min(o.nbytes for o in part.options)) // step)
        chosen.append(option)
    return chosen[::-1]


def mixed_precision(
    folder: Path,
    examples: Sequence[Example],
    modules: Mapping[str, Quantization],
    shapes: Mapping[str, Shape],
    target: float,
    pack: Pack,
    costs: Costs,
    *,
    pinned: frozenset[str] = frozenset(),
    candidates: Sequence[Quantization] = CANDIDATES,
    progress: bool = False,
) -> dict[str, Quantization]:
    """Settings by module path that cost least at `target` bits per weight of the whole model.

    modules: those of the uniform recipe: they say what is quantized, and measure the losses.
    shapes: of all parameters (`apply.parameter_shapes`). Modules outside the decoder keep their
    settings, as do those that are pinned, and routers their eight bits.
    pack, costs: `Calibration`'s.
    """
    model = load_model(folder, default_dtype(), progress=progress)
    named = model.named_modules()  # type: ignore[no-untyped-call]
    if any("scales" in module for _, module in named):
        raise InputError(
            "mixed precision is measured on an unquantized checkpoint; give its source"
        )
    itemsize = model_itemsize(folder)
    fixed = {path: c for path, c in modules.items() if not _is_free(path) or path in pinned}
    fixed |= {path: _router(chosen) for path, chosen in fixed.items() if path.endswith(".mlp.gate")}
    paths = [path for path in modules if path not in fixed]
    parts = []
    with progress_bar(len(paths), "Measuring", progress, counts=True) as bar:
        for group, loss in _losses(model, examples, paths, modules, pack):
            parts.append(_part(model, group, loss, modules[group[0]], candidates, costs, itemsize))
            bar.update(len(group))
    total = weigh(shapes, fixed, itemsize)
    free = sum(itemsize * int(np.prod(shapes[f"{path}.weight"])) for path in paths)
    budget = int(target * total.parameters / 8) - (total.nbytes - free)
    chosen = allocate(parts, budget)
    for part, option in zip(parts, chosen, strict=True):
        fixed |= dict.fromkeys(part.paths, option.settings)
    return {path: fixed[path] for path in modules}


def check_target_bits(
    folder: Path, modules: Mapping[str, Quantization], pinned: frozenset[str], target: float
) -> None:
    """Raise InputError unless `target` bits per weight can be met, before anything is measured."""
    config = read_config(folder)
    with TensorReader(weight_files(folder)) as reader:
        if stored_settings(reader.shapes, config):
            raise InputError("bits per weight are chosen for an unquantized checkpoint: give that")
        shapes = parameter_shapes(effective_config(config, reader.shapes))
    smallest = {}
    for path, settings in modules.items():
        width = shapes[f"{path}.weight"][-1]
        fitting = [c for c in CANDIDATES if width % c.group_size == 0]
        is_fixed = path in pinned or not _is_free(path) or not fitting
        rest = shapes[f"{path}.weight"]
        smallest[path] = settings if is_fixed else min(fitting, key=lambda c: packed_bytes(rest, c))
    itemsize = model_itemsize(folder)
    least = weigh(shapes, smallest, itemsize).bits_per_weight
    if not least <= target <= 8 * itemsize:
        raise InputError(
            f"bits per weight must be {least:.2f} to {8 * itemsize} for this model, got {target}: "
            "they count all parameters, those that stay whole too"
        )


def _is_free(path: str) -> bool:
    return path.startswith("language_model.") and not path.endswith(".mlp.gate")


def _router(settings: Quantization) -> Quantization:
    return settings if settings.bits >= ROUTER_BITS else Quantization(64, ROUTER_BITS)


def _part(
    model: Model,
    paths: Sequence[str],
    loss: float,
    base: Quantization,
    candidates: Sequence[Quantization],
    costs: Costs,
    itemsize: int,
) -> Part:
    weights = [whole_weight(submodule(model, path)) for path in paths]
    widths = [weight.shape[-1] for weight in weights]
    probe = _probe(base)
    fitting = [c for c in candidates if all(width % c.group_size == 0 for width in widths)]
    fitting = list(dict.fromkeys([*fitting, base, probe]))
    errors = {
        settings: sum(
            _error(weight, settings, costs(path, weight.shape[-1]))
            for path, weight in zip(paths, weights, strict=True)
        )
        for settings in fitting
    }
    options = (
        Option(
            settings,
            sum(packed_bytes(weight.shape, settings, itemsize) for weight in weights),
            loss * errors[settings] / max(errors[probe], 1e-30),
        )
        for settings in fitting
    )
    return Part(tuple(paths), tuple(options))


def _error(weight: mx.array, settings: Quantization, importance: mx.array) -> float:
    """The squared rounding error of a weight, by importance of its columns."""
    rows = sample_rows(weight)
    packed = pack_plain(rows, settings)
    error = unpack(packed, settings, mx.float32) - rows
    return float((mx.square(error) * importance).sum()) * weight.size / rows.size


def _probe(base: Quantization) -> Quantization:
    return base if base.bits <= PROBE_BITS else Quantization(base.group_size, PROBE_BITS)


# -- measuring ---------------------------------------------------------------------------------


@dataclass
class _Run:
    """One example on its way through the model."""

    hidden: mx.array  # (1, L, hidden_size), the next layer's input
    token_ids: mx.array  # (1, L)
    rotation: Rotation
    visual: VisualTokens | None
    rows: slice
    log_probs: mx.array  # (n, vocab_size), the source's


def _losses(
    model: Model,
    examples: Sequence[Example],
    paths: Sequence[str],
    modules: Mapping[str, Quantization],
    pack: Pack,
) -> Iterator[tuple[tuple[str, ...], float]]:
    """Each part with the mean KL of the answers when it alone is rounded."""
    text = model.language_model.model
    runs = [_start(model, example) for example in examples]
    for path in (_EMBEDDINGS, _HEAD):
        if path in paths:
            with _Rounded(model, (path,), modules, pack):
                loss = _divergence(model, runs, 0, embed=path == _EMBEDDINGS)
            yield (path,), loss
    for index in range(len(text.layers)):
        prefix = f"language_model.model.layers.{index}."
        for names in _PARTS:
            group = tuple(prefix + name for name in names if prefix + name in paths)
            if group:
                with _Rounded(model, group, modules, pack):
                    loss = _divergence(model, runs, index)
                yield group, loss
        for run in runs:
            run.hidden = _through(model, run, run.hidden, index)
            mx.eval(run.hidden)


class _Rounded:
    """Within, some modules have the weights that their probe settings leave."""

    def __init__(
        self, model: Model, paths: Sequence[str], modules: Mapping[str, Quantization], pack: Pack
    ):
        self._modules = {path: submodule(model, path) for path in paths}
        self._whole: dict[str, Any] = {path: m.weight for path, m in self._modules.items()}
        self._settings = {path: _probe(modules[path]) for path in paths}
        self._pack = pack

    def __enter__(self) -> None:
        for path, module in self._modules.items():
            settings, weight = self._settings[path], self._whole[path]
            parts = self._pack(path, weight, settings, 0)
            module.weight = unpack(parts, settings, weight.dtype)

    def __exit__(self, *_: object) -> None:
        for path, module in self._modules.items():
            module.weight = self._whole[path]


def _start(model: Model, example: Example) -> _Run:
    text, prompt = model.language_model.model, example.prompt
    visual = None
    if prompt.media:
        visual = VisualTokens(
            mx.array(prompt.visual_rows), encode(model.vision_tower, prompt.media)
        )
    positions = mx.array(prompt.position_ids[:, None])  # (3, 1, L)
    token_ids = mx.array(prompt.token_ids[None])
    rotation = text.rope.rotation(positions, token_ids.shape[1])
    run = _Run(mx.array([]), token_ids, rotation, visual, example.rows, mx.array([]))
    run.hidden = _embedded(model, run)
    run.log_probs = _finish(model, run, run.hidden, 0)
    mx.eval(run.hidden, run.log_probs)
    return run


def _embedded(model: Model, run: _Run) -> mx.array:
    text = model.language_model.model
    hidden: mx.array = text.embed_tokens(run.token_ids).astype(text.norm.weight.dtype)
    if run.visual is not None:
        hidden = set_rows(hidden, run.visual.rows, run.visual.features.embeds)
    return hidden


def _through(model: Model, run: _Run, hidden: mx.array, index: int) -> mx.array:
    """Layer `index` on a run's hidden states, (1, L, hidden_size)."""
    layer = model.language_model.model.layers[index]
    out: mx.array = layer(hidden, run.rotation, "causal", None)
    if run.visual is not None and index < len(run.visual.features.deepstack):
        return add_rows(out, run.visual.rows, run.visual.features.deepstack[index])
    return out


def _finish(model: Model, run: _Run, hidden: mx.array, index: int) -> mx.array:
    """Log-probabilities (n, vocab_size) of the answer, from the input of layer `index` on."""
    for later in range(index, len(model.language_model.model.layers)):
        hidden = _through(model, run, hidden, later)
    normed = model.language_model.model.norm(hidden[0, run.rows])
    logits = model.language_model.logits(normed).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _divergence(model: Model, runs: Sequence[_Run], index: int, *, embed: bool = False) -> float:
    """Mean KL of the answers' tokens, from the input of layer `index` on."""
    total, count = 0.0, 0
    for run in runs:
        hidden = _embedded(model, run) if embed else run.hidden
        found = _finish(model, run, hidden, index)
        total += float((mx.exp(run.log_probs) * (run.log_probs - found)).sum())
        count += found.shape[0]
    return total / count
