"""Text that arrives in pieces gives the same answer, reasoning and tool calls as in one piece."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.engine.output import (
    Chunk,
    Completion,
    OutputParser,
    Scanner,
    Usage,
    collect,
    make_usage,
    parse_tool_call,
)

WEATHER = '{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}'
ZOOM = '{"name": "zoom", "arguments": {"box": {"a": "}", "b": "\\"{"}}}'
USAGE = make_usage(prompt=3, completion=2, cached=1, started=1.0, first=3.0, ended=4.0, peak=9)


def call(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


@st.composite
def pieces(draw: st.DrawFn, parts: Sequence[str]) -> list[str]:
    """Some of the parts joined, and cut anywhere, also into empty pieces."""
    text = "".join(draw(st.lists(st.sampled_from(parts), max_size=12)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


# Stop strings.


def scan(literals: Sequence[str], texts: Sequence[str]) -> tuple[str, str | None]:
    """What comes before the first literal, and the literal."""
    scanner = Scanner(literals)
    before = ""
    for text in texts:
        ready, found, _ = scanner.push(text)
        before += ready
        if found is not None:
            return before, found
    return before + scanner.flush(), None


@settings(deadline=None)
@given(
    pieces(["a", "b", "ab", "c", "aa", "\n"]),
    st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=3),
)
def test_scanner_does_not_see_where_the_text_was_cut(texts: list[str], literals: list[str]) -> None:
    whole = "".join(texts)
    before, found = scan(literals, texts)
    assert (before, found) == scan(literals, [whole])
    if found is None:
        assert before == whole
        assert not any(literal in whole for literal in literals)
    else:
        assert whole.startswith(before + found)
        seen = (before + found)[:-1]
        assert not any(literal in seen for literal in literals)


@pytest.mark.parametrize(
    ("literals", "texts", "expected"),
    [
        (["END"], ["one E", "N", "D two"], ("one ", "END")),
        (["END"], ["one EN", "NO"], ("one ENNO", None)),
        (["END"], ["one EN"], ("one EN", None)),
        (["two", "one"], ["zero one two"], ("zero ", "one")),
        (["abcd", "bc"], ["xab", "cd"], ("xa", "bc")),
        (["abc", "bc"], ["xabc"], ("x", "abc")),
        (["aab"], ["aaab"], ("a", "aab")),
        (["aab"], list("aaab"), ("a", "aab")),
        ([], ["any", "thing"], ("anything", None)),
    ],
)
def test_scanner(literals: list[str], texts: list[str], expected: tuple[str, str | None]) -> None:
    assert scan(literals, texts) == expected


def test_scanner_holds_back_no_more_than_it_must() -> None:
    scanner = Scanner(["</think>", "STOP"])
    assert scanner.push("a < b </th") == ("a < b ", None, "")
    assert scanner.push("is ") == ("</this ", None, "")
    assert scanner.push("ST") == ("", None, "")
    assert scanner.push("OP rest") == ("", "STOP", " rest")


# Reasoning and tool calls.


def parse(texts: Sequence[str], *, thinking: bool = False, tools: bool = True) -> dict[str, Any]:
    parser = OutputParser(thinking=thinking, tools=tools)
    chunks = [chunk for text in texts for chunk in parser.push(text)] + parser.flush()
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    assert len({call.id for call in calls}) == len(calls) == parser.calls
    assert all(chunk.text or chunk.reasoning or chunk.tool_calls for chunk in chunks)
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "reasoning": "".join(chunk.reasoning for chunk in chunks),
        "calls": [(call.name, json.loads(call.arguments)) for call in calls],
        "closed": parser.reasoning_closed,
    }


PARTS = (
    "a",
    " b",
    "\n",
    "<",
    "{",
    "think>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    call(WEATHER),
    call(ZOOM),
    call("{"),
)


@settings(deadline=None)
@given(pieces(PARTS), st.booleans(), st.booleans())
def test_parser_does_not_see_where_the_text_was_cut(
    texts: list[str], thinking: bool, tools: bool
) -> None:
    whole = "".join(texts)
    expected = parse([whole], thinking=thinking, tools=tools)
    assert parse(texts, thinking=thinking, tools=tools) == expected


@settings(deadline=None)
@given(pieces(PARTS), st.booleans())
def test_nothing_is_lost_but_calls_and_the_end_of_thinking(
    texts: list[str], thinking: bool
) -> None:
    whole = "".join(texts)
    got = parse(texts, thinking=thinking)
    reasoning, mark, text = whole.partition("</think>") if thinking else ("", "", whole)
    if thinking:
        assert got["reasoning"] == (reasoning.rstrip("\n") if mark else reasoning)
        assert got["closed"] == bool(mark)
    else:
        assert got["closed"]
    if not got["calls"]:
        assert got["text"] == (text.lstrip("\n") if mark else text)
    assert parse(texts, thinking=thinking, tools=False)["text"] == (
        text.lstrip("\n") if mark else text
    )


THINKING: list[tuple[str, str, str, bool]] = [
    ("I see.\n</think>\n\nA cat.", "I see.", "A cat.", True),
    ("I see.</think>A cat.", "I see.", "A cat.", True),
    ("One.\n\nTwo.\n\n\n</think>\nA\n\ncat.\n", "One.\n\nTwo.", "A\n\ncat.\n", True),
    ("</think>\n\nA cat.", "", "A cat.", True),
    ("I see.\n</think>\n\n", "I see.", "", True),
    ("I see.\n", "I see.\n", "", False),
    ("I see </thin", "I see </thin", "", False),
    ("", "", "", False),
    ("a</think>b</think>c", "a", "b</think>c", True),
    ("a<tool_call>{}</tool_call></think>b", "a<tool_call>{}</tool_call>", "b", True),
]


@pytest.mark.parametrize(("text", "reasoning", "answer", "closed"), THINKING)
@pytest.mark.parametrize("tools", [False, True])
def test_thinking(text: str, reasoning: str, answer: str, closed: bool, tools: bool) -> None:
    expected = {"text": answer, "reasoning": reasoning, "calls": [], "closed": closed}
    assert parse(list(text), thinking=True, tools=tools) == expected


def test_an_answer_without_thinking_keeps_the_marker() -> None:
    assert parse(["a\n</think>\nb"])["text"] == "a\n</think>\nb"


CITY = ("weather", {"city": "Zürich", "days": [1, 2]})
BOX = ("zoom", {"box": {"a": "}", "b": '"{'}})
CALLS: dict[str, tuple[str, str, list[tuple[str, Any]]]] = {
    "one": (call(WEATHER), "", [CITY]),
    "text before": ("I look.\n" + call(WEATHER), "I look.", [CITY]),
    "several": (call(WEATHER) + "\n" + call(ZOOM), "", [CITY, BOX]),
    "text behind": (call(WEATHER) + "\n\nDone.\n", "Done.", [CITY]),
    "nested braces": (call(ZOOM), "", [BOX]),
    "on one line": (f"<tool_call>{WEATHER}</tool_call>", "", [CITY]),
    "not JSON": (f"a\n{call('{oops')}\nb", f"a\n{call('{oops')}\nb", []),
    "good and bad": (call(WEATHER) + "\n" + call("x"), call("x"), [CITY]),
    "unfinished": ("a\n\n<tool_call>\n{", "a\n\n<tool_call>\n{", []),
    "unfinished behind one": (call(ZOOM) + "\n<tool_call>", "<tool_call>", [BOX]),
    "marker cut": ("a\n<tool_ca", "a\n<tool_ca", []),
    "end marker alone": ("a </tool_call> b", "a </tool_call> b", []),
}


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls(name: str) -> None:
    text, answer, calls = CALLS[name]
    for texts in ([text], list(text)):
        got = parse(texts)
        assert (got["text"], got["calls"]) == (answer, calls)
        assert parse(texts, tools=False) == {
            "text": text,
            "reasoning": "",
            "calls": [],
            "closed": True,
        }
    thought = parse(list("Hm.\n</think>\n\n" + text), thinking=True)
    assert (thought["reasoning"], thought["calls"]) == ("Hm.", calls)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', {"a": 1}),
        ('\n {"arguments": {}, "name": "f"} \n', {}),
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "f", "arguments": "a"}', None),
        ('{"name": "f", "arguments": "[1]"}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": 5, "arguments": {}}', None),
        ('{"arguments": {}}', None),
        ('["f", {}]', None),
        ('{"name": "f"} {"name": "g"}', None),
        ("", None),
    ],
)
def test_parse_tool_call(text: str, arguments: dict[str, Any] | None) -> None:
    got = parse_tool_call(text)
    if arguments is None:
        assert got is None
    else:
        assert got is not None
        assert (got.name, json.loads(got.arguments)) == ("f", arguments)


def test_arguments_are_json_text_as_written() -> None:
    got = parse_tool_call(WEATHER)
    assert got is not None
    assert got.arguments == '{"city": "Zürich", "days": [1, 2]}'
    assert got.id.startswith("call_")


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = OutputParser(thinking=False, tools=True)
    assert parser.push("Hello <") == [Chunk(text="Hello ")]
    assert parser.push("b>\n") == [Chunk(text="<b>")]
    assert parser.push("c") == [Chunk(text="\nc")]


# Whole answers.


def test_collect_joins_a_stream() -> None:
    tool = parse_tool_call(WEATHER)
    assert tool is not None
    chunks = [
        Chunk(reasoning="a"),
        Chunk(reasoning="b"),
        Chunk(text="c"),
        Chunk(tool_calls=(tool,)),
        Chunk(text="d"),
        Chunk(finish_reason="stop", usage=USAGE, stop="e", reasoning_closed=False),
    ]
    whole = collect(iter(chunks))
    assert whole == Completion("cd", "ab", (tool,), "stop", USAGE, "e", reasoning_closed=False)
    plain = json.loads(json.dumps(whole.to_dict()))
    assert plain["text"] == "cd"
    assert plain["tool_calls"][0]["name"] == "weather"
    assert plain["usage"]["total_tokens"] == 5


def test_usage() -> None:
    assert (
        Usage(
            prompt_tokens=3,
            completion_tokens=2,
            total_tokens=5,
            cached_tokens=1,
            total_prompt_time_sec=2.0,
            total_completion_time_sec=1.0,
            total_time_sec=3.0,
            avg_prompt_tok_per_sec=1.0,
            avg_compl_tok_per_sec=1.0,
            avg_tok_per_sec=pytest.approx(5 / 3),
            time_to_first_token_sec=2.0,
            peak_memory_bytes=9,
        )
        == USAGE
    )
    still = make_usage(prompt=3, completion=1, cached=0, started=1, first=1, ended=1, peak=0)
    assert still.avg_tok_per_sec == still.avg_compl_tok_per_sec == 0
