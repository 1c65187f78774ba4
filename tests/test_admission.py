"""Memory predicted before a request runs: rising with what is asked, honest in refusing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from admitting import GIB, LARGE, SMALL, real
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.admission import (
    RESERVE,
    UNBOUNDED_TOKENS,
    Admission,
    Cost,
    Demand,
    memory_limit,
)
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.processing.image import VisualInput
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.quant.plan import parse_memory, prefill_bytes

# What rises with what.

tokens = st.integers(1, 200_000)
pictures = st.lists(st.integers(4, 16_384), max_size=4).map(tuple)
films = st.lists(st.tuples(st.integers(1, 300), st.integers(4, 768)), max_size=2).map(tuple)
demands = st.builds(Demand, tokens, tokens, pictures, films)


@settings(max_examples=60, deadline=None)
@given(
    demand=demands,
    more=st.builds(Demand, tokens, tokens, pictures),
    name=st.sampled_from([SMALL, LARGE]),
    bits=st.sampled_from([None, 8, 4]),
    fused=st.booleans(),
)
def test_asking_for_more_never_costs_less(
    demand: Demand, more: Demand, name: str, bits: int | None, fused: bool
) -> None:
    admission = replace(real(name), kv_bits=bits, fused=fused)
    least = admission.estimate(demand)
    for larger in (
        replace(demand, prompt_tokens=demand.prompt_tokens + more.prompt_tokens),
        replace(demand, max_tokens=demand.max_tokens + more.max_tokens),
        replace(demand, images=demand.images + more.images),
        replace(demand, images=tuple(2 * n for n in demand.images)),
        replace(demand, videos=tuple((2 * t, n) for t, n in demand.videos)),
        replace(demand, videos=tuple((t, 2 * n) for t, n in demand.videos)),
    ):
        cost = admission.estimate(larger)
        for part in ("cache", "features", "decode", "vision", "prefill", "growth", "total"):
            assert getattr(cost, part) >= getattr(least, part), part
    for bigger in (
        replace(admission, itemsize=4),
        replace(admission, chunk=2 * admission.chunk),
        replace(admission, kv_bits=None),
        replace(admission, fused=False),
    ):
        assert bigger.estimate(demand).total >= least.total
    assert replace(real(LARGE), kv_bits=bits, fused=fused).estimate(demand).total >= (
        replace(real(SMALL), kv_bits=bits, fused=fused).estimate(demand).total
    )


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(demands, min_size=1, max_size=5),
    limit=st.integers(1, 200 * GIB),
    more=st.integers(0, 50 * GIB),
    kept=st.integers(0, GIB),
)
def test_room_only_grows_with_the_limit_and_shrinks_with_company(
    asked: list[Demand], limit: int, more: int, kept: int
) -> None:
    tight, wide = replace(real(SMALL), limit=limit), replace(real(SMALL), limit=limit + more)
    first, *others = [tight.estimate(demand) for demand in asked]
    if tight.fits(first, others, kept):
        assert wide.fits(first, others, kept)
        assert tight.fits(first, others)
        assert all(tight.fits(first, others[:n]) for n in range(len(others)))
        assert all(tight.fits(other) for other in others)
    assert (tight.refuse(first) is None) == tight.fits(first)
    together = tight.together([first, *others])
    assert together >= max(cost.total for cost in (first, *others)) > 0
    assert tight.together([first]) == first.total
    assert tight.together([]) == 0


def test_a_chunk_is_read_at_a_time() -> None:
    admission = real(SMALL)
    text = admission.config.text
    assert admission.estimate(Demand(50, 1)).prefill == prefill_bytes(text, 50)
    chunk = replace(admission, chunk=512).estimate(Demand(5000, 1)).prefill
    assert chunk == prefill_bytes(text, 512) < admission.estimate(Demand(5000, 1)).prefill


def test_the_last_byte_counts() -> None:
    whole = real(SMALL)
    cost = whole.estimate(Demand(3000, 100, (2560,)))
    exact = replace(whole, limit=whole.weights + whole.reserved + cost.total)
    assert exact.fits(cost)
    assert not exact.fits(cost, kept=1)
    assert not exact.fits(cost, [whole.estimate(Demand(1, 1)).answering])
    assert not replace(exact, limit=exact.limit - 1).fits(cost)


def test_a_picture_is_encoded_while_another_prompt_is_read() -> None:
    admission = real(SMALL)
    seeing, reading = (
        admission.estimate(Demand(3000, 100, (2560,))),
        admission.estimate(Demand(3000, 100)),
    )
    both = admission.together([seeing, reading])
    assert both - 2 * (seeing.cache + seeing.growth + seeing.decode) - seeing.features == (
        seeing.vision + reading.prefill
    )


def test_a_row_that_answers_needs_its_cache_alone() -> None:
    admission = real(SMALL)
    cost = admission.estimate(Demand(3000, 100, (2560,)))
    assert cost.answering.total == cost.cache + cost.growth + cost.decode
    other = admission.estimate(Demand(30, 10))
    assert admission.together([other, cost.answering]) < admission.together([other, cost])


def test_a_batch_is_as_wide_as_its_longest_row() -> None:
    admission = real(SMALL)
    long, short = admission.estimate(Demand(30_000, 100)), admission.estimate(Demand(30, 100))
    assert admission.together([long, short]) >= 2 * long.cache
    assert admission.together([short, short]) < 3 * short.total


# What is refused, and what is said then.


def on_mac(name: str, memory: str, share: float = 1.0) -> Admission:
    """A checkpoint on a Mac, its weights packed to `share` of bf16."""
    whole = real(name)
    return replace(whole, limit=parse_memory(memory).usable, weights=int(share * whole.weights))


PHOTO = (2560,)
FOUR_BITS, EIGHT_BITS = 0.35, 0.57  # of bf16's bytes; the tower stays whole


@pytest.mark.parametrize(
    ("name", "memory", "share", "demand", "runs"),
    [
        (SMALL, "8GB", 1.0, Demand(2600, 512, PHOTO), False),  # 4 of 5.3 GiB are weights
        (SMALL, "8GB", EIGHT_BITS, Demand(2600, 512, PHOTO), True),
        (SMALL, "8GB", EIGHT_BITS, Demand(30_000, 512), False),
        (SMALL, "16GB", 1.0, Demand(2600, 2048, PHOTO), True),
        (SMALL, "16GB", 1.0, Demand(120_000, 2048), False),
        (LARGE, "8GB", FOUR_BITS, Demand(100, 100), False),
        (LARGE, "16GB", 1.0, Demand(100, 100), False),
        (LARGE, "16GB", FOUR_BITS, Demand(2600, 2048, PHOTO), True),
        (LARGE, "16GB", FOUR_BITS, Demand(16_500, 2048, (16_384,)), False),
        (LARGE, "16GB", FOUR_BITS, Demand(20_000, 100_000), False),
    ],
)
def test_real_models_on_real_machines(
    name: str, memory: str, share: float, demand: Demand, runs: bool
) -> None:
    admission = on_mac(name, memory, share)
    cost = admission.estimate(demand)
    message = admission.refuse(cost)
    assert (message is None) == runs
    if message is not None:
        offered = applied(message, admission, demand)
        assert all(offer.refuse(offer.estimate(smaller)) is None for offer, smaller in offered)
        assert offered or "load a smaller model" in message


def applied(message: str, admission: Admission, demand: Demand) -> list[tuple[Admission, Demand]]:
    """What the message says would fit, taken at its word."""
    found = []
    for offer in message.partition("it would fit with ")[2].split(", or "):
        changed, asked = admission, demand
        values = {
            key: int(n) for key, n in re.findall(r"(max_tokens|max_pixels|kv_bits)=(\d+)", offer)
        }
        if "max_tokens" in values:
            asked = replace(asked, max_tokens=values["max_tokens"])
        if "max_pixels" in values:
            asked = asked.with_images(values["max_pixels"] // 32**2)
        if "kv_bits" in values:
            changed = replace(changed, kv_bits=values["kv_bits"])
        if at_most := re.search(r"at most ([\d,]+) tokens", offer):
            asked = replace(asked, prompt_tokens=int(at_most[1].replace(",", "")))
        if "without pictures" in offer:
            asked = replace(asked, images=(), videos=())
        if values:
            found.append((changed, asked))
    return found


def largest_offer(message: str, name: str) -> int:
    match = re.search(rf"{name}=(\d+)", message)
    assert match, message
    return int(match[1])


def test_the_offers_are_the_largest_that_fit() -> None:
    admission = on_mac(LARGE, "16GB", FOUR_BITS)
    demand = Demand(20_000, 100_000)
    answer = largest_offer(str(admission.refuse(admission.estimate(demand))), "max_tokens")
    assert admission.fits(admission.estimate(replace(demand, max_tokens=answer)))
    assert not admission.fits(admission.estimate(replace(demand, max_tokens=answer + 1)))
    seen = Demand(16_500, 2048, (16_384,))
    pixels = largest_offer(str(admission.refuse(admission.estimate(seen))), "max_pixels")
    assert admission.fits(admission.estimate(seen.with_images(pixels // 1024)))
    assert not admission.fits(admission.estimate(seen.with_images(pixels // 1024 + 1)))


def test_the_message_names_every_number() -> None:
    admission = on_mac(LARGE, "16GB", FOUR_BITS)
    cost = admission.estimate(Demand(16_500, 2048, (16_384,)))
    message = str(admission.refuse(cost))
    need = admission.weights + admission.reserved + cost.total
    for size in (need, admission.limit, admission.weights, cost.cache, cost.features + cost.vision):
        assert f"{size / GIB:.1f}" in message
    assert "16,500" in message
    assert "2,048" in message


def test_too_large_weights_are_named() -> None:
    admission = on_mac(LARGE, "16GB")
    message = str(admission.refuse(admission.estimate(Demand(1, 1))))
    assert f"{admission.weights / GIB:.1f}" in message
    assert "fewer bits" in message


@settings(max_examples=60, deadline=None)
@given(demand=demands, room=st.integers(1, 20 * GIB), name=st.sampled_from([SMALL, LARGE]))
def test_what_is_offered_always_fits(demand: Demand, room: int, name: str) -> None:
    whole = real(name)
    admission = replace(whole, limit=whole.weights + RESERVE + room)
    demand = replace(demand, prompt_tokens=demand.prompt_tokens + demand.visual_tokens)
    message = admission.refuse(admission.estimate(demand))
    if message is not None:
        for offer, smaller in applied(message, admission, demand):
            assert offer.refuse(offer.estimate(smaller)) is None, message


# The rest of the surface.


def test_an_answer_without_a_limit_reserves_a_part() -> None:
    admission = real(SMALL)
    assert admission.reserve(200_000, unbounded=True) == UNBOUNDED_TOKENS == 4096
    assert admission.reserve(100, unbounded=True) == 100
    assert admission.reserve(200_000) == 200_000


def test_a_prompt_is_read_into_numbers() -> None:
    shape = (tiny_input("image", (1, 4, 6)), tiny_input("video", (3, 4, 4)))
    prompt = Prompt(np.zeros((90,), np.int32), None, shape)  # type: ignore[arg-type]
    cost = real(SMALL).cost(prompt, 7)
    assert isinstance(cost, Cost)
    assert cost.demand == Demand(90, 7, (6,), ((3, 4),))
    assert cost.demand.visual_tokens == 18
    assert cost.demand.with_images(4) == Demand(88, 7, (4,), ((3, 4),))


def tiny_input(kind: str, grid: tuple[int, int, int]) -> VisualInput:
    from qwen3vl_mlx.processing.image import PixelBudget, VisionSettings

    budget = PixelBudget(1024, 10**6)
    fields = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image": budget, "video": budget}
    sizes = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    settings_ = VisionSettings(**fields, **sizes)  # type: ignore[arg-type]
    return VisualInput(kind, np.zeros((int(np.prod(grid)), 8), np.uint8), grid, settings_)  # type: ignore[arg-type]


def test_the_memory_limit_is_the_callers_or_the_machines() -> None:
    assert memory_limit(5 * GIB) == 5 * GIB
    assert memory_limit() > 0
    for wrong in (0, -1):
        with pytest.raises(InputError, match=f"got {wrong}"):
            memory_limit(wrong)


def test_the_limit_follows_metal_where_it_says_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12_345})
    assert memory_limit() == 12_345
    monkeypatch.setattr(mx, "device_info", dict)
    assert memory_limit() > 12_345


def test_bits_a_model_cannot_have_are_refused_when_it_is_loaded(
    tiny_model: Callable[[str], Qwen3VL],
) -> None:
    with pytest.raises(InputError, match="kv_bits"):
        Admission.for_model(tiny_model("dense64").model, GIB, kv_bits=3)
