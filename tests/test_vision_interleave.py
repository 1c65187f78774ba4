"""The tower's work, divided into steps of any size, gives what one call gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.engine import vision
from qwen3vl_mlx.engine.vision import Encoding, encode
from qwen3vl_mlx.models.vision import Block, VisionFeatures, VisionModel, VisionTables
from qwen3vl_mlx.processing.image import VisualInput
from qwen3vl_mlx.processing.video import Video


def noise(seed: int, width: int, height: int) -> Image.Image:
    draws = np.random.RandomState(seed).randint(0, 256, (height, width, 3))
    return Image.fromarray(draws.astype(np.uint8))


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Qwen3VL]) -> Qwen3VL:
    return tiny_model("dense72")


@pytest.fixture(scope="module")
def tower(model: Qwen3VL) -> VisionModel:
    return model.model.vision_tower


@pytest.fixture(scope="module")
def media(model: Qwen3VL) -> list[VisualInput]:
    """Three pictures of one grid, another size, and videos of three and one temporal patches."""
    sources = [
        noise(1, 96, 64),
        noise(2, 64, 128),
        Video([noise(seed, 64, 64) for seed in range(10, 16)]),
        noise(3, 96, 64),
        noise(4, 96, 64),
        Video([noise(seed, 96, 64) for seed in (20, 21)]),
    ]
    processor = model.processor
    return [processor.visual_input(source, processor.image_budget()) for source in sources]


def arrays(features: VisionFeatures) -> list[npt.NDArray[np.float32]]:
    return [np.array(x) for x in features.arrays]


@contextmanager
def passes_of(max_patches: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "MAX_PATCHES", max_patches)
        yield


@contextmanager
def counted_blocks() -> Iterator[list[int]]:
    """The patches of each block that is queued."""
    calls: list[int] = []
    call = Block.__call__

    def counting(self: Block, x: mx.array, tables: VisionTables) -> mx.array:
        calls.append(len(x))
        return call(self, x, tables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "__call__", counting)
        yield calls


@settings(max_examples=15, deadline=None)
@given(
    chosen=st.lists(st.integers(0, 5), min_size=1, max_size=7),
    budgets=st.lists(st.integers(0, 80), min_size=1, max_size=12),
    max_patches=st.sampled_from([1, 32, 56, 16384]),
)
def test_any_budgets_give_the_same_bits(
    tower: VisionModel,
    media: list[VisualInput],
    chosen: list[int],
    budgets: list[int],
    max_patches: int,
) -> None:
    asked = [media[i] for i in chosen]
    with passes_of(max_patches):
        expected = arrays(encode(tower, asked))
        encoding = Encoding(tower, asked)
        for count in range(10_000):
            if encoding.step(budgets[count % len(budgets)]):
                break
    assert encoding.features.keys() == {medium.identity for medium in asked}
    found = VisionFeatures.concatenate([encoding.features[m.identity] for m in asked])
    for got, want in zip(arrays(found), expected, strict=True):
        np.testing.assert_array_equal(got, want)


@settings(max_examples=15, deadline=None)
@given(
    budgets=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    max_patches=st.sampled_from([1, 40, 16384]),
)
def test_a_step_keeps_to_its_budget_and_always_goes_on(
    tower: VisionModel, media: list[VisualInput], budgets: list[int], max_patches: int
) -> None:
    depth = tower.config.depth
    total = sum(medium.num_tokens for medium in media)
    with passes_of(max_patches), counted_blocks() as calls:
        encoding = Encoding(tower, media)
        assert encoding.tokens_left == total
        done = False
        for count in range(10_000):
            if done:
                break
            before, budget = len(calls), budgets[count % len(budgets)]
            done = encoding.step(budget)
            queued = [patches // 4 for patches in calls[before:]]
            assert len(queued) == 1 or (queued and sum(queued) <= budget * depth)
            work = sum(calls) // 4  # tokens times blocks
            assert encoding.tokens_left == -(-(total * depth - work) // depth)
            assert done == (encoding.tokens_left == 0)
        assert sum(calls) == 4 * depth * total  # nothing twice, nothing left out


def test_a_budget_that_is_large_enough_is_used_up(
    tower: VisionModel, media: list[VisualInput]
) -> None:
    """Whole small passes and a part of the next in one step, not one pass each."""
    with passes_of(1), counted_blocks() as calls:
        encoding = Encoding(tower, media)
        assert not encoding.step(17)
    # Passes of 6, 6 and 6 tokens first: two whole ones, then 4 of 5 blocks of the third.
    assert calls == [24] * (2 * tower.config.depth + 4)


def test_features_appear_as_each_medium_is_complete(
    tower: VisionModel, media: list[VisualInput]
) -> None:
    video = media[2]
    with passes_of(1):
        encoding = Encoding(tower, [video, media[0]])
        seen: list[int] = []
        while not encoding.step(1):
            seen.append(len(encoding.features))
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}
    assert len(encoding.features) == 2
    assert encoding.step(1)  # asked again, it has nothing to do


def test_nothing_to_encode_is_done_at_once(tower: VisionModel) -> None:
    encoding = Encoding(tower, [])
    assert encoding.tokens_left == 0
    assert encoding.step(1)
    assert encoding.features == {}


@pytest.fixture(scope="module")
def large(model: Qwen3VL) -> VisualInput:
    return model.processor.visual_input(noise(7, 320, 320), model.processor.image_budget())


def peak(work: Callable[[], object]) -> int:
    """Most bytes MLX holds at once beyond what it did before."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    kept = work()
    mx.synchronize()
    del kept
    return mx.get_peak_memory() - before


