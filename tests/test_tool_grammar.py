"""Tool calls as masks: whatever is drawn from them, a reader gets the calls asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from constraining import (
    ADDED,
    EOS,
    LOOSE,
    NOW,
    SCHEMA_OF,
    TEXTS,
    TOOL_END,
    TOOL_START,
    TOOLS,
    VOCAB,
    allowed,
    encode,
    fits,
    function,
    guided,
    named,
    narrowed,
    read,
    record,
    say,
    spell,
    walk,
)

from qwen3vl_mlx.engine.constraints import parse_grammar
from qwen3vl_mlx.errors import InputError

pytest.importorskip("llguidance")

ALL = set(SCHEMA_OF)


@pytest.mark.parametrize(
    ("choice", "may", "most"),
    [
        ("required", ALL, None),
        (named("weather"), {"weather"}, 1),
        ({"type": "function", "name": "look-up"}, {"look-up"}, 1),
        (named('now "ü"'), {'now "ü"'}, 1),
        (narrowed("required", "look-up", "weather"), {"look-up", "weather"}, None),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [named("weather")]},
            {"weather"},
            None,
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("thinking", [False, True])
def test_a_call_that_is_required_comes_and_is_valid(
    choice: Any, may: set[str], most: int | None, thinking: bool
) -> None:
    seen = set()
    for seed in range(12):
        guide = guided(tools=TOOLS, tool_choice=choice, thinking=thinking, budget=3)
        answer = read(walk(guide, seed), thinking=thinking)
        assert answer["text"] == ""
        assert 1 <= len(answer["calls"]) <= (most or 99)
        for name, arguments in answer["calls"]:
            assert fits(SCHEMA_OF[name], arguments)
            seen.add(name)
    assert seen == may


def test_a_call_is_spaced_as_in_training() -> None:
    call = {"name": "weather", "arguments": {"city": 'Rö"m', "days": 3}}
    text = f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
    guide = guided(tools=TOOLS, tool_choice="required")
    say(guide, f"{text}\n{text}", EOS[0])
    assert read(encode(text))["calls"] == [("weather", call["arguments"])]


def test_one_call_only_where_calls_may_not_be_parallel() -> None:
    for choice, tools in (("required", TOOLS), ("auto", TOOLS), ("auto", [NOW])):
        guide = guided(tools=tools, tool_choice=choice, parallel_tool_calls=False)
        say(guide, '<tool_call>\n{"name": "now \\"ü\\"", "arguments": {}}\n</tool_call>')
        assert guide.complete
        assert allowed(guide) == set(EOS)


def test_auto_leaves_text_free_and_binds_a_call_once_it_starts() -> None:
    for choice in (None, "auto"):
        guide = guided(tools=TOOLS, tool_choice=choice)
        assert guide.mask() is None
        say(guide, 'I look. {"name": "nonsense"} <b>\n')
        assert guide.wants_host
        say(guide, "<tool_call>")
        say(guide, '\n{"name": "weather", "arguments": {"city": "<')
        assert allowed(guide) == {
            encode("b")[0],
            *(t for t, x in enumerate(TEXTS) if x in (b"b>", b'b>"', b'b>",')),
        }
        assert not set(EOS) & allowed(guide)
        say(guide, 'b>", "days": 1}}\n')
        assert allowed(guide) == {TOOL_END}
        say(guide, "</tool_call>")
        assert guide.mask() is None
        say(guide, " Done.", EOS[0])


def test_loose_tools_may_say_any_object_and_unknown_names_nothing() -> None:
    start = '<tool_call>\n{"name": '
    guide = guided(tools=TOOLS)
    say(guide, start + '"look-up", "arguments": {"anything": [1, null]}}\n</tool_call>')
    for wrong in ('"nothing"', '"weather", "arguments": {"town"', '"weather", "arguments": 3'):
        tokens = encode(start + wrong)
        assert guided(tools=TOOLS).accepts(tokens) < len(tokens)


def test_only_allowed_tools_may_be_called() -> None:
    guide = guided(tools=[LOOSE, NOW], tool_choice=narrowed("auto", "look-up"))
    say(guide, 'Hm. <tool_call>\n{"name": "look-up", "arguments": {"any": "thing"}}\n</tool_call>')
    tokens = encode('<tool_call>\n{"name": "now')
    assert guided(tools=[LOOSE, NOW], tool_choice=narrowed("auto", "look-up")).accepts(
        tokens
    ) < len(tokens)


@pytest.mark.parametrize("choice", [None, "auto", "none", "required"])
def test_without_need_there_is_no_constraint(choice: str | None) -> None:
    assert parse_grammar() is None
    assert parse_grammar({"type": "text"}, tools=[]) is None
    if choice in (None, "auto"):
        assert parse_grammar(tools=[LOOSE, NOW], tool_choice=choice) is None
    if choice != "required":
        assert parse_grammar(tools=[], tool_choice=choice) is None


@pytest.mark.parametrize("thinking", [False, True])
def test_none_forbids_the_token_that_starts_a_call_for_good(thinking: bool) -> None:
    guide = guided(tools=TOOLS, tool_choice="none", thinking=thinking)
    if thinking:
        assert guide.mask() is None
        say(guide, "Hm <tool_call>?</think>")
    assert allowed(guide) == set(range(VOCAB)) - {TOOL_START}
    assert not guide.wants_host
    say(guide, "Just text", EOS[0])


@pytest.mark.parametrize("choice", [None, "auto"])
def test_a_formatted_answer_may_be_a_call_instead(choice: str | None) -> None:
    asked = {"response_format": record(a={"enum": [1]}), "tools": [NOW], "tool_choice": choice}
    say(guided(**asked), '{"a": 1}', EOS[0])
    call = '<tool_call>\n{"name": "now \\"ü\\"", "arguments": {}}\n</tool_call>'
    say(guided(**asked), f"{call}\n{call}", EOS[0])
    called = guided(**asked)
    say(called, call)
    assert allowed(called) == {TOOL_START, *encode("\n"), *EOS}
    mixed = guided(**asked)
    say(mixed, '{"a"')
    assert TOOL_START not in allowed(mixed)
    say(guided(**{**asked, "tool_choice": "none"}), '{"a": 1}', EOS[0])


def test_tags_cannot_be_spelled_out_where_a_reader_would_obey_them() -> None:
    """They would cut a call in two, or start one that no grammar watches."""
    text = guided(tools=TOOLS)
    closing = {token for token, x in enumerate(TEXTS) if x.startswith(b">") and token not in ADDED}
    for token in spell("a <<tool_call"):
        assert token in allowed(text)
        text.consume(token)
    assert allowed(text) == set(range(VOCAB)) - closing
    assert text.accepts(spell(">")) == 0
    say(text, " ")
    assert text.mask() is None

    free = function("say", strict=True, text={"type": "string"})
    call = guided(tools=[free], tool_choice="required")
    say(
        call,
        '<tool_call>\n{"name": "say", "arguments": {"text": "a <tool_call> </b>'.replace(
            "<tool_call> <", "<"
        ),
    )
    for token in spell("</tool_call"):
        assert token in allowed(call)
        call.consume(token)
    assert not closing & allowed(call)
    assert not (ADDED - set(EOS)) & allowed(call)
    say(call, '\\u003e <think"}}\n')
    say(call, "</tool_call>", EOS[0])

    content = guided(response_format={"type": "object"}, tools=[NOW])
    for token in [*encode('{"a": "'), *spell("<tool_call")]:
        assert token in allowed(content)
        content.consume(token)
    assert not closing & allowed(content)


def test_a_schema_that_llguidance_cannot_do_binds_only_strict_tools() -> None:
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    loose = {"type": "function", "function": {"name": "f", "parameters": odd}}
    guide = guided(tools=[loose], tool_choice="required")
    say(guide, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', EOS[0])
    with pytest.raises(InputError, match=r"tool 'f'.*not"):
        parse_grammar(
            tools=[{"type": "function", "function": {**loose["function"], "strict": True}}]
        )
