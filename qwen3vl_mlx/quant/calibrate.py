"""Calibration: what a model does with examples, as a small file that makes its quantization better.

Made layer by layer, so a model needs not fit in memory; used row by row while a model is converted.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.loading import progress_bar, read_tensors, rename_weights, stored_config
from qwen3vl_mlx.models.config import ModelConfig, Quantization, read_config
from qwen3vl_mlx.quant.apply import as_dict, parameter_shapes
from qwen3vl_mlx.quant.awq import (
    DAMPING,
    DENSE_SITES,
    SPARSE_SITES,
    Floats,
    LayerScales,
    Moments,
    layer_scales,
    measure,
    scaled,
)
from qwen3vl_mlx.quant.examples import Example
from qwen3vl_mlx.quant.rounding import Sensitivity, round_rows, sensitivity
from qwen3vl_mlx.quant.sensitivity import check_target_bits, mixed_precision
from qwen3vl_mlx.quant.streamed import StreamedPass

ANSWER_SHARE = 0.2
"""Part of a site's moments that positions which predict the answer have to themselves."""

FILE_BYTES = 256 * 2**20  # of what columns take over, in all: it decides how many take part

_FORMAT = "qwen3vl_mlx-calibration-1"
_LAYER = re.compile(r"(language_model\.model\.layers\.\d+\.)(.+)")
_SITE_OF = {path: site.name for site in (*DENSE_SITES, *SPARSE_SITES) for path in site.modules}
_EMBEDDINGS = "language_model.model.embed_tokens"
_HEAD = "language_model.lm_head"
_NORM = "language_model.model.norm.weight"
_TIED_DAMPING = 1.0  # a tied embedding is looked up too, where every column counts the same
_CHUNK = 2**22  # weights rounded at once
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found: scales, and what rounding errors cost.

    dtype: of affine scales and biases. model: the text config's sizes. norm_crc: of the last
    norm's weights. columns: (in,) by site, what its weights are multiplied by. rows: (out,) by
    producer, what its rows are divided by. importance: (n, b) by site, or (experts, in). feedback:
    (n, b * (b - 1) / 2) float16 by site, the part above the diagonal; see `rounding.Sensitivity`.
    overrides: settings by module path, from a search for mixed precision.
    """

    dtype: mx.Dtype
    model: Mapping[str, Any]
    norm_crc: int
    columns: Mapping[str, mx.array]
    rows: Mapping[str, mx.array]
    importance: Mapping[str, mx.array]
    feedback: Mapping[str, mx.array]
    overrides: Mapping[str, Quantization] = field(default_factory=dict)

    def check(self, config: ModelConfig) -> None:
        """Raise InputError unless `config` is of the model this was made for."""
        ours, theirs = self.model, sizes(config)
        if differing := [key for key in ours if ours[key] != theirs.get(key)]:
            key = differing[0]
            raise InputError(
                f"the calibration is of another model: its {key} is {ours[key]}, not "
                f"{theirs.get(key)}; calibrate this model"
            )

    def apply(self, name: str, rows: mx.array, start: int) -> mx.array:
        """Rows [start:start + n] of the parameter `name`, scaled; what is scaled is float32.

        Raises InputError where they cannot be the calibrated model's.
        """
        whole = rows.shape == (self.model["hidden_size"],)
        if name == _NORM and whole and _crc(rows) != self.norm_crc:
            raise InputError("the calibration is of a model with other weights; calibrate this one")
        path, _, kind = name.rpartition(".")
        columns = self.columns.get(_site(path)) if kind == "weight" else None
        divisors = self.rows.get(path)
        if columns is None and divisors is None:
            return rows
        result = rows.astype(mx.float32)
        if columns is not None:
            self._check_width(path, rows, columns.shape[-1])
            result = result * columns
        if divisors is not None:
            part = divisors[start : start + rows.shape[0]]
            if part.shape[0] != rows.shape[0]:
                raise InputError(f"{name} has other rows than in the calibrated model")
            result = result / part.reshape(-1, *[1] * (rows.ndim - 1))
        return result

    def pack(
        self, path: str, rows: mx.array, settings: Quantization, start: int
    ) -> dict[str, mx.array]:
        """Like `apply.pack`, for rows that `apply` has been over: (n, in), or (n, out, in)."""
        width, site = rows.shape[-1], _site(path)
        importance = self.importance.get(site, mx.ones((1, width)))
        if site in self.importance and site not in self.feedback:  # experts, each its own
            self._check_width(path, rows, importance.shape[-1])
            return _stacked(
                round_rows(expert, settings, self.dtype, Sensitivity(importance[i][None]))
                for i, expert in enumerate(rows, start)
            )
        self._check_width(path, rows, importance.size)
        feedback = self.feedback.get(site)
        known = Sensitivity(
            importance, None if feedback is None else _full(feedback, importance.shape[-1])
        )
        flat = rows.reshape(-1, width)
        step = max(1, _CHUNK // width)
        parts = [
            round_rows(flat[i : i + step], settings, self.dtype, known)
            for i in range(0, flat.shape[0], step)
        ]
        joined = {key: mx.concatenate([part[key] for part in parts]) for key in parts[0]}
        return {key: part.reshape(*rows.shape[:-1], -1) for key, part in joined.items()}

    def costs(self, path: str, width: int) -> mx.array:
        """What a squared error in each column of a weight costs: (width,); experts' mean."""
        site = _site(path)
        if site not in self.importance:
            return mx.ones((width,))
        importance = self.importance[site]
        return importance.flatten() if site in self.feedback else importance.mean(axis=0)

    def _check_width(self, path: str, rows: mx.array, width: int) -> None:
        if rows.shape[-1] != width:
            raise InputError(
                f"{path} is {rows.shape[-1]} wide, not {width} as in the calibrated model"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file."""
        tensors = {f"{site}.columns": array for site, array in self.columns.items()}
        tensors |= {f"{producer}.rows": array for producer, array in self.rows.items()}
        tensors |= {f"{site}.importance": array for site, array in self.importance.items()}
        tensors |= {f"{site}.feedback": array for site, array in self.feedback.items()}
        note = {
            "dtype": str(self.dtype).rpartition(".")[2],
            "model": dict(self.model),
            "norm_crc": self.norm_crc,
            "overrides": {name: as_dict(chosen) for name, chosen in self.overrides.items()},
        }
        metadata = {"format": _FORMAT, "calibration": json.dumps(note)}
        mx.save_safetensors(os.fspath(_checked(path)), tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote. Raises InputError for anything else."""
        path = _checked(path)
        if not path.is_file():
            raise InputError(f"no calibration {path}")
        try:
            loaded: Any = mx.load(os.fspath(path), return_metadata=True)
            tensors, metadata = loaded
            if metadata["format"] != _FORMAT:
                raise KeyError(metadata["format"])
            mx.eval(tensors)
            return _read(tensors, json.loads(metadata["calibration"]))
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a calibration of this version") from error


def _read(tensors: Mapping[str, mx.array], note: Mapping[str, Any]) -> Calibration:
    parts: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        parts.setdefault(kind, {})[owner] = tensor
    return Calibration(
        dtype=_DTYPES[note["dtype"]],
        model=note["model"],
        norm_crc=note["norm_crc"],
        columns=parts.get("columns", {}),
        rows=parts.get("rows", {}),
        importance=parts["importance"],
        feedback=parts.get("feedback", {}),
        overrides={name: Quantization(**chosen) for name, chosen in note["overrides"].items()},
    )


def calibrate(
    folder: Path,
    examples: Sequence[Example],
    modules: Mapping[str, Quantization],
    *,
    target_bits_per_weight: float | None = None,
    pinned: frozenset[str] = frozenset(),
    scales: bool = True,
    progress: bool = False,
) -> Calibration:
    """Run `examples` through the checkpoint in `folder`, layer by layer.

    modules: the settings it is to be quantized to, by path (`Assignment.modules`).
    target_bits_per_weight: of the whole model; settings are then chosen module by module to cost
    least (`Calibration.overrides`), which needs the model in memory. pinned: paths that keep their
    settings then. scales: search for AWQ scales.
    Otherwise needs memory for one layer, and the examples' hidden states. Raises InputError.
    """
    if not examples:
        raise InputError("calibration needs at least one example")
    overrides: dict[str, Quantization] = {}
    if target_bits_per_weight is not None:
        check_target_bits(folder, modules, pinned, target_bits_per_weight)
        first = _calibrate(folder, examples, modules, False, progress)
        overrides = mixed_precision(
            folder,
            examples,
            modules,
            parameter_shapes(stored_config(folder, read_config(folder))),
            target_bits_per_weight,
            first.pack,
            first.costs,
            pinned=pinned,
            progress=progress,
        )
    found = _calibrate(folder, examples, {**modules, **overrides}, scales, progress)
    return replace(found, overrides=overrides)


def _calibrate(
    folder: Path,
    examples: Sequence[Example],
    modules: Mapping[str, Quantization],
    scales: bool,
    progress: bool,
) -> Calibration:
    config = stored_config(folder, read_config(folder))
    passing = StreamedPass(folder, [example.prompt for example in examples])
    weights = token_weights(examples)
    limit = block_limit(config, FILE_BYTES)
    norm = rename_weights(read_tensors(folder), config)[_NORM]
    dtype = norm.dtype
    columns: dict[str, mx.array] = {}
    rows: dict[str, mx.array] = {}
    importance: dict[str, mx.array] = {}
    feedback: dict[str, mx.array] = {}
    last: list[mx.array] = []
    with progress_bar(passing.num_layers, "Calibrating", progress, counts=True) as bar:
        for index, layer, inputs in passing.layers():
            prefix = f"language_model.model.layers.{index}."
            moments = measure(layer, inputs, weights, limit)
            chosen = {
                name.removeprefix(prefix): settings
                for name, settings in modules.items()
                if name.startswith(prefix)
            }
            found = LayerScales({}, {})
            if scales:
                found = layer_scales(layer, moments, chosen, config.text, dtype)
            columns |= {prefix + name: array for name, array in found.columns.items()}
            rows |= {prefix + name: array for name, array in found.rows.items()}
            for name, moment in moments.items():
                known = _known(moment, found.columns.get(name))
                importance[prefix + name] = known.importance
                if known.feedback is not None:
                    feedback[prefix + name] = _upper(known.feedback)
            if index == passing.num_layers - 1:
                last = [
                    item.through(layer)[0, example.rows]
                    for item, example in zip(inputs, examples, strict=True)
                ]
                mx.eval(last)
            bar.update(1)
    normed = [mx.fast.rms_norm(x, norm.astype(x.dtype), config.text.rms_norm_eps) for x in last]
    head = _head_moments(passing, examples, normed, limit)
    tied = config.tie_word_embeddings
    known = sensitivity(head, _TIED_DAMPING if tied else DAMPING)
    assert known.feedback is not None
    place = _EMBEDDINGS if tied else _HEAD
    importance[place], feedback[place] = known.importance, _upper(known.feedback)
    return Calibration(dtype, sizes(config), _crc(norm), columns, rows, importance, feedback)


def token_weights(examples: Sequence[Example]) -> list[mx.array]:
    """What each token of each example counts, (L,): those that predict the answer count more."""
    total = sum(len(example.prompt.token_ids) for example in examples)
    answers = sum(len(example.answer_ids) for example in examples)
    extra = ANSWER_SHARE / (1 - ANSWER_SHARE) * total / answers
    weights = []
    for example in examples:
        counts = np.ones(len(example.prompt.token_ids), np.float32)
        counts[example.rows] += extra
        weights.append(mx.array(counts / total))
    return weights


def block_limit(config: ModelConfig, nbytes: int) -> int:
    """Channels of a block such that what columns take over takes `nbytes` of a file."""
    text = config.text
    widths = 2 * text.hidden_size + text.num_attention_heads * text.head_dim
    widths += 0 if text.moe else text.intermediate_size
    channels = widths * text.num_hidden_layers + text.hidden_size
    limit = 4096
    while limit > 128 and channels * limit > nbytes:  # two bytes, half a block
        limit //= 2
    return limit


def _known(moments: Floats, columns: mx.array | None) -> Sensitivity:
    if moments.ndim == 2:  # experts: the squares alone
        floor = DAMPING * moments.mean() + 1e-12
        return Sensitivity(mx.array((moments + floor).astype(np.float32)))
    if columns is not None:
        moments = scaled(moments, np.array(columns))
    return sensitivity(moments, DAMPING)


def _head_moments(
    passing: StreamedPass, examples: Sequence[Example], normed: Sequence[mx.array], limit: int
) -> Floats:
    """Moments of the head's inputs, each position counting by how undecided its answer is.

    A sure answer stays sure whatever the error: the loss' curvature there is 1 - sum p^2.
    """
    moments = Moments(normed[0].shape[-1], limit)
    logits = passing.logits([example.rows for example in examples])
    for x, values in zip(normed, logits, strict=True):
        p = mx.softmax(values.astype(mx.float32), axis=-1)
        moments.add(x, 1 - mx.square(p).sum(axis=-1))
    return moments.array()


def sizes(config: ModelConfig) -> dict[str, Any]:
    """What tells models apart, as JSON keeps it."""
    text = asdict(config.text)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size", "vocab_size")  # fmt: skip
    experts = config.text.moe.num_experts if config.text.moe else 0
    return {**{key: text[key] for key in keys}, "num_experts": experts}


def _site(path: str) -> str:
    """The site whose activations the module at `path` gets."""
    match = _LAYER.fullmatch(path)
    return match[1] + _SITE_OF.get(match[2], match[2]) if match else path


def _crc(rows: mx.array) -> int:
    values: npt.NDArray[np.float32] = np.array(rows.astype(mx.float32))
    return zlib.crc32(values.tobytes())


def _stacked(parts: Iterable[Mapping[str, mx.array]]) -> dict[str, mx.array]:
    rows = list(parts)
    return {key: mx.stack([row[key] for row in rows]) for key in rows[0]}


def _upper(feedback: mx.array) -> mx.array:
    """The part of (n, b, b) above the diagonal: (n, b * (b - 1) / 2) float16."""
    i, j = np.triu_indices(feedback.shape[1], 1)
    return mx.array(np.array(feedback)[:, i, j].astype(np.float16))


def _full(upper: mx.array, size: int) -> mx.array:
    i, j = np.triu_indices(size, 1)
    feedback = np.tile(np.eye(size, dtype=np.float32), (upper.shape[0], 1, 1))
    feedback[:, i, j] = np.array(upper)
    return mx.array(feedback)


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise InputError(f"a calibration is a .safetensors file, got {path}")
    return path