def whole_pass(tower: VisionModel, medium: VisualInput) -> VisionFeatures:
    """`VisionModel.__call__` over one medium, evaluated at once."""
    mean, std = medium.settings.mean, medium.settings.std
    patches = vision.normalize_patches(mx.array(medium.patches), mean, std, mx.float32)
    features = tower(patches, vision.vision_tables([medium.grid_thw], tower.config))
    mx.eval(*features.arrays)
    return features


@pytest.mark.parametrize("tokens", [1, 45, 10**6])
def test_steps_need_no_more_memory_than_one_call(
    tower: VisionModel, large: VisualInput, tokens: int
) -> None:
    def stepped() -> Encoding:
        encoding = Encoding(tower, [large])
        while not encoding.step(tokens):
            pass
        return encoding

    whole_pass(tower, large)  # what is allocated once, is
    hidden = large.num_tokens * 4 * tower.config.hidden_size * 4
    assert peak(stepped) <= peak(lambda: whole_pass(tower, large)) + hidden // 2


@pytest.mark.parametrize("steps", [1, 3])
def test_dropping_one_in_the_middle_frees_all_of_it(
    tower: VisionModel, media: list[VisualInput], large: VisualInput, steps: int
) -> None:
    whole_pass(tower, large)
    mx.synchronize()
    before = mx.get_active_memory()
    encoding = Encoding(tower, [large, *media])
    for _ in range(steps):
        assert not encoding.step(30)
    mx.synchronize()
    hidden = large.num_tokens * 4 * tower.config.hidden_size * 4
    assert mx.get_active_memory() - before >= hidden
    del encoding  # by reference count: no cycle waits for the collector
    mx.synchronize()
    assert mx.get_active_memory() == before


def test_features_hold_no_more_than_their_own_bytes(model: Qwen3VL, tower: VisionModel) -> None:
    """One picture's features, when those that shared its pass are gone."""
    processor = model.processor
    pictures = [
        processor.visual_input(noise(seed, 128, 128), processor.image_budget()) for seed in range(8)
    ]
    encoding = Encoding(tower, pictures)
    mx.synchronize()
    before = mx.get_active_memory()
    while not encoding.step(100):
        pass
    kept = encoding.features[pictures[3].identity]
    del encoding
    mx.synchronize()
    assert mx.get_active_memory() - before <= 1.05 * kept.nbytes


def test_a_video_in_parts_keeps_the_order_of_its_frames(
    tower: VisionModel, media: list[VisualInput]
) -> None:
    """The last part is the shortest here, and shorter grids are encoded first."""
    whole = arrays(encode(tower, [media[2]]))
    with passes_of(32):
        parts = arrays(encode(tower, [media[2]]))
    for got, expected in zip(parts, whole, strict=True):
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_every_step_queues_what_it_built(
    tower: VisionModel, media: list[VisualInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left lazy, all the work would fall into the last step."""
    queued: list[int] = []
    queue = mx.async_eval

    def recorded(*given: mx.array) -> None:
        queued.append(len(given))
        queue(*given)

    monkeypatch.setattr(mx, "async_eval", recorded)
    encoding = Encoding(tower, [media[0]])
    steps = 1
    while not encoding.step(1):
        steps += 1
    levels = len(tower.config.deepstack_visual_indexes)
    assert len(queued) == steps > 1
    assert queued == sorted(queued)
    assert (queued[0], queued[-1]) == (2, 1 + levels)  # a block and its DeepStack; all features
