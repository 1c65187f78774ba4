"""Constrained answers: whatever is drawn from the masks, a reader gets what was asked for."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from constraining import (
    ADDED,
    EOS,
    SHORT,
    TEXTS,
    TOKENIZER,
    VOCAB,
    allowed,
    encode,
    fits,
    guided,
    read,
    record,
    say,
    walk,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.engine.constraints import GrammarCompiler, expand, make_guide, parse_grammar

pytest.importorskip("llguidance")

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


@pytest.mark.parametrize("name", ["\U0002f800", "e\u0301", "\u212b", "\u1112\u1161\u11ab", "é"])
def test_a_name_that_the_tokenizer_would_normalize_is_spelled_as_it_stands(name: str) -> None:
    schema = record(**{name: {"type": "string", "maxLength": 6}})
    for seed in range(3):
        answer = json.loads(read(walk(guided(response_format=schema), seed))["text"])
        assert list(answer) == [name]


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


def test_special_tokens_come_only_where_a_grammar_names_them() -> None:
    guide = guided(grammar={"type": "lark", "value": 'start: <|box_start|> "a"'})
    assert allowed(guide) == {TOKENIZER.added_tokens["<|box_start|>"]}
    anything = guided(grammar={"type": "regex", "value": r"(?s:.){5,}"})
    assert not ADDED & allowed(anything)
    assert not {token for token in allowed(anything) if not TEXTS[token]}


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
