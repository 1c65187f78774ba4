"""The sizes that Qwen3-VL was released in, Instruct and Thinking alike, as their config.json is."""

from __future__ import annotations

from types import MappingProxyType

from qwen3vl_mlx.models.config import (
    ModelConfig,
    MoeConfig,
    RopeConfig,
    TextConfig,
    VisionConfig,
)


def _config(
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    *,
    experts_of: int | None = None,
    kv_heads: int = 8,
    small: bool = False,
) -> ModelConfig:
    """experts_of: width of each of 128 experts. small: the smaller vision tower, a tied head."""
    moe = None if experts_of is None else MoeConfig(128, 8, experts_of, frozenset(range(layers)))
    text = TextConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=151_936,
        rms_norm_eps=1e-6,
        max_position_embeddings=262_144,
        attention_bias=False,
        rope=RopeConfig(5_000_000.0, (24, 20, 20)),
        moe=moe,
    )
    vision = VisionConfig(
        depth=24 if small else 27,
        hidden_size=1024 if small else 1152,
        num_heads=16,
        intermediate_size=4096 if small else 4304,
        out_hidden_size=hidden,
        num_position_embeddings=2304,
        deepstack_visual_indexes=(5, 11, 17) if small else (8, 16, 24),
        in_channels=3,
        patch_size=16,
        temporal_patch_size=2,
        spatial_merge_size=2,
    )
    return ModelConfig(
        model_type="qwen3_vl" if moe is None else "qwen3_vl_moe",
        text=text,
        vision=vision,
        image_token_id=151_655,
        video_token_id=151_656,
        vision_start_token_id=151_652,
        vision_end_token_id=151_653,
        tie_word_embeddings=small,
    )


# By size, in the spelling of the Hub's Qwen/Qwen3-VL-{size}-Instruct; smallest first.
RELEASED = MappingProxyType({
    "2B": _config(2048, 28, 16, 6144, small=True),
    "4B": _config(2560, 36, 32, 9728, small=True),
    "8B": _config(4096, 36, 32, 12_288),
    "30B-A3B": _config(2048, 48, 32, 6144, experts_of=768, kv_heads=4),
    "32B": _config(5120, 64, 64, 25_600),
    "235B-A22B": _config(4096, 94, 64, 12_288, experts_of=1536, kv_heads=4),
})  # fmt: skip


def size_of(config: ModelConfig) -> str | None:
    """Which of the released sizes a model has, by its decoder's shape; None for another."""
    text = config.text
    experts = text.moe.num_experts if text.moe else 0
    for size, known in RELEASED.items():
        other = known.text
        shape = (
            other.hidden_size,
            other.num_hidden_layers,
            other.moe.num_experts if other.moe else 0,
        )
        if shape == (text.hidden_size, text.num_hidden_layers, experts):
            return size
    return None
