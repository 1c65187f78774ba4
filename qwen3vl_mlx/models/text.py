"""The Qwen3 decoder, dense and mixture-of-experts, with DeepStack injection.

Modules hold weights only: positions, caches and visual features are arguments. Source: HF
`Qwen3VLTextModel` and `Qwen3VLMoeTextModel` (transformers 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from qwen3vl_mlx._mlx_lm.models.activations import swiglu
from qwen3vl_mlx._mlx_lm.models.base import (
    create_attention_mask,
    quantized_scaled_dot_product_attention,
)
from qwen3vl_mlx._mlx_lm.models.switch_layers import SwitchGLU
from qwen3vl_mlx.models.config import ModelConfig, TextConfig
from qwen3vl_mlx.models.rope import MRope, Rotation
from qwen3vl_mlx.models.vision import VisionFeatures

# From this many queries on, unpacked keys and the fused kernel beat products of packed ones.
_MANY_QUERIES = 9


class KVCache(Protocol):
    """What a layer needs of a cache, of one row or many, plain or quantized."""

    @property
    def offset(self) -> Any: ...  # int, or (B,) array

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]: ...

    def make_mask(self, N: int, return_array: bool, window_size: int | None) -> Any: ...  # noqa: N803


@dataclass(frozen=True)
class VisualTokens:
    """Features of the M visual tokens among a pass' B x L tokens, and where they stand."""

    rows: mx.array  # (M,) int32, index into the flattened (B * L) tokens
    features: VisionFeatures


def set_rows(x: mx.array, rows: mx.array, values: mx.array) -> mx.array:
    """x (B, L, D) with flattened rows replaced by values (M, D)."""
    flat = x.reshape(-1, x.shape[-1])
    flat[rows] = values.astype(x.dtype)
    return flat.reshape(x.shape)


def add_rows(x: mx.array, rows: mx.array, values: mx.array) -> mx.array:
    """x (B, L, D) with values (M, D) added to flattened rows."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.at[rows].add(values.astype(x.dtype)).reshape(x.shape)


def attend(q: mx.array, keys: Any, values: Any, scale: float, mask: Any) -> mx.array:
    """softmax(q k^T * scale) v, (B, heads, L, head_dim), over what a cache gave.

    keys, values: arrays (B, kv_heads, K, head_dim), or triples (packed, scales, biases).
    """
    if not isinstance(keys, tuple):
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    head_dim = q.shape[-1]
    bits = 32 * keys[0].shape[-1] // head_dim
    group_size = head_dim // keys[1].shape[-1]
    if q.shape[2] < _MANY_QUERIES:
        return quantized_scaled_dot_product_attention(
            q, keys, values, scale=scale, mask=mask, group_size=group_size, bits=bits
        )
    k, v = (
        mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits)
        for packed, scales, biases in (keys, values)
    )
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


class Attention(nn.Module):
    def __init__(self, config: TextConfig, rope: MRope):
        super().__init__()
        hidden, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = head_dim**-0.5
        self.rope = rope
        self.q_proj = nn.Linear(hidden, self.num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * head_dim, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, rotation: Rotation, mask: Any, cache: KVCache | None
    ) -> mx.array:
        B, L, _ = x.shape  # noqa: N806
        q = self.q_norm(self.q_proj(x).reshape(B, L, self.num_heads, -1)).swapaxes(1, 2)
        k = self.k_norm(self.k_proj(x).reshape(B, L, self.num_kv_heads, -1)).swapaxes(1, 2)
        v = self.v_proj(x).reshape(B, L, self.num_kv_heads, -1).swapaxes(1, 2)
        q, k = self.rope(q, rotation), self.rope(k, rotation)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = attend(q, k, v, self.scale, mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class SparseMoeBlock(nn.Module):
    """Top-k experts, weighted by their softmax over all experts renormalised to sum to one."""

    def __init__(self, config: TextConfig):
        super().__init__()
        assert config.moe is not None
        self.top_k = config.moe.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.moe.num_experts, bias=False)
        self.switch_mlp = SwitchGLU(
            config.hidden_size, config.moe.moe_intermediate_size, config.moe.num_experts
        )

    def __call__(self, x: mx.array) -> mx.array:
        scores = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)  # (B, L, experts)
        chosen = mx.argpartition(-scores, kth=self.top_k - 1, axis=-1)[..., : self.top_k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(x.dtype)
        return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, index: int, rope: MRope):
        super().__init__()
        sparse = config.moe is not None and index in config.moe.sparse_layers
        self.self_attn = Attention(config, rope)
        self.mlp = SparseMoeBlock(config) if sparse else MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, rotation: Rotation, mask: Any, cache: KVCache | None
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.rope = MRope(config.rope, config.head_dim)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i, self.rope) for i in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        token_ids: mx.array,
        positions: mx.array,
        cache: list[KVCache] | None = None,
        visual: VisualTokens | None = None,
    ) -> mx.array:
        """Hidden states (B, L, hidden_size) after the last norm.

        token_ids: (B, L). positions: (3, B, L) three-axis position ids, or (B,) the position of
        each row's first token where all axes count together. cache: one per layer, updated.
        visual: replaces placeholder embeddings, and adds to the first layers' outputs.
        """
        # Some quantized embeddings come out in bfloat16 whatever the model's type.
        x = self.embed_tokens(token_ids).astype(self.norm.weight.dtype)
        if visual is not None:
            x = set_rows(x, visual.rows, visual.features.embeds)
        rotation = self.rope.rotation(positions, token_ids.shape[1])
        mask = create_attention_mask(x, cache[0] if cache else None)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, cache[index] if cache else None)
            if visual is not None and index < len(visual.features.deepstack):
                x = add_rows(x, visual.rows, visual.features.deepstack[index])
        return self.norm(x)


class LanguageModel(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.model = TextModel(config.text)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def __call__(
        self,
        token_ids: mx.array,
        positions: mx.array,
        cache: list[KVCache] | None = None,
        visual: VisualTokens | None = None,
    ) -> mx.array:
        """Hidden states: see `TextModel`. `logits` turns the rows that are wanted into logits."""
        return self.model(token_ids, positions, cache, visual)

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., hidden_size) to (..., vocab_size)."""
        if "lm_head" in self:
            return self.lm_head(hidden)
        return self.model.embed_tokens.as_linear(hidden)
