"""How long texts are, told without reading them: those that no context holds are refused early."""

from __future__ import annotations

from collections.abc import Mapping

# More than any language, program or table has on the average of a whole context. Only long runs of
# blanks have more: the vocabulary's longest tokens are such runs.
CHARACTERS_PER_TOKEN = 16

_NO_TEXT = frozenset(("role", "type", "image", "image_url", "video", "video_url"))


def least_tokens(*texts: object) -> int:
    """Tokens that strings, messages or tools have at least, their pictures left out."""
    return sum(map(text_length, texts)) // CHARACTERS_PER_TOKEN


def text_length(value: object) -> int:
    """Characters of all strings in messages or tools, their pictures left out."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(text_length(each) for key, each in value.items() if key not in _NO_TEXT)
    return sum(map(text_length, value)) if isinstance(value, (list, tuple)) else 0
