"""What a caller asks an answer to look like: response_format, grammar, tools and tool_choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from qwen3vl_mlx.engine.tool_grammar import (
    ToolGrammar,
    dumped,
    parse_choice,
    parse_tools,
    tool_grammar,
    with_options,
)
from qwen3vl_mlx.errors import InputError

if TYPE_CHECKING:
    import llguidance

# A space or one indented line break between JSON's tokens: enough for every writer of JSON, and
# no model can fill its answer with blanks for ever.
_JSON_OPTIONS: Final = {
    "whitespace_pattern": r"( |\r?\n[ \t]{0,64})",
    "json_allow_general_unicode_escapes": True,
}
_JSON_TYPES: Final = ("object", "array", "string", "number", "integer", "boolean", "null")
_FORMATS: Final = '"text", "json_object", "json_schema" or a JSON schema itself'
_LONGEST: Final = 600  # characters of a message; llguidance quotes whole grammars
_GRAMMARS: Final = ("regex", "json_schema", "lark", "llguidance")


@dataclass(frozen=True)
class Grammar:
    """What an answer must follow. `content` is llguidance's text for the answer beside its calls.

    Without `content` and `tools`, the answer is free but for `no_calls`: it never starts one.
    """

    content: str | None = None
    tools: ToolGrammar | None = None
    no_calls: bool = False


def parse_grammar(
    response_format: Mapping[str, Any] | None = None,
    grammar: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    *,
    parallel_tool_calls: bool | None = None,
) -> Grammar | None:
    """Read a request's constraints; None where it has none. Nothing is read from a checkpoint.

    response_format: OpenAI's text, json_object or json_schema, or a JSON schema as a dict.
    grammar: {"type": "regex" | "json_schema" | "lark" | "llguidance", "value": ...}.
    tools, tool_choice: as OpenAI has them. parallel_tool_calls False allows one call at most.

    Raises InputError for what is malformed, contradictory, unknown or beyond llguidance, naming
    the fault, and where llguidance is missing.
    """
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise InputError(f"parallel_tool_calls must be true or false, got {parallel_tool_calls!r}")
    content = _content(response_format, grammar)
    if tool_choice is None and not tools:
        return Grammar(content) if content is not None else None
    known = parse_tools(tools)
    choice = parse_choice(tool_choice, known)
    parallel = parallel_tool_calls is not False
    if choice.mode == "none":
        return Grammar(content, no_calls=True) if known or content else None
    strict = any(tool.strict for tool in known)
    loose = choice.mode == "auto" and not (strict or choice.narrowed or content or not parallel)
    if not known or loose:
        return Grammar(content) if content is not None else None
    return Grammar(content, tool_grammar(known, choice, fault_of, parallel=parallel))


def _content(
    response_format: Mapping[str, Any] | None, grammar: Mapping[str, Any] | None
) -> str | None:
    """llguidance's text for the answer's content, checked; None where it is free."""
    if response_format is not None and grammar is not None:
        raise InputError("response_format and grammar exclude each other; give one of them")
    if grammar is not None:
        name, text = "grammar", _from_grammar(grammar)
    elif response_format is not None:
        schema = _schema(response_format)
        if schema is None:
            return None
        name, text = "response_format", json_grammar(schema)
    else:
        return None
    if message := fault_of(text):
        raise InputError(f"{name} cannot be used: {message}")
    return text


def _schema(response_format: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The JSON schema that a response_format asks for; None for plain text."""
    if not isinstance(response_format, Mapping):
        raise InputError(
            f"response_format is a {type(response_format).__name__}; expected a dict: {_FORMATS}"
        )
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        if not response_format or (isinstance(kind, str) and kind not in _JSON_TYPES):
            raise InputError(f"response_format {response_format!r} is unknown; expected {_FORMATS}")
        return response_format
    wrapper = response_format.get("json_schema")
    schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InputError(
            "response_format json_schema holds no schema; expected "
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        )
    return schema


def _from_grammar(grammar: Mapping[str, Any]) -> str:
    """llguidance's text for {"type": ..., "value": ...}."""
    kind = grammar.get("type") if isinstance(grammar, Mapping) else None
    if kind not in _GRAMMARS or set(grammar) != {"type", "value"}:
        raise InputError(
            f"grammar {grammar!r} is unknown; expected "
            f'{{"type": one of {", ".join(_GRAMMARS)}, "value": ...}}'
        )
    value = grammar["value"]
    if kind == "json_schema":
        return json_grammar(_json_object(value, kind))
    if kind == "llguidance":
        return dumped(_json_object(value, kind))
    if not isinstance(value, str):
        raise InputError(f"grammar {kind}: its value must be a text, got {value!r}")
    matcher: type[llguidance.LLMatcher] = llguidance_module().LLMatcher
    if kind == "regex":
        return matcher.grammar_from_regex(value)
    return matcher.grammar_from_lark(value)


def _json_object(value: object, kind: str) -> Mapping[str, Any]:
    """A grammar's value that may come as an object or as its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"grammar {kind}: its value is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise InputError(f"grammar {kind}: its value must be a JSON object, got {value!r}")
    return value


def json_grammar(schema: Mapping[str, Any]) -> str:
    """llguidance's text for JSON that follows `schema`."""
    spaced = with_options(schema, _JSON_OPTIONS)
    return dumped({"grammars": [{"json_schema": spaced}]})


def llguidance_module() -> ModuleType:
    """llguidance, imported when it is first needed."""
    try:
        import llguidance
    except ImportError as error:
        raise InputError(
            "constrained answers (response_format, grammar, strict tools, tool_choice) need "
            "llguidance: pip install llguidance"
        ) from error
    return llguidance


def parser_limits() -> llguidance.LLParserLimits:
    """llguidance's own limits; messages without a dump of the parser."""
    limits: llguidance.LLParserLimits = llguidance_module().LLParserLimits(verbose_errors=False)
    return limits


def fault_of(grammar: str) -> str:
    """What is wrong with llguidance's text `grammar`, in its words; empty where it is right."""
    limits = parser_limits()
    wrong, messages = llguidance_module().LLMatcher.validate_grammar_with_warnings(
        grammar, limits=limits
    )
    return shortened(messages[0]) if wrong else ""


def shortened(message: str) -> str:
    """llguidance's message without its marker for leaving out the parser's state, and not long."""
    message = message.replace("<non-verbose/>", "").strip()
    return message if len(message) <= _LONGEST else message[:_LONGEST] + " ..."
