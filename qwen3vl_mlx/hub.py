"""A model's name to the folder that holds it: a path, "demo", or a Hugging Face repository."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import CheckpointError, HubError, InputError
from qwen3vl_mlx.hub_cache import cached_repo

if TYPE_CHECKING:
    from tqdm.auto import tqdm

# Is told the bytes that are here and those of all files together; the latter may still grow.
Progress: TypeAlias = "Callable[[int, int], None]"

DEFAULT_MODEL = "mlx-community/Qwen3-VL-4B-Instruct-4bit"
MODEL_VARIABLE = "QWEN3VL_MODEL"

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATTERNS = ["*.json", "*.jinja", "*.safetensors"]
# What a conversion hands on beside them: merges.txt, and the licence, in its file and its card.
DOWNLOADED = (*_PATTERNS, "*.txt", "README.md", "LICENSE*", "NOTICE*")
_OFFLINE_HINT = "try `--model demo`, the small checkpoint that comes with this package"


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's folder, and where it came from.

    repo_id and commit are None for a folder of one's own and for the demo.
    """

    folder: Path
    repo_id: str | None = None
    commit: str | None = None


def default_model() -> str:
    """$QWEN3VL_MODEL, or the 4-bit 4B model of mlx-community."""
    return os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of `model`. See `snapshot`, which also says where it came from."""
    return snapshot(model, revision).folder


def snapshot(
    model: str | os.PathLike[str],
    revision: str | None = None,
    *,
    progress: Progress | None = None,
) -> Snapshot:
    """Find `model`: "demo", an existing folder, or a Hub repository id, pinned to its commit.

    A complete local copy of a repository is used without asking the network; otherwise it is
    downloaded, resuming and showing progress in the terminal; `progress` is called instead, from
    the threads that download. Raises CheckpointError for a folder that is not there, HubError where
    the Hub cannot be reached or does not have it.
    """
    folder = local_folder(model, revision)
    if folder is not None:
        return Snapshot(folder)
    name = os.fspath(model)
    folder = cached_snapshot(name, revision) or download(name, revision, progress=progress)
    return Snapshot(folder, name, folder.name if _COMMIT.fullmatch(folder.name) else None)


def config_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A folder with the config.json of `model`, and perhaps nothing else: enough for planning.

    Takes what `snapshot` takes and raises what it raises. A cached file is used without asking the
    network; otherwise that one file is downloaded.
    """
    folder = local_folder(model, revision)
    if folder is not None:
        return folder
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name = os.fspath(model)
    with _explained(name, revision), _without_bar():
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(found, str):
            found = hf_hub_download(name, "config.json", revision=revision)
    return Path(found).parent


@contextmanager
def _without_bar() -> Iterator[None]:
    """A small file of the Hub arrives before its bar could be read."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars("huggingface_hub.http_get")
    try:
        yield
    finally:
        enable_progress_bars("huggingface_hub.http_get")


def local_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path | None:
    """The folder of a path or of "demo"; None for what may be a Hub id. Never uses the network."""
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"a model is a folder, a Hub id or 'demo', got {type(model).__name__}")
    name = os.fspath(model)
    try:
        path = Path(model).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, unknown ~user, a null character
        is_folder = is_there = False
    if (is_folder or name == "demo") and revision is not None:
        raise InputError(f"revision {revision!r} is for models of the Hub, and {name} is not one")
    if name == "demo":
        return CHECKPOINT
    if is_folder:
        return path
    if is_there:
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    if not is_repo_id(name):
        raise CheckpointError(
            f"no folder {name[:200]!r}; give a checkpoint's folder, a Hub id such as "
            f'{DEFAULT_MODEL}, or "demo"'
        )
    return None


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form owner/name. The Hub has more rules, and checks them itself."""
    return _REPO_ID.fullmatch(name) is not None and not name.startswith(".")


def cached_snapshot(repo_id: str, revision: str | None = None) -> Path | None:
    """The local copy of a repository if it is complete, else None. Never uses the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # Without the extras: a copy that another program fetched is enough to run and convert.
        found = snapshot_download(
            repo_id, revision=revision, allow_patterns=_PATTERNS, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):  # download() says what is wrong
        return None
    folder = Path(found)
    return folder if is_complete(folder) else None


def is_complete(folder: Path) -> bool:
    """Whether a folder has a config, a tokenizer and every weight file its index names."""
    return not missing_files(folder)


def missing_files(folder: Path) -> list[str]:
    """Files a checkpoint's folder lacks; an index that cannot be read counts as missing."""
    names = ["config.json", "tokenizer.json"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names += sorted({os.fspath(name) for name in weight_map.values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return [index.name]
    else:
        names.append("model.safetensors")
    return [name for name in names if not (folder / name).exists()]


def download(
    repo_id: str, revision: str | None = None, *, progress: Progress | None = None
) -> Path:
    """Fetch a repository's configs, tokenizer and weights. Raises HubError saying what to do.

    progress: see `snapshot`.
    """
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {} if progress is None else {"tqdm_class": _telling(progress)}
    with _explained(repo_id, revision), cached_repo(repo_id).noting():
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=list(DOWNLOADED), **options
            )
        )
    if not is_complete(folder):
        raise HubError(
            f"{repo_id} is on this machine in part only, or is not a Qwen3-VL checkpoint in "
            f"safetensors ({folder}); connect and try again, or {_OFFLINE_HINT}"
        )
    return folder


@dataclass(frozen=True)
class RemoteFile:
    """A file that `download` fetches: its name, its bytes, and its name among the cache's blobs."""

    name: str
    nbytes: int
    blob: str


def remote_files(repo_id: str, revision: str | None = None) -> list[RemoteFile]:
    """What `download` fetches of a repository, by the Hub's own list. Raises HubError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects

    with _explained(repo_id, revision):
        tree = HfApi().list_repo_tree(repo_id, recursive=True, revision=revision)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
    wanted = filter_repo_objects(
        files, allow_patterns=list(DOWNLOADED), key=lambda file: str(file.path)
    )
    return [
        RemoteFile(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
        for file in wanted
    ]


def _telling(progress: Progress) -> type[tqdm[Any]]:
    """A bar for the Hub's library that shows nothing and tells `progress` instead."""
    from threading import Lock

    from huggingface_hub.utils import tqdm

    bars: list[Bar] = []
    lock = Lock()

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.total = options.get("total")
            if options.get("unit") == "B":  # others count files
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self in bars:
                    # Bytes from the network and bytes on disk; the former's total is a guess.
                    total = min(bar.total or 0 for bar in bars)
                    progress(int(min(total, max(bar.n for bar in bars))), int(total))

    return Bar


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what a download raises into a HubError that says what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id} is gated: accept its terms on huggingface.co, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no revision {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubError(
            f"the Hub has no repository {repo_id} (a private one needs `hf auth login`), and there "
            f"is no such folder here; {_OFFLINE_HINT}"
        ) from error
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise _unreachable(repo_id, error) from error
    except EntryNotFoundError as error:
        raise HubError(f"{repo_id} has no config.json: it holds no checkpoint") from error
    except HfHubHTTPError as error:
        raise _unreachable(repo_id, error) from error
    except (HTTPError, OSError) as error:
        raise HubError(
            f"{repo_id} could not be downloaded ({first_line(error)}); what has arrived is kept: "
            f"try again, or {_OFFLINE_HINT}"
        ) from error


def _unreachable(repo_id: str, error: BaseException) -> HubError:
    return HubError(
        f"{repo_id} is not on this machine and the Hub cannot be reached ({first_line(error)}); "
        f"connect and try again, or {_OFFLINE_HINT}"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
