"""`auto`: what fits a Mac, over the twelve released checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_mlx.engine.engine import EngineOptions
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.config import ModelConfig, VisionConfig, parse_config, read_config
from qwen3vl_mlx.models.text import LanguageModel
from qwen3vl_mlx.models.vision import VisionModel, normalize_patches, vision_tables
from qwen3vl_mlx.processing.processor import DESKTOP_MAX_PIXELS
from qwen3vl_mlx.quant import apply
from qwen3vl_mlx.quant import plan as planning
from qwen3vl_mlx.quant.plan import (
    CANDIDATES,
    DEFAULT_IMAGE_TOKENS,
    GIB,
    NO_FIT,
    TIERS,
    TIGHT,
    Candidate,
    Memory,
    Plan,
    parse_memory,
    plan,
    prefill_bytes,
    table,
    this_memory,
    to_dict,
    vision_bytes,
)

FOLDERS = sorted((Path(__file__).parent / "data" / "checkpoints").glob("Qwen3-VL-*"))
NAMES = [folder.name for folder in FOLDERS]
MACS = (8, 16, 24, 32, 64, 128, 192, 512)
CONTEXTS = (4096, 8192, 32768, 131072, 262144)


@cache
def config_of(name: str) -> ModelConfig:
    return read_config(FOLDERS[NAMES.index(name)])


@pytest.fixture(scope="module", autouse=True)
def weigh_once() -> Iterator[None]:
    """Plans differ in the Mac and the context: each model is weighed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "weigh_all", cache(planning.weigh_all))
        yield


@cache
def plan_for(name: str, mac: int, context: int = 8192) -> Plan:
    return plan(config_of(name), parse_memory(f"{mac}GB"), context)


def rank(found: Plan) -> int:
    """Place of what is chosen, best first; after all of them where nothing fits."""
    return found.candidates.index(found.best) if found.best else len(found.candidates)


def test_all_twelve_checkpoints_are_here() -> None:
    assert len(FOLDERS) == 12


# What holds for every plan.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mac", MACS)
def test_the_chosen_fits_and_nothing_better_does(name: str, mac: int) -> None:
    found = plan_for(name, mac)
    for candidate in found.candidates:
        running = candidate.nbytes + found.cache + found.working
        assert running < candidate.need
        assert (candidate.status == NO_FIT) == (candidate.need > found.memory.usable)
        assert (candidate.status == TIGHT) == (
            0.9 * found.memory.usable < candidate.need <= found.memory.usable
        )
    if found.best is None:
        assert all(candidate.status == NO_FIT for candidate in found.candidates)
        return
    assert found.choose() is found.best
    assert found.best.need <= found.memory.usable
    assert all(c.need > found.memory.usable for c in found.candidates[: rank(found)])


@pytest.mark.parametrize("name", NAMES)
def test_more_memory_never_gives_worse_and_more_context_never_better(name: str) -> None:
    for context in (4096, 32768):
        ranks = [rank(plan_for(name, mac, context)) for mac in MACS]
        assert ranks == sorted(ranks, reverse=True)
    for mac in MACS:
        ranks = [rank(plan_for(name, mac, context)) for context in CONTEXTS]
        assert ranks == sorted(ranks)
    rooms = [[c.headroom for c in plan_for(name, mac).candidates] for mac in MACS]
    for column in zip(*rooms, strict=True):
        assert list(column) == sorted(column)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vision", [False, True])
def test_weights_are_what_the_recipe_weighs(name: str, vision: bool) -> None:
    config = config_of(name)
    shapes, modules = apply.parameter_shapes(config), apply.quantizable_shapes(config)
    found = plan(config, parse_memory("64GB"), vision=vision)
    whole = sum(int(np.prod(shape)) for shape in shapes.values())
    assert (found.candidates[0].recipe, found.candidates[0].nbytes) == (None, 2 * whole)
    for candidate in found.candidates[1:]:
        assert candidate.recipe is not None
        assert candidate.recipe.name == candidate.name
        assert (candidate.recipe.vision is not None) == vision
        weight = apply.weigh(shapes, apply.assign(candidate.recipe, modules).modules)
        assert candidate.nbytes == weight.nbytes
        assert candidate.bits_per_weight == weight.bits_per_weight


