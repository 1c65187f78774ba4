"""config.json as frozen dataclasses, whatever wrote it.

Dialects: transformers 4.57 (`rope_theta`, `rope_scaling`, as on the Hub), transformers 5
(`rope_parameters`, `num_local_experts`, `vision_config.model_type = qwen3_vl_vision`) and
mlx-vlm / mlx-community output (`quantization` beside either). Only keys the model reads are kept.
A value this package cannot honour is a `ConfigError` naming its key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen3vl_mlx.errors import ConfigError
from qwen3vl_mlx.jsonfiles import read_config_values
from qwen3vl_mlx.models.section import Section

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
_VISION_TYPES = (*MODEL_TYPES, "qwen3_vl_vision", "qwen3_vl_moe_vision")
_TEXT_TYPES = (*MODEL_TYPES, "qwen3_vl_text", "qwen3_vl_moe_text")

# Families taken for Qwen3-VL by mistake, by model_type, and what runs them on a Mac, if known.
_OTHER_FAMILIES = (
    (r"qwen2(_moe)?", "Qwen2 or Qwen2.5, text only", "mlx-lm"),
    (r"qwen3(_moe)?", "Qwen3, text only", "mlx-lm"),
    (r"qwen3_next", "Qwen3-Next, text only", "mlx-lm"),
    (r"qwen2_vl(_.+)?", "Qwen2-VL", "mlx-vlm"),
    (r"qwen2_5_vl(_.+)?", "Qwen2.5-VL", "mlx-vlm"),
    (r"qwen3_5(_.+)?", "Qwen3.5", "mlx-vlm"),
    (r"qwen3_omni(_.+)?", "Qwen3-Omni", "mlx-vlm"),
    (r"qwen2_5_omni(_.+)?", "Qwen2.5-Omni", None),
    (r"qwen2_audio(_.+)?", "Qwen2-Audio", None),
    (r"qwen3_asr(_.+)?", "Qwen3-ASR", None),
)


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv:2309.00071), as in HF `_compute_yarn_parameters`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class RopeConfig:
    """Interleaved M-RoPE: `mrope_section` counts frequencies per axis (time, height, width)."""

    theta: float
    mrope_section: tuple[int, int, int]
    yarn: YarnConfig | None = None


@dataclass(frozen=True)
class MoeConfig:
    """Which decoder layers route over experts, and how."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    sparse_layers: frozenset[int]


@dataclass(frozen=True)
class TextConfig:
    """The decoder: `TextConfig.head_dim` is read, never derived where the file gives it."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool
    rope: RopeConfig
    moe: MoeConfig | None = None


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `num_position_embeddings` is a square table."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Quantization:
    """How a module was quantized: `mx.quantize`'s group size, bits and mode."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True)
class QuantizationConfig:
    """The checkpoint's default and its exceptions by module path (None: left whole)."""

    default: Quantization
    overrides: Mapping[str, Quantization | None]


@dataclass(frozen=True)
class ModelConfig:
    """All of config.json that the model reads."""

    model_type: str
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    quantization: QuantizationConfig | None = None

    def untied(self) -> ModelConfig:
        """The same with an output head of its own."""
        return replace(self, tie_word_embeddings=False)


def read_config(folder: Path) -> ModelConfig:
    """Read `folder/config.json`. Raises CheckpointError (no file, not JSON) or ConfigError."""
    return parse_config(read_config_values(folder))


