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
import test_hub_upload
from cached import Cache, qwen
from test_hub_upload import TOKEN, Handler, StandIn

from qwen3vl_mlx.models_command import main

REPO = "someone/Qwen3-VL-4B-Instruct"
OTHER = "someone/Qwen3-VL-8B-Thinking"
SHARDS = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]


@pytest.fixture(autouse=True)
def whole_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in says of files, too, that a repository or a revision is not there."""
    *others, (pattern, answer) = test_hub_upload.ROUTES

    def file(handler: Handler, body: bytes, name: str, revision: str, path: str) -> None:
        repo = handler.server.repos.get(name)
        if repo is not None and (revision in repo.branches or revision in repo.commits):
            return answer(handler, body, name, revision, path)
        handler.send_response(404)
        handler.send_header("X-Error-Code", "RevisionNotFound" if repo else "RepoNotFound")
        handler.send_header("Content-Length", "0")
        return handler.end_headers()

    monkeypatch.setattr(test_hub_upload, "ROUTES", [*others, (pattern, file)])


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
