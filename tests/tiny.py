"""Tiny random checkpoints in the Hub's layout, written without torch and equal on every machine.

Names and shapes are spelled out here from the Hub's layout, not taken from the package, so that the
package's loader is tested against something it did not make. Weights come from numpy's frozen
legacy generator.
"""

from __future__ import annotations

import json
import shutil
import zlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DEMO = Path(__file__).parents[1] / "qwen3vl_mlx" / "demo" / "checkpoint"
VARIANTS = ("dense64", "dense72", "moe")

_VISION = {
    "deepstack_visual_indexes": [0, 2, 3],
    "depth": 5,
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "initializer_range": 0.02,
    "num_heads": 2,
    "num_position_embeddings": 64,
    "out_hidden_size": 48,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 998,
    "dtype": "float32",
    "eos_token_id": 1000,
    "head_dim": 32,  # not hidden_size / num_attention_heads
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "mrope_interleaved": True,
        "mrope_section": [6, 5, 5],
        "rope_type": "default",
    },
    "rope_theta": 5000000,
    "use_cache": True,
    "vocab_size": 1024,
}
_MOE = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def tiny_config(variant: str) -> dict[str, Any]:
    """config.json of a variant, in the dialect of transformers 4.57.

    dense64: vision head_dim 64, tied head. dense72: vision head_dim 72, an MLP width no
    quantization group divides, untied. moe: vision head_dim 72, 8 experts, untied.
    """
    model_type = "qwen3_vl_moe" if variant == "moe" else "qwen3_vl"
    wide = {"hidden_size": 128, "intermediate_size": 192}
    odd = {"hidden_size": 144, "intermediate_size": 208}
    tied = variant == "dense64"
    text: dict[str, Any] = {**deepcopy(_TEXT), "model_type": f"{model_type}_text"}
    if variant == "moe":
        text |= _MOE
    else:
        text["tie_word_embeddings"] = tied
    return {
        "architectures": ["Qwen3VL" + ("Moe" * (variant == "moe")) + "ForConditionalGeneration"],
        "image_token_id": 1010,
        "model_type": model_type,
        "text_config": text,
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 1011,
        "vision_config": {**_VISION, "model_type": model_type, **(wide if tied else odd)},
        "vision_end_token_id": 1008,
        "vision_start_token_id": 1007,
    }


def hub_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hub's layout and its shape."""
    text, vision = config["text_config"], config["vision_config"]
    width, merged = vision["hidden_size"], 4 * vision["hidden_size"]
    hidden, head = text["hidden_size"], text["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inner: int) -> None:
        shapes[f"model.visual.{name}.weight"] = (out, inner)
        shapes[f"model.visual.{name}.bias"] = (out,)

    def norm(name: str, size: int) -> None:
        shapes[f"model.visual.{name}.weight"] = shapes[f"model.visual.{name}.bias"] = (size,)

    patch = (vision["in_channels"], vision["temporal_patch_size"], *[vision["patch_size"]] * 2)
    shapes["model.visual.patch_embed.proj.weight"] = (width, *patch)
    shapes["model.visual.patch_embed.proj.bias"] = (width,)
    shapes["model.visual.pos_embed.weight"] = (vision["num_position_embeddings"], width)
    for i in range(vision["depth"]):
        norm(f"blocks.{i}.norm1", width)
        norm(f"blocks.{i}.norm2", width)
        linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        linear(f"blocks.{i}.attn.proj", width, width)
        linear(f"blocks.{i}.mlp.linear_fc1", vision["intermediate_size"], width)
        linear(f"blocks.{i}.mlp.linear_fc2", width, vision["intermediate_size"])
    mergers = {"merger": width}
    mergers |= {
        f"deepstack_merger_list.{i}": merged for i in range(len(vision["deepstack_visual_indexes"]))
    }
    for name, norm_size in mergers.items():
        norm(f"{name}.norm", norm_size)
        linear(f"{name}.linear_fc1", merged, merged)
        linear(f"{name}.linear_fc2", vision["out_hidden_size"], merged)
    queries = text["num_attention_heads"] * head
    keys = text["num_key_value_heads"] * head
    for i in range(text["num_hidden_layers"]):
        layer = f"model.language_model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (size, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, queries)
        shapes[f"{layer}.self_attn.q_norm.weight"] = (head,)
        shapes[f"{layer}.self_attn.k_norm.weight"] = (head,)
        if "num_experts" in text:
            count, inner = text["num_experts"], text["moe_intermediate_size"]
            shapes[f"{layer}.mlp.gate.weight"] = (count, hidden)
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = (count, hidden, 2 * inner)
            shapes[f"{layer}.mlp.experts.down_proj"] = (count, inner, hidden)
        else:
            for name in ("gate_proj", "up_proj"):
                shapes[f"{layer}.mlp.{name}.weight"] = (text["intermediate_size"], hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, text["intermediate_size"])
    shapes["model.language_model.norm.weight"] = (hidden,)
    shapes["model.language_model.embed_tokens.weight"] = (text["vocab_size"], hidden)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    return shapes


def tiny_weights(config: dict[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """Random weights, of a size that keeps activations near one and every stage in play."""
    return {name: _random(name, shape) for name, shape in hub_shapes(config).items()}


def _random(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name and name.endswith("weight"):
        return (1 + 0.1 * draws).astype(np.float32)
    if name.endswith("bias"):
        return (0.1 * draws).astype(np.float32)
    if "pos_embed" in name or "embed_tokens" in name:
        return (0.5 * draws).astype(np.float32)
    inputs = shape[1] if "experts" in name else int(np.prod(shape[1:]))
    return (1.5 * draws / np.sqrt(inputs)).astype(np.float32)


def write_tiny(folder: Path, variant: str, **text_changes: Any) -> Path:
    """Write a variant's checkpoint with the demo's tokenizer and template; returns `folder`.

    text_changes replace keys of text_config.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(variant)
    config["text_config"] |= text_changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tiny_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder / name)
    for name, least, most in (
        ("preprocessor_config.json", 4096, 262144),
        ("video_preprocessor_config.json", 4096, 262144),
    ):
        settings = json.loads((DEMO / name).read_text())
        settings["size"] = {"shortest_edge": least, "longest_edge": most}
        (folder / name).write_text(json.dumps(settings))
    generation = {"do_sample": False, "eos_token_id": [1000, 998]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
