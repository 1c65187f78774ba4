"""A conversation as a folder: conversation.json, the pictures' files, and the model's cache.

The pictures are named by their content and written first, the JSON file replaces the old one at
once, and only then what nobody names any more is removed: killed at any moment, the folder holds
the conversation as it was before or as it is now.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_mlx.chat.pictures import Picture, picture_of
from qwen3vl_mlx.chat.places import conversations_folder
from qwen3vl_mlx.chat.settings import SETTINGS, check
from qwen3vl_mlx.chat.transcript import Transcript, Turn
from qwen3vl_mlx.errors import InputError, OutputError, Qwen3VLError
from qwen3vl_mlx.media_decode import HEAD_BYTES, format_of
from qwen3vl_mlx.publish import replace_text

SUFFIX = ".qwen3vl-chat"
_FORMAT = "qwen3vl-chat-1"
_FILE = "conversation.json"
_PICTURE = re.compile(r"picture-[0-9a-f]{32}\.[a-z]+")
_ENDINGS = {"JPEG": "jpg", "TIFF": "tif", "HEIF": "heic"}


def folder_of(name: str) -> Path:
    """The folder of a saved conversation: a path where one is given, else of the user's own.

    Raises InputError for what can be neither.
    """
    plain = name.removesuffix(SUFFIX)
    if not plain or plain.endswith("/") or "\0" in name:
        raise InputError(f"{name!r} cannot be a conversation's name: give a word, or a path")
    if plain in (".", "..") or plain.startswith("-"):
        raise InputError(f"{name!r} cannot be a conversation's name: give a word, or a path")
    try:
        path = Path(plain + SUFFIX).expanduser()
    except RuntimeError as error:  # ~nobody
        raise InputError(f"{name!r}: {error}") from error
    return path.absolute() if "/" in name else conversations_folder() / path


def saved_names() -> list[str]:
    """Names of the conversations in the user's own folder, the newest first."""
    try:
        found = [path for path in conversations_folder().glob(f"*{SUFFIX}") if is_saved(path)]
        found.sort(key=lambda path: -(path / _FILE).stat().st_mtime_ns)
    except OSError:  # one was removed meanwhile
        found = []
    return [path.name.removesuffix(SUFFIX) for path in found]


def is_saved(folder: Path) -> bool:
    """Whether a conversation is there."""
    return (folder / _FILE).is_file()


def folder_bytes(folder: Path) -> int:
    """What a saved conversation takes on the disk."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def write_conversation(folder: Path, transcript: Transcript) -> None:
    """Save a conversation, in the place of the one that is there. Raises OutputError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        named = [_write_picture(folder, p) for turn in transcript.turns for p in turn.pictures]
        text = json.dumps(_values(transcript), ensure_ascii=False, indent=1)
        replace_text(folder / _FILE, text + "\n")
        for path in folder.iterdir():
            if _PICTURE.fullmatch(path.name) and path.name not in named:
                path.unlink()
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}; the conversation goes on unsaved"
        ) from error


def read_conversation(folder: Path) -> Transcript:
    """A saved conversation. Raises InputError where it is missing, damaged or another's."""
    path = folder / _FILE
    if not path.is_file():
        names = saved_names()
        hint = f"; saved: {', '.join(names[:10])}" if names else "; /save NAME saves one"
        raise InputError(f"no conversation is saved at {folder}{hint}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise InputError(f"{path} is of the format {values['format']!r}, expected {_FORMAT}")
        return _transcript(folder, values)
    except Qwen3VLError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is damaged, or is no saved conversation ({reason})") from error


# Writing.


def _values(transcript: Transcript) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if transcript.system is not None:
        messages.append({"role": "system", "content": transcript.system})
    for turn in transcript.turns:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _file_name(p)}, "name": p.name}
            for p in turn.pictures
        ]
        content.append({"type": "text", "text": turn.question})
        messages.append({"role": "user", "content": content})
        answer = {"role": "assistant", "content": turn.answer}
        if turn.reasoning:
            answer["reasoning_content"] = turn.reasoning
        messages.append(answer)
    return {
        "format": _FORMAT,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": transcript.model,
        "settings": dict(transcript.changes),
        "messages": messages,
    }


def _file_name(picture: Picture) -> str:
    form = format_of(picture.data[:HEAD_BYTES]) or "img"
    digest = hashlib.sha256(picture.data).hexdigest()[:32]
    return f"picture-{digest}.{_ENDINGS.get(form, form.lower())}"


def _write_picture(folder: Path, picture: Picture) -> str:
    name = _file_name(picture)
    path = folder / name
    if path.exists() and path.stat().st_size == len(picture.data):
        return name
    draft = path.with_name(f".{name}.writing")
    try:
        with draft.open("wb") as file:
            file.write(picture.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return name


# Reading.


def _transcript(folder: Path, values: Mapping[str, Any]) -> Transcript:
    messages = list(values["messages"])
    system = None
    if messages and messages[0]["role"] == "system":
        system = _text(messages.pop(0)["content"])
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(messages) // 2):
        raise ValueError("questions and answers do not take turns")
    turns = [
        _turn(folder, question, answer)
        for question, answer in zip(messages[::2], messages[1::2], strict=True)
    ]
    return Transcript(_text(values["model"]), system, tuple(turns), _changes(values["settings"]))


def _turn(folder: Path, question: Mapping[str, Any], answer: Mapping[str, Any]) -> Turn:
    *parts, text = question["content"]
    return Turn(
        _text(text["text"]),
        tuple(_read_picture(folder, part) for part in parts),
        _text(answer["content"]),
        _text(answer.get("reasoning_content", "")),
    )


def _read_picture(folder: Path, part: Mapping[str, Any]) -> Picture:
    name = _text(part["image_url"]["url"])
    if not _PICTURE.fullmatch(name):
        raise ValueError(f"{name!r} is no picture's file here")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise InputError(f"{folder / name}, a picture, cannot be read: {error}") from error
    picture = picture_of(data, _text(part["name"]), str(folder / name)).picture
    if _file_name(picture) != name:
        raise InputError(f"{folder / name} is not the picture that was saved")
    return picture


def _changes(values: Mapping[str, Any]) -> dict[str, Any]:
    changes = dict(values)
    if unknown := changes.keys() - SETTINGS.keys():
        raise ValueError(f"there is no setting {min(unknown)!r}")
    if "logit_bias" in changes:  # JSON has no numbers for keys
        changes["logit_bias"] = {int(token): bias for token, bias in changes["logit_bias"].items()}
    check(changes)
    return changes


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {type(value).__name__}")
    return value