def parse_config(values: Mapping[str, Any]) -> ModelConfig:
    """Build a `ModelConfig` from config.json's object. Raises ConfigError naming the key."""
    top = Section(values, "")
    if values.get("model_type") not in MODEL_TYPES:
        raise top.error("model_type", _other_family(values.get("model_type")))
    text_section = top.section("text_config")
    text_section.one_of("model_type", _TEXT_TYPES, default="qwen3_vl_text")
    text = _text(text_section)
    vision = _vision(top.section("vision_config"))
    if vision.out_hidden_size != text.hidden_size:
        raise ConfigError(
            f"config.json: vision_config.out_hidden_size is {vision.out_hidden_size} but "
            f"text_config.hidden_size is {text.hidden_size}; they must be equal"
        )
    if len(vision.deepstack_visual_indexes) > text.num_hidden_layers:
        raise ConfigError(
            "config.json: vision_config.deepstack_visual_indexes has more entries "
            f"({len(vision.deepstack_visual_indexes)}) than text_config.num_hidden_layers "
            f"({text.num_hidden_layers})"
        )
    if values.get("image_token_id") == values.get("video_token_id"):
        raise ConfigError("config.json: image_token_id and video_token_id must differ")
    # transformers 5 writes the class default into text_config of MoE models: the top level rules.
    tied = text_section.flag("tie_word_embeddings", default=False)
    return ModelConfig(
        model_type=str(values["model_type"]),
        text=text,
        vision=vision,
        image_token_id=top.integer("image_token_id", least=0),
        video_token_id=top.integer("video_token_id", least=0),
        vision_start_token_id=top.integer("vision_start_token_id", least=0),
        vision_end_token_id=top.integer("vision_end_token_id", least=0),
        tie_word_embeddings=top.flag("tie_word_embeddings", default=tied),
        quantization=_quantization(top),
    )


def _other_family(model_type: Any) -> str:
    """What to say of a checkpoint that is not of this family."""
    problem = (
        f"is {model_type!r}, expected one of {', '.join(MODEL_TYPES)}: this package runs Qwen3-VL "
        "checkpoints only"
    )
    if model_type in (*_VISION_TYPES, *_TEXT_TYPES):
        return f"{problem}, and this is one half of such a checkpoint: give the whole one"
    for pattern, family, runner in _OTHER_FAMILIES:
        if re.fullmatch(pattern, str(model_type)):
            ending = f"; {runner} runs it" if runner else ""
            return f"{problem}, and this is {family}{ending}"
    return f"{problem}; mlx-lm runs text models, mlx-vlm other models that see"


def _text(section: Section) -> TextConfig:
    section.one_of("hidden_act", ("silu",), default="silu")
    hidden_size = section.integer("hidden_size")
    heads = section.integer("num_attention_heads")
    kv_heads = section.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise section.error(
            "num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})"
        )
    moe = _moe(section)
    # HF's own class defaults for a file without the key.
    head_dim = section.integer("head_dim", default=hidden_size // heads if moe else 128)
    return TextConfig(
        hidden_size=hidden_size,
        num_hidden_layers=section.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=section.integer("intermediate_size"),
        vocab_size=section.integer("vocab_size"),
        rms_norm_eps=section.number("rms_norm_eps", default=1e-6),
        max_position_embeddings=section.integer("max_position_embeddings"),
        attention_bias=section.flag("attention_bias", default=False),
        rope=_rope(section, head_dim),
        moe=moe,
    )


def _moe(section: Section) -> MoeConfig | None:
    names = [key for key in ("num_experts", "num_local_experts") if section.has(key)]
    counts = {section.integer(key, least=0) for key in names}
    if len(counts) > 1:
        raise section.error("num_experts", "contradicts num_local_experts")
    if not counts or counts == {0}:
        return None
    num_experts = counts.pop()
    per_token = section.integer("num_experts_per_tok")
    if per_token > num_experts:
        raise section.error(
            "num_experts_per_tok", f"({per_token}) is more than the {num_experts} experts"
        )
    step = section.integer("decoder_sparse_step", default=1)
    dense = section.integers("mlp_only_layers", default=())
    layers = range(section.integer("num_hidden_layers"))
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        moe_intermediate_size=section.integer("moe_intermediate_size"),
        sparse_layers=frozenset(i for i in layers if i not in dense and (i + 1) % step == 0),
    )


