"""Vision tower and decoder as one tree of weights, named as MLX checkpoints name them."""

from __future__ import annotations

import mlx.nn as nn

from qwen3vl_mlx.models.config import ModelConfig
from qwen3vl_mlx.models.text import LanguageModel
from qwen3vl_mlx.models.vision import VisionModel


class Model(nn.Module):
    """`vision_tower` encodes patches, `language_model` reads tokens: see their modules."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionModel(config.vision)
        self.language_model = LanguageModel(config)
