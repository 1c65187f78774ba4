"""Shared fixtures: tiny random checkpoints by variant, loaded once, and the demo checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX starts: newer GPUs round float32 else

import layouts
import tiny
from asking import SCENES
from disks import Disk
from driving import Driver, record
from law import INPUTS
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.demo.thinking import write_twin
from qwen3vl_mlx.engine.engine import EngineOptions
from qwen3vl_mlx.engine.request import Request, Stream
from qwen3vl_mlx.media import load_image
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.quant.recipes import parse_recipe


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(variant)`: a checkpoint in the Hub's layout. Read it, do not change it."""
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda variant: tiny.write_tiny(root / variant, variant))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Callable[[str], Path]) -> Callable[[str], Qwen3VL]:
    """`tiny_model(variant)`: the same, loaded. `tiny_model("moe 4bit")`: a wider one, quantized."""

    def loaded(name: str) -> Qwen3VL:
        variant, _, preset = name.partition(" ")
        folder = tiny_folder(variant)
        if not preset:
            return load(folder)
        wide = folder.with_name(f"{variant}-wide")
        shutil.copytree(folder, wide, dirs_exist_ok=True)
        config, tensors = layouts.wide(variant)
        layouts.write(wide, config, tensors)
        num_layers = config["text_config"]["num_hidden_layers"]
        return load(wide, quantize=parse_recipe(preset, num_layers, group_size=32))

    return cache(loaded)


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[str], Qwen3VL]) -> Qwen3VL:
    """The smallest, for what does not depend on the architecture."""
    return tiny_model("dense64")


@pytest.fixture(scope="session")
def prompts(model: Qwen3VL) -> dict[str, Prompt]:
    """`law.INPUTS`, laid out for `model`."""
    return {name: model.processor.prompt(messages) for name, messages in INPUTS.items()}


@pytest.fixture
def serve() -> Iterator[Callable[..., Qwen3VL]]:
    """`serve(**options)`: the demo checkpoint on an engine of its own."""
    models: list[Qwen3VL] = []

    def served(**options: Any) -> Qwen3VL:
        models.append(load("demo", engine=EngineOptions(**options)))
        return models[-1]

    yield served
    for each in models:
        each.close()


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    """`drive(model, **options)`: its scheduler, stepped by hand, whose draws are recorded."""
    drawn = record(monkeypatch)  # undone in turn with what the test itself patches
    return lambda model, **options: Driver(model, drawn, **options)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A folder for prefix caches, all closed at the end."""
    disk = Disk(tmp_path / "prefixes")
    yield disk
    for opened in disk.open:
        opened.close()


@pytest.fixture(scope="session")
def demo() -> Qwen3VL:
    return load("demo")


@pytest.fixture(scope="session")
def thinking_demo(tmp_path_factory: pytest.TempPathFactory) -> Qwen3VL:
    """The demo checkpoint behind the template of the Thinking models."""
    return load(write_twin(tmp_path_factory.mktemp("thinking") / "checkpoint"))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What engines are asked, in turn."""
    seen: list[Request] = []
    run = Qwen3VL.run

    def recorded(model: Qwen3VL, request: Request) -> Stream:
        seen.append(request)
        return run(model, request)

    monkeypatch.setattr(Qwen3VL, "run", recorded)
    return seen


@pytest.fixture(scope="session")
def scene() -> Image:
    """What `asking.TRUTH` describes."""
    return load_image(SCENES / "scene18.png")


@pytest.fixture(scope="session")
def other_scene() -> Image:
    """What `asking.OTHER_TRUTH` describes."""
    return load_image(SCENES / "scene22.png")
