"""Answers as models give them, whole and broken, to boxes, points, JSON and documents."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from typing import Any

import pytest
from answers import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.tasks import (
    Box,
    Point,
    TaskError,
    parse_boxes,
    parse_document,
    parse_json,
    parse_points,
)

SIZE = (2000, 500)  # a pixel is 2 across and 0.5 down for each thousandth
CAT = Box(200.0, 100.0, 600.0, 200.0, "cat")
DOG = Box(1000.0, 250.0, 1200.0, 300.0, "dog")
CAT_JSON = '{"bbox_2d": [100, 200, 300, 400], "label": "cat"}'
DOG_JSON = '{"bbox_2d": [500, 500, 600, 600], "label": "dog"}'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOLDEN, [CAT, DOG]),
        (f"[{CAT_JSON}, {DOG_JSON}]", [CAT, DOG]),
        (f"```\n[{CAT_JSON}]\n```", [CAT]),
        (f"Here [see below] they are:\n```json\n[{CAT_JSON}]\n```\nThat's {{all}}.", [CAT]),
        (CAT_JSON, [CAT]),
        (f"{CAT_JSON}\n{DOG_JSON}", [CAT, DOG]),
        (f"Cats: [{CAT_JSON}] and dogs: [{DOG_JSON}]", [CAT, DOG]),
        (f'{{"objects": [{CAT_JSON}, {{"inside": {DOG_JSON}}}]}}', [CAT, DOG]),
        # cut off: every whole object before the cut
        (f"```json\n[{CAT_JSON}, {DOG_JSON}", [CAT, DOG]),
        (f"[{CAT_JSON}, {DOG_JSON[:-1]}", [CAT]),
        (f"[{CAT_JSON}, {DOG_JSON[:30]}", [CAT]),
        (f"[{CAT_JSON}, {DOG_JSON[:20]}", [CAT]),
        (f'{{"objects": [{CAT_JSON}, {DOG_JSON[:20]}', [CAT]),
        (CAT_JSON[:-1], []),
        ("[100, 200, 300, 40", []),
        # of another form
        (str([json.loads(CAT_JSON)]), [CAT]),
        ("[{'bbox_2d': (100, 200, 300, 400), 'label': 'cat',},]", [CAT]),
        ("[{bbox_2d: [100, 200, 300, 400], label: 'cat'}]", [CAT]),
        ('[{"bbox": [100.0, 2e2, "300", " 400 "], "text_content": "cat"}]', [CAT]),
        ('[{"box_2d": "100, 200, 300, 400", "name": "cat"}]', [CAT]),
        ('[{"box": [[100, 200], [300, 400]], "category": " cat "}]', [CAT]),
        ('{"bbox_2d": [[100, 200, 300, 400], [500, 500, 600, 600]], "label": "cat"}',
         [CAT, Box(1000.0, 250.0, 1200.0, 300.0, "cat")]),
        ('[{"species": "cat", "bbox_2d": [100, 200, 300, 400]}]', [CAT]),
        ('[{"label": null, "bbox_2d": [100, 200, 300, 400]}]', [Box(200, 100, 600, 200, "")]),
        ("[[100, 200, 300, 400]]", [Box(200, 100, 600, 200, "")]),
        ("It is at [100, 200, 300, 400].", [Box(200, 100, 600, 200, "")]),
        (f"From [1, 2, 3, 4] to {CAT_JSON}", [CAT]),
        # what ends wrongly
        (f"[{CAT_JSON[:-1]}, {DOG_JSON}]", [DOG]),
        (f"[{CAT_JSON} {DOG_JSON}]", [CAT, DOG]),
        (f"[{CAT_JSON}, oops, {DOG_JSON}]", [CAT, DOG]),
        ('[{"bbox_2d": [100, 200, 300, 400}, {"bbox_2d": [500, 500, 600, 600], "label": "dog"}]',
         [Box(200, 100, 600, 200, ""), DOG]),
        # numbers out of range
        ('[{"bbox_2d": [-50, 200, 1300, 400], "label": "wide"}]', [Box(0, 100, 2000, 200, "wide")]),
        ('[{"bbox_2d": [300, 400, 100, 200], "label": "cat"}]', [CAT]),
        # no box at all
        ('[{"bbox_2d": [100, 200, 100, 400], "label": "line"}]', []),
        ('[{"bbox_2d": [1100, 200, 1200, 400], "label": "outside"}]', []),
        ('[{"bbox_2d": [NaN, 200, 300, 400], "label": "nan"}]', []),
        ('[{"bbox_2d": [1, 2, Infinity, 4], "label": "infinite"}]', []),
        ('[{"bbox_2d": [100, 200, 300], "label": "three"}]', []),
        ('[{"bbox_2d": [100, 200, 300, 400, 500], "label": "five"}]', []),
        ('[{"bbox_2d": [true, 200, 300, 400], "label": "truth"}]', []),
        ('[{"bbox_2d": ["a", "b", "c", "d"], "label": "letters"}]', []),
        ('[{"bbox_2d": null, "label": "nothing"}]', []),
        (f'[{{"bbox_2d": [1, 2, {10**400}, {"9" * 6000}], "label": "huge"}}]', []),
        ('[{"point_2d": [1, 2], "label": "a point"}]', []),
        ("There is no cat in the image.", []),
        ("[]", []),
        ("", []),
        # repeated
        (f"[{', '.join([CAT_JSON, DOG_JSON] * 50)}, {CAT_JSON[:9]}", [CAT, DOG]),
    ],
)  # fmt: skip
def test_boxes(answer: str, expected: list[Box]) -> None:
    assert parse_boxes(answer, SIZE) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('```json\n[{"point_2d": [100, 200], "label": "cat"}]\n```', [Point(200, 100, "cat")]),
        ('{"point_2d": ["100", 200.0], "label": "cat"}', [Point(200, 100, "cat")]),
        ('{"points": [[100, 200], [500, 500]], "label": "cat"}',
         [Point(200, 100, "cat"), Point(1000, 250, "cat")]),
        (CAT_JSON, [Point(400, 150, "cat")]),  # the middle of a box
        ('[{"point_2d": [100, 200, 300, 400], "label": "cat"}]', [Point(400, 150, "cat")]),
        ('[{"point_2d": [1, 2], "bbox_2d": [0, 0, 9, 9], "label": "x"}]', [Point(2, 1, "x")]),
        ('[{"point_2d": [-1, 2000], "label": "corner"}]', [Point(0, 500, "corner")]),
        ("[100, 200]", [Point(200, 100, "")]),
        ('[{"bbox_2d": [100, 200, 100, 400], "label": "line"}]', []),
        ('[{"point_2d": [1, 2, 3], "label": "three"}]', []),
        ('[{"point_2d": [1, 2], "label": "a"}, {"point_2d": [3, ', [Point(2, 1, "a")]),
        ("nowhere", []),
    ],
)  # fmt: skip
def test_points(answer: str, expected: list[Point]) -> None:
    assert parse_points(answer, SIZE) == expected


@pytest.mark.parametrize(
    "label",
    [
        "a cat's [1] {2}, \"three\"", "it's", '5" nail', "naïve 猫 🙂", "line\nbreak", "C:\\new",
        "] }", "```", "a, b: c", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("write", [json.dumps, repr, lambda items: json.dumps(items, indent=1)])
def test_a_label_may_hold_anything(label: str, write: Any) -> None:
    items = [{"bbox_2d": [1, 2, 3, 4], "label": label}, {"bbox_2d": [5, 6, 7, 8], "label": "next"}]
    for end in (None, -1):
        labels = [box.label for box in parse_boxes(write(items)[:end], (1000, 1000))]
        assert labels == [label, "next"]


@pytest.mark.parametrize("quote", ['"', "'"])
def test_unescaped_quotes_inside_a_label(quote: str) -> None:
    answer = f"[{{'bbox_2d': [1, 2, 3, 4], 'label': {quote}the {quote}big{quote} one{quote}}}]"
    assert parse_boxes(answer, (1000, 1000))[0].label == f"the {quote}big{quote} one"


sides = st.integers(1, 10_000)
thousandths = st.tuples(*[st.integers(0, 1000)] * 4).filter(lambda b: b[0] < b[2] and b[1] < b[3])


@settings(deadline=None)
@given(st.lists(thousandths, max_size=8, unique=True), sides, sides)
def test_a_round_trip_on_any_aspect_ratio(
    places: list[tuple[int, ...]], width: int, height: int
) -> None:
    answer = json.dumps([{"bbox_2d": place, "label": "thing"} for place in places])
    boxes = parse_boxes(answer, (width, height))
    again = [
        tuple(
            round(value * 1000 / side)
            for value, side in zip((b.x0, b.y0, b.x1, b.y1), (width, height) * 2, strict=True)
        )
        for b in boxes
    ]
    assert again == places
    middles = parse_points(answer, (width, height))
    for box, point in zip(boxes, middles, strict=False):
        assert box.x0 < point.x < box.x1
        assert box.y0 < point.y < box.y1


numbers = st.one_of(st.integers(-3000, 3000), st.floats(), st.text(max_size=4), st.none())


@settings(deadline=None)
@given(st.lists(st.lists(numbers, max_size=6), max_size=6), sides, sides)
def test_boxes_are_always_inside_and_have_an_area(
    places: list[list[Any]], width: int, height: int
) -> None:
    answer = json.dumps([{"bbox_2d": place, "label": "thing"} for place in places])
    for box in parse_boxes(answer, (width, height)):
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    for point in parse_points(answer, (width, height)):
        assert 0 <= point.x <= width
        assert 0 <= point.y <= height


tokens = st.sampled_from([
    *"[]{}(),:'\"`\\ \n", "```json\n", "```", '"bbox_2d"', "'label'", "[1, 2, 3, 4]", "-1e999",
    "12", "true", "NaN", "\\u12", "\\ud800", "é", "\x00", "\ud800", '"label": "x"', "<html>",
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(tokens, max_size=60).map("".join)))
def test_no_text_is_too_strange(answer: str) -> None:
    for box in parse_boxes(answer, (7, 9)):
        json.dumps(box.to_dict(), allow_nan=False).encode()
    parse_points(answer, (7, 9))
    parse_document(answer, "markdown")
    parse_document(answer, "html")
    try:
        json.dumps(parse_json(answer))
    except TaskError as error:
        assert len(str(error)) < 600  # noqa: PT017


HOSTILE = {
    "openers": "[{", "lists": "[", "objects": '{"a":', "strings": '["', "quotes": '"a ',
    "entries": '[{"bbox_2d": [1, 2', "escapes": '{"a": "\\', "fences": "```", "blanks": "[  ",
    "numbers": "[1 ", "closers": "[}", "pages": "<html>", "blocks": "```html\n", "words": "[true",
}  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
def test_nonsense_takes_a_time_in_proportion_to_its_length(unit: str) -> None:
    def took(length: int) -> float:
        answer = unit * (length // len(unit)) + "x"  # a quote at the end would close a string
        started = time.process_time()  # others' work does not count
        assert parse_boxes(answer, (10, 10)) == []
        parse_document(answer, "html")
        with suppress(TaskError):
            parse_json(answer)
        return time.process_time() - started

    # Sixteen times as long takes sixteen times the time; a quadratic reader would take 256 times.
    assert took(2**17) < 100 * max(took(2**13), 0.02)


# ---- JSON


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ("42", 42),
        ('"text"', "text"),
        ("```json\nnull\n```", None),
        ('Sure!\n```json\n{"a": [1, 2]}\n```\nAnything else?', {"a": [1, 2]}),
        ('The total [1] is {"total": 3.5, "items": ["x"]}.', {"total": 3.5, "items": ["x"]}),
        ("{'a': True, 'b': None, 'c': (1, 2)}", {"a": True, "b": None, "c": [1, 2]}),
        ('{"a": 1}\n{"a": 2}\n{"a": 3}', [{"a": 1}, {"a": 2}, {"a": 3}]),
        ('{"a": 1} or maybe {"a": 2, "b": 3}', {"a": 2, "b": 3}),
        ('[{"a": 1}, {"a": 2}, {"a": ', [{"a": 1}, {"a": 2}]),
        ('[{"a": 1}, {"a": 2}, {"a": 33', [{"a": 1}, {"a": 2}]),
        ('{"name": "x", "rows": [{"a": 1}, {"a": 2, "b', {"name": "x", "rows": [{"a": 1}]}),
        ('{"name": "x", "inner": {"deep": {"er', {"name": "x"}),
        ('[1, 2, 3', [1, 2]),
        ("[]", []),
        ("so: {}", {}),
        (r'{"formula": "\frac{1}{2} \(x\)", "t": "a\tb", "u": "\ud83d\ude42"',
         {"formula": "\frac{1}{2} \\(x\\)", "t": "a\tb", "u": "🙂"}),
        (f'see {{"big": {10**30}}}', {"big": 10**30}),
    ],
)  # fmt: skip
def test_json(answer: str, expected: Any) -> None:
    assert parse_json(answer) == expected


@pytest.mark.parametrize("answer", ["", "no idea", "{", "[see", '{"a', "```json\n```", "[" * 200])
def test_no_json(answer: str) -> None:
    with pytest.raises(TaskError, match="the answer holds no JSON"):
        parse_json(answer)


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=20,
).filter(lambda value: isinstance(value, (list, dict)))


@settings(deadline=None)
@given(plain, st.booleans(), st.sampled_from([None, 2]))
def test_json_between_sentences_is_read_as_it_stands(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert parse_json(f"Well: {text} (done)") == value
    assert parse_json(f"```json\n{text}") == value


# ---- documents

CODE = "# Title\n\n```python\nprint(1)\n```\n\nMore."


@pytest.mark.parametrize(
    ("answer", "form", "expected"),
    [
        (f"```markdown\n{CODE}\n```", "markdown", CODE),
        (f"```md\n{CODE}", "markdown", CODE),
        (f"Here it is:\n\n````markdown\n{CODE}\n```\nBye.", "markdown", CODE),
        ("```markdown\none\n```\n```markdown\ntwo\n```", "markdown", "one\n\ntwo"),
        ("```\n# Title\n```", "markdown", "# Title"),
        (CODE, "markdown", CODE),
        ("```\ncode\n```\n\nText.", "markdown", "```\ncode\n```\n\nText."),
        (f"\n {CODE} \n", "markdown", CODE),
        ("```html\n<p>Hi</p>\n```", "html", "<p>Hi</p>"),
        ("```HTML\n<p>Hi", "html", "<p>Hi"),
        ("It is:\n<!DOCTYPE html><html>İ</html> Done.", "html", "<!DOCTYPE html><html>İ</html>"),
        ("<HTML><body>x", "html", "<HTML><body>x"),
        ("<p>a</p>", "html", "<p>a</p>"),
        ("", "html", ""),
        ("```html", "html", ""),
    ],
)
def test_documents(answer: str, form: Any, expected: str) -> None:
    assert parse_document(answer, form) == expected


def test_a_form_that_is_none() -> None:
    with pytest.raises(InputError, match="form 'pdf' is unknown; use 'markdown' or 'html'"):
        parse_document("", "pdf")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (math.nan, 5), None, "ab", (math.inf, 1)])
@pytest.mark.parametrize("parse", [parse_boxes, parse_points])
def test_a_size_that_is_none(parse: Any, size: Any) -> None:
    with pytest.raises(InputError, match="size must be"):
        parse("[]", size)


def test_an_answer_that_is_no_text() -> None:
    with pytest.raises(InputError, match="an answer is a text, got list"):
        parse_boxes([CAT_JSON], SIZE)  # type: ignore[arg-type]
