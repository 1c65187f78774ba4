"""Keys and values of one row or many: the same answer by every road, plain and quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest
import tiny
from caches import BITS, Layers, nbytes, parse, taken_out

from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.engine.kv_cache import KVQuantization
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.loading import load_model
from qwen3vl_mlx.models import text
from qwen3vl_mlx.models.qwen3_vl import Model

TOLERANCE = 1e-4
Models: TypeAlias = Callable[[str], Model]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root: Path = tmp_path_factory.mktemp("kv")
    return cache(lambda variant: load_model(tiny.write_tiny(root / variant, variant)))


def tokens(seed: int, count: int) -> mx.array:
    return mx.array(np.random.RandomState(seed).randint(0, 900, (1, count)))


def feed(model: Model, layers: Layers, ids: mx.array, start: int, chunk: int = 10**6) -> mx.array:
    """Hidden states (1, L, D) of `ids`, which follow `start` tokens, chunk by chunk."""
    count = ids.shape[1]
    parts = [
        model.language_model(ids[:, i : i + chunk], mx.array([start + i]), layers)
        for i in range(0, count, chunk)
    ]
    return mx.concatenate(parts, axis=1)


PROMPT, ANSWER = 250, 12  # the answer crosses a boundary of the cache's steps
ALL = PROMPT + ANSWER


@dataclass
class Scene:
    """One row to watch, and what it takes to run it."""

    model: Model
    bits: int | None
    ids: mx.array = field(default_factory=lambda: tokens(0, ALL))

    def prefilled(self, ids: mx.array) -> Layers:
        layers = kv_cache.new_layers(self.model.config.text, self.bits)
        feed(self.model, layers, ids, 0)
        return layers

    def watched(self) -> Layers:
        return self.prefilled(self.ids[:, :PROMPT])

    def decode(self, batch: Layers, rows: Sequence[mx.array], wide: int = 1) -> mx.array:
        """Feed every row (n,) to the batch, `wide` tokens at a time: (B, n, D)."""
        ids = mx.stack(list(rows))
        parts = [
            self.model.language_model(ids[:, i : i + wide], batch[0].offset, batch)
            for i in range(0, ids.shape[1], wide)
        ]
        return mx.concatenate(parts, axis=1)

    def answer(self) -> mx.array:
        return self.ids[0, PROMPT:]


def merged(rows: Sequence[Layers]) -> Layers:
    return [kv_cache.merge(layers) for layers in zip(*rows, strict=True)]


def chunked(size: int) -> Callable[[Scene], mx.array]:
    def road(scene: Scene) -> mx.array:
        layers = kv_cache.new_layers(scene.model.config.text, scene.bits)
        return feed(scene.model, layers, scene.ids, 0, size)[0, PROMPT:]

    return road


def one_by_one(scene: Scene) -> mx.array:
    return feed(scene.model, scene.watched(), scene.ids[:, PROMPT:], PROMPT, 1)[0]


def with_others(scene: Scene) -> mx.array:
    """Between a longer row and a shorter one."""
    others = [scene.prefilled(tokens(1, 300)), scene.prefilled(tokens(2, 3))]
    batch = merged([others[0], scene.watched(), others[1]])
    rows = [tokens(3, ANSWER)[0], scene.answer(), tokens(4, ANSWER)[0]]
    return scene.decode(batch, rows)[1]


def alone_in_a_batch(scene: Scene) -> mx.array:
    return scene.decode(merged([scene.watched()]), [scene.answer()])[0]


def equally_long(scene: Scene) -> mx.array:
    batch = merged([scene.watched(), scene.prefilled(tokens(1, PROMPT))])
    return scene.decode(batch, [scene.answer(), tokens(3, ANSWER)[0]])[0]


def joined_and_left(scene: Scene) -> mx.array:
    """Others join after 4 steps and leave after 8, the longest first."""
    ids = scene.answer()
    batch = merged([scene.watched()])
    parts = [scene.decode(batch, [ids[:4]])[0]]
    for seed, length in ((1, 400), (2, 5)):
        row = scene.prefilled(tokens(seed, length))
        for layer, other in zip(batch, row, strict=True):
            layer.join([other])
    noise = tokens(3, 4)[0]
    parts.append(scene.decode(batch, [ids[4:8], noise, noise])[0])
    for keep in ([2, 0], [1]):
        for layer in batch:
            layer.filter(keep)
    parts.append(scene.decode(batch, [ids[8:]])[0])
    return mx.concatenate(parts)


def extracted(scene: Scene) -> mx.array:
    """Copied out of a batch after 4 steps, and resumed alone."""
    batch = merged([scene.prefilled(tokens(1, 20)), scene.watched()])
    begun = scene.decode(batch, [tokens(3, 4)[0], scene.answer()[:4]])[1]
    layers = [taken_out(layer, 1) for layer in batch]
    mx.eval(kv_cache.arrays(layers))
    scene.decode(batch, [tokens(3, 4)[0]] * 2)  # the batch goes on without being heard
    rest = feed(scene.model, layers, scene.ids[:, PROMPT + 4 :], PROMPT + 4)
    return mx.concatenate([begun, rest[0]])


def put_back(scene: Scene) -> mx.array:
    """Rows taken out, cut, put into another cache and resumed: what a prefix cache does."""
    held = [kv_cache.layer_rows(layer) for layer in scene.watched()]
    cut = [tuple(mx.contiguous(x[:, :, :100]) for x in rows) for rows in held]
    layers = [kv_cache.layer_from_rows(rows, scene.bits) for rows in cut]
    return feed(scene.model, layers, scene.ids[:, 100:], 100)[0, PROMPT - 100 :]


def stepped_back(scene: Scene) -> mx.array:
    """Wrong guesses fed and taken back, another number for each row."""
    batch = merged([scene.watched(), scene.prefilled(tokens(1, 20))])
    wrong, ids, parts = tokens(5, 4)[0], scene.answer(), []
    for i in range(0, ANSWER, 2):
        guess = mx.concatenate([ids[i : i + 2], wrong[:2]])
        hidden = scene.decode(batch, [guess, wrong], wide=4)
        parts.append(hidden[0, :2])
        for layer in batch:
            layer.trim([2, 3])
    return mx.concatenate(parts)


def trimmed(scene: Scene) -> mx.array:
    layers = scene.prefilled(mx.concatenate([scene.ids[:, :PROMPT], tokens(9, 20)], axis=1))
    batch = merged([layers])
    for layer in batch:
        layer.trim([20])
    return scene.decode(batch, [scene.answer()])[0]


ROADS: dict[str, Callable[[Scene], mx.array]] = {
    "one by one": one_by_one,
    "chunks of 7": chunked(7),
    "chunks of 64": chunked(64),
    "alone in a batch": alone_in_a_batch,
    "with others": with_others,
    "equally long": equally_long,
    "joined and left": joined_and_left,
    "extracted": extracted,
    "put back": put_back,
    "stepped back": stepped_back,
    "trimmed": trimmed,
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_every_road_gives_one_answer(models: Models, variant: str, bits: int | None) -> None:
    scene = Scene(models(variant), bits)
    expected = chunked(ALL)(scene)
    for name, road in ROADS.items():
        error = mx.abs(road(scene) - expected).max().item()
        assert error <= TOLERANCE, f"{name}: {error}"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantization_changes_the_answer_a_little(models: Models, bits: int) -> None:
    """Else the table above would say nothing of it."""
    plain, packed = (chunked(ALL)(Scene(models("dense64"), b)) for b in (None, bits))
    error = mx.abs(plain - packed).mean().item()
    assert TOLERANCE < error < {8: 0.1, 4: 1.0}[bits]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("queries", [1, 8, 9, 20])
@pytest.mark.parametrize("masked", ["causal", "array"])
def test_packed_and_unpacked_attention_agree(
    bits: int, queries: int, masked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_product = Mock(wraps=text.quantized_scaled_dot_product_attention)
    monkeypatch.setattr(text, "quantized_scaled_dot_product_attention", packed_product)
    rng = np.random.RandomState(queries)
    q = mx.array(rng.standard_normal((2, 4, queries, 64)).astype(np.float32))
    keys, values = (
        mx.array(rng.standard_normal((2, 2, 30, 64)).astype(np.float32)) for _ in range(2)
    )
    packing = KVQuantization.of(bits, 64)
    packed = packing.pack(keys, values)
    whole = [mx.dequantize(*x, group_size=64, bits=bits) for x in (packed[:3], packed[3:])]
    seen = np.arange(30) <= (30 - queries + np.arange(queries))[:, None]  # (L, K)
    mask: Any = "causal"
    if masked == "array":
        seen = np.stack([seen, seen & (np.arange(30) >= 3)])[:, None]  # (B, 1, L, K)
        mask = mx.array(seen)
    scores = np.einsum("bhld,bhkd->bhlk", q, np.repeat(np.array(whole[0]), 2, axis=1)) / 8
    weights = np.exp(np.where(seen, scores, -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhlk,bhkd->bhld", weights, np.repeat(np.array(whole[1]), 2, axis=1))
    out = text.attend(q, packed[:3], packed[3:], 1 / 8, mask)
    np.testing.assert_allclose(np.array(out), expected, atol=1e-4)
    assert packed_product.called == (queries <= 8)  # a prompt's chunk goes to the fused kernel


@pytest.mark.parametrize(("bits", "share"), [(8, 0.54), (4, 0.29)])
def test_packed_rows_are_smaller(bits: int, share: float) -> None:
    x = mx.random.normal((1, 8, 300, 128)).astype(mx.bfloat16)
    config = replace(parse("dense64"), head_dim=128, num_hidden_layers=1)
    plain, packed = (kv_cache.new_layers(config, b) for b in (None, bits))
    for layers in (plain, packed):
        layers[0].update_and_fetch(x, x)
        mx.eval(kv_cache.arrays(layers))
    assert nbytes(packed) < share * nbytes(plain)
    batch = [kv_cache.merge([layer, layer]) for layer in packed]
    assert nbytes(batch) == 2 * nbytes(packed)
    row = KVQuantization.of(bits, 128).bytes_per_row(128, 2)
    assert nbytes(packed) == 2 * 8 * 512 * row


@pytest.mark.parametrize(("head_dim", "group"), [(128, 64), (64, 64), (96, 32), (32, 32)])
def test_group_size(head_dim: int, group: int) -> None:
    layer = kv_cache.new_layers(replace(parse("moe"), head_dim=head_dim), 4)[0]
    assert (layer.group_size, layer.bits) == (group, 4)


@pytest.mark.parametrize(("head_dim", "bits", "named"), [(32, 5, "kv_bits"), (48, 8, "48")])
def test_what_cannot_be_packed_is_refused(head_dim: int, bits: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        kv_cache.new_layers(replace(parse("moe"), head_dim=head_dim), bits)
