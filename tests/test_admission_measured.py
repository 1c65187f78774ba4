"""Memory predicted before a request runs, against what MLX measures while it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
import tiny
from admitting import GIB, SMALL, real
from caches import nbytes

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.admission import (
    RESERVE,
    Admission,
    Demand,
    weights_bytes,
)
from qwen3vl_mlx.engine.sampling import Row, Sampler, SamplingParams, draw
from qwen3vl_mlx.loading import load_model
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.models.vision import VisionFeatures, normalize_patches, vision_tables

# An estimate is at least what is measured, and at most this many times as much.
FACTOR = 4.0
CHUNK = 256


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    root = tmp_path_factory.mktemp("admission")

    def loaded(variant: str) -> Model:
        model = load_model(tiny.write_tiny(root / variant, variant))
        mx.eval(model.parameters())
        return model

    return cache(loaded)


@dataclass(frozen=True)
class Peaks:
    """Bytes above the weights."""

    vision: int
    prefill: int
    decode: int


def measure(model: Model, demand: Demand, kv_bits: int | None) -> Peaks:
    """Run what the engine runs: the tower, the prompt in chunks, a batch of one row."""
    language = model.language_model
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    features = [encoded(model, image) for image in demand.images]
    mx.eval([x for f in features for x in (f.embeds, *f.deepstack)])
    vision = mx.get_peak_memory() - before
    mx.reset_peak_memory()
    layers = kv_cache.new_layers(model.config.text, kv_bits)
    ids = mx.array(np.arange(demand.prompt_tokens)[None] % 900)
    hidden = mx.array([])
    for start in range(0, demand.prompt_tokens, CHUNK):
        chunk = ids[:, start : start + CHUNK]
        hidden = language(chunk, mx.array([start]), layers)[:, -1:]
        mx.eval(hidden, kv_cache.arrays(layers))
    token = language.logits(hidden)[:, 0].argmax(axis=-1)
    mx.eval(token)
    prefill = mx.get_peak_memory() - before
    features.clear()
    mx.reset_peak_memory()
    batch = [kv_cache.merge([layer]) for layer in layers]
    layers.clear()
    for _ in range(demand.max_tokens):
        hidden = language(token[:, None], batch[0].offset, batch)
        token = language.logits(hidden)[:, 0].argmax(axis=-1)
        mx.eval(token, kv_cache.arrays(batch))
    return Peaks(vision, prefill, mx.get_peak_memory() - before)


def encoded(model: Model, tokens: int) -> VisionFeatures:
    side = 2 * round(tokens**0.5)
    raw = mx.zeros((side * side, 3 * 16 * 16), mx.uint8)
    patches = normalize_patches(raw, [0.5] * 3, [0.5] * 3, mx.float32)
    return model.vision_tower(patches, vision_tables([(1, side, side)], model.config.vision))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize(
    ("demand", "kv_bits"),
    [
        (Demand(1000, 30), None),
        (Demand(1000, 30), 8),
        (Demand(40, 300), None),
        (Demand(40, 300), 4),
        (Demand(300, 10, (196,)), None),
        (Demand(450, 10, (256,)), 8),
    ],
)
def test_measured(
    models: Callable[[str], Model], variant: str, demand: Demand, kv_bits: int | None
) -> None:
    model = models(variant)
    admission = Admission.for_model(model, 1000 * GIB, kv_bits, chunk=CHUNK)
    cost = admission.estimate(demand)
    peaks = measure(model, demand, kv_bits)
    if demand.images:
        assert peaks.vision <= cost.vision + cost.features <= FACTOR * peaks.vision
    assert peaks.prefill <= cost.cache + cost.features + cost.growth + cost.prefill
    assert peaks.decode <= cost.cache + cost.growth + cost.decode
    most = max(peaks.vision, peaks.prefill, peaks.decode)
    assert most <= cost.total <= FACTOR * most


def test_draws_are_measured() -> None:
    size, rows = real(SMALL).config.text.vocab_size, 3
    params = SamplingParams(
        temperature=0.7, top_p=0.8, top_k=20, min_p=0.01, presence_penalty=1.5, frequency_penalty=1
    )
    samplers = [Sampler(params, np.arange(50, dtype=np.int32), size, frozenset())] * rows
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    logits = mx.random.normal((rows, size))
    mx.eval(logits)
    mx.eval(draw(logits, [Row(sampler, sampler.start(), None, None) for sampler in samplers])[0])
    peak = mx.get_peak_memory() - before
    decode = rows * real(SMALL).estimate(Demand(1, 1)).decode
    assert peak <= decode <= FACTOR * peak


def test_weights_are_all_parameters(models: Callable[[str], Model]) -> None:
    model = models("moe")
    expected = sum(4 * int(np.prod(s)) for s in tiny.hub_shapes(tiny.tiny_config("moe")).values())
    assert weights_bytes(model) == expected
    admission = Admission.for_model(model, GIB)
    assert (admission.itemsize, admission.available) == (4, GIB - expected - RESERVE)


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_keys_and_values_are_counted_exactly(
    models: Callable[[str], Model], kv_bits: int | None
) -> None:
    """The cache itself is no estimate: what the layers hold, to the step."""
    model = models("dense64")
    layers = kv_cache.new_layers(model.config.text, kv_bits)
    model.language_model(mx.zeros((1, 400), mx.int32), mx.array([0]), layers)
    admission = Admission.for_model(model, GIB, kv_bits)
    per_step = nbytes(layers) // 2  # 512 slots
    assert admission.estimate(Demand(380, 20)).cache == 3 * per_step  # and one begun in the middle


def test_features_are_counted_exactly(models: Callable[[str], Model]) -> None:
    model = models("moe")
    held = encoded(model, 64)
    expected = held.embeds.nbytes + sum(x.nbytes for x in held.deepstack)
    admission = Admission.for_model(model, GIB)
    assert admission.estimate(Demand(80, 1, (64,))).features == expected
    assert admission.estimate(Demand(80, 1, (), ((4, 16),))).features == expected
