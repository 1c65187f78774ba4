"""Log-probabilities are those of the model's own distribution, whatever was asked of the draw."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from drawing import make

import qwen3vl_mlx
from qwen3vl_mlx.engine.logprobs import LogprobArrays, chosen_logprobs, to_host
from qwen3vl_mlx.engine.sampling import Row, draw
from qwen3vl_mlx.processing.tokenizer import Tokenizer

DEMO = Path(qwen3vl_mlx.__file__).parent / "demo" / "checkpoint"

LOGITS = np.random.default_rng(1).normal(0, 5, 300).astype(np.float32)


@pytest.mark.parametrize("top", [0, 1, 5, 20, 400])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_they_are_log_softmax_of_the_logits(top: int, dtype: mx.Dtype) -> None:
    logits = mx.array(LOGITS).astype(dtype)
    exact = np.array(logits.astype(mx.float32), np.float64)
    expected = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    sampler = make(300, [3], temperature=0.7, top_k=5, presence_penalty=1.0, logit_bias={7: 60.0})
    token, _ = draw(logits[None], [Row(sampler, sampler.start())])
    assert token.item() == 7
    arrays = chosen_logprobs(logits, token, top)
    assert [x.shape for x in arrays] == [(1,), (min(top, 300),), (min(top, 300),)]
    assert arrays.chosen.item() == pytest.approx(expected[7], abs=1e-4)
    np.testing.assert_allclose(arrays.values, np.sort(expected)[::-1][:top], atol=1e-4)
    np.testing.assert_allclose(expected[np.array(arrays.ids)], arrays.values, atol=1e-4)
    assert len(set(arrays.ids.tolist())) == min(top, 300)


def test_they_add_up_to_one_and_the_best_is_the_greedy_token() -> None:
    arrays = chosen_logprobs(mx.array(LOGITS), mx.array([4]), 300)
    assert float(mx.exp(arrays.values).sum()) == pytest.approx(1, abs=1e-5)
    assert arrays.ids[0].item() == LOGITS.argmax()


def test_on_the_host_they_name_tokens_and_bytes() -> None:
    tokenizer = Tokenizer.from_folder(DEMO)
    end = tokenizer.added_tokens["<|im_end|>"]
    half = tokenizer.encode("é")[0]
    nothing = tokenizer.vocab_size + 5
    ids = mx.array([end, half, nothing], mx.uint32)
    arrays = LogprobArrays(mx.array([-0.5]), ids, mx.array([-0.25, -2.0, -mx.inf]))
    found = to_host(arrays, half, tokenizer)
    raw = tokenizer.token_bytes(half)
    assert (found.token_id, found.logprob, found.bytes) == (half, -0.5, tuple(raw))
    assert found.token == raw.decode(errors="replace")
    assert [(t.token, t.token_id, t.logprob, bytes(t.bytes)) for t in found.top] == [
        ("<|im_end|>", end, -0.25, b"<|im_end|>"),
        (found.token, half, -2.0, raw),
        ("", nothing, -9999.0, b""),
    ]
