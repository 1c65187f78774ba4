"""Which Qwen3-VL checkpoints are on this machine: in the Hub's cache, in folders, and the demo.

Reads config.json, what is as small, and the sizes of files; never weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qwen3vl_mlx import hub
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import CheckpointError, ConfigError
from qwen3vl_mlx.hub_cache import CachedRepo, cached_repos
from qwen3vl_mlx.jsonfiles import read_json
from qwen3vl_mlx.models.config import MODEL_TYPES, ModelConfig, QuantizationConfig, parse_config
from qwen3vl_mlx.quant.recipes import MIXED, preset_name
from qwen3vl_mlx.released import size_of

_KIND = re.compile(r"(?<![a-z])(instruct|thinking)(?![a-z])", re.IGNORECASE)
_SIZE = re.compile(r"(?<![a-z0-9])\d+b(-a\d+b)?(?![a-z0-9])", re.IGNORECASE)
_FAMILY = re.compile(r"qwen3[-_.]?vl", re.IGNORECASE)
_OPENS_THINKING = re.compile(r"assistant\\n<think>")  # as the template spells it
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


Source: TypeAlias = Literal["hub cache", "folder", "demo"]


@dataclass(frozen=True)
class StoredFile:
    """One file: its name in the checkpoint's folder, bytes on disk, and seconds since 1970.

    identity: device and inode, the same for a file that two checkpoints share.
    """

    name: str
    nbytes: int
    last_used: float
    identity: tuple[int, int]


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine.

    name: what `load` takes: a Hub id (with `revision`), "demo", or a folder's path.
    commit and refs: of a Hub checkpoint; refs are the branches and tags that lead to it.
    size and kind: such as "8B" or "30B-A3B", and "Instruct" or "Thinking"; empty where unknown.
    quantization: "4bit", "mxfp4", "mixed_3_6", "mixed", "fp8", or the whole weights' "bf16".
    missing: files that have not arrived. problem: why this package cannot run it, if so.
    last_used: seconds since 1970 by the disk's own note, which some disks take once a day.
    downloaded_here: this package put it into the Hub's cache, and not another program.
    """

    name: str
    folder: Path
    source: Source
    commit: str | None
    refs: tuple[str, ...]
    size: str
    kind: str
    quantization: str
    files: tuple[StoredFile, ...]
    missing: tuple[str, ...]
    problem: str | None
    last_used: float | None
    downloaded_here: bool

    @property
    def nbytes(self) -> int:
        """Bytes on disk. What two revisions share counts in both: see `disk_use`."""
        return disk_use([self])

    @property
    def model(self) -> str:
        """Size and kind in one: `8B Instruct`."""
        return f"{self.size} {self.kind}".strip()

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def has_weights(self) -> bool:
        """False where a config alone was fetched to look at."""
        return any(file.name.endswith((".safetensors", ".incomplete")) for file in self.files)

    @property
    def usable(self) -> bool:
        """Whether `load` can be expected to take it, without the network."""
        return self.complete and self.problem is None

    @property
    def revision(self) -> str | None:
        """What `load` needs beside the name; None for the main branch and outside the Hub."""
        if self.commit is None or "main" in self.refs:
            return None
        return self.refs[0] if self.refs else self.commit

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the list of files. Times are ISO 8601, in UTC."""
        used = self.last_used
        return {
            "name": self.name,
            "revision": self.revision,
            "model": self.model,
            "quantization": self.quantization,
            "bytes": self.nbytes,
            "complete": self.complete,
            "missing": list(self.missing),
            "problem": self.problem,
            "last_used": None if used is None else _iso(used),
            "source": self.source,
            "folder": str(self.folder),
            "commit": self.commit,
            "refs": list(self.refs),
            "downloaded_here": self.downloaded_here,
        }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def local_checkpoints(folders: Sequence[str | os.PathLike[str]] = ()) -> list[LocalCheckpoint]:
    """All Qwen3-VL checkpoints of the Hub's cache by name, then those in `folders`, then the demo.

    folders: each a checkpoint's own, or one that holds such. Interrupted downloads are listed too,
    marked by what is missing; models of other families are not. Never uses the network. Raises
    CheckpointError for a folder that is not there.
    """
    in_cache = [c for repo in cached_repos() for c in cached_revisions(repo) if c.has_weights]
    in_folders = [found for folder in folders for found in _below(Path(folder).expanduser())]
    return [*in_cache, *in_folders, demo_checkpoint()]


def disk_use(checkpoints: Iterable[LocalCheckpoint]) -> int:
    """Bytes on disk of them all; a file that several of them share counts once."""
    sizes = {file.identity: file.nbytes for each in checkpoints for file in each.files}
    return sum(sizes.values())


def cached_revisions(repo: CachedRepo) -> list[LocalCheckpoint]:
    """A repository's snapshots in the Hub's cache that are Qwen3-VL, or by its name seem to be."""
    found = []
    for folder in repo.snapshots():
        about = _read(folder)
        if about.is_family or (not about.values and _FAMILY.search(repo.repo_id)):
            found.append(_cached(repo, folder, about))
    found.sort(key=lambda each: (each.revision is not None, each.revision))
    parts = _parts(repo.folder / "blobs")
    # Of those they may belong to; once all is there, what an interrupt left behind.
    owners = [each.commit for each in found if each.missing] or [each.commit for each in found[:1]]
    return [_with_parts(each, parts) if each.commit in owners else each for each in found]


def _with_parts(checkpoint: LocalCheckpoint, parts: tuple[StoredFile, ...]) -> LocalCheckpoint:
    files = (*checkpoint.files, *parts)
    return replace(checkpoint, files=files, last_used=_last_used(files))


def _cached(repo: CachedRepo, folder: Path, about: _About) -> LocalCheckpoint:
    return replace(
        _checkpoint(folder, repo.repo_id, "hub cache", about),
        size=_size(about, repo.repo_id),
        kind=_kind(repo.repo_id, folder),
        commit=folder.name,
        refs=repo.refs(folder.name),
        downloaded_here=repo.was_downloaded_here(folder.name),
    )


def checkpoint_at(folder: Path) -> LocalCheckpoint:
    """The checkpoint in a folder of one's own. Raises CheckpointError where there is none."""
    about = _read(folder)
    if not about.is_family:
        problem = about.problem or "it has no config.json that can be read"
        raise CheckpointError(f"{folder} holds no Qwen3-VL checkpoint: {problem}")
    return _checkpoint(folder, str(folder), "folder", about)


