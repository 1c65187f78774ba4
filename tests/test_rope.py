"""The GPU's fused rope and the table agree, so that either may turn a token."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.models.config import RopeConfig, YarnConfig
from qwen3vl_mlx.models.rope import MRope, rotate

YARN = YarnConfig(2.0, 4096, attention_factor=1.07)


@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("length", [1, 5])
def test_the_fused_kernel_and_the_table_agree(length: int, yarn: YarnConfig | None) -> None:
    rope = MRope(RopeConfig(5e6, (24, 20, 20), yarn), 128)
    x = mx.random.normal((2, 3, length, 128), key=mx.random.key(0))
    first = mx.array([7, 3000])
    position_ids = mx.broadcast_to(first[:, None] + mx.arange(length), (3, 2, length))
    turned = rotate(x, *rope.table(position_ids))
    for rope.fused in (False, True):
        rotation = rope.rotation(first, length)
        assert isinstance(rotation, tuple) != rope.fused
        assert mx.abs(rope(x, rotation) - turned).max().item() < 2e-3  # angles of 3,000 radians


def test_answers_do_not_depend_on_which_is_used(
    demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = demo.model.language_model.model.rope
    answers = []
    for fused in (False, True):
        monkeypatch.setattr(rope, "fused", fused)
        answers.append(demo.generate("What is 3 + 4?", max_tokens=4, temperature=0).text)
    assert answers == ["7", "7"]


@pytest.mark.parametrize("variant", ["dense64", "moe"])
def test_logits_do_not_depend_on_which_is_used(
    variant: str, tiny_model: Callable[[str], Qwen3VL], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(variant)
    logits = []
    for fused in (False, True):
        monkeypatch.setattr(model.model.language_model.model.rope, "fused", fused)
        logits.append(mx.array(model.logits("Where is the red circle?")))
    difference = mx.abs(logits[0] - logits[1]).max() / mx.abs(logits[0]).max()
    assert difference.item() <= 1e-4
