"""The other side of `python -m qwen3vl_mlx.bench --engine --compare-mlx-vlm`: mlx-vlm's engine.

Runs under an interpreter that has mlx-vlm and need not have this package, so it imports only
mlx-vlm, what mlx-vlm itself brings, and the standard library. It reads a workload as JSON from its
first argument, loads, answers every conversation alone with caches off, prints one line of facts,
then answers every line on stdin with one line of JSON: a round for each of mlx-vlm's two roads.

"server" is the thread behind its HTTP server (ResponseGenerator, on BatchGenerator) with its prefix
cache and its vision cache on; "stream_generate" is its library call with a PromptCacheState for a
conversation and a vision cache. Written against mlx-vlm 0.7.10.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_vlm import apc, stream_generate
from mlx_vlm.generate import PromptCacheState
from mlx_vlm.prompt_utils import apply_chat_template
from mlx_vlm.server.generation import GenerationArguments, ResponseGenerator
from mlx_vlm.vision_cache import VisionFeatureCache
from PIL import Image


def main() -> None:
    """Serve rounds until stdin closes."""
    work, steps = json.loads(sys.argv[1])
    replies, sys.stdout = sys.stdout, sys.stderr  # the library prints; replies must stay JSON
    logging.disable(logging.WARNING)
    peer = Peer(work)
    alone = {name: peer.alone(name, {})[0] for name in work["conversations"]}
    facts = {"version": version("mlx-vlm"), "alone": alone}
    print(json.dumps(facts), file=replies, flush=True)
    for _ in sys.stdin:
        rounds = {
            "server": server_round(peer, steps, alone),
            "stream_generate": library_round(peer, steps, alone),
        }
        print(json.dumps(rounds), file=replies, flush=True)
    peer.server.stop_and_join()


class Peer:
    """mlx-vlm's serving thread, and its model for library calls while that thread has no work."""

    def __init__(self, work: dict[str, Any]):
        self.work = work
        self.prefixes = apc.from_env(overrides={"enabled": True, "disk_enabled": False})
        self.features = VisionFeatureCache()
        self.server = ResponseGenerator(
            work["model"], vision_cache=self.features, apc_manager=self.prefixes
        )
        self.model, self.processor, _ = self.server.wait_until_ready()
        if work["float32"]:
            self.model.update(tree_map(_to_float32, self.model.parameters()))
            mx.eval(self.model.parameters())
        images = self.processor.image_processor
        images.min_pixels, images.max_pixels = work["small_pixels"], work["pixels"]
        self.server.stop_tokens = set()  # those of the tokenizer count

    def stop_at_ends(self, wanted: bool) -> None:
        """Whether answers end with end tokens."""
        ends = self.work["end_tokens"] if wanted else []
        self.processor.tokenizer.stopping_criteria.eos_token_ids = list(ends)

    def clear(self) -> None:
        """Empty all caches."""
        self.prefixes.clear()
        self.features.clear()
        mx.clear_cache()

    def alone(self, name: str, caches: Mapping[str, Any]) -> tuple[list[int], float]:
        """An answer by `stream_generate`, and the seconds to its first token."""
        self.stop_at_ends(True)
        began = time.perf_counter()
        prompt, images = self._prompt(name)
        first = 0.0
        tokens: list[int] = []
        for result in stream_generate(
            self.model,
            self.processor,
            prompt,
            image=images,
            max_tokens=self.work["max_tokens"],
            temperature=0.0,
            **caches,
        ):
            first = first or time.perf_counter() - began
            tokens = result.token_ids or tokens
        return self._up_to_end(tokens), first

    def served(self, name: str) -> tuple[list[int], float, int]:
        """An answer by the server's thread, the seconds to its first token, and its length."""
        began = time.perf_counter()
        prompt, images = self._prompt(name)
        args = GenerationArguments(max_tokens=self.work["max_tokens"], temperature=0.0)
        _, results = self.server.generate(prompt, images, args=args)
        first, tokens = 0.0, []
        for result in results:
            first = first or time.perf_counter() - began
            tokens.append(result.token)
        return self._up_to_end(tokens), first, len(tokens)

    def _prompt(self, name: str) -> tuple[str, list[Any]]:
        messages = self.work["conversations"][name]
        parts = [part for message in messages for part in message["content"]]
        images = []
        for part in parts:
            if part["type"] == "image":
                with Image.open(part["image"]) as file:
                    images.append(file.convert("RGB"))
        # It wants to be told where a picture stands, not which.
        stripped = [
            {**m, "content": [{k: v for k, v in p.items() if k != "image"} for p in m["content"]]}
            for m in messages
        ]
        config = self.model.config
        text = apply_chat_template(self.processor, config, stripped, num_images=len(images))
        return text, images

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(tokens) if token in self.work["end_tokens"]]
        return tokens[: ends[0]] if ends else tokens


def _to_float32(x: Any) -> Any:
    floating = isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)
    return x.astype(mx.float32) if floating else x


def server_round(peer: Peer, steps: list[Any], alone: dict[str, list[int]]) -> dict[str, Any]:
    """One round of `bench_engine.Round`, by the server's thread."""
    peer.stop_at_ends(True)
    found = first_tokens(peer, steps, alone, lambda name: peer.served(name)[:2])
    peer.stop_at_ends(False)
    names = [name for name in peer.work["conversations"] if name.isdigit()]
    for threads, how in ((1, "in_turn"), (len(names), "at_once")):
        peer.clear()
        for state in ("new", "known"):
            began = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                answers = list(pool.map(peer.served, names))
            tokens = sum(answer[2] for answer in answers)
            key = f"{state}_{how}_per_sec"
            found["values"][key] = tokens / (time.perf_counter() - began)
            pairs = zip(names, answers, strict=True)
            found["right"][key] = [sum(a[0] == alone[n] for n, a in pairs), len(names)]
    return found


def library_round(peer: Peer, steps: list[Any], alone: dict[str, list[int]]) -> dict[str, Any]:
    """One round of `bench_engine.Round`, by library calls that share a conversation's state."""
    caches: dict[str, Any] = {"vision_cache": peer.features}

    def forget() -> None:
        caches["prompt_cache_state"] = PromptCacheState()

    return first_tokens(peer, steps, alone, lambda name: peer.alone(name, caches), forget)


def first_tokens(
    peer: Peer,
    steps: list[Any],
    alone: dict[str, list[int]],
    ask: Callable[[str], tuple[list[int], float]],
    forget: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Seconds to first tokens, with `bench_engine.STEPS`."""
    found: dict[str, Any] = {"values": {}, "right": {}}
    for name, key, empty in steps:
        if empty:
            peer.clear()
            forget()
        tokens, seconds = ask(name)
        if key:
            found["values"][key] = seconds
            found["right"][key] = [int(tokens == alone[name]), 1]
    return found


if __name__ == "__main__":
    main()
