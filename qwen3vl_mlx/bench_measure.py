"""What `python -m qwen3vl_mlx.bench` measures: its workload and both sides of it."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.conversation import as_messages
from qwen3vl_mlx.engine.engine import EngineOptions
from qwen3vl_mlx.engine.output import collect
from qwen3vl_mlx.engine.sampling import SamplingParams
from qwen3vl_mlx.engine.vision import encode
from qwen3vl_mlx.errors import InputError, Qwen3VLError
from qwen3vl_mlx.jsonfiles import read_generation_config
from qwen3vl_mlx.loading import default_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

_SENTENCE = "Say what stands in the picture, where it stands and which colour it has. "


@dataclass(frozen=True)
class Workload:
    """One picture, square and of its final size, one prompt and the length of the answer."""

    model: str  # folder
    image: str  # file
    prompt: str
    pixels: int
    max_tokens: int
    float32: bool


class Measured(TypedDict):
    """One round with a loaded model. `tokens` are the answer's ids, as far as they are known."""

    preprocess_sec: float
    vision_encode_sec: float
    time_to_first_token_sec: float
    decode_sec_per_token: float
    peak_memory_bytes: int
    max_rss_bytes: int
    prompt_tokens: int
    tokens: list[int]


def make_workload(
    model: Qwen3VL,
    checkpoint: Path,
    folder: Path,
    *,
    pixels: int,
    prompt_tokens: int,
    max_tokens: int,
) -> Workload:
    """Draw the picture into `folder` and write the prompt; both are about as large as asked."""
    from PIL import Image

    factor = model.processor.settings.factor
    side = max(1, round(math.sqrt(pixels) / factor)) * factor
    rows, cols = np.indices((side, side))
    picture = np.stack([rows * 255 // side, cols * 255 // side, (rows ^ cols) & 255], axis=-1)
    image = folder / "picture.png"
    Image.fromarray(picture.astype(np.uint8)).save(image)
    tokenizer = model.processor.tokenizer
    words = tokenizer.encode(_SENTENCE * prompt_tokens)[:prompt_tokens]
    return Workload(
        model=str(checkpoint),
        image=str(image),
        prompt=tokenizer.decode(words).strip() or "?",
        pixels=side * side,
        max_tokens=max_tokens,
        float32=default_dtype() == mx.float32,
    )


def measure(model: Qwen3VL, image: Image, workload: Workload) -> Measured:
    """One round. The answer is greedy, and goes on past end tokens to its full length."""
    processor, pixels = model.processor, workload.pixels
    began = time.perf_counter()
    visual = processor.visual_input(image, processor.image_budget(pixels, pixels))
    cut = time.perf_counter()
    features = encode(model.model.vision_tower, [visual])
    mx.eval(features.embeds, *features.deepstack)
    encoded = time.perf_counter()
    del features, visual
    mx.clear_cache()
    started = time.perf_counter()
    prompt = processor.prompt(
        as_messages(workload.prompt, [image], ()), min_pixels=pixels, max_pixels=pixels
    )
    params = SamplingParams(temperature=0, max_tokens=workload.max_tokens, ignore_eos=True)
    request = model.asking.request(prompt, params, tools=False, started=started)
    model.engine.clear_caches()
    answer = model.run(request)
    usage = collect(answer).usage
    return {
        "preprocess_sec": cut - began,
        "vision_encode_sec": encoded - cut,
        "time_to_first_token_sec": usage.time_to_first_token_sec,
        "decode_sec_per_token": usage.total_completion_time_sec
        / max(usage.completion_tokens - 1, 1),
        "peak_memory_bytes": usage.peak_memory_bytes,
        "max_rss_bytes": max_rss_bytes(),
        "prompt_tokens": usage.prompt_tokens,
        "tokens": answer.handle.tokens,
    }


def another_engine(model: Qwen3VL, options: EngineOptions) -> Qwen3VL:
    """The same weights behind an engine of their own. Close it after use."""
    settings = read_generation_config(model.source.folder)
    return Qwen3VL(model.model, model.processor, settings, model.source, options)


def max_rss_bytes() -> int:
    """The largest resident memory this process had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start_times(python: str, package: str, workload: Workload) -> dict[str, float]:
    """Seconds of a cold import, and from process start to the first text of an answer.

    Both packages' `generate` take these options. Raises Qwen3VLError where a process fails.
    """
    command = [python, "-m", f"{package}.generate", "--model", workload.model]
    command += ["--image", workload.image, "--prompt", workload.prompt]
    command += ["--max-tokens", "1", "--temperature", "0"]
    if package == "qwen3vl_mlx":  # the other side knows no budget but the checkpoint's
        command.append("--full-resolution")
    return {
        "import_sec": seconds_of([python, "-c", f"import {package}"], until_text=False),
        "start_sec": seconds_of(command, until_text=True),
    }


def seconds_of(command: Sequence[str], *, until_text: bool) -> float:
    """Wall time of a process until it ends or, `until_text`, until it writes to stdout.

    Raises Qwen3VLError where it fails.
    """
    began = time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        assert process.stdout is not None
        first = process.stdout.read(1) if until_text else process.stdout.read()
        seconds = time.perf_counter() - began
        process.stdout.read()
        if process.wait():
            errors.seek(0)
            raise Qwen3VLError(f"{' '.join(command[:3])} failed: {last_line(errors.read())}")
    if until_text and not first:
        raise Qwen3VLError(f"{' '.join(command[:3])} answered nothing")
    return seconds


class Peer:
    """mlx-vlm in a process of its own, loaded once, measuring one round at a time."""

    def __init__(self, python: str, script: str, workload: object):
        # As text: a script's own folder comes first in sys.path, and would hide modules there.
        text = Path(__file__).with_name(script).read_text(encoding="utf-8")
        self.python = python
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                [python, "-c", text, json.dumps(workload)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
            )
        except OSError as error:
            raise InputError(f"--compare-mlx-vlm: {python} cannot be run: {error}") from error
        self.facts = self._reply()
        self.name = f"mlx-vlm {self.facts['version']}"

    def measure(self) -> dict[str, Any]:
        """One round."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            reply: dict[str, Any] = json.loads(line)
            return reply
        self.process.wait()
        self.errors.seek(0)
        raise Qwen3VLError(f"mlx-vlm under {self.python} failed: {last_line(self.errors.read())}")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def last_line(output: bytes) -> str:
    """What a failed process said last."""
    return (output.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
