"""Quantized while loading, converted, saved and loaded again, requantized: the same bits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from asking import OTHER_TRUTH, QUESTION, TRUTH, about, user
from converting import (
    convert,
    differing,
    parameters,
    read_json,
    tensors_of,
    tree,
    write_source,
)
from layouts import as_mlx, wide
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.engine.sampling import SamplingParams
from qwen3vl_mlx.errors import InputError, OutputError, Qwen3VLError
from qwen3vl_mlx.loading import load_model
from qwen3vl_mlx.models.config import Quantization, read_config
from qwen3vl_mlx.quant import policy
from qwen3vl_mlx.quant.recipes import Recipe, default_recipe, parse_recipe

VARIANTS = ("dense64", "dense72", "moe")  # tied, untied, experts
STORED = {"dense64": mx.bfloat16, "dense72": mx.float32, "moe": mx.bfloat16}
LAYERS = 4
RECIPES: dict[str, str | Recipe] = {
    **{f"{bits}bit": f"{bits}bit" for bits in (2, 3, 4, 5, 6, 8)},
    "4bit-g32": parse_recipe("4bit", LAYERS, group_size=32),
    "6bit-g128": parse_recipe("6bit", LAYERS, group_size=128),
    "vision too": parse_recipe("5bit", LAYERS, group_size=32, vision=True),
    **{name: name for name in ("mxfp4", "mxfp8", "nvfp4", "mixed_3_6", "q4k")},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")
    return cache(lambda variant: write_source(root / variant, variant, STORED[variant]))


def chosen(folder: Path, quantize: str | Recipe, **settings: Any) -> Any:
    return policy.choose(read_config(folder), policy.Request(quantize, **settings))


def topology(folder: Path) -> Path:
    path = folder / "topology.yaml"
    path.write_text("0-2: 8bit\n3: none\n/v_proj/: {bits: 6, group_size: 32}\n")
    return path


@pytest.mark.parametrize(
    ("variant", "name"),
    [("moe", name) for name in RECIPES]
    + [(v, name) for v in ("dense64", "dense72") for name in ("4bit", "vision too", "mixed_3_6")],
)
def test_loaded_is_converted_is_saved(
    variant: str, name: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = source(variant)
    assignment = chosen(folder, RECIPES[name])
    convert(folder, tmp_path / "converted", assignment)
    model = load(folder, quantize=RECIPES[name])
    weights = parameters(model.model)
    assert {key.removesuffix(".scales") for key in weights if key.endswith(".scales")} == set(
        assignment.modules
    )
    assert differing(parameters(load(tmp_path / "converted").model), weights) == []
    model.save(tmp_path / "saved")
    files = tensors_of(tmp_path / "saved")
    assert differing(files, tensors_of(tmp_path / "converted")) == []
    assert differing(parameters(load(tmp_path / "saved").model), weights) == []
    whole = parameters(load_model(folder))
    for path, settings in assignment.modules.items():  # and it is what MLX makes of it
        parts = mx.quantize(
            whole[f"{path}.weight"],
            group_size=settings.group_size,
            bits=settings.bits,
            mode=settings.mode,
        )
        named = zip(("weight", "scales", "biases"), parts, strict=False)
        expected = {f"{path}.{part}": array for part, array in named}
        assert differing({key: files[key] for key in expected}, expected) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_topology_is_the_same_on_every_road(
    variant: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, file = source(variant), topology(tmp_path)
    assignment = chosen(folder, "4bit", topology=file)
    assert {s.bits for s in assignment.modules.values()} == {4, 6, 8}
    assert not any(".layers.3." in path and "v_proj" not in path for path in assignment.modules)
    convert(folder, tmp_path / "converted", assignment)
    model = load(folder, quantize="4bit", topology=file)
    again = load(folder, quantize="8bit")
    again.requantize("4bit", topology=file)
    for other in (load(tmp_path / "converted"), again):
        assert differing(parameters(other.model), parameters(model.model)) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_model_is_saved_as_it_was_stored(
    variant: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    """In the type it was stored in, though on a CPU it is held in float32."""
    load(source(variant)).save(tmp_path / "saved")
    expected = {
        name: mx.array(tensor).astype(STORED[variant])
        for name, tensor in as_mlx(*wide(variant))[1].items()
    }
    assert differing(tensors_of(tmp_path / "saved"), expected) == []
    config = read_json(tmp_path / "saved" / "config.json")
    assert "quantization" not in config
    assert config["dtype"] in str(STORED[variant])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_a_type_asked_for_is_kept(
    dtype: mx.Dtype, quantize: str | None, source: Callable[[str], Path], tmp_path: Path
) -> None:
    """One type for all, not a mixture; float32 only where bfloat16 does not hold the values."""
    model = load(source("dense64"), quantize=quantize, dtype=dtype)
    model.save(tmp_path / "saved")
    weights = parameters(model.model)
    stored = load_model(tmp_path / "saved")
    types = {x.dtype for x in parameters(stored).values() if mx.issubdtype(x.dtype, mx.floating)}
    assert types == {mx.bfloat16 if dtype == mx.float32 else dtype}
    assert differing(parameters(load_model(tmp_path / "saved", dtype)), weights) == []


def test_values_that_the_stored_type_does_not_hold(tmp_path: Path) -> None:
    """A config that names a smaller type than its tensors have."""
    folder = write_source(tmp_path / "source", "dense64")
    config = read_json(folder / "config.json")
    config["text_config"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    for quantize in (None, "4bit"):
        model = load(folder, quantize=quantize)
        model.save(tmp_path / "saved", force=True)
        saved = parameters(load(tmp_path / "saved").model)
        assert differing(saved, parameters(model.model)) == []


# The bundled checkpoint.


def test_answers_survive_saving(
    demo: Qwen3VL, scene: Image, other_scene: Image, tmp_path: Path
) -> None:
    model = load("demo", quantize="8bit")
    model.save(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    for picture, truth in ((scene, TRUTH), (other_scene, OTHER_TRUTH)):
        assert saved.generate(QUESTION, images=[picture]).text == truth
        logits = [m.logits(QUESTION, images=[picture]) for m in (model, saved)]
        assert np.array_equal(*logits)
        assert not np.array_equal(logits[0], demo.logits(QUESTION, images=[picture]))
    assert saved.default_params == demo.default_params
    assert saved.eos_token_ids == demo.eos_token_ids


def test_a_saved_model_is_requantized_from_what_it_has(tmp_path: Path) -> None:
    load("demo", quantize="8bit").save(tmp_path / "saved")
    model = load(tmp_path / "saved")
    model.requantize("3bit")
    expected = load(tmp_path / "saved", quantize="3bit")
    assert differing(parameters(model.model), parameters(expected.model)) == []
    model.save(tmp_path / "again")
    again = load(tmp_path / "again")
    assert differing(parameters(again.model), parameters(model.model)) == []
    assert "3bit" in (tmp_path / "again" / "README.md").read_text()


# Requantized.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("first", "then"), [(None, "4bit"), ("2bit", "8bit"), ("8bit", "mxfp4")])
def test_requantized_is_loaded_so(
    first: str | None, then: str, variant: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(source(variant), quantize=first)
    model.requantize(then)
    expected = load(source(variant), quantize=then)
    assert differing(parameters(model.model), parameters(expected.model)) == []
    model.save(tmp_path / "saved")
    saved = parameters(load(tmp_path / "saved").model)
    assert differing(saved, parameters(expected.model)) == []


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_requantizing_keeps_the_type(dtype: mx.Dtype, source: Callable[[str], Path]) -> None:
    model = load(source("dense64"), quantize="4bit", dtype=dtype)
    model.requantize("6bit")
    expected = load(source("dense64"), quantize="6bit", dtype=dtype)
    assert differing(parameters(model.model), parameters(expected.model)) == []


def test_not_while_an_answer_is_open(source: Callable[[str], Path]) -> None:
    model = load(source("dense64"), quantize="8bit")
    before = model.model
    endless = {"ignore_eos": True, "max_tokens": 1500}
    chat = model.chat(params=model.default_params.updated(endless))
    streams = [model.stream("Hello", sampling=endless), chat.stream("Hello")]
    for stream in streams:
        next(stream)
    for stream in streams:
        with pytest.raises(InputError, match="being generated"):
            model.requantize("4bit")
        assert model.model is before
        stream.close()  # type: ignore[attr-defined]
    model.requantize("4bit")
    assert model.model is not before


@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_a_chat_goes_on_without_what_the_old_weights_left(
    variant: str, source: Callable[[str], Path]
) -> None:
    """Random models: one stale key would be another answer."""
    model = load(source(variant), quantize="8bit")
    picture = np.random.RandomState(0).randint(0, 256, (64, 96, 3), dtype=np.uint8)
    chat = model.chat(params=SamplingParams(temperature=0, max_tokens=12))
    chat.send("What is this?", images=[picture])
    assert chat.send("And now?").usage.cached_tokens > 10
    history = list(chat.messages)
    stale = chat.send("Why?")
    chat.messages[:] = history  # as if not asked
    model.requantize("2bit")
    answer = chat.send("Why?")
    fresh = model.generate([*history, *user("Why?")], max_tokens=12, temperature=0)
    assert answer.usage.cached_tokens == 0
    assert answer.text == fresh.text != stale.text
    follow = chat.send("How?")
    assert follow.usage.cached_tokens > 10
    whole = model.generate(chat.messages[:-1], max_tokens=12, temperature=0)
    assert follow.text == whole.text


def test_the_bundled_checkpoint_goes_on(scene: Image) -> None:
    model = load("demo", quantize="4bit")
    chat = model.chat()
    first = chat.send("What color is the background?", images=[scene])
    model.requantize("8bit")
    second = chat.send("What shape is purple?")
    messages = [
        *about(scene, "What color is the background?"),
        {"role": "assistant", "content": first.text},
        *user("What shape is purple?"),
    ]
    assert second.text == model.generate(messages).text
    assert second.usage.cached_tokens == 0


@pytest.mark.parametrize("quantize", ["7bit", "", "iq4_xs", 4])
def test_a_refused_requantization_changes_nothing(
    quantize: Any, source: Callable[[str], Path]
) -> None:
    model = load(source("dense64"), quantize="8bit")
    before = model.model
    with pytest.raises(InputError):
        model.requantize(quantize)
    assert model.model is before


def test_a_source_that_is_gone(source: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source("dense64"), copy)
    model = load(copy, quantize="8bit")
    before, text = model.model, model.generate("Hello", max_tokens=4).text
    shutil.rmtree(copy)
    for work in (lambda: model.requantize("4bit"), lambda: model.save(tmp_path / "saved")):
        with pytest.raises(Qwen3VLError, match="copy"):
            work()
    assert model.model is before
    assert model.generate("Hello", max_tokens=4).text == text
    assert not list(tmp_path.iterdir())


# Where to.


def test_targets_of_save(source: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source("dense64"), copy)
    model = load(copy, quantize="8bit")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    before = tree(tmp_path)
    for target, force, words in (
        (copy, False, "source itself"),
        (copy, True, "source itself"),
        (tmp_path, True, "holds the source"),
        (other, False, "--force|force"),
        (other, True, "not a checkpoint"),
        (other / "thesis.txt", True, "not a folder"),
    ):
        with pytest.raises(InputError, match=words):
            model.save(target, force=force)
        assert tree(tmp_path) == before
    model.save(str(tmp_path / "new" / "saved"))
    saved = tree(tmp_path / "new")
    with pytest.raises(InputError, match="there already"):
        model.save(tmp_path / "new" / "saved")
    assert tree(tmp_path / "new") == saved
    model.requantize("4bit")
    model.save(tmp_path / "new" / "saved", force=True)
    again = load(tmp_path / "new" / "saved")
    assert differing(parameters(again.model), parameters(model.model)) == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]


def test_a_disk_that_fails_while_saving(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(source("dense64"), quantize="8bit")
    model.save(tmp_path / "saved")
    before = tree(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="GB free"):
        model.save(tmp_path / "saved", force=True)
    assert tree(tmp_path) == before


def test_short_lived_threads_each_quantize_a_model() -> None:
    """Thread numbers come again, and MLX's streams belong to threads: in a process of its own."""
    script = """
import os, sys, threading
from qwen3vl_mlx import load
failed = []
def work():
    try:
        load("demo", quantize="4bit")
    except Exception as error:
        failed.append(error)
for _ in range(6):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
sys.stdout.write(repr(failed))
sys.stdout.flush()
os._exit(0)  # MLX may abort when a process ends whose threads used it
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]"


@pytest.mark.parametrize("settings", [Quantization(48, 4), Quantization(64, 4, "mxfp4")])
def test_a_recipe_of_settings_there_are_not(settings: Quantization) -> None:
    with pytest.raises(InputError, match=r"affine groups|no quantization 'mxfp4'"):
        load("demo", quantize=default_recipe(settings))
