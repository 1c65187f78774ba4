"""The Hub's cache as its library lays it out, made on disk; and checkpoints to put there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(__file__).parent / "data" / "checkpoints"
INDEX = "model.safetensors.index.json"
Files = Mapping[str, "bytes | int"]  # an int is a sparse file of so many bytes


@dataclass(frozen=True)
class Cache:
    """Repositories, with blobs named by their content, snapshots that link to them, and refs."""

    root: Path

    def add(
        self,
        repo_id: str,
        files: Files,
        refs: tuple[str, ...] = ("main",),
        parts: Mapping[str, int] | None = None,
        missing: tuple[str, ...] = (),
    ) -> Path:
        """A snapshot's folder. parts: bytes of files that are arriving; missing: not linked yet."""
        repo = self.repo(repo_id)
        commit = hashlib.sha1(repr((repo_id, sorted(files.items()))).encode()).hexdigest()
        snapshot = repo / "snapshots" / commit
        for folder in (repo / "blobs", repo / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if name not in missing:
                blob = repo / "blobs" / hashlib.sha256(repr(content).encode()).hexdigest()
                fill(blob, content)
                (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
        for name, nbytes in (parts or {}).items():
            (repo / "blobs" / f"{name}.incomplete").write_bytes(bytes(nbytes))
        for ref in refs:
            (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (repo / "refs" / ref).write_text(commit)
        return snapshot

    def repo(self, repo_id: str) -> Path:
        return self.root / f"models--{repo_id.replace('/', '--')}"


def fill(path: Path, content: bytes | int) -> None:
    if isinstance(content, int):
        with path.open("wb") as file:
            file.truncate(content)
    else:
        path.write_bytes(content)


def qwen(
    name: str = "Qwen3-VL-4B-Instruct",
    weights: bytes | int = b"weights",
    shards: int = 1,
    **changes: Any,
) -> dict[str, bytes | int]:
    """A checkpoint's files: those of a released model, with changes to config.json."""
    source = CHECKPOINTS / name
    files: dict[str, bytes | int] = {path.name: path.read_bytes() for path in source.iterdir()}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    files["config.json"] = json.dumps({**config, **changes}).encode()
    files["tokenizer.json"] = b"{}"
    if shards == 1:
        return {**files, "model.safetensors": weights}
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files[INDEX] = json.dumps({"weight_map": {f"tensor {n}": n for n in names}}).encode()
    many = {n: weights + i if isinstance(weights, int) else weights + n.encode()
            for i, n in enumerate(names)}  # fmt: skip
    return {**files, **many}


def write(folder: Path, files: Files) -> Path:
    """A folder of one's own with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        fill(folder / name, content)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """All that is below a folder, and what each is: to see that nothing changed."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else f"{path.stat().st_size} {path.stat().st_mtime_ns}"
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }
