"""The tokenizer and its streaming decoder, on the bundled checkpoint's tokenizer."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen3vl_mlx
from qwen3vl_mlx.errors import CheckpointError, InputError, PromptError
from qwen3vl_mlx.processing.lengths import CHARACTERS_PER_TOKEN, least_tokens
from qwen3vl_mlx.processing.tokenizer import (
    StreamingDecoder,
    Tokenizer,
    absent_character,
    cut_literals,
    literal_start,
)

DEMO = Path(qwen3vl_mlx.__file__).parent / "demo" / "checkpoint"
TOKENIZER = Tokenizer.from_folder(DEMO)
IM_START, IM_END = TOKENIZER.added_tokens["<|im_start|>"], TOKENIZER.added_tokens["<|im_end|>"]
SINGLE_BYTES = {
    TOKENIZER.token_bytes(id_): id_
    for id_ in range(TOKENIZER.vocab_size)
    if len(TOKENIZER.token_bytes(id_)) == 1
}
# Unassigned characters are left out: Python and the tokenizer may follow different Unicodes.
UNICODE = st.text(st.characters(exclude_categories=("Cs", "Cn")))
LITERALS = st.sampled_from(sorted(TOKENIZER.added_tokens))
# The tokenizer's own ids, and some rows of the embedding beyond them.
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size + 100), max_size=60)
TEXTS = [
    "",
    "Hello, world! It's 2026 and pi is 3.14159.",
    "a\nb\r\n\n  c\t \n",
    "naïve Ångström e\u0301 中文字符、日本語 한국어 العربية",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 🙂",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n",
    "<think>\nso\n</think>\n\n<tool_call>\n{}\n</tool_call> <|endoftext|> <|unknown|>",
]


def streamed(ids: list[int], skip_special_tokens: bool = True) -> str:
    decoder = StreamingDecoder(TOKENIZER, skip_special_tokens)
    return "".join(map(decoder.push, ids)) + decoder.flush()


def test_the_bundled_tokenizer_has_qwens_26_added_tokens() -> None:
    assert TOKENIZER.vocab_size == 1024
    assert sorted(TOKENIZER.added_tokens.values()) == list(range(998, 1024))
    assert {"<|im_end|>", "<|image_pad|>", "<|video_pad|>"} <= TOKENIZER.special_tokens
    assert len(TOKENIZER.special_tokens) == 14
    assert TOKENIZER.special_tokens.isdisjoint({"<think>", "</think>", "<tool_call>"})


def test_encode_recognises_added_tokens_and_adds_none() -> None:
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.encode("<|im_start|><|im_end|>") == [IM_START, IM_END]
    assert not set(TOKENIZER.encode("Hi there")) & set(TOKENIZER.added_tokens.values())


LONG = [
    *(text * (20_000 // max(1, len(text))) for text in TEXTS),
    " " * 20_000,
    "-" * 9_000 + "\n" * 9_000,
    "\u1112\u1161\u11ab" * 3_000,
    " \t\r\n".join(map(str, range(4_000))),
    "x" * 4096,
    "y" * 4097,
]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_a_long_text_has_the_tokens_of_any_other_way_to_read_it(text: str) -> None:
    assert TOKENIZER.encode(text) == TOKENIZER.backend.encode(text, add_special_tokens=False).ids


@given(st.lists(UNICODE | LITERALS).map(lambda texts: "".join(texts) * 500))
@settings(max_examples=30, deadline=None)
def test_long_texts_in_general(text: str) -> None:
    assert TOKENIZER.encode(text) == TOKENIZER.backend.encode(text, add_special_tokens=False).ids


@given(st.lists(UNICODE | LITERALS | st.integers(1, 300).map(" ".__mul__)).map("".join))
def test_a_text_has_no_fewer_tokens_than_its_length_tells(text: str) -> None:
    assert least_tokens(text) <= len(TOKENIZER.encode(text))


def test_only_runs_of_blanks_have_tokens_as_long_as_the_length_reckons_on_average() -> None:
    bytes_of = [TOKENIZER.token_bytes(id_, False) for id_ in range(998)]
    longest = max(len(token) for token in bytes_of)
    assert longest <= CHARACTERS_PER_TOKEN
    words = [token for token in bytes_of if token.strip()]
    assert max(map(len, words)) < CHARACTERS_PER_TOKEN


@pytest.mark.parametrize("text", ["\ud83d", "cut \ude42 in two", "a" * 5_000 + "\ud83d"])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="surrogate"):
        TOKENIZER.encode(text)


@given(st.lists(UNICODE | LITERALS).map("".join))
def test_round_trip_is_the_text_in_composed_form(text: str) -> None:
    decoded = TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False)
    assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text)


def test_decode_leaves_out_special_tokens_only() -> None:
    ids = TOKENIZER.encode("<|im_start|><think>x</think><|im_end|>")
    assert TOKENIZER.decode(ids) == streamed(ids) == "<think>x</think>"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == streamed(ids, False)
    assert streamed(ids, False) == "<|im_start|><think>x</think><|im_end|>"


@pytest.mark.parametrize(
    ("token_id", "expected"),
    [
        (IM_END, b""),
        (TOKENIZER.added_tokens["</think>"], b"</think>"),
        (TOKENIZER.vocab_size, b""),
        (151_935, b""),
    ],
)
def test_token_bytes_of_added_and_unknown_ids(token_id: int, expected: bytes) -> None:
    assert TOKENIZER.token_bytes(token_id) == expected


def test_every_byte_has_a_token() -> None:
    assert set(SINGLE_BYTES) == {bytes([byte]) for byte in range(256)}


@given(UNICODE)
def test_token_bytes_joined_are_the_utf8_text(text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    ids = TOKENIZER.encode(composed)
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == composed.encode()


@given(IDS, st.booleans())
def test_streaming_equals_decoding_at_once(ids: list[int], skip_special_tokens: bool) -> None:
    assert streamed(ids, skip_special_tokens) == TOKENIZER.decode(ids, skip_special_tokens)


@given(st.binary())
def test_streaming_equals_decoding_of_any_bytes(data: bytes) -> None:
    ids = [SINGLE_BYTES[bytes([byte])] for byte in data]
    assert streamed(ids) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("text", ["é", "中文", "🙂", "👩‍👩‍👧‍👦", "🇩🇪!", "a👍🏽b\u0301"])
def test_streaming_never_shows_half_a_character(text: str) -> None:
    data = text.encode()
    for cut in range(len(data) + 1):
        decoder = StreamingDecoder(TOKENIZER)
        shown = "".join(decoder.push(SINGLE_BYTES[bytes([byte])]) for byte in data[:cut])
        assert shown == data[:cut].decode(errors="ignore")
        assert decoder.flush() == ("" if shown.encode() == data[:cut] else "\ufffd")
        assert decoder.flush() == ""


def test_a_special_token_inside_a_character_does_not_break_it() -> None:
    first, *rest = (SINGLE_BYTES[bytes([byte])] for byte in "🙂".encode())
    assert streamed([first, IM_END, 5000, *rest]) == "🙂"


def edited(**changes: object) -> str:
    config = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    return json.dumps(config | changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "is missing"),
        (lambda: "{", "damaged or incomplete"),
        (lambda: "{}", "damaged or incomplete"),
        (lambda: edited(pre_tokenizer=None), "not a byte-level BPE"),
    ],
)
def test_a_missing_or_damaged_file_is_named(
    make: Callable[[], str | None], message: str, tmp_path: Path
) -> None:
    if (content := make()) is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_truncation_and_padding_saved_by_training_are_ignored(tmp_path: Path) -> None:
    truncation = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding: dict[str, Any] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 998}
    padding |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(edited(truncation=truncation, padding=padding))
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in ("a", "far more than four tokens in this one"):
        assert tokenizer.encode(text) == TOKENIZER.encode(text)


def test_a_post_processor_adds_nothing(tmp_path: Path) -> None:
    start = {"id": "<|im_start|>", "type_id": 0}
    processor: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": start}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [IM_START], "tokens": ["<|im_start|>"]}
        },
    }
    (tmp_path / "tokenizer.json").write_text(edited(post_processor=processor))
    assert Tokenizer.from_folder(tmp_path).encode("Hi") == TOKENIZER.encode("Hi")


def test_added_tokens_outside_the_byte_alphabet_are_their_literal(tmp_path: Path) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [{"id": 998, "content": "<两 点>"} | flags]
    (tmp_path / "tokenizer.json").write_text(edited(added_tokens=added))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<两 点>") == [998]
    assert tokenizer.token_bytes(998).decode() == tokenizer.decode([998]) == "<两 点>"


@pytest.mark.parametrize(
    ("literals", "texts", "expected"),
    [
        (["<a>"], ["x<a>y"], ["x<^a>y"]),
        (["<a>"], ["<a><a>"], ["<^a><^a>"]),
        (["<a>"], ["<<a>"], ["<<^a>"]),
        (["aa"], ["aaaa"], ["a^a^a^a"]),
        (["ab", "bc"], ["abc"], ["a^b^c"]),
        (["<a>", "<a>b"], ["<a>b"], ["<^a>b"]),
        (["<a>"], ["<", "a>"], ["<^", "a>"]),
        (["<abc>"], ["x<", "", "a", "bc>", "<abc>"], ["x<^", "", "a", "bc>", "<^abc>"]),
        (["<a>"], ["<a", "<a >"], ["<a", "<a >"]),
        (["<"], ["<"], ["<"]),
        ([], ["<a>"], ["<a>"]),
        (["<a>"], [], []),
    ],
)
def test_literals_are_cut(literals: list[str], texts: list[str], expected: list[str]) -> None:
    assert cut_literals(texts, literal_start(literals), "^") == expected


@given(st.sets(st.text("<a>b", min_size=2, max_size=4)), st.lists(st.text("<a>b", max_size=8)))
def test_no_literal_survives_cutting(literals: set[str], texts: list[str]) -> None:
    cut = cut_literals(texts, literal_start(literals), "^")
    assert [text.replace("^", "") for text in cut] == texts
    assert not any(literal in "".join(cut) for literal in literals)


def test_absent_character_is_absent() -> None:
    assert absent_character([]) == "\ue000"
    assert absent_character(["\ue000", "x\ue002"]) == "\ue001"
    assert absent_character(["".join(map(chr, range(0xE000, 0xF900)))]) == "\U000f0000"


def test_absent_character_gives_up_with_a_message() -> None:
    with pytest.raises(PromptError, match="private-use"):
        absent_character(map(chr, range(0xE000, 0x110000)))


@pytest.mark.parity
@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_equal_transformers(text: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO)
    ids = TOKENIZER.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ids == theirs(text)["input_ids"]
    for skip in (True, False):
        assert TOKENIZER.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert streamed(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
