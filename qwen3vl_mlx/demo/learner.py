"""The demo checkpoint as torch trains it: transformers' own model, its losses and optimizers."""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import AutoConfig, Qwen3VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.demo.heads import Heads

_BLOCKED = -1e4  # added to a score that must not count; -inf would make empty rows NaN


def make_model(seed: int) -> tuple[Qwen3VLForConditionalGeneration, Heads]:
    """Make the model in float32 with random weights, and the heads that are thrown away."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.dtype = torch.float32
    config._attn_implementation = "sdpa"
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = 0.05
    model = Qwen3VLForConditionalGeneration(config).float()
    visual, text = model.model.visual, model.model.language_model
    for part in (text, visual):
        part.config._attn_implementation = "grouped"
    visual.patch_embed.forward = MethodType(_embed_one_frame, visual.patch_embed)
    with torch.no_grad():
        visual.pos_embed.weight.copy_(_waves(visual.num_grid_per_side, config.vision_config))
        for block in visual.blocks:  # a block that adds nothing at first does no harm
            for layer in (block.attn.proj, block.mlp.linear_fc2):
                layer.weight.zero_()
        for block in text.layers:
            for layer in (block.self_attn.o_proj, block.mlp.down_proj):
                layer.weight.zero_()
    vision = config.vision_config
    return model, Heads(vision.hidden_size, vision.out_hidden_size)


def _waves(side: int, vision: Any) -> Tensor:
    """Sines and cosines of row and column, (side * side, hidden_size): neighbours start alike."""
    count = vision.hidden_size // 4
    turns = math.pi * torch.arange(side)[:, None] / side * torch.logspace(0, 3, count, base=2)
    wave = torch.cat([turns.sin(), turns.cos()], 1)  # (side, hidden_size / 2)
    rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, -1)


def _embed_one_frame(self: Any, patches: Tensor) -> Tensor:
    # both frames of a picture are the same, so their weights can be added before the product
    weight = self.proj.weight.sum(2).flatten(1)
    return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    # two products and a softmax: backward takes a third of the fused kernel's time on a CPU
    batch, heads, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width) * scaling
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, length, length)
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    shares = (
        scores.softmax(-1, dtype=scores.dtype).to(value.dtype).view(batch, key.shape[1], -1, length)
    )
    mixed = (shares @ value).view(batch, heads, length, width)
    return mixed.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("grouped", _grouped_attention)


def see(model: Qwen3VLForConditionalGeneration, batch: dict[str, Any]) -> Any:
    """Run the vision tower: `patches` are levels, (patches, 3 * 16 * 16) in merged order."""
    pixels = batch["patches"].float().div_(127.5).sub_(1)
    return model.model.visual(pixels, grid_thw=batch["grids"])


def answer_logits(
    model: Qwen3VLForConditionalGeneration, batch: dict[str, Any], seen: Any
) -> Tensor:
    """Logits of every token that has a weight, from the one before it."""
    ids, segments = batch["ids"], batch["segments"]
    text = model.model.language_model
    pads = ids == model.config.image_token_id
    embedded = text.embed_tokens(ids)
    embedded = embedded.masked_scatter(pads[..., None], seen.pooler_output.to(embedded.dtype))
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, None, :] == segments[:, :, None]
    mask = causal & (same | (segments == 0)[:, None, :])
    hidden = text(
        inputs_embeds=embedded,
        attention_mask=torch.zeros(()).masked_fill(~mask[:, None], _BLOCKED),
        position_ids=batch["positions"],
        visual_pos_masks=pads,
        deepstack_visual_embeds=seen.deepstack_features,
        use_cache=False,
    ).last_hidden_state
    before = (batch["weights"][:, 1:] > 0).nonzero(as_tuple=True)
    return model.lm_head(hidden[:, :-1][before]).float()


def answer_loss(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    """Weighted cross entropy of the answers' tokens."""
    weights = batch["weights"][:, 1:]
    chosen = weights > 0
    losses = F.cross_entropy(logits, batch["ids"][:, 1:][chosen], reduction="none")
    return (losses * weights[chosen]).sum() / weights.sum()


def make_optimizers(
    model: nn.Module, heads: Heads, *, rate: float, muon_factor: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and mergers, split over processes; AdamW for the rest.

    Each group's `scale` is what a step's rate is multiplied by.
    """
    matrices, tables, others = [], [], []
    for name, parameter in (*model.named_parameters(), *heads.named_parameters(prefix="heads")):
        inner = "blocks." in name or ".layers." in name or "merger" in name
        if parameter.ndim == 2 and inner:
            matrices.append(parameter)
        elif parameter.ndim >= 2:
            tables.append(parameter)
        else:
            others.append(parameter)
    adam = torch.optim.AdamW(
        [{"params": tables, "scale": 1.0}, {"params": others, "scale": 1.0, "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True,
    )  # fmt: skip
    muon = ZeroRedundancyOptimizer(
        [{"params": matrices, "scale": muon_factor}],
        torch.optim.Muon,
        lr=rate,
        weight_decay=decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adam, muon]


def share_gradients(parameters: list[nn.Parameter]) -> None:
    """Average over processes the gradients of the parameters that were used."""
    used = [(p, p.grad) for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for _, gradient in used])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    parts = flat.split([p.numel() for p, _ in used])
    for (parameter, _), part in zip(used, parts, strict=True):
        parameter.grad = part.view_as(parameter)