def demo_checkpoint() -> LocalCheckpoint:
    """The one that comes with this package."""
    found = _checkpoint(CHECKPOINT, "demo", "demo", _read(CHECKPOINT))
    return replace(found, size="tiny")


def _checkpoint(folder: Path, name: str, source: Source, about: _About) -> LocalCheckpoint:
    files = _files(folder)
    return LocalCheckpoint(
        name=name,
        folder=folder,
        source=source,
        commit=None,
        refs=(),
        size=_size(about, folder.resolve().name),
        kind=_kind(folder.resolve().name, folder),
        quantization=quantization_name(about.values, about.config),
        files=files,
        missing=tuple(hub.missing_files(folder)),
        problem=about.problem,
        last_used=_last_used(files),
        downloaded_here=False,
    )


def _below(folder: Path) -> Iterator[LocalCheckpoint]:
    """The checkpoint in `folder`, or those in the folders it holds."""
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; give a checkpoint's, or one that holds such")
    inside = [folder]
    if not (folder / "config.json").exists():
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    for path in inside:
        if _read(path).is_family:
            yield checkpoint_at(path)


@dataclass(frozen=True)
class _About:
    """config.json: its object, empty where there is none; what it describes, or why not."""

    values: Mapping[str, Any]
    config: ModelConfig | None = None
    problem: str | None = None

    @property
    def is_family(self) -> bool:
        return self.values.get("model_type") in MODEL_TYPES


def _read(folder: Path) -> _About:
    try:
        values = read_json(folder / "config.json")
    except CheckpointError:
        return _About({})
    if not isinstance(values, dict):
        return _About({})
    try:
        return _About(values, parse_config(values))
    except ConfigError as error:
        return _About(values, problem=str(error))


def _files(folder: Path) -> tuple[StoredFile, ...]:
    found = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            try:
                stat = path.stat()
            except OSError:  # the link of a file that has not arrived
                continue
            found.append(_stored(path.relative_to(folder).as_posix(), stat))
    return tuple(sorted(found, key=lambda file: file.name))


def _stored(name: str, stat: os.stat_result) -> StoredFile:
    used = max(stat.st_atime, stat.st_mtime)  # a disk may take no note of reading
    nbytes = stat.st_size
    if name.endswith(".incomplete"):  # may have its full length before it is filled
        nbytes = min(nbytes, 512 * stat.st_blocks)
    return StoredFile(name, nbytes, used, (stat.st_dev, stat.st_ino))


def _parts(blobs: Path) -> tuple[StoredFile, ...]:
    """Files of which only a part has arrived."""
    return tuple(file for file in _files(blobs) if file.name.endswith(".incomplete"))


def _last_used(files: Sequence[StoredFile]) -> float | None:
    """Of the weights: looking at a checkpoint reads its other files."""
    used = [file.last_used for file in files if file.name.endswith((".safetensors", ".incomplete"))]
    return max(used, default=None)


def _size(about: _About, name: str) -> str:
    """As in the names of Qwen's own releases, by the shape of the decoder."""
    if about.config is not None:
        return size_of(about.config) or ""
    found = _SIZE.search(name)
    return found[0].upper() if found else ""


def _kind(name: str, folder: Path) -> str:
    """By the name, else by the chat template."""
    found = _KIND.search(name)
    if found:
        return found[1].capitalize()
    for file in ("chat_template.jinja", "chat_template.json"):
        try:
            text = (folder / file).read_text(encoding="utf-8").replace(r"\\n", r"\n")
        except (OSError, UnicodeDecodeError):
            continue
        return "Thinking" if _OPENS_THINKING.search(text) else "Instruct"
    return ""


def quantization_name(values: Mapping[str, Any], config: ModelConfig | None) -> str:
    """What config.json says of the weights: `4bit`, `mixed_3_6`, `fp8`, `bf16`, or "" for nothing.

    The finer embeddings, head and router that recipes keep do not make it mixed.
    """
    for key in ("quantization", "quantization_config"):
        section = values.get(key)
        if isinstance(section, dict) and "quant_method" in section:
            return str(section["quant_method"])
    if config is None:
        return ""
    if config.quantization is not None:
        return _packed_name(config.quantization)
    sections = (values, values["text_config"])
    dtypes = (section.get(key) for section in sections for key in ("dtype", "torch_dtype"))
    return next((_DTYPES.get(str(dtype), str(dtype)) for dtype in dtypes if dtype), "")


def _packed_name(quantization: QuantizationConfig) -> str:
    default = quantization.default
    used = {default}
    for path, settings in quantization.overrides.items():
        if settings is not None and ".layers." in path and not path.endswith(".mlp.gate"):
            used.add(settings)
    if len(used) == 1:
        return preset_name(default)
    bits = sorted({settings.bits for settings in used})
    name = "_".join(["mixed", *map(str, bits)])
    return name if name in MIXED and {s.mode for s in used} == {"affine"} else "mixed"
