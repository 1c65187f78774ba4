"""A model's name to the folder that holds it: a path, "demo", or a Hugging Face repository."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import CheckpointError, HubError, InputError

DEFAULT_MODEL = "mlx-community/Qwen3-VL-4B-Instruct-4bit"
MODEL_VARIABLE = "QWEN3VL_MODEL"

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PATTERNS = ["*.json", "*.jinja", "*.safetensors"]
_OFFLINE_HINT = "try `--model demo`, the small checkpoint that comes with this package"


def default_model() -> str:
    """$QWEN3VL_MODEL, or the 4-bit 4B model of mlx-community."""
    return os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of `model`: "demo", an existing folder, or a Hub repository id.

    A complete local copy of a repository is used without asking the network; otherwise it is
    downloaded, resuming and showing progress. Raises CheckpointError for a folder that is not
    there, HubError where the Hub cannot be reached or does not have it.
    """
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
    if not _REPO_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(
            f"no folder {name[:200]!r}; give a checkpoint's folder, a Hub id such as "
            f'{DEFAULT_MODEL}, or "demo"'
        )
    return cached_snapshot(name, revision) or download(name, revision)


def cached_snapshot(repo_id: str, revision: str | None = None) -> Path | None:
    """The local copy of a repository if it is complete, else None. Never uses the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repo_id, revision=revision, allow_patterns=_PATTERNS, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):  # download() says what is wrong
        return None
    folder = Path(found)
    return folder if is_complete(folder) else None


def is_complete(folder: Path) -> bool:
    """Whether a folder has a config, a tokenizer and every weight file its index names."""
    if not all((folder / name).exists() for name in ("config.json", "tokenizer.json")):
        return False
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return (folder / "model.safetensors").exists()
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {os.fspath(name) for name in weight_map.values()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return False
    return all((folder / name).exists() for name in names)


def download(repo_id: str, revision: str | None = None) -> Path:
    """Fetch a repository's configs, tokenizer and weights. Raises HubError saying what to do."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS))
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
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"{repo_id} is not on this machine and the Hub cannot be reached "
            f"({_first_line(error)}); connect and try again, or {_OFFLINE_HINT}"
        ) from error
    except (HTTPError, OSError) as error:
        raise HubError(
            f"{repo_id} could not be downloaded ({_first_line(error)}); what has arrived is kept: "
            f"try again, or {_OFFLINE_HINT}"
        ) from error
    if not is_complete(folder):
        raise HubError(
            f"{repo_id} is on this machine in part only, or is not a Qwen3-VL checkpoint in "
            f"safetensors ({folder}); connect and try again, or {_OFFLINE_HINT}"
        )
    return folder


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
