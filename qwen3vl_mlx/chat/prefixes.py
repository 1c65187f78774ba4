"""The cache of one conversation as a file: after a restart, its turns are not computed again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from qwen3vl_mlx.engine import prefix_file
from qwen3vl_mlx.engine.prefix_cache import Key, PrefixCache, prompt_key
from qwen3vl_mlx.engine.prefix_disk import fingerprint
from qwen3vl_mlx.engine.prefix_file import DamagedFileError, Head
from qwen3vl_mlx.errors import OutputError, PromptError

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL
    from qwen3vl_mlx.conversation import Chat


@dataclass(frozen=True)
class _Held:
    """Rows of the first `length` tokens, computed, as integers of their size."""

    identity: str
    length: int
    raw: tuple[tuple[mx.array, ...], ...]
    dtypes: tuple[tuple[mx.Dtype, ...], ...]


def write_prefix(chat: Chat, folder: Path) -> int:
    """Write what the model remembers of a conversation, in the place of older files there.

    Returns how many tokens these are. Raises OutputError.
    """
    model = chat.model
    cache = model.engine.scheduler.prefix
    if cache is None or not chat.messages:
        return 0
    key = _key(chat)
    held = model.engine.call(lambda: _held(model, cache, key))
    head = Head(key.values[: held.length].copy(), 0)
    name = prefix_file.file_name(held.identity, head.values, 0)
    try:
        if held.length:
            prefix_file.write_file(folder / name, held.identity, head, held.raw, held.dtypes)
        _remove(folder, but=name)
    except OSError as error:
        raise OutputError(f"{folder / name} cannot be written: {error}") from error
    return held.length


def _held(model: Qwen3VL, cache: PrefixCache, key: Key) -> _Held:
    """For the thread that owns the model: other threads may only read what is computed."""
    match = cache.match(key)
    raw = tuple(tuple(prefix_file.as_raw(array) for array in layer) for layer in match.layers)
    mx.eval(raw)
    dtypes = tuple(tuple(array.dtype for array in layer) for layer in match.layers)
    return _Held(_identity(model), match.length, raw, dtypes)


def _remove(folder: Path, but: str) -> None:
    for path in folder.iterdir():
        if prefix_file.is_file(path.name) and path.name != but:
            path.unlink()


def read_prefix(chat: Chat, folder: Path) -> int:
    """Give the model what `write_prefix` kept of a conversation.

    Returns how many tokens these are: 0 where it was made by another model, or is damaged; then
    the conversation is computed again when it goes on.
    """
    model = chat.model
    cache = model.engine.scheduler.prefix
    if cache is None or not chat.messages:
        return 0
    identity = model.engine.call(lambda: _identity(model))
    try:
        key = _key(chat)
        for path in sorted(folder.glob(f"{prefix_file.family(identity)}*")):
            head = prefix_file.read_head(path, identity)
            length = _agreeing(head, key)
            if not length:
                continue
            raw = prefix_file.read_file(path, identity, head)

            def give(raw: prefix_file.RawRows = raw, length: int = length) -> int:
                rows = prefix_file.as_rows(raw)
                layers = [[array[:, :, :length, :] for array in layer] for layer in rows]
                return cache.insert(key, layers)

            return model.engine.call(give)
    except (DamagedFileError, OSError, PromptError):
        pass
    return 0


def _agreeing(head: Head, key: Key) -> int:
    """How many first tokens of a file are those of a conversation, no picture cut."""
    most = min(len(head.values), len(key.values))
    differing = np.flatnonzero(head.values[:most] != key.values[:most])
    agreeing = int(differing[0]) if len(differing) else most
    return key.cut(agreeing) if head.start == 0 else 0


def _key(chat: Chat) -> Key:
    prompt = chat.model.processor.prompt(
        chat.messages,
        tools=chat.tools,
        add_vision_id=chat.number_images,
        add_generation_prompt=False,
    )
    return prompt_key(prompt)


def _identity(model: Qwen3VL) -> str:
    return fingerprint(model.model, model.engine.options.kv_bits)
