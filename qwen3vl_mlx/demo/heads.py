"""Throwaway heads that teach the demo's vision tower what each patch shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3vl_mlx.demo.rows import CHARACTERS, COLOR_NAMES, KINDS
from qwen3vl_mlx.demo.scenes import PLACES

BINS = 64  # of an edge's position across the picture
SHARES = ("kind", "color", "place", "char", "edge")  # what `Heads.forward` reports


class Heads(nn.Module):
    """What the helper losses read off patches and off what the language model is given."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        sizes = [len(KINDS), len(COLOR_NAMES), len(PLACES), len(CHARACTERS) + 1, 4 * BINS]
        self.sizes = sizes
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(sizes)))
        merged = [*sizes[:3], 2 * sizes[3], sizes[4]]
        self.merged_sizes = merged
        self.merged = nn.Sequential(nn.LayerNorm(out), nn.Linear(out, sum(merged)))

    def forward(self, patches: Tensor, merged: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and shares of patches right: kind, colour, place, character; edges' error."""
        found = self.patch(patches).float().split(self.sizes, -1)
        loss, shares = _helper_loss(list(found), targets)
        # a merged patch shows what the first of its patches with a thing shows
        groups = targets.view(-1, 4, 8)
        first = (groups[..., 0] > 0).int().argmax(1)
        best = groups[torch.arange(len(groups)), first]
        left, right = ((groups[:, [i, i + 2], 3]).amin(1) for i in (0, 1))
        kind, color, place, characters, edges = (
            self.merged(merged).float().split(self.merged_sizes, -1)
        )
        size = self.sizes[3]
        best_left = torch.cat([best[:, :3], left[:, None], best[:, 4:]], 1)
        merged_loss, _ = _helper_loss([kind, color, place, characters[:, :size], edges], best_left)
        merged_loss = merged_loss + _balanced(characters[:, size:], right.long(), best[:, 0] == 1)
        return loss + merged_loss, shares


def _balanced(logits: Tensor, labels: Tensor, things: Tensor) -> Tensor:
    """Cross entropy in which the many patches of background weigh a quarter of what things do."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    weights = torch.where(things, 1.0 / things.sum().clamp(min=1), 0.25 / (~things).sum())
    return (losses * weights).sum()


def _helper_loss(found: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    kind, color, place, character, edges = found
    thing = targets[:, 0] > 0
    labels = targets[:, :4].long()
    shape = targets[:, 0] > 1
    text = targets[:, 0] == 1
    loss = _balanced(kind, labels[:, 0], thing) + _balanced(color, labels[:, 1], thing)
    loss = loss + _balanced(character, labels[:, 3], text)
    if shape.any():
        loss = loss + F.cross_entropy(place[shape], labels[shape, 2])
        loss = loss + _edge_loss(edges[shape].view(-1, 4, BINS), targets[shape, 4:])
    with torch.no_grad():
        place_of = (edges[shape].view(-1, 4, BINS).softmax(-1) * torch.arange(BINS)).sum(-1)
        shares = torch.stack([
            (kind.argmax(-1) == labels[:, 0])[thing].float().mean(),
            (color.argmax(-1) == labels[:, 1])[thing].float().mean(),
            (place.argmax(-1) == labels[:, 2])[shape].float().mean(),
            (character.argmax(-1) == labels[:, 3])[text].float().mean(),
            (place_of / (BINS - 1) - targets[shape, 4:]).abs().mean(),
        ])  # fmt: skip
    return loss, shares


def _edge_loss(edges: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy with the two bins on either side of each edge, by how near they are.

    edges: (patches, 4, BINS) logits; wanted: (patches, 4), 0 to 1 across the picture.
    """
    place = wanted.clamp(0, 1) * (BINS - 1)
    low = place.floor().clamp(max=BINS - 2).long()
    part = place - low
    picked = edges.log_softmax(-1).gather(-1, torch.stack([low, low + 1], -1))
    return -((1 - part) * picked[..., 0] + part * picked[..., 1]).mean()
