"""Where the chat keeps its files: history and saved conversations, for the owner's eyes alone."""

from __future__ import annotations

import os
from pathlib import Path

from qwen3vl_mlx.errors import OutputError
from qwen3vl_mlx.folders import make_private, state_folder


def history_file() -> Path:
    """The file of what was typed, made with mode 0600 if need be. Raises OutputError."""
    path = state_folder() / "chat_history"
    try:
        make_private(path.parent)
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
