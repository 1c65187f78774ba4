"""The self-test of `qwen3vl doctor`: one question to the demo checkpoint, and one HEIC picture.

It runs in a process of its own, so that a crash inside MLX is found, and not met.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from qwen3vl_mlx.doctor_checks import Check

QUESTION = "Describe the image."
ANSWER = (
    "A blue background with a white circle at the top left, a green square at the top, a purple "
    "star at the right and a red triangle at the bottom."
)
_LIMIT_SEC = 60.0  # a test takes a second or two; who waits longer has found something
_RED = (200, 30, 30)
_HEIC_ERROR = 16  # levels that a lossy picture of one colour may be off


@dataclass(frozen=True)
class Result:
    """What happened. Times in seconds; heic: "ok", "not installed" or what went wrong."""

    answer: str
    load_sec: float
    first_token_sec: float
    tokens_per_sec: float
    heic: str


def ask() -> Result:
    """Load the demo checkpoint and ask it about the example picture, here and now."""
    from qwen3vl_mlx import load
    from qwen3vl_mlx.demo import EXAMPLE

    began = time.perf_counter()
    model = load("demo")
    loaded = time.perf_counter() - began
    done = model.generate(QUESTION, images=[EXAMPLE], temperature=0, max_tokens=64)
    model.close()
    usage = done.usage
    return Result(
        answer=done.text,
        load_sec=round(loaded, 3),
        first_token_sec=round(usage.time_to_first_token_sec, 3),
        tokens_per_sec=round(usage.avg_compl_tok_per_sec, 1),
        heic=heic(),
    )


def heic() -> str:
    """Write a small HEIC picture in memory and read it as any picture is read."""
    try:
        import pillow_heif
    except ImportError:
        return "not installed"
    from PIL import Image

    from qwen3vl_mlx.errors import ImageError
    from qwen3vl_mlx.media import load_image

    pillow_heif.register_heif_opener()
    file = io.BytesIO()
    try:
        Image.new("RGB", (64, 48), _RED).save(file, "HEIF")
        picture = load_image(file.getvalue())
    except (ImageError, OSError, RuntimeError) as error:
        return str(error)
    found = picture.getpixel((32, 24))
    assert isinstance(found, tuple)
    off = max(abs(a - b) for a, b in zip(found, _RED, strict=True))
    if picture.size != (64, 48) or off > _HEIC_ERROR:
        return f"a picture of {_RED} was read as {found}, of size {picture.size}"
    return "ok"


def check_self_test(words: Sequence[str] | None = None, limit: float = _LIMIT_SEC) -> Check:
    """Run the test. words: the command to run instead; limit: seconds it may take."""
    command = words or [sys.executable, "-m", "qwen3vl_mlx.doctor_self_test"]
    todo = "install the package and MLX again; --debug and `qwen3vl generate --model demo` say more"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Check("self-test", "problem", f"no answer within {limit:.0f} s", todo)
    if done.returncode:
        return Check("self-test", "problem", _failure(done.returncode, done.stderr), todo)
    result = Result(**json.loads(done.stdout.splitlines()[-1]))
    facts = asdict(result)
    if result.answer != ANSWER:
        text = f"the demo answered {result.answer!r}, expected {ANSWER!r}"
        return Check("self-test", "problem", text, todo, facts)
    text = (
        f"the demo answers right: loaded in {result.load_sec:.2f} s, first token after "
        f"{result.first_token_sec:.2f} s, {result.tokens_per_sec:.0f} tokens/s"
    )
    if result.heic == "not installed":
        return Check("self-test", "ok", text, facts=facts)
    if result.heic != "ok":
        problem = f"{text}; HEIC cannot be read: {result.heic}"
        return Check("self-test", "warning", problem, "install pillow-heif again", facts)
    return Check("self-test", "ok", f"{text}; HEIC is read", facts=facts)


def _failure(status: int, stderr: str) -> str:
    last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
    how = f"was ended by signal {-status}" if status < 0 else "failed"
    return f"the test {how}: {last}"


if __name__ == "__main__":
    print(json.dumps(asdict(ask())))
