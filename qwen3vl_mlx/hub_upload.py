"""A checkpoint's folder to a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx.errors import CheckpointError, HubError, InputError
from qwen3vl_mlx.hub import first_line, is_repo_id, missing_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

# Loaders read every model*.safetensors they find: shards of an earlier upload must go.
_REPLACED = ["model*.safetensors", "model.safetensors.index.json"]
_HIDDEN = [".*", "*/.*"]
_LOG_IN = "run `hf auth login` with a token that may write (huggingface.co/settings/tokens)"


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a checkpoint as one commit, and return the commit's URL.

    Makes the repository (and the branch `revision`) where missing. Weights of an earlier
    checkpoint that this one does not have are deleted in the same commit; other files there stay.
    Hidden files are left out. Shows progress; after an interruption the same call goes on, without
    sending again what has arrived. token: default is the one of `hf auth login` or $HF_TOKEN.

    Raises, before any network, CheckpointError for a folder that is not a complete checkpoint,
    InputError for a malformed repository id and HubError where nobody is logged in; later,
    HubError saying what to do.
    """
    path = Path(folder).expanduser()
    missing = missing_files(path)
    if missing:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no readable {', '.join(missing[:3])}"
            f"{' and more' if len(missing) > 3 else ''}; nothing was uploaded"
        )
    token = check_upload(repo_id, token)
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(repo_id, revision):
        _prepare(api, repo_id, private, revision)
        # Resumable by itself: the Hub says which files, or parts of them, it already has.
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=path,
            revision=revision,
            commit_message=f"Upload {path.resolve().name}",
            ignore_patterns=list(_HIDDEN),
            delete_patterns=list(_REPLACED),
        )
    return str(commit.commit_url)


def check_upload(repo_id: str, token: str | None = None) -> str:
    """What can be known before any network: returns the token. Raises InputError or HubError."""
    _check_repo_id(repo_id)
    from huggingface_hub import get_token

    token = token or get_token()
    if token is None:
        raise HubError(f"not logged in to the Hub: {_LOG_IN}, then try again")
    return token


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    wanted = "give OWNER/NAME, of letters, digits, '-', '_' and '.'"
    if not is_repo_id(repo_id):
        raise InputError(f"{repo_id!r} is not the name of a Hub repository: {wanted}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not the name of a Hub repository: {wanted}") from error


def _prepare(api: HfApi, repo_id: str, private: bool, revision: str | None) -> None:
    """Make the repository and the branch. Refuses a public one where a private one was asked."""
    # None, not False: an organisation's own default for new repositories stands.
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise HubError(
            f"{repo_id} is there already and is public: make it private in its settings, or give "
            "another name; nothing was uploaded"
        )
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what an upload raises into a HubError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # The library wraps what stops one file in a RuntimeError that only names the file.
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise HubError(_refusal(cause, repo_id, revision)) from error
        if isinstance(cause, (HTTPError, OSError)):
            raise HubError(
                f"{repo_id}: the Hub cannot be reached, or the upload was cut off "
                f"({first_line(cause)}); connect and do the same again: what has arrived is not "
                "sent again"
            ) from error
        raise HubError(f"{repo_id} cannot be uploaded: {' '.join(str(cause).split())}") from error


def _refusal(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    """What to do about an answer of the Hub that is an error."""
    from huggingface_hub.errors import RevisionNotFoundError

    owner = repo_id.split("/")[0]
    status = error.response.status_code
    reason = " ".join((error.server_message or first_line(error)).split())
    said = f"the Hub answered {status}: {reason}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r} to upload to ({said})"
    if status == 401:
        return f"the Hub does not accept this token: {_LOG_IN} ({said})"
    if status == 403:
        return (
            f"this account or token may not write to {repo_id}: check the name {owner!r}, and that "
            f"the token has write access to it; {_LOG_IN} ({said})"
        )
    if status == 404:
        return (
            f"the Hub does not find {repo_id}: check that a user or organisation {owner!r} exists "
            f"({said})"
        )
    return f"{repo_id} could not be uploaded ({said}); do the same again to go on"
