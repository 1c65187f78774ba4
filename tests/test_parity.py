"""Equal to Hugging Face transformers, stage by stage, in float32, on tiny random checkpoints.

HF reads the pixels with its own processors and lays out positions with its own code; only token
ids are shared. Tokens after the prompt go through HF's full forward and our decode loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from stages import (
    CASES,
    CHECKPOINTS,
    FOLLOWING,
    Stages,
    batch_stages,
    beyond_tolerance,
    digest,
    make_prompt,
    make_scene,
    read_golden,
    stages,
    write_checkpoint,
)

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.processing.prompt import Prompt

pytest.importorskip("torch")
pytest.importorskip("transformers")
import hf

pytestmark = pytest.mark.parity

MAIN = ("dense64", "dense72", "moe")
OTHERS = [name for name in CHECKPOINTS if name not in MAIN]
BATCHES = (  # the row with padding has an image, or the other one, or both
    ("dense72", ("image", "between")),
    ("dense72", ("image and video", "text")),
    ("dense64", ("text", "three images")),
    ("moe", ("odd grid", "odd video")),
    ("yarn 3", ("between", "image")),
)


@dataclass(frozen=True)
class Pair:
    """One checkpoint as both sides loaded it."""

    folder: Path
    ours: Qwen3VL
    theirs: Any

    def prompt(self, case: str) -> Prompt:
        return make_prompt(make_scene(case), self.ours.processor)

    def inputs(self, *cases: str) -> dict[str, Any]:
        """Arguments of HF's forward for one left-padded row per case."""
        ids = [self.prompt(case).token_ids for case in cases]
        return hf.model_inputs(self.theirs, self.folder, [*map(make_scene, cases)], ids)


Pairs: TypeAlias = Callable[[str], Pair]
Reference: TypeAlias = Callable[[str, str], Stages]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    root = tmp_path_factory.mktemp("checkpoints")

    def pair(name: str) -> Pair:
        folder = write_checkpoint(root / name, name)
        return Pair(folder, load(folder), hf.load_hf(folder))

    return cache(pair)


@pytest.fixture(scope="module")
def reference(pairs: Pairs) -> Reference:
    """HF's stages of a checkpoint and a case."""
    return cache(lambda name, case: hf.run(pairs(name).theirs, pairs(name).inputs(case))[0])


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in MAIN for case in CASES] + [(name, "between") for name in OTHERS],
)
def test_every_stage(pairs: Pairs, reference: Reference, name: str, case: str) -> None:
    ours = stages(pairs(name).ours.model, pairs(name).prompt(case))
    assert beyond_tolerance(ours, reference(name, case)) == {}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_layout_transformers_5_saves(
    pairs: Pairs, reference: Reference, name: str, tmp_path: Path
) -> None:
    pair = pairs(name)
    folder = hf.resave(pair.theirs, pair.folder, tmp_path / "resaved")
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    assert "rope_parameters" in text_config  # it is the other layout
    assert "rope_theta" not in text_config
    if name == "moe":
        key = "model.language_model.layers.0.mlp.experts.gate_up_proj"
        files = [mx.load(str(path / "model.safetensors")) for path in (pair.folder, folder)]
        assert mx.array_equal(files[0][key], files[1][key].swapaxes(1, 2))
    resaved = load(folder)
    assert resaved.model.config == pair.ours.model.config
    weights = dict(tree_flatten(pair.ours.model.parameters()))
    again = dict(tree_flatten(resaved.model.parameters()))
    assert weights.keys() == again.keys()
    assert [key for key in weights if not mx.array_equal(weights[key], again[key])] == []
    ours = stages(resaved.model, pair.prompt("between"))
    assert beyond_tolerance(ours, reference(name, "between")) == {}


@pytest.mark.parametrize("case", CASES)
def test_positions(pairs: Pairs, case: str) -> None:
    pair = pairs("dense64")
    prompt = pair.prompt(case)
    position_ids, rope_deltas = hf.rope_index(pair.theirs, pair.inputs(case))
    after = np.arange(len(FOLLOWING)) + len(prompt.token_ids) + prompt.rope_delta
    ours = np.concatenate([prompt.position_ids, np.tile(after, (3, 1))], axis=1)
    assert np.array_equal(ours, position_ids[:, 0])
    assert prompt.rope_delta == rope_deltas[0]


@pytest.mark.parametrize(("name", "cases"), BATCHES)
def test_left_padded_rows(pairs: Pairs, name: str, cases: tuple[str, ...]) -> None:
    """Rows of different length in one batch, prefilled and decoded together, as HF runs them."""
    pair = pairs(name)
    references = hf.run(pair.theirs, pair.inputs(*cases))
    model = pair.ours.model
    prompts = [pair.prompt(case) for case in cases]
    assert len({len(prompt.token_ids) for prompt in prompts}) == len(cases)
    rows = batch_stages(model, prompts)
    for ours, theirs in zip(rows, references, strict=True):
        assert beyond_tolerance(ours, {key: theirs[key] for key in ours}) == {}


def test_goldens_are_such_runs(reference: Reference) -> None:
    """The committed arrays are what HF of this version computes too."""
    golden = read_golden("moe", "text")
    theirs = {name: digest(x) for name, x in reference("moe", "text").items()}
    assert beyond_tolerance(theirs, golden.stages) == {}
