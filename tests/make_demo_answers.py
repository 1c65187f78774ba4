"""Ask transformers about drawn scenes and keep its answers, for tests without torch.

Writes tests/data/demo_scenes_transformers.json. Needs torch and transformers (extra `dev`). Run
`python tests/make_demo_answers.py` from the repository's root after a change of the scenes or of
the bundled checkpoint; it takes a minute. The answers are greedy, in float32. Each question is one
user message of one picture, then the text; there is no system message.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.demo.scenes import is_correct, make_scene, questions

OUTPUT = Path(__file__).parent / "data" / "demo_scenes_transformers.json"
MAX_TOKENS = 200


class Reference:
    """The demo checkpoint in transformers, without the parts that need torchvision."""

    def __init__(self, folder: Path = CHECKPOINT) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        settings.pop("image_processor_type")  # the class of the torchvision processor
        self.processor = Qwen2VLImageProcessorPil(**settings)

    def inputs(self, image: Image.Image, question: str) -> dict[str, torch.Tensor]:
        pixels = self.processor(images=[image], return_tensors="pt")
        pads = int(pixels["image_grid_thw"].prod()) // self.processor.merge_size**2
        prompt = (
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * pads}<|vision_end|>{question}"
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }

    @torch.inference_mode()
    def answer(self, image: Image.Image, question: str) -> str:
        inputs = self.inputs(image, question)
        out = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))


def records(reference: Reference, scenes: int) -> list[dict[str, Any]]:
    """Ask for a description of each scene of seeds 0, 1, ... and one question of its own."""
    asked = []
    for seed in range(scenes):
        scene = make_scene(seed)
        image = scene.draw()
        described, *others = questions(scene)
        for question in (described, Random(seed).choice(others)):
            answer = reference.answer(image, question.question)
            asked.append(
                {
                    "seed": seed,
                    "kind": "text" if scene.text else "shapes",
                    "question": question.question,
                    "answer": answer,
                    "correct": is_correct(question, answer),
                }
            )
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    asked = records(Reference(), arguments.scenes)
    lines = ",\n".join(json.dumps(record) for record in asked)
    arguments.output.write_text(f"[\n{lines}\n]\n")
    print(f"{arguments.output}: {sum(r['correct'] for r in asked)} of {len(asked)} right")


if __name__ == "__main__":
    main()
