"""Thoughts: a grammar waits for their end, and a spent budget closes them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers
from constraining import (
    COMPILER,
    EOS,
    EVERYTHING,
    TEXTS,
    THINK_END,
    TOKENIZER,
    VOCAB,
    allowed,
    encode,
    guided,
    read,
    say,
    spell,
    walk,
)

from qwen3vl_mlx.engine.constraints import GrammarCompiler, Guide, make_guide, parse_grammar
from qwen3vl_mlx.processing.tokenizer import Tokenizer

pytest.importorskip("llguidance")


def closed_by(guide: Guide, thought: Sequence[int]) -> list[int]:
    """Think these tokens, then what the guide forces."""
    for token in thought:
        assert allowed(guide) >= EVERYTHING - set(EOS)
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
    any_token = [token for token in range(0, VOCAB, 37) if token not in EOS]
    for token in [*encode('Hm.\n"maybe" <tool_call> {'), *any_token, *ending]:
        assert allowed(guide) == EVERYTHING - set(EOS) or token in encode("\n")
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
