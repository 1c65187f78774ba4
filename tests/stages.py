"""Small prompts through the package, stage by stage, for comparison with recorded or live HF runs.

A stage is the output of one module: `image.block.3`, `layer.0.out`, `logits`. Prompts are made of
token ids and random pixels, so that they depend on no tokenizer, template or image library.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import tiny
from passes import decode, forward
from PIL import Image

from qwen3vl_mlx._mlx_lm.models.cache import BatchKVCache
from qwen3vl_mlx.engine import kv_cache
from qwen3vl_mlx.models import text, vision
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.models.text import VisualTokens
from qwen3vl_mlx.models.vision import VisionFeatures
from qwen3vl_mlx.processing import image
from qwen3vl_mlx.processing.processor import Processor
from qwen3vl_mlx.processing.prompt import Prompt

Array: TypeAlias = npt.NDArray[np.float32]
Stages: TypeAlias = dict[str, Array]

TOLERANCE = 1e-4  # largest difference of a stage, as a share of its largest value
FOLLOWING = (17, 401, 86)  # decoded after every prompt
TEXT_TOKENS = 998  # ids below are ordinary text in the tiny checkpoints

# A number is that many text tokens; (height, width) an image; (frames, height, width) a video.
CASES: dict[str, tuple[int | tuple[int, ...], ...]] = {
    "text": (24,),
    "image": (3, (64, 96), 4),
    "odd grid": ((96, 160), 5),  # 6 x 10 patches
    "between": (7, (160, 96), 9),
    "three images": (2, (96, 160), (64, 64), 3, (160, 64), 5),
    "video": (3, (6, 64, 96), 4),
    "odd video": (2, (5, 96, 64), 4),  # the last frame counts twice
    "image and video": (2, (64, 96), 2, (5, 96, 64), 3, (96, 160), 4),
}


def _yarn(factor: float) -> dict[str, Any]:
    scaling = {
        "mrope_interleaved": True,
        "mrope_section": [6, 5, 5],
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 256,  # prompts of some 100 tokens must notice
    }
    return {"rope_scaling": scaling}


@dataclass(frozen=True)
class Checkpoint:
    """A tiny checkpoint: `tiny.write_tiny`'s variant, changed."""

    variant: str
    tied: bool | None = None  # None: as the variant has it
    text_changes: dict[str, Any] | None = None
    gelu: bool = False  # weights that tell exact from approximate GELU


CHECKPOINTS = {
    **{variant: Checkpoint(variant) for variant in tiny.VARIANTS},
    "dense64 untied": Checkpoint("dense64", tied=False),
    "dense72 tied": Checkpoint("dense72", tied=True),
    "yarn 2": Checkpoint("dense64", text_changes=_yarn(2.0)),
    "yarn 3": Checkpoint("dense72", text_changes=_yarn(3.0)),
    "gelu": Checkpoint("dense64", gelu=True),
}


# What tests/data/goldens holds: too large to keep every case of every checkpoint.
GOLDENS = {
    "dense64": ("text", "image and video"),
    "dense72": ("text", "three images", "image and video"),
    "moe": ("text", "image and video"),
    "yarn 2": ("between",),
    "gelu": ("image",),
}


def golden_file(name: str) -> Path:
    return Path(__file__).parent / "data" / "goldens" / f"{name.replace(' ', '-')}.npz"


@dataclass(frozen=True)
class Golden:
    """One case of one checkpoint, as HF ran it. `stages` are thinned by `digest`."""

    token_ids: npt.NDArray[np.int32]  # (L,)
    position_ids: npt.NDArray[np.int32]  # (3, L)
    rope_delta: int
    stages: Stages


def read_golden(name: str, case: str) -> Golden:
    with np.load(golden_file(name)) as file:
        arrays = {
            key.removeprefix(f"{case}/"): file[key]
            for key in file.files
            if key.startswith(f"{case}/")
        }
    thinned = {
        key.removeprefix("stage/"): x for key, x in arrays.items() if key.startswith("stage/")
    }
    return Golden(arrays["token_ids"], arrays["position_ids"], int(arrays["rope_delta"]), thinned)