@pytest.mark.parametrize("name", NAMES)
def test_candidates_go_from_best_to_smallest(name: str) -> None:
    candidates = plan_for(name, 64).candidates
    assert len(candidates) == len(CANDIDATES) == len({c.name for c in candidates})
    for better, worse in pairwise(candidates):
        assert better.nbytes > worse.nbytes
        assert better.need > worse.need
        assert TIERS.index(better.tier) <= TIERS.index(worse.tier)


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("bf16", "Baseline"),
        ("8bit", "Near-lossless"),
        ("mxfp8", "Near-lossless"),
        ("6bit", "Good"),
        ("5bit", "Good"),
        ("4bit", "Acceptable"),
        ("mxfp4", "Acceptable"),
        ("3bit", "Degraded"),
        ("2bit", "Degraded"),
    ],
)
def test_tiers(name: str, tier: str) -> None:
    tiers = {c.name: c.tier for c in plan_for("Qwen3-VL-2B-Instruct", 16).candidates}
    assert tiers[name] == tier


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mac", MACS)
def test_headroom_is_the_longest_context_that_fits(name: str, mac: int) -> None:
    """Planned anew with the headroom as context a candidate fits; with one token more, not."""
    found = plan_for(name, mac)
    most = config_of(name).text.max_position_embeddings
    for i in (1, 6, 11):
        room = found.candidates[i].headroom
        if room >= 4096:
            assert fits(name, mac, room, i)
        if 4096 <= room < most:
            assert not fits(name, mac, room + 1, i)
        if found.candidates[i].status != NO_FIT:
            assert room >= found.context


def fits(name: str, mac: int, context: int, index: int) -> bool:
    return plan_for(name, mac, context).candidates[index].status != NO_FIT


# Numbers worked out apart from the code.


def test_what_is_assumed_of_the_engine() -> None:
    assert EngineOptions().prefill_chunk == planning.PREFILL_CHUNK
    assert DEFAULT_IMAGE_TOKENS * 32 * 32 == DESKTOP_MAX_PIXELS


@pytest.mark.parametrize(
    ("name", "per_token"),
    [  # layers x 2 x key-value heads x 128 x 2 bytes
        ("Qwen3-VL-2B-Instruct", 28 * 2 * 8 * 128 * 2),
        ("Qwen3-VL-8B-Thinking", 36 * 2 * 8 * 128 * 2),
        ("Qwen3-VL-30B-A3B-Instruct", 48 * 2 * 4 * 128 * 2),
        ("Qwen3-VL-235B-A22B-Instruct", 94 * 2 * 4 * 128 * 2),
    ],
)
def test_cache_of_a_context(name: str, per_token: int) -> None:
    for context in (1, 8192, 262144):
        small = plan(config_of(name), parse_memory("64GB"), context, image_tokens=0)
        assert small.cache == per_token * context


