"""Where the chat keeps its files: history and saved conversations, for the owner's eyes alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qwen3vl_mlx.errors import OutputError


def state_folder() -> Path:
    """~/Library/Application Support/qwen3vl on a Mac, else below $XDG_STATE_HOME."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "qwen3vl"
    given = os.environ.get("XDG_STATE_HOME", "")
    # The specification has relative ones ignored.
    base = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    return base / "qwen3vl"


def history_file() -> Path:
    """The file of what was typed, made with mode 0600 if need be. Raises OutputError."""
    path = state_folder() / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise OutputError(
            f"the history {path} cannot be written ({error.strerror}); --no-history goes without"
        ) from error
    return path


def conversations_folder() -> Path:
    """Where `/save NAME` puts a conversation."""
    return state_folder() / "conversations"
