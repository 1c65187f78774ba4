"""Where this package keeps what outlives a command: sockets, histories, records."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_NAME = "qwen3vl"


def state_folder() -> Path:
    """The user's own folder; it may not exist yet.

    ~/Library/Application Support/qwen3vl on a Mac, $XDG_STATE_HOME/qwen3vl or
    ~/.local/state/qwen3vl elsewhere.
    """
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / _NAME
    given = os.environ.get("XDG_STATE_HOME", "")  # relative ones are to be ignored
    return (Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state") / _NAME


def default_socket() -> Path:
    """Where `qwen3vl serve --socket` listens unless told otherwise."""
    return state_folder() / "server.sock"


def make_private(folder: Path) -> Path:
    """Make a folder that only its owner can enter; one that is there keeps its permissions."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