def test_needs_are_the_peak_of_running_and_of_loading() -> None:
    config, memory = config_of("Qwen3-VL-8B-Instruct"), parse_memory("64GB")
    short, long, longer = (plan(config, memory, n, image_tokens=0) for n in (1, 100_000, 100_001))
    assert (long.candidates[1].name, long.candidates[0].name) == ("8bit", "bf16")
    for a, b in zip(long.candidates, longer.candidates, strict=True):
        assert b.need - a.need == 37 * 2 * 8 * 128 * 2  # one layer of 36 is held twice
    assert long.working == prefill_bytes(config.text, 2048) + 100_000 * 2 * 8 * 128 * 2
    head = 151936 * 4096
    for index, largest in ((0, 2 * head), (1, head * 17 // 16)):  # bf16, and 8.5 bits
        candidate = short.candidates[index]
        assert candidate.need == candidate.nbytes + 2 * largest + GIB // 2


@pytest.mark.parametrize(
    ("size", "mac", "expected"),
    [
        ("2B", 8, {"8bit", "mxfp8", "6bit"}),
        ("2B", 16, {"bf16"}),
        ("4B", 8, {"5bit", "mixed_4_6", "4bit"}),
        ("4B", 16, {"bf16", "8bit"}),
        ("8B", 8, {None}),
        ("8B", 16, {"6bit", "8bit"}),
        ("8B", 24, {"8bit"}),
        ("8B", 32, {"bf16"}),
        ("30B-A3B", 16, {None}),
        ("30B-A3B", 24, {"3bit", "mixed_3_6"}),
        ("30B-A3B", 32, {"4bit", "mixed_4_6"}),
        ("30B-A3B", 64, {"8bit"}),
        ("32B", 16, {None}),
        ("32B", 32, {"4bit", "mxfp4"}),
        ("32B", 64, {"8bit"}),
        ("32B", 128, {"bf16"}),
        ("235B-A22B", 64, {None}),
        ("235B-A22B", 128, {"3bit", "3bit-g128"}),
        ("235B-A22B", 192, {"4bit", "mixed_4_6"}),
        ("235B-A22B", 512, {"8bit"}),
    ],
)
def test_what_each_mac_gets(size: str, mac: int, expected: set[str | None]) -> None:
    for kind in ("Instruct", "Thinking"):
        best = plan_for(f"Qwen3-VL-{size}-{kind}", mac).best
        assert (best.name if best else None) in expected


def test_a_larger_image_takes_more_working_memory() -> None:
    config, memory = config_of("Qwen3-VL-8B-Instruct"), parse_memory("16GB")
    small, large = (plan(config, memory, 32768, image_tokens=n) for n in (2560, 16384))
    assert large.working > small.working + GIB
    assert [c.nbytes for c in large.candidates] == [c.nbytes for c in small.candidates]
    assert all(a.need <= b.need for a, b in zip(small.candidates, large.candidates, strict=True))


def test_the_towers_buffers_are_estimated_within_a_factor_of_two() -> None:
    """Against what MLX allocates for a small tower in float32."""
    values = tiny.tiny_config("dense64")
    values["vision_config"] |= {"intermediate_size": 512}
    vision = replace(parse_config(values).vision, depth=2, deepstack_visual_indexes=(0,))
    for rows, columns in ((8, 8), (16, 16)):
        measured = tower_peak(vision, (1, rows, columns))
        estimated = vision_bytes(vision, rows * columns // 4, itemsize=4)
        assert 0.5 < estimated / measured < 2


@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_the_decoders_buffers_are_estimated_within_a_factor_of_two(variant: str) -> None:
    config = parse_config(tiny.tiny_config(variant))
    decoder = LanguageModel(config)
    mx.eval(decoder.parameters())
    tokens = mx.zeros((1, 128), mx.int32)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(decoder.logits(decoder(tokens, mx.array([0]))[:, -1:]))
    measured = mx.get_peak_memory() - before
    assert 0.5 < prefill_bytes(config.text, 128, itemsize=4) / measured < 2


def tower_peak(config: VisionConfig, grid: tuple[int, int, int]) -> int:
    tower = VisionModel(config)
    mx.eval(tower.parameters())
    patches = np.zeros((grid[1] * grid[2], 3 * config.patch_size**2), np.uint8)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pixels = normalize_patches(mx.array(patches), [0.5] * 3, [0.5] * 3, mx.float32)
    features = tower(pixels, vision_tables([grid], config))
    mx.eval(features.embeds, *features.deepstack)
    return mx.get_peak_memory() - before


# Memory.


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("16GB", 16 * GIB),
        ("16 GiB", 16 * GIB),
        (" 16gb ", 16 * GIB),
        ("16G", 16 * GIB),
        ("1.5TB", 1536 * GIB),
        ("0.5 TiB", 512 * GIB),
        ("512MB", GIB // 2),
        ("24.GB", 24 * GIB),
    ],
)
def test_parse_memory(text: str, total: int) -> None:
    assert parse_memory(text).total == total


@pytest.mark.parametrize(
    "text", ["", "16", "GB", "-16GB", "0GB", "0.0GB", "16KB", "16 bytes", "1e3GB", "nanGB", "infGB"]
)
def test_other_memory_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="memory must be a size such as 16GB"):
        parse_memory(text)


@given(st.one_of(st.text(max_size=12), st.from_regex(r"\d{1,12}\.?\d{0,3} ?[KMGTP]i?B?")))
def test_memory_is_a_size_or_an_input_error(text: str) -> None:
    try:
        memory = parse_memory(text)
    except InputError:
        return
    assert 0 < memory.usable < memory.total <= 2**50


@pytest.mark.parametrize(
    ("mac", "gib"),  # recommendedMaxWorkingSetSize as Macs have reported it
    [(8, 5.33), (16, 10.67), (24, 16), (32, 21.33), (36, 27), (64, 48), (96, 72), (128, 96)],
)
def test_what_macos_lets_the_gpu_use(mac: int, gib: float) -> None:
    assert parse_memory(f"{mac}GB").usable / GIB == pytest.approx(gib, abs=0.01)


@pytest.mark.parametrize(
    ("metal", "info", "usable"),
    [
        (True, {"max_recommended_working_set_size": 11 * GIB}, 11 * GIB),
        (True, {}, None),
        (False, {"max_recommended_working_set_size": 11 * GIB}, None),
    ],
)
def test_this_machine(
    monkeypatch: pytest.MonkeyPatch, metal: bool, info: dict[str, int], usable: int | None
) -> None:
    pages = {"SC_PAGE_SIZE": 16384, "SC_PHYS_PAGES": 2**20}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert this_memory() == Memory(16 * GIB, usable or parse_memory("16GB").usable)


def test_this_machine_for_real() -> None:
    memory = this_memory()
    assert GIB // 4 < memory.usable < memory.total


# Refusals, and what is shown.


def test_nothing_fits_names_the_smallest_need() -> None:
    found = plan_for("Qwen3-VL-235B-A22B-Instruct", 64)
    assert found.best is None
    assert "->" not in table(found)
    least = min(candidate.need for candidate in found.candidates)
    message = rf"even 2bit needs {least / GIB:.1f} GiB.* 64 GiB may use 48 GiB"
    with pytest.raises(InputError, match=message):
        found.choose()


@pytest.mark.parametrize(
    ("context", "image_tokens", "message"),
    [
        (0, 0, "context must be 1 to 262,144 tokens"),
        (262145, 0, "context must be 1 to 262,144 tokens for this model, got 262,145"),
        (4096, 4097, "an image of 4,097 tokens must .* fit the context, 4,096"),
        (4096, -1, "must be at least 0"),
    ],
)
def test_contexts_and_images_that_cannot_be(context: int, image_tokens: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(config_of("Qwen3-VL-2B-Instruct"), parse_memory("16GB"), context, image_tokens)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_shows_every_candidate_and_marks_the_chosen(name: str) -> None:
    found = plan_for(name, 128)
    lines = table(found).splitlines()
    rows = lines[-len(found.candidates) :]
    for row, candidate in zip(rows, found.candidates, strict=True):
        assert shown(row, found) == candidate_cells(candidate)
        assert row.startswith("->") == (candidate is found.best)
    header = lines[-len(found.candidates) - 1]
    starts = {row.index(c.tier) for row, c in zip(rows, found.candidates, strict=True)}
    assert starts == {header.index("quality")}
    assert "96 GiB" in lines[0]
    assert f"{found.context:,}" in lines[1]
    assert max(map(len, lines)) <= 120


def shown(row: str, found: Plan) -> list[str]:
    return row.removeprefix("->").split(maxsplit=6)


def candidate_cells(candidate: Candidate) -> list[str]:
    sizes = (candidate.nbytes / GIB, candidate.bits_per_weight, candidate.need / GIB)
    texts = [f"{size:.2f}" for size in sizes]
    room = f"{candidate.headroom:,}"
    return [candidate.name, *texts, room, candidate.tier, candidate.status]


def test_to_dict_is_json() -> None:
    found = plan_for("Qwen3-VL-8B-Instruct", 16)
    read = json.loads(json.dumps(to_dict(found)))
    assert found.best is not None
    assert read["chosen"] == found.best.name
    assert (read["memory_bytes"], read["usable_bytes"]) == (16 * GIB, 16 * GIB * 2 // 3)
    assert (read["context"], read["image_tokens"]) == (8192, DEFAULT_IMAGE_TOKENS)
    assert [row["name"] for row in read["candidates"]] == [c.name for c in found.candidates]
    assert [row["weight_bytes"] for row in read["candidates"]] == [
        c.nbytes for c in found.candidates
    ]
    assert to_dict(plan_for("Qwen3-VL-235B-A22B-Instruct", 8))["chosen"] is None
