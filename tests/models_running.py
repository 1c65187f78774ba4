"""`qwen3vl models` run in tests: on a cache made on disk, with a stand-in for the Hub."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cached import Cache, qwen
from hub_stand_in import TOKEN, StandIn

from qwen3vl_mlx.models_command import main

REPO = "someone/Qwen3-VL-4B-Instruct"
OTHER = "someone/Qwen3-VL-8B-Thinking"
SHARDS = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Cache(tmp_path / "hub")


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SimpleNamespace]:
    """`run(*words)`: the command's status, stdout and stderr. Stdin is no terminal."""
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def ran(*words: object) -> SimpleNamespace:
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return ran


def served(server: StandIn, **changes: Any) -> dict[str, bytes]:
    files = {name: data for name, data in qwen(shards=2, weights=b"w" * 10**6, **changes).items()
             if isinstance(data, bytes)}  # fmt: skip
    server.make(REPO, {**files, "README.md": b"---\nlicense: apache-2.0\n---\n", "x.bin": b"no"})
    return files


def command(*words: str, endpoint: str, hub: Path) -> dict[str, Any]:
    """Arguments of subprocess.Popen for the command, with the stand-in as its Hub."""
    home = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(hub), "HF_TOKEN": TOKEN}
    return {
        "args": [sys.executable, "-m", "qwen3vl_mlx.models_command", *words],
        "env": {**os.environ, **home, "HF_HUB_DISABLE_XET": "1"},
        "text": True,
    }
