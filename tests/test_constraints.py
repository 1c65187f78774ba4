"""Constrained answers: whatever is drawn from the masks, a reader gets what was asked for."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.engine.constraints import (
    Grammar,
    GrammarCompiler,
    Guide,
    expand,
    make_guide,
    parse_grammar,
)
from qwen3vl_mlx.engine.grammar_compiler import Bits
from qwen3vl_mlx.engine.output import Chunk, OutputParser
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.processing.tokenizer import Tokenizer

pytest.importorskip("llguidance")

TOKENIZER = Tokenizer.from_folder(CHECKPOINT)
VOCAB = 1100  # more than the tokenizer has, and no whole number of 32-bit words
EOS = (TOKENIZER.added_tokens["<|im_end|>"], TOKENIZER.added_tokens["<|endoftext|>"])
THINK_END = TOKENIZER.added_tokens["</think>"]
TOOL_START = TOKENIZER.added_tokens["<tool_call>"]
TOOL_END = TOKENIZER.added_tokens["</tool_call>"]
COMPILER = GrammarCompiler(TOKENIZER, VOCAB, EOS)
TEXTS = [TOKENIZER.token_bytes(token, False) for token in range(VOCAB)]
ADDED = set(TOKENIZER.added_tokens.values())


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def unpacked(bits: Bits) -> np.ndarray[Any, Any]:
    return np.unpackbits(bits.view(np.uint8), bitorder="little")[:VOCAB]


def allowed(guide: Guide) -> set[int]:
    bits = guide.mask()
    everything = set(range(VOCAB))
    return everything if bits is None else set(np.flatnonzero(unpacked(bits)).tolist())


def guided(*, thinking: bool = False, budget: int | None = None, **asked: Any) -> Guide:
    guide = make_guide(COMPILER, parse_grammar(**asked), thinking=thinking, thinking_budget=budget)
    assert guide is not None
    return guide


def walk(guide: Guide, seed: int, *, length: int = 1500, text_only: bool = True) -> list[int]:
    """Draw evenly from what is allowed, until an end token. Free parts speak text and may end."""
    chance, tokens = random.Random(seed), list[int]()
    while len(tokens) < length:
        choices = allowed(guide)
        if guide.mask() is None and text_only:
            choices = {t for t in choices if TEXTS[t] and t not in ADDED} | set(EOS)
        tokens.append(chance.choice(sorted(choices)))
        guide.consume(tokens[-1])
        assert guide.failure is None
        if tokens[-1] in EOS:
            return tokens
    raise AssertionError(f"no end: {TOKENIZER.decode(tokens[:200], False)!r}")


def say(guide: Guide, text: str, *end: int) -> None:
    """Consume a text, checking that every token was allowed."""
    for token in (*encode(text), *end):
        assert token in allowed(guide), (text, TEXTS[token])
        guide.consume(token)
        assert guide.failure is None


def spell(text: str) -> list[int]:
    """Tokens of one byte each, tags included."""
    return [TEXTS.index(bytes([byte])) for byte in text.encode()]


def read(tokens: Sequence[int], *, thinking: bool = False, tools: bool = True) -> dict[str, Any]:
    """The answer as a caller gets it."""
    parser = OutputParser(thinking=thinking, tools=tools)
    text = TOKENIZER.decode([t for t in tokens if t not in EOS], skip_special_tokens=False)
    chunks: list[Chunk] = [*parser.push(text), *parser.flush()]
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "reasoning": "".join(chunk.reasoning for chunk in chunks),
        "calls": [
            (call.name, json.loads(call.arguments)) for chunk in chunks for call in chunk.tool_calls
        ],
    }


# Grammars for the answer itself.


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
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": record(
            name={"enum": ["a", "b"]}, child={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        )
    },
}
SCHEMAS: list[dict[str, Any]] = [
    record(ok={"type": "boolean"}, none={"type": "null"}),
    record(text=SHORT, nested=record(inner=record(deep=SHORT))),
    record(box={"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1000},
                "minItems": 4, "maxItems": 4}),
    record(colour={"enum": ["red", "grün", "赤", 'say "hi"\n', "🙂"]}),
    record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    record(**{'ключ "x"\\': {"type": "integer", "minimum": -5, "maximum": 5}}),
    {"anyOf": [record(a={"enum": [1]}), {"type": "array", "items": SHORT, "maxItems": 3}]},
    {"type": "array", "items": record(label=SHORT), "minItems": 1, "maxItems": 3},
    {**record(a=SHORT, b=SHORT), "required": ["b"]},
    TREE,
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
@pytest.mark.parametrize("seed", range(4))
def test_an_answer_follows_its_schema(schema: dict[str, Any], seed: int) -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for asked in (
        {"response_format": wrapped},
        {"response_format": schema},
        {"grammar": {"type": "json_schema", "value": json.dumps(schema)}},
    ):
        guide = guided(**asked)
        answer = read(walk(guide, seed))["text"]
        assert fits(schema if schema is not TREE else {}, json.loads(answer)), answer
        assert guide.part == "done"
        assert not guide.wants_host


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    names = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=5)
    leaves = st.one_of(
        st.just(SHORT),
        st.just({"type": "boolean"}),
        st.builds(lambda values: {"enum": values}, st.lists(names, min_size=1, unique=True)),
        st.integers(-999, 999).map(
            lambda low: {"type": "integer", "minimum": low, "maximum": low + 50}
        ),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(names, inner, max_size=3).map(lambda fields: record(**fields)),
            inner.map(lambda one: {"type": "array", "items": one, "maxItems": 3}),
            st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
        ),
        max_leaves=5,
    )


@settings(max_examples=60, deadline=None)
@given(schemas(), st.integers(0, 10**6))
def test_any_schema_is_followed(schema: dict[str, Any], seed: int) -> None:
    answer = read(walk(guided(response_format=schema), seed))["text"]
    assert fits(schema, json.loads(answer)), answer


def test_json_object_is_an_object_with_anything_in_it() -> None:
    asked = {"response_format": {"type": "json_object"}}
    for value in ('{"a": [1, 2.5e-3, {"b": null}], "": "\\ud83d\\ude00 \\n \\"é\\" 中"}', "{}"):
        say(guided(**asked), value, EOS[0])
    for value in ("[1]", '"a"', "null", " {}"):
        assert guided(**asked).accepts(encode(value)) < len(encode(value))
    # Half a surrogate pair could not be sent to anyone.
    half = encode('{"a": "\\ud83d"}')
    assert guided(**asked).accepts(half) < len(half)


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
def test_json_may_be_indented_but_not_filled_with_blanks(indent: Any) -> None:
    asked = {"response_format": {"type": "json_object"}}
    value = {"a": {"b": [1, {"c": [True, [[]]]}]}, "d": ""}
    say(guided(**asked), json.dumps(value, indent=indent), EOS[1])
    for blanks in ("\n\n", " " * 70, "\n" + " " * 70):
        text = encode('{"a": 1' + blanks + "}")
        assert guided(**asked).accepts(text) < len(text)


@pytest.mark.parametrize(
    "pattern",
    [
        "yes|no",
        "[0-9]{4}-(0[1-9]|1[0-2])",
        r"(ab){0,3}c?",
        r"[äöü中🙂]{1,3}",
        r"<b>[a-z ]{0,9}</b>",
        r"(a|b)*a(a|b){3}",
    ],
)
def test_an_answer_matches_its_regex(pattern: str) -> None:
    for seed in range(10):
        answer = read(walk(guided(grammar={"type": "regex", "value": pattern}), seed))["text"]
        assert re.fullmatch(pattern, answer), answer


LARK = {
    "words": ('start: "yes" | "no"', "yes|no"),
    "sums": ('start: N ("+" N)*\nN: /[0-9]{1,2}/', r"\d{1,2}(\+\d{1,2})*"),
    "brackets": ('start: "x" | "(" start ")"', r"\(*x\)*"),
    "json": ('start: "A " %json {"type": "boolean"} "\\n"', "A (true|false)\n"),
}


@pytest.mark.parametrize("name", LARK)
def test_an_answer_follows_its_lark_grammar(name: str) -> None:
    lark, pattern = LARK[name]
    both = [
        {"type": "lark", "value": lark},
        {"type": "llguidance", "value": {"grammars": [{"lark_grammar": lark}]}},
    ]
    for grammar in both:
        for seed in range(5):
            answer = TOKENIZER.decode(walk(guided(grammar=grammar), seed)[:-1])
            assert re.fullmatch(pattern, answer), answer
            assert answer.count("(") == answer.count(")")


def test_the_mask_is_exactly_what_may_follow() -> None:
    """Against all strings of a small language; ends too, each of them, where a string is whole."""
    language = [b"yes", b"yesterday", b"no", "né".encode(), b"", "中中".encode()]
    value = "|".join(word.decode() for word in language)
    for seed in range(8):
        guide, said = guided(grammar={"type": "regex", "value": value}), b""
        chance = random.Random(seed)
        while True:
            expected = {
                token
                for token, text in enumerate(TEXTS)
                if text and token not in ADDED and any(w.startswith(said + text) for w in language)
            }
            ends = set(EOS) if said in language else set()
            following = {w[len(said) :][:1] for w in language if w.startswith(said)}
            if len(following) > 1:
                assert allowed(guide) == expected | ends
            else:  # llguidance spells what is certain as the tokenizer would
                assert allowed(guide) <= expected | ends
                assert allowed(guide)
            token = chance.choice(sorted(allowed(guide)))
            guide.consume(token)
            if token in EOS:
                break
            said += TEXTS[token]


def test_complete_says_that_only_an_end_may_follow() -> None:
    guide = guided(grammar={"type": "regex", "value": "ab?"})
    assert not guide.complete
    say(guide, "a")
    assert not guide.complete  # it may end, and it may go on
    say(guide, "b")
    assert guide.complete
    assert allowed(guide) == set(EOS)


def test_a_token_that_breaks_the_grammar_is_a_failure_and_ends_the_answer() -> None:
    guide = guided(grammar={"type": "regex", "value": "[a-z]+!"})
    guide.consume(encode("7")[0])
    assert guide.failure is not None
    assert "'7' breaks the grammar" in guide.failure
    assert "<state>" not in guide.failure
    assert "verbose" not in guide.failure
    assert allowed(guide) == set(EOS)
    early = guided(grammar={"type": "regex", "value": "[a-z]+!"})
    say(early, "ab")
    early.consume(EOS[0])
    assert early.failure is not None


def test_looking_ahead_changes_nothing() -> None:
    schema = record(a={"enum": ["x"]}, b={"type": "boolean"})
    guide = guided(response_format=schema)
    tokens = [*encode('{"a": "x", "b": true}'), EOS[0]]
    wrong = [*encode('{"a": "x", "c')]
    for done in range(len(tokens)):
        rest = tokens[done:]
        assert guide.accepts(rest) == len(rest)
        assert guide.accepts([*rest, EOS[0]]) == len(rest)
        assert guide.accepts(wrong[done:]) <= max(0, len(wrong) - done - 1)
        masks = guide.masks(rest)
        branch = guide.fork()
        for token, mask in zip(rest, masks, strict=False):
            assert np.array_equal(mask, branch.mask())
            assert token in allowed(branch)
            branch.consume(token)
        assert branch.part == "done"
        assert guide.part != "done"
        guide.consume(tokens[done])
    assert guide.failure is None


# Thinking.


def closed_by(guide: Guide, thought: Sequence[int]) -> list[int]:
    """Think these tokens, then what the guide forces."""
    for token in thought:
        assert guide.mask() is None
        guide.consume(token)
    forced = []
    while guide.part == "thought":
        (token,) = allowed(guide)
        forced.append(token)
        guide.consume(token)
        assert guide.failure is None
    return forced


@pytest.mark.parametrize(
    "ending",
    [[THINK_END], spell("</think>"), [THINK_END, *encode("\n")], [THINK_END, *spell("\n\n")]],
)
def test_a_grammar_waits_for_the_end_of_the_thought(ending: list[int]) -> None:
    guide = guided(thinking=True, grammar={"type": "regex", "value": "yes|no"})
    for token in [*encode('Hm.\n"maybe" <tool_call> {'), *range(0, VOCAB, 37), *ending]:
        assert guide.mask() is None or token in encode("\n")
        assert guide.wants_host
        guide.consume(token)
    assert guide.failure is None
    newlines = len(TOKENIZER.decode(ending, False)) - len("</think>")
    starts = {token for token in allowed(guide) if TEXTS[token].strip(b"\n")}
    assert starts == {
        t for t, x in enumerate(TEXTS) if x and (b"yes".startswith(x) or b"no".startswith(x))
    }
    assert (encode("\n")[0] in allowed(guide)) == (newlines < 2)
    say(guide, "yes", EOS[0])


def test_text_in_one_token_with_the_end_of_a_spelled_thought_is_part_of_the_answer() -> None:
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    backend.add_tokens([">4", ">\n"])
    added = {**TOKENIZER.added_tokens, ">4": 1024, ">\n": 1025}
    wider = Tokenizer(backend, added, TOKENIZER.special_tokens, 1026)
    compiler = GrammarCompiler(wider, VOCAB, EOS)
    for pattern, joined, rest in (("42", 1024, "2"), ("42", 1025, "42"), ("7", 1024, None)):
        grammar = parse_grammar(grammar={"type": "regex", "value": pattern})
        guide = make_guide(compiler, grammar, thinking=True)
        assert guide is not None
        for token in [*spell("</think"), joined]:
            guide.consume(token)
        assert (guide.failure is None) == (rest is not None)
        if rest is not None:
            say(guide, rest, EOS[0])


def test_an_answer_that_ends_inside_its_thought_has_not_met_its_grammar() -> None:
    guide = guided(thinking=True, response_format={"type": "json_object"})
    guide.consume(EOS[0])
    assert guide.failure is not None
    free = guided(thinking=True, budget=5)
    free.consume(EOS[0])
    assert free.failure is None
    assert free.part == "done"


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("last", ["a", "\n"])
@pytest.mark.parametrize("pattern", [None, "yes|no"])
def test_a_spent_budget_closes_the_thought_cleanly(
    budget: int, last: str, pattern: str | None
) -> None:
    asked = {"grammar": {"type": "regex", "value": pattern}} if pattern else {}
    guide = guided(thinking=True, budget=budget, **asked)
    thought = (encode("a") * budget)[: max(0, budget - 1)] + (encode(last) if budget else [])
    forced = closed_by(guide, thought)
    line_ended = budget == 0 or last == "\n"  # the prompt ends with <think> and a newline
    assert TOKENIZER.decode(forced, False) == ("" if line_ended else "\n") + "</think>\n\n"
    if pattern:
        rest = walk(guide, budget)
        seen = read([*thought, *forced, *rest], thinking=True)
        assert seen["text"] in ("yes", "no")
        assert seen["reasoning"].rstrip("\n") == TOKENIZER.decode(thought).rstrip("\n")
    else:
        assert guide.mask() is None
        assert not guide.wants_host


@pytest.mark.parametrize("thought", ["", "a", "aa"])
@pytest.mark.parametrize("ending", [[THINK_END], spell("</think>")])
def test_a_thought_that_ends_by_itself_is_left_alone(thought: str, ending: list[int]) -> None:
    opened = [*spell(thought), *ending]
    guide = guided(thinking=True, budget=len(opened))
    for token in opened:
        assert guide.mask() is None
        guide.consume(token)
    assert guide.failure is None
    assert guide.part == "free"
    for token in encode("and so on for longer than the budget was"):
        assert guide.mask() is None
        guide.consume(token)
    assert not guide.wants_host


def test_a_tag_that_the_budget_cuts_is_closed_all_the_same() -> None:
    cut = spell("a</thin")
    guide = guided(thinking=True, budget=len(cut))
    forced = closed_by(guide, cut)
    seen = read([*cut, *forced, *encode("Yes")], thinking=True)
    assert seen == {"text": "Yes", "reasoning": "a</thin", "calls": []}


def test_nothing_asked_is_no_guide() -> None:
    assert make_guide(COMPILER, None, thinking=False) is None
    assert make_guide(COMPILER, None, thinking=True) is None
    assert make_guide(COMPILER, None, thinking=False, thinking_budget=5) is None


# Tools.


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


# Faults.


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


def test_special_tokens_come_only_where_a_grammar_names_them() -> None:
    guide = guided(grammar={"type": "lark", "value": 'start: <|box_start|> "a"'})
    assert allowed(guide) == {TOKENIZER.added_tokens["<|box_start|>"]}
    anything = guided(grammar={"type": "regex", "value": r"(?s:.){5,}"})
    assert not ADDED & allowed(anything)
    assert not {token for token in allowed(anything) if not TEXTS[token]}


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


def test_threads_may_compile_at_once() -> None:
    fresh = GrammarCompiler(TOKENIZER, VOCAB, EOS)
    schemas_ = [record(**{f"k{n % 5}": {"enum": [n % 5]}}) for n in range(40)]

    def answer(at: int) -> Any:
        guide = make_guide(fresh, parse_grammar(schemas_[at]), thinking=False)
        assert guide is not None
        return json.loads(read(walk(guide, at))["text"])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, range(40)))
    assert answers == [{f"k{n % 5}": n % 5} for n in range(40)]


# Masks on the device.


@given(st.integers(1, 200), st.integers(0, 3), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_expand_is_unpackbits(vocab_size: int, rows: int, seed: int) -> None:
    words = (vocab_size + 31) // 32
    shape = (rows, words) if rows else (words,)
    bits = np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)
    expected = np.unpackbits(bits.view(np.uint8), axis=-1, bitorder="little")[..., :vocab_size]
    flags = expand(bits, vocab_size)
    assert flags.dtype == mx.bool_
    assert np.array_equal(np.array(flags), expected.astype(bool))
