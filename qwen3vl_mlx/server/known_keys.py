"""Which keys the objects inside a request may have: what is not read here is told of, or refused.

One table for each API, of the keys that its clients can send. What asks for nothing (null) is
passed over everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Keys:
    """The keys of one kind of object.

    known: read, or rightly without influence. inner: those that hold further such objects, alone
    or in a list. refused: what the API knows and this server cannot do, with what to do instead.
    """

    known: frozenset[str]
    inner: Mapping[str, Shape] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OneOf:
    """Objects of several kinds, told apart by the value of `key`; any other is `otherwise`."""

    key: str
    kinds: Mapping[str, Keys]
    otherwise: Keys | None = None  # None: its keys are its own matter, or its kind is refused

    def keys_of(self, value: Mapping[str, Any]) -> Keys | None:
        kind = value.get(self.key)
        return self.kinds.get(kind, self.otherwise) if isinstance(kind, str) else self.otherwise


Shape: TypeAlias = Keys | OneOf


def unread(value: object, shape: Shape, place: str) -> Iterator[tuple[str, str | None]]:
    """Places of keys that `shape` does not know, and the advice for those that are refused."""
    if isinstance(value, list):
        for at, entry in enumerate(value):
            yield from unread(entry, shape, f"{place}[{at}]")
    if not isinstance(value, Mapping):
        return  # of the wrong type, which others tell
    keys = shape.keys_of(value) if isinstance(shape, OneOf) else shape
    if keys is None:
        return
    for key, entry in value.items():
        if key in keys.inner:
            yield from unread(entry, keys.inner[key], f"{place}.{key}")
        elif key in keys.refused:
            if entry:
                yield f"{place}.{key}", keys.refused[key]
        elif entry is not None and key not in keys.known:
            yield f"{place}.{key}", None


def _keys(
    names: str, inner: Mapping[str, Shape] | None = None, refused: Mapping[str, str] | None = None
) -> Keys:
    return Keys(frozenset(names.split()), inner or {}, refused or {})


# Parts of a content. Prefixes are cached anyway, wherever a client marks their ends.

_CACHE = "prompt_cache_breakpoint cache_control"
_PIXELS = "detail min_pixels max_pixels"
_TEXT = _keys(f"type text annotations logprobs {_CACHE}")
IMAGE_URL = _keys(f"url {_PIXELS}")
_IMAGE = _keys(f"type {_PIXELS} {_CACHE}", {"image": IMAGE_URL, "image_url": IMAGE_URL})
_FRAME = _keys("url")
_VIDEO = _keys(f"type fps min_pixels max_pixels {_CACHE}", {"video": _FRAME, "video_url": _FRAME})
_CHAT_PARTS = OneOf(
    "type",
    {
        **dict.fromkeys(("text", "input_text"), _TEXT),
        **dict.fromkeys(("image", "image_url", "input_image"), _IMAGE),
        **dict.fromkeys(("video", "video_url"), _VIDEO),
    },
    # Qwen's own form: the key of what it holds tells the kind
    Keys(_TEXT.known | _IMAGE.known | _VIDEO.known, {**_IMAGE.inner, **_VIDEO.inner}),
)

# Chat completions. Templates show no names but those of functions.

_CALL = _keys("id type index name arguments", {"function": _keys("name arguments")})
MESSAGES = OneOf(
    "role",
    {
        "assistant": _keys(
            "role reasoning_content reasoning annotations",
            {"content": _CHAT_PARTS, "tool_calls": _CALL},
            {
                "audio": "the models make text only; send what was said as content",
                "function_call": "functions became tools: send tool_calls",
            },
        ),
        "tool": _keys("role tool_call_id name", {"content": _CHAT_PARTS}),
    },
    _keys("role", {"content": _CHAT_PARTS}),
)
_FUNCTION = "name description parameters strict"
TOOLS = _keys(f"type {_FUNCTION} {_CACHE}", {"function": _keys(_FUNCTION)})
_NAMED = _keys("type name", {"function": _keys("name")})
TOOL_CHOICE = _keys(
    "type name mode",
    {
        "function": _keys("name"),
        "allowed_tools": _keys("mode", {"tools": _NAMED}),
        "tools": _NAMED,
    },
)
RESPONSE_FORMAT = OneOf(  # or a JSON schema itself
    "type",
    {
        **dict.fromkeys(("text", "json_object"), _keys("type")),
        "json_schema": _keys("type", {"json_schema": _keys("name description schema strict")}),
    },
)
GRAMMAR = _keys("type value")

# Responses

_PARTS = OneOf(
    "type",
    {
        **dict.fromkeys(("text", "input_text", "output_text"), _TEXT),
        **dict.fromkeys(
            ("input_image", "image_url"),
            _keys(f"type file_id {_PIXELS} {_CACHE}", {"image_url": IMAGE_URL}),
        ),
        "refusal": _keys("type refusal"),
    },
)
_THOUGHT = _keys("type text")
_ITEM = "id type status created_by"
_MESSAGE = _keys(f"{_ITEM} role phase", {"content": _PARTS})
ITEMS = OneOf(
    "type",
    {
        "message": _MESSAGE,
        "reasoning": _keys(
            f"{_ITEM} encrypted_content", {"content": _THOUGHT, "summary": _THOUGHT}
        ),
        "function_call": _keys(f"{_ITEM} call_id name arguments caller"),
        "function_call_output": _keys(f"{_ITEM} call_id name caller", {"output": _PARTS}),
        "item_reference": _keys("id type"),
    },
    _MESSAGE,
)
FLAT_TOOLS = _keys(
    f"type {_FUNCTION}",
    refused={
        "defer_loading": "all tools are shown to the model; leave it out",
        "async": "answers wait for their tools; leave it out",
    },
)
