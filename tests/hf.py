"""Tiny checkpoints through Hugging Face transformers, stage by stage. Needs torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from stages import FOLLOWING, Scene, Stages
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as image_smart_resize,
)
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import (
    smart_resize as video_smart_resize,
)
from transformers.video_utils import VideoMetadata

__all__ = ["image_smart_resize", "video_smart_resize"]


def load_hf(folder: Path) -> Any:
    """The checkpoint in float32, with attention spelled out."""
    torch.set_num_threads(2)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def resave(model: Any, source: Path, folder: Path) -> Path:
    """Save as transformers 5 does (`rope_parameters`, transposed experts); copies the rest."""
    model.save_pretrained(folder)
    for path in source.iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    return folder


def image_patches(
    images: Sequence[Image.Image], folder: Path, **settings: Any
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """pixel_values (N, C * T * P * P) and image_grid_thw by HF's PIL processor."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    output = processor(images=list(images), return_tensors="np", **settings)
    return output["pixel_values"], output["image_grid_thw"]


def video_patches(
    frames: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
    """Patches (N, C * T * P * P) of frames (F, H, W, 3) that need no resizing, and their grid.

    HF resizes videos with torchvision, which is not needed here, and not installed.
    """
    scaled = (torch.tensor(frames).permute(0, 3, 1, 2).float() - 127.5) / 127.5
    patchify = Qwen3VLVideoProcessor.patchify
    patches, *grid = patchify(
        None, scaled[None], patch_size=16, merge_size=2, temporal_patch_size=2
    )
    return patches[0].numpy(), (grid[0], grid[1], grid[2])


def read_patches(patches: npt.NDArray[Any], temporal: int = 2, size: int = 16) -> npt.NDArray[Any]:
    """HF's (N, C * T * P * P) with the axes in this package's order: (N, T, P, P, C)."""
    return patches.reshape(len(patches), 3, temporal, size, size).transpose(0, 2, 3, 4, 1)


def timestamps(num_frames: int, fps: float, temporal: int) -> list[float]:
    indices = list(range(num_frames))
    return Qwen3VLProcessor._calculate_timestamps(None, indices, fps, temporal)


def prompt_ids(
    folder: Path,
    messages: Sequence[dict[str, Any]],
    images: Sequence[Image.Image],
    videos: Sequence[tuple[Sequence[Image.Image], float]],
    **template: Any,
) -> list[int]:
    """Token ids by HF's tokenizer, template and expansions; videos are (frames, fps).

    The template's wrapper around a video is replaced with the placeholder, as transformers 4.57
    did when the models came out; 5.x leaves an outer pair of tokens around the frames.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, **template
    )
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    video_processor = Qwen3VLVideoProcessor.from_pretrained(folder)
    stand_in = SimpleNamespace(
        image_processor=image_processor,
        video_processor=video_processor,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        _calculate_timestamps=partial(Qwen3VLProcessor._calculate_timestamps, None),
    )
    image_runs = []
    if images:
        output = image_processor(images=list(images), return_tensors="np")
        expand_image = partial(Qwen3VLProcessor.replace_image_token, stand_in, output)
        image_runs = [expand_image(i) for i in range(len(images))]
    expand_video = partial(Qwen3VLProcessor.replace_video_token, stand_in)
    video_runs = [
        expand_video(_video_inputs(video_processor, frames, fps), 0) for frames, fps in videos
    ]
    for placeholder, runs in (
        ("<|image_pad|>", image_runs),
        ("<|vision_start|><|video_pad|><|vision_end|>", video_runs),
    ):
        before, *rest = text.split(placeholder)
        text = before + "".join(run + after for run, after in zip(runs, rest, strict=True))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _video_inputs(
    processor: Qwen3VLVideoProcessor, frames: Sequence[Image.Image], fps: float
) -> dict[str, Any]:
    count = len(frames)
    rows, cols = video_smart_resize(
        num_frames=count,
        height=frames[0].height,
        width=frames[0].width,
        factor=32,
        min_pixels=processor.size.shortest_edge,
        max_pixels=processor.size.longest_edge,
    )
    metadata = VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
    grid = np.array([[(count + 1) // 2, rows // 16, cols // 16]])
    return {"video_grid_thw": grid, "video_metadata": [metadata]}


def model_inputs(
    model: Any, folder: Path, scenes: Sequence[Scene], rows: Sequence[npt.NDArray[np.int32]]
) -> dict[str, torch.Tensor]:
    """Arguments of HF's forward for left-padded rows of expanded ids, FOLLOWING appended."""
    longest = max(map(len, rows)) + len(FOLLOWING)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        whole = torch.tensor([*row.tolist(), *FOLLOWING])
        ids[b, longest - len(whole) :] = whole
        mask[b, longest - len(whole) :] = 1
    kinds = (ids == model.config.image_token_id) + 2 * (ids == model.config.video_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds.int()}
    if images := [Image.fromarray(pixels) for scene in scenes for pixels in scene.images]:
        pixel_values, grids = image_patches(images, folder)
        inputs |= {
            "pixel_values": torch.tensor(pixel_values),
            "image_grid_thw": torch.tensor(grids),
        }
    if videos := [video_patches(frames) for scene in scenes for frames in scene.videos]:
        inputs |= {
            "pixel_values_videos": torch.tensor(np.concatenate([patches for patches, _ in videos])),
            "video_grid_thw": torch.tensor([grid for _, grid in videos]),
        }
    return inputs


def rope_index(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """HF's position ids (3, B, L) and rope deltas (B,)."""
    names = (
        "input_ids",
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "attention_mask",
    )
    arguments = {name: inputs[name] for name in names if name in inputs}
    position_ids, deltas = model.model.get_rope_index(**arguments)
    return position_ids.numpy(), deltas[:, 0].numpy()


def run(model: Any, inputs: dict[str, torch.Tensor]) -> list[Stages]:
    """Every stage of a forward pass, as in `stages.stages`, one dict per row.

    Stages of the tower, which knows no rows, are in the first.
    """
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, given, output, name=name: calls.setdefault(name, []).append(
                (given[0], output)
            )
        )
        for name, module in _modules(model).items()
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    tower: Stages = {}
    kinds = [kind for kind in ("image", "video") if f"{kind}_grid_thw" in inputs]
    for name in [name for name in calls if not name.startswith(("layer.", "norm"))]:
        for kind, (given, output) in zip(kinds, calls.pop(name), strict=True):
            tower[f"{kind}.{name}"] = output.numpy()
            if name == "block.0":
                tower[f"{kind}.positions"] = given.numpy()
    whole: dict[str, torch.Tensor] = {"logits": logits}
    for name, ((given, output),) in calls.items():
        whole |= {name: output} if name == "norm" else {f"{name}.in": given, f"{name}.out": output}
    rows = [_row(whole, b, int(mask.sum())) for b, mask in enumerate(inputs["attention_mask"])]
    rows[0] |= tower
    return rows


def _row(whole: dict[str, torch.Tensor], b: int, length: int) -> Stages:
    """One row without its padding; FOLLOWING counts for `decode` alone."""
    extra = len(FOLLOWING)
    row = {name: x[b, -length:-extra].numpy() for name, x in whole.items()}
    return row | {"decode": whole["logits"][b, -extra - 1 :].numpy()}


def _modules(model: Any) -> dict[str, torch.nn.Module]:
    visual, decoder = model.model.visual, model.model.language_model
    named = {"patch_embed": visual.patch_embed, "merger": visual.merger, "norm": decoder.norm}
    named |= {f"block.{i}": block for i, block in enumerate(visual.blocks)}
    named |= {f"deepstack.{i}": merger for i, merger in enumerate(visual.deepstack_merger_list)}
    return named | {f"layer.{i}": layer for i, layer in enumerate(decoder.layers)}
