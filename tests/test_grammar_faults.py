"""What cannot be asked of an answer is refused before it begins, and the fault is named."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from constraining import (
    EOS,
    TOKENIZER,
    TOOLS,
    VOCAB,
    WEATHER,
    function,
    guided,
    named,
    narrowed,
    record,
)

from qwen3vl_mlx.engine.constraints import Grammar, GrammarCompiler, make_guide, parse_grammar
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.processing.tokenizer import Tokenizer

pytest.importorskip("llguidance")

BAD: list[tuple[dict[str, Any], str]] = [
    ({"grammar": {"type": "regex", "value": "a(b"}}, "unclosed group"),
    ({"grammar": {"type": "regex", "value": "(?=a)b"}}, "look-around"),
    ({"grammar": {"type": "lark", "value": "start: foo"}}, "unknown name"),
    ({"grammar": {"type": "lark", "value": "begin: /a/"}}, "start"),
    ({"grammar": {"type": "llguidance", "value": {}}}, "grammars"),
    ({"grammar": {"type": "llguidance", "value": "{"}}, "not JSON"),
    ({"grammar": {"type": "json_schema", "value": "[]"}}, "JSON object"),
    ({"grammar": {"type": "regex", "value": 3}}, "must be a text"),
    ({"grammar": {"type": "ebnf", "value": "a"}}, "expected"),
    ({"grammar": {"type": "regex"}}, "expected"),
    ({"grammar": "a+"}, "expected"),
    ({"response_format": {"type": "json"}}, "json_object"),
    ({"response_format": {}}, "json_object"),
    ({"response_format": "json_object"}, "expected a dict"),
    ({"response_format": {"type": "json_schema"}}, "holds no schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "holds no schema"),
    ({"response_format": {"type": "object", "properties": {"a": {"type": "foo"}}}}, "foo"),
    ({"response_format": record(a={"not": {}})}, "not"),
    ({"response_format": record(a={"$ref": "#/nope"})}, "nope"),
    ({"response_format": record(a={"type": "integer", "minimum": 5, "maximum": 3})},
     "nsatisfiable"),
    ({"response_format": record(a={1, 2})}, "plain JSON"),
    ({"response_format": {"type": "object", "x-guidance": 3}}, "x-guidance"),
    ({"response_format": {"type": "json_object"}, "grammar": {"type": "regex", "value": "a"}},
     "exclude each other"),
    ({"tool_choice": "required"}, "needs tools"),
    ({"tool_choice": named("f")}, "no tools were given"),
    ({"tools": TOOLS, "tool_choice": named("f")}, "'f'.*'weather', 'look-up'"),
    ({"tools": TOOLS, "tool_choice": narrowed("auto", "f")}, "'f'.*'weather', 'look-up'"),
    ({"tools": TOOLS, "tool_choice": narrowed("never", "weather")}, "mode"),
    ({"tools": TOOLS, "tool_choice": narrowed("auto")}, "at least one"),
    ({"tools": TOOLS, "tool_choice": "any"}, "'any' is unknown"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "is unknown"),
    ({"tools": TOOLS, "tool_choice": 3}, "is unknown"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "names no function"),
    ({"tools": [WEATHER, WEATHER]}, "tools.1. has the name 'weather' of another"),
    ({"tools": [{"type": "function"}]}, "tools.0. names no function"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls.*true or false.*'no'"),
    ({"parallel_tool_calls": 0}, "parallel_tool_calls.*got 0"),
    ({"tools": [function("")]}, "empty name"),
    ({"tools": [{"function": {"name": "f", "strict": "yes"}}]}, "strict must be"),
    ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "must be a JSON schema"),
    ({"tools": [{"function": {"name": "f", "strict": True, "parameters": {"type": "string"}}}]},
     "'string'.*object"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "fault"), BAD, ids=[str(at) for at in range(len(BAD))])
def test_what_cannot_be_asked_is_refused_by_name(asked: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=f"(?s){fault}") as caught:
        parse_grammar(**asked)
    message = str(caught.value)
    assert len(message) < 1000
    assert "<state>" not in message
    assert "non-verbose" not in message


@pytest.mark.parametrize(
    ("lark", "fault"),
    [
        ('start: start "a"', "matches no text"),
        ("start: /[^\\x00-\\U0010ffff]/", "matches no text|invalid regex"),
        ("start: <|nope|>", "unknown special token"),
        ("start: <[99999]>", "99999"),
    ],
)
def test_what_only_the_tokenizer_can_refuse_is_refused_when_compiled(lark: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        guided(grammar={"type": "lark", "value": lark})


def test_a_missing_llguidance_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match="pip install llguidance"):
        parse_grammar(response_format={"type": "json_object"})
    assert parse_grammar(tools=TOOLS, tool_choice="none") == Grammar(no_calls=True)
    fresh = GrammarCompiler(TOKENIZER, VOCAB, EOS)
    assert make_guide(fresh, None, thinking=True, thinking_budget=3) is not None


def test_a_tokenizer_without_tool_tokens_is_refused() -> None:
    without = {k: v for k, v in TOKENIZER.added_tokens.items() if "tool" not in k}
    plain = Tokenizer(TOKENIZER.backend, without, TOKENIZER.special_tokens, TOKENIZER.vocab_size)
    grammar = parse_grammar(tools=TOOLS, tool_choice="required")
    with pytest.raises(InputError, match="<tool_call>"):
        make_guide(GrammarCompiler(plain, VOCAB, EOS), grammar, thinking=False)
