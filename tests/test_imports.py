"""What an import costs: nothing heavy before it is used, transformers and torch never."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("mlx", "numpy", "PIL", "jinja2", "tokenizers", "huggingface_hub", "safetensors")
NEVER = ("torch", "torchvision", "transformers", "cv2")
ASK = """
from qwen3vl_mlx import load
from qwen3vl_mlx.demo import EXAMPLE
print(load("demo").generate("Describe the image.", images=[EXAMPLE], max_tokens=2).text)
"""


def loaded_by(code: str) -> set[str]:
    """Top-level modules in memory after `code` has run in a fresh interpreter."""
    last = "import json, sys; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{last}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import qwen3vl_mlx; qwen3vl_mlx.__version__", HEAVY + NEVER),
        ("from qwen3vl_mlx.errors import Qwen3VLError", HEAVY + NEVER),
        ("import qwen3vl_mlx.models.positions", ("mlx", "PIL", "jinja2", "tokenizers", *NEVER)),
        ("from qwen3vl_mlx import load", NEVER),
        (ASK, (*NEVER, "huggingface_hub", "tqdm")),
    ],
)
def test_what_is_not_imported(code: str, absent: tuple[str, ...]) -> None:
    loaded = loaded_by(code)
    assert "qwen3vl_mlx" in loaded
    assert not loaded & set(absent)
