"""The demo checkpoint in transformers, to compare with. Needs torch and transformers (`dev`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.demo.rows import tools_message


class Reference:
    """A checkpoint in transformers, in float32, without the parts that need torchvision."""

    def __init__(self, folder: Path = CHECKPOINT) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        settings.pop("image_processor_type")  # the class of the torchvision processor
        self.processor = Qwen2VLImageProcessorPil(**settings)

    def inputs(
        self, images: Sequence[Image.Image], question: str, *, zoom: bool = False
    ) -> dict[str, torch.Tensor]:
        """One user message: the pictures, then the question. zoom: with the tool `ZOOM`."""
        inputs: dict[str, torch.Tensor] = {}
        shown = ""
        if images:
            pixels = self.processor(images=list(images), return_tensors="pt")
            inputs = {key: pixels[key] for key in ("pixel_values", "image_grid_thw")}
            for grid in pixels["image_grid_thw"]:
                pads = int(grid.prod()) // self.processor.merge_size**2
                shown += f"<|vision_start|>{'<|image_pad|>' * pads}<|vision_end|>"
        system = tools_message() if zoom else ""
        prompt = f"{system}<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        inputs["input_ids"] = ids
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        return inputs

    @torch.inference_mode()
    def answer(
        self,
        images: Sequence[Image.Image],
        question: str,
        max_tokens: int = 200,
        *,
        guess: str | None = None,
        zoom: bool = False,
    ) -> str:
        """The greedy answer. A `guess` that is right saves the most of the time, and no more."""
        inputs = self.inputs(images, question, zoom=zoom)
        if guess is not None and self._would_say(inputs, guess, max_tokens):
            return guess
        out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def _would_say(self, inputs: dict[str, torch.Tensor], guess: str, max_tokens: int) -> bool:
        """Whether each token of `guess`, and its end, is the likeliest after those before it."""
        said = self.tokenizer(guess, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = torch.cat([inputs["input_ids"], said.long()], 1)
        given = inputs | {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
        }
        kept = said.shape[1] + 1
        best = self.model(**given, logits_to_keep=kept, use_cache=False).logits[0].argmax(-1)
        ends = self.model.generation_config.eos_token_id
        ended = int(best[-1]) in (ends if isinstance(ends, list) else [ends])
        return kept <= max_tokens and ended and torch.equal(best[:-1], said[0])
