"""Which tokens end an answer that a guide follows: all of the model's, or none with ignore_eos."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from asking import user
from constraining import (
    EOS,
    EVERYTHING,
    NOW,
    THINK_END,
    TOKENIZER,
    TOOL_START,
    TOOLS,
    WEATHER,
    allowed,
    encode,
    guided,
    named,
    read,
    record,
    say,
    spell,
)

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.constraints import GrammarCompiler, Guide, parse_grammar
from qwen3vl_mlx.engine.engine import Engine, EngineOptions
from qwen3vl_mlx.engine.output import Completion
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.engine.sampling import SamplingParams

pytest.importorskip("llguidance")

NONE: frozenset[int] = frozenset()
CALL = '<tool_call>\n{"name": "now \\"ü\\"", "arguments": {}}\n</tool_call>'
SCHEMA = record(a={"enum": [1]})
OWED: dict[str, dict[str, Any]] = {
    "format": {"response_format": SCHEMA},
    "grammar": {"grammar": {"type": "regex", "value": "a?"}},
    "call": {"tools": TOOLS, "tool_choice": "required"},
    "named call": {"tools": TOOLS, "tool_choice": named("weather")},
    "format or call": {"response_format": SCHEMA, "tools": [NOW]},
    "format, no call": {"response_format": SCHEMA, "tools": [NOW], "tool_choice": "none"},
}
FREE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no calls": {"tools": TOOLS, "tool_choice": "none"},
    "strict tools": {"tools": [WEATHER]},
}


@pytest.mark.parametrize("owed", OWED)
@pytest.mark.parametrize("ends", [None, NONE])
def test_a_thought_cannot_end_the_answer_that_is_owed(
    owed: str, ends: frozenset[int] | None
) -> None:
    guide = guided(thinking=True, ends=ends, **OWED[owed])
    for token in [*encode("Hm.\n"), *spell("</thin")]:
        assert allowed(guide) == EVERYTHING - set(EOS)
        guide.consume(token)
    assert guide.wants_host
    assert guide.failure is None
    guide.consume(EOS[0])
    assert guide.failure == "the answer ended inside its thought"


@pytest.mark.parametrize("free", FREE)
def test_a_thought_may_end_an_answer_that_owes_nothing(free: str) -> None:
    for token in EOS:
        guide = guided(thinking=True, budget=9, **FREE[free])
        say(guide, "Hm", token)
        assert guide.complete
    counted = guided(thinking=True, budget=9, ends=frozenset(EOS[:1]), **FREE[free])
    say(counted, "Hm", EOS[1])
    assert counted.part == "thought"


@pytest.mark.parametrize("free", FREE)
@pytest.mark.parametrize("thought", [None, "open", "closed", "cut"])
def test_free_text_goes_on_past_end_tokens_that_do_not_count(
    free: str, thought: str | None
) -> None:
    if thought is None and free == "nothing":
        return
    budget = 3 if thought == "cut" else 99
    guide = guided(thinking=thought is not None, budget=budget, ends=NONE, **FREE[free])
    if thought == "closed":
        say(guide, "Hm", THINK_END)
    for token in [*EOS, *encode("\n"), *EOS, *encode("and on"), *EOS] * 2:
        forced = len(allowed(guide)) == 1
        chosen = min(allowed(guide)) if forced else token
        assert chosen in allowed(guide)
        guide.consume(chosen)
        assert guide.failure is None
        assert not guide.complete
    assert (guide.part == "thought") == (thought == "open")
    assert set(EOS) <= allowed(guide)


def run_out(guide: Guide, seed: int) -> list[int]:
    """Draw evenly from what is allowed until only an end may follow."""
    chance, tokens = random.Random(seed), list[int]()
    while not guide.complete:
        assert len(tokens) < 200
        tokens.append(chance.choice(sorted(allowed(guide))))
        guide.consume(tokens[-1])
        assert guide.failure is None
    return tokens


@pytest.mark.parametrize(
    ("pattern", "longest"), [("a{1,5}", "aaaaa"), ("(ab?)?", "ab"), ("yes|yes sir", "yes sir")]
)
def test_a_grammar_goes_on_for_as_long_as_it_can_and_then_ends(pattern: str, longest: str) -> None:
    for seed in range(5):
        guide = guided(grammar={"type": "regex", "value": pattern}, ends=NONE)
        assert TOKENIZER.decode(run_out(guide, seed)) == longest
        assert allowed(guide) == set(EOS)
        say(guide, "", EOS[0])
        assert guide.part == "done"


def test_a_grammar_of_nothing_ends_at_once_even_so() -> None:
    for ends in (None, NONE):
        guide = guided(grammar={"type": "regex", "value": ""}, ends=ends)
        assert allowed(guide) == set(EOS)
        guide.consume(EOS[1])
        assert guide.complete
        assert guide.failure is None


def test_a_whole_call_is_followed_by_others_where_no_token_ends() -> None:
    guide = guided(tools=TOOLS, tool_choice="required", ends=NONE)
    say(guide, CALL)
    assert allowed(guide) == {TOOL_START, *encode("\n")}
    single = guided(tools=TOOLS, tool_choice="required", parallel_tool_calls=False, ends=NONE)
    say(single, CALL)
    assert single.complete


@pytest.mark.parametrize("said", ["", "a", "<tool_call>\n", CALL])
@pytest.mark.parametrize("ends", [frozenset(EOS), NONE])
def test_an_end_that_was_not_allowed_is_a_failure(said: str, ends: frozenset[int]) -> None:
    if said.startswith("<"):
        asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required"}
    else:
        asked = {"grammar": {"type": "regex", "value": "[ab]+"}}
    guide = guided(ends=ends, **asked)
    say(guide, said)
    fine = bool(ends) and said in ("a", CALL)
    assert (EOS[0] in allowed(guide)) == fine
    assert guide.accepts([EOS[0]]) == int(fine)
    guide.consume(EOS[0])
    assert (guide.failure is None) == fine
    assert guide.part == "done"


@pytest.mark.parametrize("between", [EOS[0], TOKENIZER.added_tokens["<|box_start|>"]])
def test_a_tag_is_seen_through_tokens_that_no_reader_sees(between: int) -> None:
    closed = [*spell("Hm</thi"), between, *spell("nk>")]
    guide = guided(thinking=True, ends=NONE, budget=99, tools=TOOLS, tool_choice="none")
    for token in closed:
        guide.consume(token)
    assert guide.part == "free"
    assert read(closed, thinking=True)["reasoning"] == "Hm"

    text = guided(tools=[WEATHER], ends=NONE)
    for token in [*spell("<tool_"), between, *spell("call")]:
        text.consume(token)
    assert text.accepts(spell(">")) == 0


# In the engine. The model wants nothing but its end token.


def eager(
    demo: Qwen3VL, *, thinking: bool, asked: dict[str, Any], **params: Any
) -> tuple[Sequence[int], Completion]:
    """The tokens and the answer of a model that wants to end at once."""
    vocab_size = demo.model.config.text.vocab_size
    compiler = GrammarCompiler(TOKENIZER, vocab_size, EOS)
    engine = Engine(demo.model, demo.processor.tokenizer, compiler, EngineOptions())
    bias = {EOS[0]: 100.0}
    request = Request(
        prompt=demo.processor.prompt(user("Hi")),
        params=SamplingParams(temperature=0.0, logit_bias=bias, max_tokens=24, **params),
        max_tokens=24,
        eos_token_ids=frozenset(EOS),
        thinking=thinking,
        tools="tools" in asked,
        preparation_sec=0.0,
        grammar=parse_grammar(**asked),
    )
    try:
        handle = engine.submit(request)
        return handle.tokens, handle.result()
    finally:
        engine.close()


@pytest.mark.parametrize("free", FREE)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_ignore_eos_holds_whatever_else_is_asked(
    demo: Qwen3VL, free: str, thinking: bool, ignore: bool
) -> None:
    budget = 3 if thinking else None
    tokens, answer = eager(
        demo, thinking=thinking, asked=FREE[free], ignore_eos=ignore, thinking_budget=budget
    )
    if ignore:
        assert (len(tokens), answer.finish_reason) == (24, "length")
    else:
        assert (list(tokens), answer.finish_reason) == ([EOS[0]], "stop")
    assert answer.reasoning_closed == (ignore or not thinking)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_thought_that_wants_to_end_everything_is_answered(demo: Qwen3VL, ignore: bool) -> None:
    asked = {"grammar": {"type": "regex", "value": "yes|yes sir"}}
    _, answer = eager(demo, thinking=True, asked=asked, ignore_eos=ignore, thinking_budget=3)
    assert answer.reasoning_closed
    assert answer.finish_reason == "stop"
    assert answer.text == ("yes sir" if ignore else "yes")