def _rope(section: Section, head_dim: int) -> RopeConfig:
    """Merge the two dialects: `rope_parameters`, or `rope_scaling` with `rope_theta` beside it."""
    found = [key for key in ("rope_parameters", "rope_scaling") if section.has(key)]
    if not found:
        raise section.error("rope_scaling", "(or rope_parameters) is missing")
    rope = section.section(found[0])
    if len(found) == 2:
        other = section.section(found[1])
        for key in ("rope_type", "mrope_section", "factor"):
            if rope.has(key) and other.has(key) and rope.values[key] != other.values[key]:
                raise rope.error(key, f"contradicts {other.name(key)}")
    thetas = {s.name("rope_theta"): s for s in (rope, section) if s.has("rope_theta")}
    values = {s.number("rope_theta") for s in thetas.values()}
    if len(values) != 1:
        problem = "contradict each other" if values else "is missing"
        raise ConfigError(
            f"config.json: {' and '.join(thetas) or section.name('rope_theta')} {problem}"
        )
    sections = rope.integers("mrope_section", default=(24, 20, 20))
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != head_dim // 2:
        raise rope.error(
            "mrope_section",
            f"{list(sections)} must be three counts that sum to head_dim / 2 = {head_dim // 2}",
        )
    if 3 * sections[1] > head_dim // 2 + 1 or 3 * sections[2] > head_dim // 2:
        raise rope.error("mrope_section", f"{list(sections)} does not fit the interleaved layout")
    if not rope.flag("mrope_interleaved", default=True):
        raise rope.error("mrope_interleaved", "is false: only the interleaved layout is Qwen3-VL's")
    kind_key = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.one_of(kind_key, ("default", "mrope", "yarn"), default="default")
    yarn = _yarn(rope, section) if kind == "yarn" else None
    return RopeConfig(values.pop(), (sections[0], sections[1], sections[2]), yarn)


def _yarn(rope: Section, text: Section) -> YarnConfig:
    factor = rope.number("factor")
    default_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    if rope.has("mscale") and rope.has("mscale_all_dim") and factor > 1:
        scales = [
            0.1 * rope.number(key) * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim")
        ]
        default_factor = scales[0] / scales[1]
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", default=text.integer("max_position_embeddings")
        ),
        attention_factor=rope.number("attention_factor", default=default_factor),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        truncate=rope.flag("truncate", default=True),
    )


def _vision(section: Section) -> VisionConfig:
    section.one_of("model_type", _VISION_TYPES, default="qwen3_vl")
    section.one_of("hidden_act", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    vision = VisionConfig(
        depth=section.integer("depth"),
        hidden_size=section.integer("hidden_size"),
        num_heads=section.integer("num_heads"),
        intermediate_size=section.integer("intermediate_size"),
        out_hidden_size=section.integer("out_hidden_size"),
        num_position_embeddings=section.integer("num_position_embeddings"),
        deepstack_visual_indexes=section.integers("deepstack_visual_indexes"),
        in_channels=section.integer("in_channels", default=3),
        patch_size=section.integer("patch_size"),
        temporal_patch_size=section.integer("temporal_patch_size"),
        spatial_merge_size=section.integer("spatial_merge_size"),
    )
    if vision.hidden_size % (4 * vision.num_heads):
        raise section.error(
            "hidden_size", f"({vision.hidden_size}) must be a multiple of 4 x num_heads"
        )
    if math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        raise section.error("num_position_embeddings", "must be a square number")
    indexes = vision.deepstack_visual_indexes
    if list(indexes) != sorted(set(indexes)) or not all(0 <= i < vision.depth for i in indexes):
        raise section.error(
            "deepstack_visual_indexes",
            f"{list(indexes)} must rise and lie in 0 to depth - 1 = {vision.depth - 1}",
        )
    return vision


def _quantization(top: Section) -> QuantizationConfig | None:
    for key in ("quantization", "quantization_config"):
        if not top.has(key):
            continue
        section = top.section(key)
        if section.has("quant_method"):
            method = section.values["quant_method"]
            if method == "fp8":
                _check_fp8(section)
                return None  # no setting of the model: its tensors are made whole as they are read
            raise section.error(
                "quant_method",
                f"is {method!r}: only MLX quantization and FP8 blocks can be read; "
                "use an MLX, FP8 or unquantized checkpoint",
            )
        overrides = {
            path: _module_quantization(Section(value, section.name(path)))
            if isinstance(value, Mapping)
            else None
            for path, value in section.values.items()
            if isinstance(value, Mapping) or value is False
        }
        return QuantizationConfig(_module_quantization(section), overrides)
    return None


def _check_fp8(section: Section) -> None:
    """Only blocks of 128 x 128 with a scale each, as Qwen releases them."""
    block = section.integers("weight_block_size", default=(128, 128))
    if block != (128, 128):
        raise section.error("weight_block_size", f"is {list(block)}, expected [128, 128]")


def _module_quantization(section: Section) -> Quantization:
    mode = section.one_of("mode", ("affine", "mxfp4", "mxfp8", "nvfp4"), default="affine")
    return Quantization(section.integer("group_size"), section.integer("bits"), mode)
