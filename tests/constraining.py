"""Guides over the demo checkpoint's tokenizer: what they allow, walks through them, readers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.engine.constraints import GrammarCompiler, Guide, make_guide, parse_grammar
from qwen3vl_mlx.engine.grammar_compiler import Bits
from qwen3vl_mlx.engine.output import Chunk, OutputParser
from qwen3vl_mlx.processing.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(CHECKPOINT)
VOCAB = 1100  # more than the tokenizer has, and no whole number of 32-bit words
EOS = (TOKENIZER.added_tokens["<|im_end|>"], TOKENIZER.added_tokens["<|endoftext|>"])
THINK_END = TOKENIZER.added_tokens["</think>"]
TOOL_START = TOKENIZER.added_tokens["<tool_call>"]
TOOL_END = TOKENIZER.added_tokens["</tool_call>"]
COMPILER = GrammarCompiler(TOKENIZER, VOCAB, EOS)
TEXTS = [TOKENIZER.token_bytes(token, False) for token in range(VOCAB)]
ADDED = set(TOKENIZER.added_tokens.values())
EVERYTHING = frozenset(range(VOCAB))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def unpacked(bits: Bits) -> np.ndarray[Any, Any]:
    return np.unpackbits(bits.view(np.uint8), bitorder="little")[:VOCAB]


def allowed(guide: Guide) -> AbstractSet[int]:
    bits = guide.mask()
    return EVERYTHING if bits is None else set(np.flatnonzero(unpacked(bits)).tolist())


def guided(
    *,
    thinking: bool = False,
    budget: int | None = None,
    ends: frozenset[int] | None = None,
    **asked: Any,
) -> Guide:
    guide = make_guide(
        COMPILER,
        parse_grammar(**asked),
        thinking=thinking,
        thinking_budget=budget,
        end_tokens=ends,
    )
    assert guide is not None
    return guide


def walk(guide: Guide, seed: int, *, length: int = 1500) -> list[int]:
    """Draw evenly from what is allowed, until an end token. Free parts speak text and may end."""
    chance, tokens = random.Random(seed), list[int]()
    while len(tokens) < length:
        choices = allowed(guide)
        if choices >= EVERYTHING - set(EOS):
            choices &= {t for t in choices if TEXTS[t] and t not in ADDED} | set(EOS)
        tokens.append(chance.choice(sorted(choices)))
        guide.consume(tokens[-1])
        assert guide.failure is None, guide.failure
        if tokens[-1] in EOS:
            return tokens
    raise AssertionError(f"no end: {TOKENIZER.decode(tokens[:200], False)!r}")


def say(guide: Guide, text: str, *end: int) -> None:
    """Consume a text, checking that every token was allowed."""
    for token in (*encode(text), *end):
        assert token in allowed(guide), (text, TEXTS[token])
        guide.consume(token)
        assert guide.failure is None, guide.failure


def spell(text: str) -> list[int]:
    """Tokens of one byte each, tags included."""
    return [TEXTS.index(bytes([byte])) for byte in text.encode()]


def read(tokens: Sequence[int], *, thinking: bool = False, tools: bool = True) -> dict[str, Any]:
    """The answer as a caller gets it."""
    parser = OutputParser(thinking=thinking, tools=tools)
    chunks: list[Chunk] = [*parser.push(TOKENIZER.decode(tokens)), *parser.flush()]
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "reasoning": "".join(chunk.reasoning for chunk in chunks),
        "calls": [
            (call.name, json.loads(call.arguments)) for chunk in chunks for call in chunk.tool_calls
        ],
    }


def fits(schema: Any, value: Any) -> bool:
    """JSON Schema, as far as the schemas here go."""
    if not isinstance(schema, Mapping):
        return bool(schema)
    kinds: dict[str, Callable[[Any], bool]] = {
        "object": lambda v: isinstance(v, dict),
        "array": lambda v: isinstance(v, list),
        "string": lambda v: isinstance(v, str),
        "boolean": lambda v: isinstance(v, bool),
        "null": lambda v: v is None,
        "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    }
    if "type" in schema and not kinds[schema["type"]](value):
        return False
    if "enum" in schema and not any(v == value and type(v) is type(value) for v in schema["enum"]):
        return False
    if "anyOf" in schema and not any(fits(one, value) for one in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= set(value) and all(
            fits(properties.get(key, extra), item) for key, item in value.items()
        )
    if isinstance(value, list):
        count = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**6)
        return count and all(fits(schema.get("items", True), item) for item in value)
    if isinstance(value, str):
        pattern = schema.get("pattern", "")
        return len(value) <= schema.get("maxLength", 10**6) and bool(re.search(pattern, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return bool(schema.get("minimum", -1e99) <= value <= schema.get("maximum", 1e99))
    return True


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 6}


def function(name: str, *, strict: bool | None = None, **parameters: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"name": name, "description": "does </tool_call> things"}
    if strict is not None:
        body["strict"] = strict
    if parameters:
        body["parameters"] = record(**parameters)
    return {"type": "function", "function": body}


CITY = {"enum": ["Paris", 'Rö"m', "<b>"]}
WEATHER = function(
    "weather", strict=True, city=CITY, days={"type": "integer", "minimum": 1, "maximum": 9}
)
LOOSE = function("look-up", query=SHORT)
NOW = function('now "ü"')
TOOLS = [WEATHER, LOOSE, NOW]
SCHEMA_OF = {
    "weather": WEATHER["function"]["parameters"],
    "look-up": LOOSE["function"]["parameters"],
    'now "ü"': record(),
}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def narrowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [named(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
