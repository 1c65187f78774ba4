"""Equal to recorded runs of Hugging Face transformers, stage by stage, without torch.

And the tower's two economies change nothing: one temporal slice for a still image, and attention
in chunks where its scores would be large.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import pytest
import tiny
from stages import (
    GOLDENS,
    TOLERANCE,
    batch_stages,
    beyond_tolerance,
    difference,
    digest,
    make_prompt,
    make_scene,
    read_golden,
    stages,
    write_checkpoint,
)

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.models import attention
from qwen3vl_mlx.models.attention import full_attention
from qwen3vl_mlx.models.config import parse_config
from qwen3vl_mlx.models.vision import PatchEmbed
from qwen3vl_mlx.processing.prompt import Prompt

Models: TypeAlias = Callable[[str], Qwen3VL]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: load(write_checkpoint(root / name, name)))


def prompt_of(model: Qwen3VL, case: str) -> Prompt:
    return make_prompt(make_scene(case), model.processor)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in GOLDENS.items() for case in cases]
)
def test_every_stage(models: Models, name: str, case: str) -> None:
    golden = read_golden(name, case)
    prompt = prompt_of(models(name), case)
    assert np.array_equal(prompt.token_ids, golden.token_ids)
    assert np.array_equal(prompt.position_ids, golden.position_ids)
    assert prompt.rope_delta == golden.rope_delta
    ours = {key: digest(x) for key, x in stages(models(name).model, prompt).items()}
    assert beyond_tolerance(ours, golden.stages) == {}


@pytest.mark.parametrize("name", tiny.VARIANTS)
@pytest.mark.parametrize("cases", [("text", "image and video"), ("image and video", "text")])
def test_left_padded_rows_are_as_if_alone(
    models: Models, name: str, cases: tuple[str, ...]
) -> None:
    prompts = [prompt_of(models(name), case) for case in cases]
    for case, row in zip(cases, batch_stages(models(name).model, prompts), strict=True):
        golden = read_golden(name, case).stages
        ours = {key: digest(x) for key, x in row.items()}
        assert beyond_tolerance(ours, {key: golden[key] for key in ours}) == {}


def test_the_digest_sees_every_row() -> None:
    x = np.random.RandomState(0).standard_normal((60, 8)).astype(np.float32)
    for row in range(len(x)):
        changed = x.copy()
        changed[row, 3] += 0.1
        assert difference(digest(changed), digest(x)) > 4 * TOLERANCE


@pytest.mark.parametrize("variant", ["dense64", "dense72"])
def test_one_slice_of_a_still_stands_for_two(variant: str) -> None:
    """The weight's slices are summed, instead of the same pixels being multiplied twice."""
    config = parse_config(tiny.tiny_config(variant)).vision
    module = PatchEmbed(config)
    random = np.random.RandomState(0)
    shape = module.proj.weight.shape
    module.proj.weight = mx.array(random.standard_normal(shape).astype(np.float32))
    module.proj.bias = mx.array(random.standard_normal(shape[0]).astype(np.float32))
    still = random.uniform(-1, 1, (21, 16 * 16 * 3)).astype(np.float32)
    twice = np.concatenate([still, still], axis=1)
    ours = np.array(module(mx.array(still)))
    assert difference(ours, np.array(module(mx.array(twice)))) < 1e-5
    weight = np.array(module.proj.weight, np.float64).reshape(shape[0], -1)
    exact = twice.astype(np.float64) @ weight.T + np.array(module.proj.bias, np.float64)
    assert difference(ours, exact) < 1e-5


def naive_attention(q: Any, k: Any, v: Any, scale: float) -> Any:
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    scores = np.exp(q @ k.swapaxes(-1, -2) * scale)
    return scores / scores.sum(axis=-1, keepdims=True) @ v


@pytest.mark.parametrize("unfused", [True, False], ids=["no fused kernel", "as this device has it"])
@pytest.mark.parametrize(
    ("segments", "length", "score_bytes"),
    [
        (1, 1, 1),
        (1, 24, 2**30),  # fits
        (1, 24, 1),  # a row at a time, the least there is
        (1, 25, 2 * 24 * 4 * 10),  # ten rows at a time and a rest
        (3, 24, 2 * 24 * 24 * 4),  # a segment at a time
        (5, 24, 2 * 24 * 24 * 4 * 2),  # two segments at a time and a rest
        (2, 24, 2 * 24 * 4 * 7),  # segments, then rows
    ],
)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_bounded_attention(
    monkeypatch: pytest.MonkeyPatch,
    segments: int,
    length: int,
    score_bytes: int,
    head_dim: int,
    unfused: bool,
) -> None:
    """Equal to attention at once, and no call makes more scores than allowed."""
    if unfused:
        monkeypatch.setattr(attention, "has_fused_kernel", lambda head_dim, dtype: False)
    made: list[int] = []
    attend = mx.fast.scaled_dot_product_attention

    def spy(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        made.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * 4)
        return attend(q, k, v, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    heads, scale = 2, head_dim**-0.5
    random = np.random.RandomState(length)
    shape = (segments, heads, length, head_dim)
    q, k, v = (mx.array(random.standard_normal(shape).astype(np.float32)) for _ in range(3))
    ours = np.array(full_attention(q, k, v, scale, score_bytes))
    assert difference(ours, naive_attention(q, k, v, scale)) < 1e-5
    if unfused:
        assert sum(made) == segments * heads * length * length * 4
        assert max(made) <= max(score_bytes, heads * length * 4)  # one row is the least


def test_a_fused_kernel_is_never_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_fused_kernel", lambda head_dim, dtype: True)
    calls: list[tuple[int, ...]] = []
    attend = mx.fast.scaled_dot_product_attention

    def spy(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        calls.append(q.shape)
        return attend(q, k, v, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    x = mx.zeros((2, 2, 24, 64))
    full_attention(x, x, x, 1.0, score_bytes=1)
    assert calls == [x.shape]
