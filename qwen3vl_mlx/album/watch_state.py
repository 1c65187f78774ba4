"""What a watch is to leave alone for ever: the files that were there before it first began.

Kept beside the results, so that a watch that begins again does what came while nobody watched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from qwen3vl_mlx.album.finding import Selection, find
from qwen3vl_mlx.album.records import Stamp, stamp_at
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.publish import replace_text


def left_alone(
    root: str,
    selection: Selection,
    out: str | None,
    note: Callable[[str], None],
    *,
    existing: bool,
) -> dict[str, Stamp]:
    """Files below `root` that are none of this watch's, by their path.

    Those of the first watch of this folder with these results; with `existing` none. Raises
    InputError for a state that cannot be read, OutputError where it cannot be written.
    """
    path = _state_path(root, out)
    patterns = [*selection.globs, "-", *selection.excludes, *["-r"] * selection.recursive]
    if path is not None and path.exists() and not existing:
        known = _read(path, patterns)
        if known is not None:
            at = {file: os.path.realpath(os.path.join(root, file)) for file in known}
            return {at[file]: stamp for file, stamp in known.items()}
        note(f"{root} was watched for other files before: what is there now is left alone")
    there = (
        [] if existing else [(each, stamp_at(each.path)) for each in find([root], selection, note)]
    )
    found = [(picture, stamp) for picture, stamp in there if stamp is not None]
    if path is not None:
        files = {picture.file: [stamp.size, stamp.modified_ns] for picture, stamp in found}
        state = {"folder": root, "patterns": patterns, "files": files}
        replace_text(path, json.dumps(state))
    return {picture.path: stamp for picture, stamp in found}


def _state_path(root: str, out: str | None) -> Path | None:
    """Beside the results; for lines on stdout there is none."""
    if out is None or out == "-":
        return None
    if out == "sidecar":
        return Path(root) / ".qwen3vl-watch.json"
    results = Path(out).expanduser()
    which = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    return results.with_name(f".{results.name}.watch-{which}.json")


def _read(path: Path, patterns: list[str]) -> dict[str, Stamp] | None:
    """The files of a state, named from the folder; None where other patterns made it."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files = {str(file): Stamp(*map(int, stamp)) for file, stamp in state["files"].items()}
        return files if state["patterns"] == patterns else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read: {error}; remove it, and pictures that are there are left alone"
        ) from error