def write_checkpoint(folder: Path, name: str) -> Path:
    """Write one of CHECKPOINTS in the Hub's layout."""
    from safetensors.numpy import save_file

    checkpoint = CHECKPOINTS[name]
    tiny.write_tiny(folder, checkpoint.variant, **(checkpoint.text_changes or {}))
    config = json.loads((folder / "config.json").read_text())
    if checkpoint.tied is not None:
        config["tie_word_embeddings"] = checkpoint.tied
        config["text_config"]["tie_word_embeddings"] = checkpoint.tied
        (folder / "config.json").write_text(json.dumps(config))
    weights = tiny.tiny_weights(config)
    if checkpoint.gelu:
        weights = {name: _at_gelus_tail(name, weight) for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _at_gelus_tail(name: str, weight: Array) -> Array:
    """The two GELUs differ by 5e-4 at most, but near -2.2, where they are small, by 1 %."""
    if "visual" in name and "linear_fc1" in name:
        return weight / 10 - (2.2 if name.endswith("bias") else 0.0)
    return weight * 100 if "visual" in name and "linear_fc2.weight" in name else weight


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise."""
    random = np.random.RandomState(seed)
    return Image.fromarray(random.randint(0, 256, (height, width, 3)).astype(np.uint8))


def film(count: int, height: int, width: int) -> list[Image.Image]:
    return [picture(height, width, seed) for seed in range(count)]


@dataclass(frozen=True)
class Scene:
    """Pixels, and token ids with one placeholder per image and per temporal patch of a video."""

    token_ids: tuple[int, ...]
    media: tuple[npt.NDArray[np.uint8], ...]  # (H, W, 3) images, (F, H, W, 3) videos

    @property
    def images(self) -> list[npt.NDArray[np.uint8]]:
        return [pixels for pixels in self.media if pixels.ndim == 3]

    @property
    def videos(self) -> list[npt.NDArray[np.uint8]]:
        return [pixels for pixels in self.media if pixels.ndim == 4]


def make_scene(case: str) -> Scene:
    """The raw material of one of CASES, equal on every machine."""
    config = tiny.tiny_config("dense64")  # all have the same token ids
    random = np.random.RandomState(zlib.crc32(case.encode()))
    start, end = config["vision_start_token_id"], config["vision_end_token_id"]
    ids: list[int] = []
    media: list[npt.NDArray[np.uint8]] = []
    for part in CASES[case]:
        if isinstance(part, int):
            ids += random.randint(0, TEXT_TOKENS, part).tolist()
            continue
        media.append(random.randint(0, 256, (*part, 3)).astype(np.uint8))
        if len(part) == 2:
            ids += [start, config["image_token_id"], end]
        else:
            for _ in range((part[0] + 1) // 2):
                times = random.randint(0, TEXT_TOKENS, 3).tolist()  # in a timestamp's place
                ids += [*times, start, config["video_token_id"], end]
    return Scene(tuple(ids), tuple(media))


def make_prompt(scene: Scene, processor: Processor) -> Prompt:
    settings = processor.settings
    media = [
        image.image_input(Image.fromarray(pixels), settings, settings.image)
        if pixels.ndim == 3
        else image.video_input([Image.fromarray(f) for f in pixels], 2.0, settings, settings.video)
        for pixels in scene.media
    ]
    return processor.layout(scene.token_ids, media)


def difference(ours: Array, theirs: Array) -> float:
    """Largest difference, as a share of the largest value of `theirs`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def differences(ours: Stages, theirs: Stages) -> dict[str, float]:
    """`difference` stage by stage; the two must have the same stages."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return {name: difference(ours[name], theirs[name]) for name in theirs}


def beyond_tolerance(ours: Stages, theirs: Stages) -> dict[str, float]:
    """The stages that differ too much, not-a-number included: empty where all is well."""
    found = differences(ours, theirs)
    return {name: value for name, value in found.items() if not value <= TOLERANCE}


def digest(x: Array) -> Array:
    """Every seventh row of (n, D), and the mean of all: small enough to keep, sees every row."""
    return np.concatenate([x[::7], x.mean(axis=0, keepdims=True)])


def stages(model: Model, prompt: Prompt) -> Stages:
    """Every stage of one prompt alone, and `decode`: logits of its last token and FOLLOWING."""
    found, features = tower_stages(model, prompt)
    (decoder,) = decoder_stages(model, [prompt], [features])
    return found | decoder | {"decode": decoded(model, prompt)}


def tower_stages(model: Model, prompt: Prompt) -> tuple[Stages, VisionFeatures | None]:
    """Stages of the vision tower, images and videos apart, and the features in prompt order."""
    found: Stages = {}
    parts: dict[int, VisionFeatures] = {}
    tower = model.vision_tower
    for kind in ("image", "video"):
        chosen = [i for i, medium in enumerate(prompt.media) if medium.kind == kind]
        if not chosen:
            continue
        media = [prompt.media[i] for i in chosen]
        settings = media[0].settings
        raw = mx.array(np.concatenate([medium.patches for medium in media]))
        patches = vision.normalize_patches(raw, settings.mean, settings.std, mx.float32)
        tables = vision.vision_tables([medium.grid_thw for medium in media], tower.config)
        with recorded(tower_names(model)) as calls:
            features = tower(patches, tables)
        found |= {f"{kind}.{name}": _numpy(output) for name, (_, output) in calls.items()}
        found[f"{kind}.positions"] = _numpy(calls["block.0"][0])
        start = 0
        for i, medium in zip(chosen, media, strict=True):
            parts[i] = features[start : start + medium.num_tokens]
            start += medium.num_tokens
    ordered = [parts[i] for i in range(len(parts))]
    return found, VisionFeatures.concatenate(ordered) if ordered else None


def decoder_stages(
    model: Model,
    prompts: Sequence[Prompt],
    features: Sequence[VisionFeatures | None],
    cache: list[Any] | None = None,
) -> list[Stages]:
    """Stages of the decoder for a batch of left-padded prompts: one per prompt, padding cut off."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    longest = max(lengths)
    token_ids = np.zeros((len(prompts), longest), np.int32)
    positions = np.zeros((3, len(prompts), longest), np.int32)
    rows: list[npt.NDArray[np.int32]] = []
    for b, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        token_ids[b, longest - length :] = prompt.token_ids
        positions[:, b, longest - length :] = prompt.position_ids
        rows.append(prompt.visual_rows + (b * longest + longest - length))
    visual: VisualTokens | None = None
    if present := [part for part in features if part is not None]:
        visual = VisualTokens(mx.array(np.concatenate(rows)), VisionFeatures.concatenate(present))
    decoder = model.language_model
    with recorded(decoder_names(model)) as calls:
        hidden = decoder(mx.array(token_ids), mx.array(positions), cache, visual)
    outputs = {f"{name}.out": output for name, (_, output) in calls.items()}
    inputs = {f"{name}.in": given for name, (given, _) in calls.items()}
    whole = {**inputs, **outputs, "norm": hidden, "logits": decoder.logits(hidden)}
    arrays = {name: _numpy(x) for name, x in whole.items()}
    return [
        {name: x[b, longest - length :] for name, x in arrays.items()}
        for b, length in enumerate(lengths)
    ]


def batch_stages(model: Model, prompts: Sequence[Prompt]) -> list[Stages]:
    """Stages of the decoder for each of a batch of left-padded prompts, decoded together too."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    decoder = model.language_model
    cache = [BatchKVCache(padding) for _ in decoder.model.layers]
    features = [tower_stages(model, prompt)[1] for prompt in prompts]
    rows = decoder_stages(model, prompts, features, cache)
    deltas = mx.array([prompt.rope_delta for prompt in prompts])
    steps = []
    for token in FOLLOWING:
        token_ids = mx.full((len(prompts), 1), token)
        hidden = decoder(token_ids, cache[0].offset + deltas, cache)
        steps.append(_numpy(decoder.logits(hidden)))
    decoded = np.concatenate(steps, axis=1)  # (B, len(FOLLOWING), vocab_size)
    return [
        row | {"decode": np.concatenate([row["logits"][-1:], steps])}
        for row, steps in zip(rows, decoded, strict=True)
    ]


def decoded(model: Model, prompt: Prompt) -> Array:
    """Logits of the prompt's last token and of each of FOLLOWING, token by token."""
    layers = kv_cache.new_layers(model.config.text)
    rows: list[mx.array] = []
    forced = iter((*FOLLOWING, 0))

    def choose(logits: mx.array) -> int:
        rows.append(logits)
        return next(forced)

    (hidden,) = forward(model, prompt, layers)
    logits = model.language_model.logits(hidden[:, -1:])[0, 0]
    steps = decode(model, layers, prompt.rope_delta, logits, choose, len(FOLLOWING) + 1)
    assert tuple(steps)[:-1] == FOLLOWING
    return np.stack([_numpy(row) for row in rows])


def tower_names(model: Model) -> dict[int, str]:
    """Stage names of the tower's modules by `id`."""
    tower = model.vision_tower
    names = {id(tower.patch_embed): "patch_embed", id(tower.merger): "merger"}
    names |= {id(block): f"block.{i}" for i, block in enumerate(tower.blocks)}
    merger_list = tower.deepstack_merger_list
    return names | {id(merger): f"deepstack.{i}" for i, merger in enumerate(merger_list)}


def decoder_names(model: Model) -> dict[int, str]:
    layers = model.language_model.model.layers
    return {id(layer): f"layer.{i}" for i, layer in enumerate(layers)}


@contextmanager
def recorded(names: dict[int, str]) -> Iterator[dict[str, tuple[mx.array, mx.array]]]:
    """Record (first argument, result) of every call of the named modules, which run as ever."""
    calls: dict[str, tuple[mx.array, mx.array]] = {}

    def spying(call: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def spy(module: Any, x: mx.array, *rest: Any) -> mx.array:
            result = call(module, x, *rest)
            if id(module) in names:
                calls[names[id(module)]] = (x, result)
            return result

        return spy

    kinds = (vision.PatchEmbed, vision.Block, vision.PatchMerger, text.DecoderLayer)
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "__call__", spying(kind.__call__)))
        yield calls


def _numpy(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32))
