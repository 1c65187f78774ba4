"""Which tools an answer may or must call, and the grammar of one call's text.

The call of Qwen3-VL is `<tool_call>`, a newline, `{"name": ..., "arguments": {...}}`, a newline,
`</tool_call>`; the grammar here is what stands between the two tags, spaced as in training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qwen3vl_mlx.errors import InputError

# Separators as json.dumps writes them, which is how the model was taught to write a call.
_JSON_OPTIONS: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allow_general_unicode_escapes": True,
}
_CHOICES: Final = (
    '"auto", "none", "required", {"type": "function", "function": {"name": ...}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
)


@dataclass(frozen=True)
class Tool:
    """One function: its name, the JSON schema of its arguments, and whether that is binding."""

    name: str
    parameters: Mapping[str, Any] | None
    strict: bool


@dataclass(frozen=True)
class Choice:
    """`mode` is auto, none or required; `names` are the tools that may be called."""

    mode: str
    names: tuple[str, ...]
    narrowed: bool  # only some of the tools, so that names must be watched
    single: bool  # one call and no more


@dataclass(frozen=True)
class ToolGrammar:
    """`body` is the Lark grammar of a call's text between its tags."""

    body: str
    required: bool
    single: bool


def parse_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """Read OpenAI tools; also the flat form of its Responses API. InputError names the fault."""
    found: list[Tool] = []
    for at, entry in enumerate(tools or ()):
        function = entry.get("function", entry) if isinstance(entry, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(
                f"tools[{at}] names no function; expected "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
            )
        name, parameters = function["name"], function.get("parameters")
        if not name or name in [tool.name for tool in found]:
            fault = f"has the name {name!r} of another tool" if name else "has an empty name"
            raise InputError(f"tools[{at}] {fault}; give every tool a name of its own")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InputError(f"tools[{at}] {name!r}: parameters must be a JSON schema (an object)")
        strict = function.get("strict") or False
        if not isinstance(strict, bool):
            raise InputError(f"tools[{at}] {name!r}: strict must be true or false")
        found.append(Tool(name, parameters, strict))
    return tuple(found)


def parse_choice(tool_choice: object, tools: Sequence[Tool]) -> Choice:
    """Read OpenAI's tool_choice; None is auto. InputError for forms and names it does not know."""
    names = tuple(tool.name for tool in tools)
    if tool_choice is None or isinstance(tool_choice, str):
        mode = "auto" if tool_choice is None else tool_choice
        if mode not in ("auto", "none", "required"):
            raise InputError(f"tool_choice {mode!r} is unknown; expected {_CHOICES}")
        if mode == "required" and not names:
            raise InputError('tool_choice "required" needs tools, and there are none')
        return Choice(mode, names, narrowed=False, single=False)
    if not isinstance(tool_choice, Mapping):
        raise InputError(f"tool_choice {tool_choice!r} is unknown; expected {_CHOICES}")
    kind = tool_choice.get("type")
    if kind == "function":
        return Choice("required", (_known_name(tool_choice, names),), narrowed=True, single=True)
    if kind == "allowed_tools":
        inner = tool_choice.get("allowed_tools", tool_choice)
        if not isinstance(inner, Mapping) or inner.get("mode", "auto") not in ("auto", "required"):
            raise InputError('tool_choice allowed_tools: mode must be "auto" or "required"')
        entries = inner.get("tools")
        if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
            raise InputError("tool_choice allowed_tools: tools must list at least one function")
        allowed = tuple(dict.fromkeys(_known_name(entry, names) for entry in entries))
        return Choice(inner.get("mode", "auto"), allowed, narrowed=True, single=False)
    raise InputError(f"tool_choice {tool_choice!r} is unknown; expected {_CHOICES}")


def _known_name(entry: object, names: Sequence[str]) -> str:
    function = entry.get("function", entry) if isinstance(entry, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InputError(
            f'tool_choice {entry!r} names no function; expected {{"type": "function", '
            '"function": {"name": ...}}'
        )
    if name not in names:
        known = ", ".join(map(repr, names)) or "none, as no tools were given"
        raise InputError(f"tool_choice names {name!r}, which is not among the tools: {known}")
    return name


def tool_grammar(
    tools: Sequence[Tool], choice: Choice, fault: Callable[[str], str], *, parallel: bool
) -> ToolGrammar:
    """The grammar for calling what `choice` allows.

    `fault(lark)` says what is wrong with a grammar, or nothing. Schemas bind where a tool is
    strict or must be called; a loose tool whose schema uses what llguidance cannot do may write
    any object.
    """
    rules = ["start: " + " | ".join(f"call_{at}" for at in range(len(choice.names)))]
    by_name = {tool.name: tool for tool in tools}
    for at, name in enumerate(choice.names):
        tool = by_name[name]
        schema: Mapping[str, Any] = {"type": "object"}
        if tool.strict or choice.mode == "required":
            schema = _arguments(tool)
            if message := fault(f"start: {_json(schema)}"):
                if tool.strict:
                    raise InputError(f"tool {name!r}: its parameters cannot be met: {message}")
                schema = {"type": "object"}
        opening = f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
        rules.append(f'call_{at}: {json.dumps(opening)} args_{at} "}}\\n"')
        rules.append(f"args_{at}: {_json(schema)}")
    single = choice.single or not parallel
    return ToolGrammar("\n".join(rules), required=choice.mode == "required", single=single)


def _arguments(tool: Tool) -> Mapping[str, Any]:
    """The schema of a call's arguments: always an object; none declared means an empty one."""
    if tool.parameters is None:
        return {"type": "object", "additionalProperties": False}
    kind = tool.parameters.get("type", "object")
    if kind != "object":
        raise InputError(
            f"tool {tool.name!r}: parameters have the type {kind!r}; the arguments of a call are "
            'an object, so expected "object"'
        )
    return {**tool.parameters, "type": "object"}


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + dumped(with_options(schema, _JSON_OPTIONS))


def with_options(schema: Mapping[str, Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """`schema` with options for llguidance; those it brings itself, under "x-guidance", win."""
    own = schema.get("x-guidance", {})
    if not isinstance(own, Mapping):
        raise InputError(f"the schema's x-guidance must be an object, got {own!r}")
    return {**schema, "x-guidance": {**options, **own}}


def dumped(value: Mapping[str, Any]) -> str:
    """`value` as JSON. InputError where it holds what JSON cannot."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"a grammar or schema must be plain JSON: {error}") from error
