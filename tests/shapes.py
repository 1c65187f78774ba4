"""Messages, pictures and fields that are mostly right, and now and then anything at all."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from clients import data_uri
from hypothesis import strategies as st
from malformed import malformed

GOOD = data_uri(np.zeros((64, 96, 3), np.uint8))
BAD = malformed()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any] = JSON) -> Any:
    return st.integers(0, 19).flatmap(lambda draw: bad if draw == 19 else good)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


WORDS = st.sampled_from(
    ["Hello", "", " ", "<|im_end|>", "<|image_pad|>", "<think>", "\x00", "é", "😀", "a" * 300]
)
SOURCES = mostly(
    st.just(GOOD),
    st.sampled_from(
        [
            *(f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in BAD.values()),
            "",
            "data:",
            "data:image/png;base64",
            "data:image/png;base64,%%%",
            "data:text/plain,hello",
            "data:image/png;base64," + "A" * 999,
            "/etc/passwd",
            "~root/.ssh/id_rsa",
            "../../x.png",
            "a\x00b.png",
            "file:///etc/passwd",
            "file://host/etc/passwd",
            "http://127.0.0.1:9/a.png",
            "http://[::1]:9/a.png",
            "http://[",
            "http://localhost/a.png",
            "https://127.0.0.1/a.png",
            "ftp://127.0.0.1/a.png",
            "x" * 5000,
        ]
    )
    | JSON,
)
PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, mostly(WORDS)),
    st.builds(lambda text: {"type": "input_text", "text": text}, WORDS),
    st.builds(
        lambda url, fields: {"type": "image_url", "image_url": {"url": url, **fields}},
        SOURCES,
        optional(
            detail=mostly(st.sampled_from(["low", "high", "auto"])),
            max_pixels=mostly(st.integers(1, 50000)),
            min_pixels=mostly(st.integers(1, 50000)),
        ),
    ),
    st.builds(lambda url: {"type": "input_image", "image_url": url}, SOURCES),
    st.builds(lambda url: {"image": url, "max_pixels": 9999}, SOURCES),
    st.builds(
        lambda frames, fps: {"type": "video", "video": frames, "fps": fps},
        mostly(st.lists(SOURCES, min_size=1, max_size=3)),
        mostly(st.sampled_from([1, 2, 0.5])),
    ),
    st.builds(
        lambda kind, data: {
            "type": "image",
            "source": {"type": kind, "media_type": "image/png", "data": data, "url": data},
        },
        st.sampled_from(["base64", "url", "file"]),
        SOURCES,
    ),
    st.sampled_from(
        [
            {"type": "tool_use", "id": "call_1", "name": "f", "input": {}},
            {"type": "tool_result", "tool_use_id": "call_1", "content": "So."},
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"type": "refusal", "refusal": "No."},
        ]
    ),
    JSON,
)
CALLS = st.lists(
    st.builds(
        lambda name, arguments: {
            "id": "call_1",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        },
        mostly(st.just("f")),
        mostly(st.sampled_from(["{}", {}, "{", "[]", '{"x": NaN}'])),
    ),
    max_size=2,
)
CONTENT = mostly(WORDS | st.lists(PARTS, max_size=4))
OF_ROLE: dict[str, st.SearchStrategy[Any]] = {
    "user": optional(name=mostly(WORDS), type=st.just("message")),
    "assistant": optional(tool_calls=mostly(CALLS), reasoning_content=mostly(WORDS)),
    "tool": optional(tool_call_id=mostly(st.just("call_1"))),
    "system": st.just({}),
}
MESSAGES = mostly(
    st.sampled_from(["user", "user", "user", "assistant", "assistant", "tool", "system"]).flatmap(
        lambda role: st.builds(
            lambda content, rest: {"role": role, "content": content, **rest},
            CONTENT,
            mostly(OF_ROLE[role], st.dictionaries(st.text(max_size=4), JSON, max_size=2)),
        )
    )
)
SCHEMAS = st.sampled_from(
    [
        {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]},
        {"$ref": "#"},
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(a*)*b{1,9999}"},
        {"type": "array", "minItems": 10**9},
        {"allOf": [{"type": "string"}, {"type": "number"}]},
        {"const": "\x00"},
        {},
    ]
)
TOOLS = st.lists(
    st.builds(
        lambda name, schema, strict: {
            "type": "function",
            "name": name,
            "input_schema": schema,
            "function": {"name": name, "parameters": schema, "strict": strict},
        },
        mostly(st.sampled_from(["f", "g", "", "f g"])),
        mostly(SCHEMAS),
        mostly(st.booleans()),
    ),
    max_size=3,
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(-1, 9),
    "max_completion_tokens": st.integers(-1, 9),
    "n": st.integers(-1, 3),
    "temperature": st.sampled_from([0, 1, 1e-9, 1e300, -1, 5e-324]),
    "top_p": st.sampled_from([0, 0.5, 1, 5e-324, -0.0]),
    "top_k": st.integers(-1, 2000),
    "stop": st.lists(WORDS, max_size=5) | WORDS,
    "seed": st.integers(-1, 2**64),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(-1, 21),
    "logit_bias": st.dictionaries(
        st.sampled_from(["5", "1000", "2000", "-1", "x", "٣"]), st.sampled_from([0, 100, -1e308])
    ),
    "tools": TOOLS,
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]
    ),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}])
    | SCHEMAS.map(lambda s: {"type": "json_schema", "json_schema": {"name": "x", "schema": s}}),
    "grammar": st.builds(
        lambda kind, value: {"type": kind, "value": value},
        st.sampled_from(["regex", "lark", "json_schema", "llguidance"]),
        st.sampled_from(["a|b", "(", "start: start", "start: /(a*)*/", "{}", '{"grammars": []}'])
        | SCHEMAS,
    ),
    "timeout": st.sampled_from([1e-9, 0.01, 5, -1, 1e308]),
    "stream": st.booleans(),
    "min_pixels": st.integers(-1, 2**40),
    "max_pixels": st.integers(-1, 2**40) | st.just("full"),
    "truncate_sequence": st.booleans(),
    "dry_multiplier": st.sampled_from([0, 1, 1e300]),
    "dry_sequence_breakers": st.lists(WORDS, max_size=3),
    "user": WORDS,
}
