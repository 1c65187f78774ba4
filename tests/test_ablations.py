"""The goldens notice what implementations of this model get wrong: each breakage must show.

Some of these pass for a working model: the answer stays fluent, and a few points worse.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import pytest
import stages
import tiny
from stages import TOLERANCE, Stages, difference, digest

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.errors import ConfigError, WeightsError
from qwen3vl_mlx.models import text, vision
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.models.rope import MRope, Rotation
from qwen3vl_mlx.models.vision import VisionFeatures, VisionTables
from qwen3vl_mlx.processing import image
from qwen3vl_mlx.processing.prompt import Prompt

Patch: TypeAlias = pytest.MonkeyPatch
Break: TypeAlias = Callable[[Patch, Qwen3VL], None]
Models: TypeAlias = Callable[[str], Qwen3VL]


def _change_tables(patch: Patch, change: Callable[[VisionTables], VisionTables]) -> None:
    tables = vision.vision_tables
    patch.setattr(vision, "vision_tables", lambda *given: change(tables(*given)))


def vision_rope_swapped(patch: Patch, model: Qwen3VL) -> None:
    def swap(angles: mx.array) -> mx.array:
        return mx.concatenate(mx.split(angles, 2, axis=-1)[::-1], axis=-1)

    _change_tables(patch, lambda t: replace(t, cos=swap(t.cos), sin=swap(t.sin)))


def positions_swapped(patch: Patch, model: Qwen3VL) -> None:
    side = 8
    _change_tables(
        patch, lambda t: replace(t, taps=tuple(tap % side * side + tap // side for tap in t.taps))
    )


def corners_not_aligned(patch: Patch, model: Qwen3VL) -> None:
    def taps(index: mx.array, size: mx.array, side: int) -> tuple[mx.array, mx.array, mx.array]:
        source = mx.clip((index.astype(mx.float32) + 0.5) * side / size - 0.5, 0, side - 1)
        low = mx.floor(source).astype(mx.int32)
        return low, mx.minimum(low + 1, side - 1), source - low

    patch.setattr(vision, "_axis_taps", taps)


def nearest_position(patch: Patch, model: Qwen3VL) -> None:
    def nearest(t: VisionTables) -> VisionTables:
        weights = mx.concatenate(t.weights, axis=1)
        best = mx.argmax(weights, axis=1, keepdims=True) == mx.arange(4)
        return replace(t, weights=tuple(mx.split(best.astype(mx.float32), 4, axis=1)))

    _change_tables(patch, nearest)


def raster_coordinates(patch: Patch, model: Qwen3VL) -> None:
    def raster(t: int, h: int, w: int, merge: int) -> tuple[mx.array, mx.array]:
        return mx.tile(mx.repeat(mx.arange(h), w), t), mx.tile(mx.arange(w), t * h)

    patch.setattr(vision, "_merge_order", raster)


def raster_patches(patch: Patch, model: Qwen3VL) -> None:
    def patchify(frames: Any, temporal: int, settings: Any) -> Any:
        count, rows, cols, channels = frames.shape
        size = settings.patch_size
        split = frames.reshape(
            count // temporal, temporal, rows // size, size, cols // size, size, channels
        )
        return split.transpose(0, 2, 4, 1, 3, 5, 6).reshape(-1, temporal * size**2 * channels)

    patch.setattr(image, "_patchify", patchify)


def frames_see_each_other(patch: Patch, model: Qwen3VL) -> None:
    _change_tables(
        patch,
        lambda t: replace(t, segments=((1, sum(count * size for count, size in t.segments)),)),
    )


def first_slice_only(patch: Patch, model: Qwen3VL) -> None:
    def embed(self: vision.PatchEmbed, patches: mx.array) -> mx.array:
        weight = self.proj.weight[:, 0].reshape(self.proj.weight.shape[0], -1)
        return patches[:, : weight.shape[1]] @ weight.T + self.proj.bias

    patch.setattr(vision.PatchEmbed, "__call__", embed)


def tanh_gelu_in_mergers(patch: Patch, model: Qwen3VL) -> None:
    patch.setattr(vision.nn, "gelu", nn.gelu_approx)


def exact_gelu_in_blocks(patch: Patch, model: Qwen3VL) -> None:
    patch.setattr(vision.nn, "gelu_approx", nn.gelu)


def _change_deepstack(
    patch: Patch, change: Callable[[tuple[mx.array, ...]], tuple[mx.array, ...]]
) -> None:
    call = vision.VisionModel.__call__

    def changed(*given: Any) -> VisionFeatures:
        features = call(*given)
        return replace(features, deepstack=change(features.deepstack))

    patch.setattr(vision.VisionModel, "__call__", changed)


def deepstack_dropped(patch: Patch, model: Qwen3VL) -> None:
    _change_deepstack(patch, lambda levels: ())


def deepstack_a_layer_late(patch: Patch, model: Qwen3VL) -> None:
    _change_deepstack(patch, lambda levels: (mx.zeros_like(levels[0]), *levels))


def deepstack_a_token_late(patch: Patch, model: Qwen3VL) -> None:
    add = text.add_rows
    patch.setattr(text, "add_rows", lambda x, rows, values: add(x, rows + 1, values))


def deepstack_without_the_last_token(patch: Patch, model: Qwen3VL) -> None:
    _change_deepstack(patch, lambda levels: tuple(x.at[-1].multiply(0) for x in levels))


def _change_axes(patch: Patch, model: Qwen3VL, axes: list[int]) -> None:
    rope = model.model.language_model.model.rope
    assert axes != rope.axes.tolist()
    patch.setattr(rope, "axes", mx.array(axes))


def sectioned_mrope(patch: Patch, model: Qwen3VL) -> None:
    """The layout of Qwen2-VL."""
    sections = model.model.config.text.rope.mrope_section
    _change_axes(patch, model, [axis for axis in range(3) for _ in range(sections[axis])])


def mrope_swapped(patch: Patch, model: Qwen3VL) -> None:
    axes = model.model.language_model.model.rope.axes.tolist()
    _change_axes(patch, model, [{0: 0, 1: 2, 2: 1}[axis] for axis in axes])


def time_axis_for_all(patch: Patch, model: Qwen3VL) -> None:
    _change_axes(patch, model, [0] * len(model.model.language_model.model.rope.axes))


def rope_delta_ignored(patch: Patch, model: Qwen3VL) -> None:
    patch.setattr(Prompt, "rope_delta", 0)


def scale_of_hidden_by_heads(patch: Patch, model: Qwen3VL) -> None:
    config = model.model.config.text
    head_dim = config.hidden_size // config.num_attention_heads
    assert head_dim != config.head_dim
    for layer in model.model.language_model.model.layers:
        patch.setattr(layer.self_attn, "scale", head_dim**-0.5)


def no_query_norm(patch: Patch, model: Qwen3VL) -> None:
    for layer in model.model.language_model.model.layers:
        patch.setattr(layer.self_attn, "q_norm", nn.Identity())


def _change_rope(patch: Patch, model: Qwen3VL, rope: MRope, *names: str) -> None:
    for name in names:
        patch.setattr(model.model.language_model.model.rope, name, vars(rope)[name])


def yarn_ignored(patch: Patch, model: Qwen3VL) -> None:
    config = model.model.config.text
    plain = MRope(replace(config.rope, yarn=None), config.head_dim)
    _change_rope(patch, model, plain, "inv_freq", "wavelengths", "attention_scaling")


def yarn_ignored_in_decode(patch: Patch, model: Qwen3VL) -> None:
    config = model.model.config.text
    plain = MRope(replace(config.rope, yarn=None), config.head_dim)
    rope = model.model.language_model.model.rope
    right = rope.rotation

    def rotation(positions: mx.array, length: int) -> Rotation:
        return (plain.rotation if positions.ndim == 1 else right)(positions, length)

    patch.setattr(rope, "rotation", rotation)


def yarn_without_its_scaling(patch: Patch, model: Qwen3VL) -> None:
    config = model.model.config.text
    plain = MRope(replace(config.rope, yarn=None), config.head_dim)
    _change_rope(patch, model, plain, "attention_scaling")


def experts_not_renormalised(patch: Patch, model: Qwen3VL) -> None:
    def route(self: text.SparseMoeBlock, x: mx.array) -> mx.array:
        scores = mx.softmax(self.gate(x), axis=-1)
        chosen = mx.argsort(-scores, axis=-1)[..., : self.top_k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    patch.setattr(text.SparseMoeBlock, "__call__", route)


# Breakage, the stages where it must show, and on which checkpoint.
ABLATIONS: list[tuple[Break, tuple[str, ...], str]] = [
    (vision_rope_swapped, ("image.block.0", "video.block.0"), "dense72"),
    (positions_swapped, ("image.positions", "video.positions"), "dense72"),
    (corners_not_aligned, ("image.positions", "video.positions"), "dense72"),
    (nearest_position, ("image.positions", "video.positions"), "dense72"),
    (raster_coordinates, ("image.positions", "video.block.0"), "dense72"),
    (raster_patches, ("image.patch_embed", "video.patch_embed"), "dense72"),
    (frames_see_each_other, ("image.block.0", "video.block.0"), "dense64"),
    (first_slice_only, ("image.patch_embed", "video.patch_embed"), "dense64"),
    (tanh_gelu_in_mergers, ("image.merger", "image.deepstack.0"), "gelu"),
    (exact_gelu_in_blocks, ("image.block.0",), "gelu"),
    (deepstack_dropped, ("layer.1.in", "layer.3.in", "logits"), "dense64"),
    (deepstack_a_layer_late, ("layer.1.in", "layer.3.in", "logits"), "dense72"),
    (deepstack_a_token_late, ("layer.1.in", "layer.3.in", "logits"), "moe"),
    (deepstack_without_the_last_token, ("layer.1.in", "logits"), "moe"),
    (sectioned_mrope, ("layer.0.out", "logits"), "dense64"),
    (mrope_swapped, ("layer.0.out", "logits"), "dense72"),
    (time_axis_for_all, ("layer.0.out", "logits"), "moe"),
    (rope_delta_ignored, ("decode",), "dense64"),
    (rope_delta_ignored, ("decode",), "dense72"),
    (rope_delta_ignored, ("decode",), "moe"),
    (scale_of_hidden_by_heads, ("layer.0.out", "logits"), "dense64"),
    (no_query_norm, ("layer.0.out", "logits"), "dense72"),
    (experts_not_renormalised, ("layer.0.out", "logits"), "moe"),
    (yarn_ignored, ("layer.0.out", "logits", "decode"), "yarn 2"),
    (yarn_ignored_in_decode, ("decode",), "yarn 2"),
    (yarn_without_its_scaling, ("layer.0.out", "logits", "decode"), "yarn 2"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: load(stages.write_checkpoint(root / name, name)))


def some_stages(model: Model, prompt: Prompt, wanted: tuple[str, ...]) -> Stages:
    """No more of `stages.stages` than is wanted."""
    found, features = stages.tower_stages(model, prompt)
    if not found.keys() >= set(wanted):
        found |= stages.decoder_stages(model, [prompt], [features])[0]
    if "decode" in wanted:
        found["decode"] = stages.decoded(model, prompt)
    return found


@pytest.mark.parametrize(("ablate", "where", "name"), ABLATIONS)
def test_breakage_shows(
    monkeypatch: pytest.MonkeyPatch,
    models: Models,
    ablate: Break,
    where: tuple[str, ...],
    name: str,
) -> None:
    case = stages.GOLDENS[name][-1]
    golden = stages.read_golden(name, case).stages
    model = models(name)
    ablate(monkeypatch, model)
    prompt = stages.make_prompt(stages.make_scene(case), model.processor)
    broken = some_stages(model.model, prompt, where)
    found = {key: difference(digest(broken[key]), golden[key]) for key in where}
    assert min(found.values()) > 20 * TOLERANCE


@pytest.mark.parametrize(
    ("head_dim", "mrope_section", "error"),
    [
        (12, [2, 2, 2], WeightsError),  # hidden_size / num_attention_heads
        (12, [6, 5, 5], ConfigError),
        (None, [6, 5, 5], ConfigError),  # the class default of 128
    ],
)
def test_another_head_dim_is_refused(
    tmp_path: Path, head_dim: int | None, mrope_section: list[int], error: type[Exception]
) -> None:
    scaling = {"rope_type": "default", "mrope_section": mrope_section}
    changes = {"head_dim": head_dim, "rope_scaling": scaling}
    tiny.write_tiny(tmp_path, "dense64")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error):
        load(tmp_path)
