"""The other side of `python -m qwen3vl_mlx.bench --compare-mlx-vlm`: the same work by mlx-vlm.

Runs under an interpreter that has mlx-vlm and need not have this package, so it imports only
mlx-vlm, what mlx-vlm itself brings, and the standard library. It reads a workload as JSON from its
first argument, loads, prints one line of facts, then answers every line on stdin with one line of
JSON measurements, as `bench.measure` defines them. Written against mlx-vlm 0.7.10.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_vlm import load, stream_generate
from mlx_vlm.prompt_utils import apply_chat_template
from PIL import Image


def main() -> None:
    """Serve measurements until stdin closes."""
    workload = json.loads(sys.argv[1])
    replies, sys.stdout = sys.stdout, sys.stderr  # the library prints; replies must stay JSON
    model, processor = load(workload["model"])
    if workload["float32"]:
        model.update(tree_map(_to_float32, model.parameters()))
        mx.eval(model.parameters())
    image_processor = processor.image_processor
    image_processor.min_pixels = image_processor.max_pixels = workload["pixels"]
    processor.tokenizer.stopping_criteria.eos_token_ids = []
    with Image.open(workload["image"]) as file:
        image = file.convert("RGB")
    print(json.dumps({"version": version("mlx-vlm")}), file=replies, flush=True)
    for _ in sys.stdin:
        measured = measure(model, processor, image, workload["prompt"], workload["max_tokens"])
        print(json.dumps(measured), file=replies, flush=True)


def _to_float32(x: Any) -> Any:
    floating = isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)
    return x.astype(mx.float32) if floating else x


def measure(model: Any, processor: Any, image: Any, prompt: str, max_tokens: int) -> dict[str, Any]:
    """One round: seconds, bytes and the token ids of the answer."""
    began = time.perf_counter()
    inputs = processor.image_processor(images=[image])
    pixel_values = mx.array(inputs["pixel_values"])
    grid_thw = mx.array(inputs["image_grid_thw"])
    mx.eval(pixel_values, grid_thw)
    cut = time.perf_counter()
    mx.eval(model.vision_tower(pixel_values, grid_thw))
    encoded = time.perf_counter()
    del inputs, pixel_values, grid_thw
    mx.clear_cache()
    mx.reset_peak_memory()
    times = [time.perf_counter()]
    tokens: list[int] = []
    text = apply_chat_template(processor, model.config, prompt, num_images=1)
    answer = stream_generate(
        model, processor, text, image=[image], max_tokens=max_tokens, temperature=0.0
    )
    for result in answer:
        if len(tokens) < max_tokens:  # the last result repeats the last token
            times.append(time.perf_counter())
            tokens.append(int(result.token))
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "preprocess_sec": cut - began,
        "vision_encode_sec": encoded - cut,
        "time_to_first_token_sec": times[1] - times[0],
        "decode_sec_per_token": (times[-1] - times[1]) / max(len(tokens) - 1, 1),
        "peak_memory_bytes": mx.get_peak_memory(),
        "max_rss_bytes": rss * (1 if sys.platform == "darwin" else 1024),
        "tokens": tokens,
        "prompt_tokens": result.prompt_tokens,
    }


if __name__ == "__main__":
    main()
