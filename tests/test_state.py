"""A conversation cache on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.engine.state import CacheState
from qwen3vl_mlx.errors import InputError


def test_a_conversation_cache_is_written_whole_or_not_at_all(
    demo: Qwen3VL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = demo.chat()
    chat.send("Hello")
    path = tmp_path / "talk.safetensors"
    chat.state.save(path)
    assert CacheState.load(path).token_ids == chat.state.token_ids
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("qwen3vl_mlx.engine.state.save_prompt_cache", fail)
    with pytest.raises(OSError, match="disk full"):
        chat.state.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def save_arrays(path: Path, metadata: dict[str, str]) -> None:
    mx.save_safetensors(str(path), {"a": mx.zeros((2,))}, metadata)


NOT_CACHES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "garbage": lambda path: path.write_bytes(b"garbage" * 99),
    "empty": lambda path: path.write_bytes(b""),
    "weights": lambda path: save_arrays(path, {}),
    "weights with a note": lambda path: save_arrays(path, {"format": "pt"}),
    "foreign class": lambda path: save_arrays(path, {"0.format": "x", "1.0": "List", "2.0": "a"}),
    "cut": lambda path: (
        shutil.copy(CHECKPOINT / "model.safetensors", path),
        path.open("r+b").truncate(5000),
    ),
}


@pytest.mark.parametrize("name", NOT_CACHES)
def test_what_is_no_conversation_cache(name: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.safetensors"
    NOT_CACHES[name](path)
    with pytest.raises(InputError, match=r"talk\.safetensors"):
        CacheState.load(path)


def test_cache_of_another_version(
    demo: Qwen3VL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("qwen3vl_mlx.engine.state._FORMAT", "qwen3vl_mlx-0")
        chat = demo.chat()
        chat.send("Hello")
        chat.state.save(path)
    with pytest.raises(InputError, match="version"):
        CacheState.load(path)
    for write in (CacheState.load, chat.state.save):
        with pytest.raises(InputError, match=r"\.safetensors"):
            write(tmp_path / "talk.bin")
