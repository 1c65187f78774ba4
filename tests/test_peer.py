"""Checkpoints that mlx-vlm's own converter writes load here, and both packages agree on them.

Needs mlx-vlm, which wants versions of its own: give it an environment of its own, with this package
and pytest, and run `python -m pytest tests/test_peer.py` there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from asking import OTHER_TRUTH, QUESTION, SCENES, TRUTH
from layouts import AFFINE4, wide_config, write
from passes import forward

pytestmark = pytest.mark.peer
mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.convert import convert  # noqa: E402
from mlx_vlm.prompt_utils import apply_chat_template  # noqa: E402

from qwen3vl_mlx.api import Qwen3VL, load  # noqa: E402
from qwen3vl_mlx.demo import CHECKPOINT  # noqa: E402
from qwen3vl_mlx.models.config import Quantization  # noqa: E402

TOLERANCE = 1e-4  # of the largest logit
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """`converted(variant, quantized)`: the folder mlx-vlm wrote from a tiny checkpoint."""
    root = tmp_path_factory.mktemp("peer")

    @cache
    def folder(variant: str, quantized: bool) -> Path:
        source = tiny.write_tiny(root / variant, variant)
        config = wide_config(variant)  # its widths are multiples of a group
        write(source, config, tiny.tiny_weights(config))
        target = root / f"{variant}-{quantized}"
        convert(str(source), str(target), quantize=quantized, q_group_size=32, q_bits=4)
        return target

    return folder


def messages() -> list[dict[str, Any]]:
    pixels = np.random.RandomState(0).randint(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    content = [{"image": pixels[0]}, {"text": "or"}, {"image": pixels[1]}, {"text": "Which?"}]
    return [{"role": "user", "content": content}]


def peer_logits(folder: Path, ours: Qwen3VL, messages: list[dict[str, Any]]) -> Logits:
    """mlx-vlm's own loader and forward pass on our prompt."""
    theirs, _ = mlx_vlm.load(str(folder))
    correct_activations(theirs.vision_tower)
    prompt = ours.processor.prompt(messages)
    pictures: dict[str, mx.array] = {}
    if prompt.media:
        pixels = (np.concatenate([m.patches for m in prompt.media]) - np.float32(127.5)) / 127.5
        still = pixels.reshape(-1, 1, 16, 16, 3).transpose(0, 4, 1, 2, 3)  # (N, C, 1, P, P)
        twice = np.repeat(still, 2, axis=2).reshape(len(pixels), -1)  # both slices of a patch
        grids = [medium.grid_thw for medium in prompt.media]
        pictures = {"pixel_values": mx.array(twice), "image_grid_thw": mx.array(grids)}
    got = theirs(mx.array(prompt.token_ids)[None], **pictures)
    return np.array(got.logits[0].astype(mx.float32))


def correct_activations(tower: Any) -> None:
    """Up to 0.7.10 the mixture of experts' tower has its two GELUs the wrong way round."""
    for block in tower.blocks:
        block.mlp.act_fn = nn.GELU(approx="tanh")
    for merger in (tower.merger, *tower.deepstack_merger_list):
        merger.act_fn = nn.GELU()


@pytest.mark.parametrize("quantized", [False, True], ids=["whole", "4 bits"])
@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_converted_checkpoints_give_equal_logits(
    converted: Callable[[str, bool], Path], variant: str, quantized: bool
) -> None:
    folder = converted(variant, quantized)
    ours = load(folder)
    settings = ours.model.config.quantization
    assert (settings is not None) == quantized
    if settings is not None:
        assert settings.default == Quantization(*AFFINE4.values())
    text = [{"role": "user", "content": "Tell me of the sea and the old stone house."}]
    for asked in (text, messages()):
        expected = peer_logits(folder, ours, asked)
        prompt = ours.processor.prompt(asked)
        got = our_logits(ours, prompt)
        assert np.abs(got - expected).max() / np.abs(expected).max() <= TOLERANCE
        assert (got.argmax(-1) == expected.argmax(-1)).all()


def our_logits(ours: Qwen3VL, prompt: Any) -> Logits:
    (hidden,) = forward(ours.model, prompt)
    return np.array(ours.model.language_model.logits(hidden)[0])


@pytest.fixture(scope="module")
def peer_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The bundled checkpoint in mlx-vlm, in float32 as here."""
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    convert(str(CHECKPOINT), str(folder), dtype="float32")
    model, processor = mlx_vlm.load(str(folder))
    return model, processor


@pytest.mark.parametrize(("name", "truth"), [("scene18.png", TRUTH), ("scene22.png", OTHER_TRUTH)])
def test_the_bundled_checkpoint_answers_alike(
    demo: Qwen3VL, peer_demo: tuple[Any, Any], name: str, truth: str
) -> None:
    model, processor = peer_demo
    prompt = apply_chat_template(processor, model.config, QUESTION, num_images=1)
    picture = str(SCENES / name)
    answer = mlx_vlm.generate(
        model, processor, prompt, image=[picture], max_tokens=40, temperature=0.0
    )
    assert answer.text.strip() == demo.generate(QUESTION, images=[picture]).text == truth
