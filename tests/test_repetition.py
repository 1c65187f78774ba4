"""The loop guard: collapses are found, and soon; what real pages hold is not."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen3vl_mlx
from qwen3vl_mlx.engine.repetition import LONGEST_PERIOD, LoopGuard
from qwen3vl_mlx.processing.tokenizer import Tokenizer

# Its tokens are shorter than Qwen's own, so that texts here are longer ones: a stricter test.
TOKENIZER = Tokenizer.from_folder(Path(qwen3vl_mlx.__file__).parent / "demo" / "checkpoint")
PROSE = (
    "The committee met on Tuesday to review the plans for the harbour. Several members asked for "
    "a longer quay, others for a second crane; none spoke of the cost."
)


def alarm(tokens: Iterable[int]) -> int | None:
    """How many tokens the guard lets pass, or None where it is silent."""
    guard = LoopGuard()
    return next((count for count, token in enumerate(tokens, 1) if guard.push(token)), None)


# What repeats, and within how many repeats it must be found.
COLLAPSES: dict[str, tuple[str, int]] = {
    "a digit": ("0", 128),
    "a dot": (".", 128),
    "a word": (" the", 128),
    "an empty cell": ("| ", 128),
    "an empty HTML cell": ("<td></td>", 128),
    "a short phrase": (" and so on,", 128),
    "a table row": ("| 2021 | 14.5 | 0.0 |\n", 100),
    "a sentence": ("The quick brown fox jumps over the lazy dog.\n", 80),
    "a paragraph": (PROSE + "\n\n", 25),
    "two paragraphs": (PROSE + "\n\n" + PROSE[::-1] + "\n\n", 12),
}


@pytest.mark.parametrize("name", COLLAPSES)
@pytest.mark.parametrize("before", ["", PROSE])
def test_collapses_are_found(name: str, before: str) -> None:
    text, repeats = COLLAPSES[name]
    start = TOKENIZER.encode(before)
    part = TOKENIZER.encode(text)
    found = alarm([*start, *part * 1000])
    assert found is not None
    assert found - len(start) <= (repeats + 1) * len(part)


def numbered(count: int, line: str) -> str:
    return "".join(f"{i + 1}. {line}\n" for i in range(count))


RANDOM = random.Random(1)
LEGITIMATE: dict[str, str] = {
    "prose": PROSE * 3,
    "a numbered list of equal lines": numbered(300, "Not applicable"),
    "a table of numbers": "\n".join(
        "| " + " | ".join(f"{RANDOM.random():.2f}" for _ in range(8)) + " |" for _ in range(100)
    ),
    "a table that is mostly zero": "\n".join(
        f"| {RANDOM.randint(1, 99)} | " + " | ".join(["0"] * 10) + " |" for _ in range(60)
    ),
    "a blank form": "| " * 6 + "|\n" + "|---" * 6 + "|\n" + ("| " * 6 + "|\n") * 40,
    "a blank HTML form": "<table>" + ("<tr>" + "<td></td>" * 6 + "</tr>\n") * 20 + "</table>",
    "a zero matrix": "[" + ",\n".join(["[" + ", ".join(["0"] * 12) + "]"] * 12) + "]",
    "a vector of zeros": "[" + ", ".join(["0"] * 100) + "]",
    "a googol": "1" + "0" * 100,
    "pi": "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899",
    "a hex dump": "\n".join("00 " * 15 + "00" for _ in range(16)),
    "rules": "\n\n".join(f"Chapter {i}\n" + "-" * 80 for i in range(20)),
    "leader dots": "\n".join(f"Section {i} {'.' * 60} {i * 3}" for i in range(60)),
    "a sheet of labels": "Ada Lovelace, 12 St James's Square, London\n" * 24,
    "tickets with terms": (PROSE + "\n") * 6,
    "a chorus": ("Row, row, row your boat, gently down the stream,\n" * 3 + PROSE + "\n") * 4,
    "unrolled code": "\n".join(f"x[{i}] = y[{i}] * scale + bias" for i in range(200)),
    "closing brackets": "[" * 100 + "]" * 100,
    "boilerplate": "        try:\n            pass\n        except ValueError:\n" * 20,
    "boxes": "\n".join(f'{{"bbox_2d": [{i}, 0, {i + 9}, 9], "label": "x"}},' for i in range(150)),
    "equal labels": '{"label": "car"}, ' * 50,
    "no, no, no": "no, " * 60,
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_pages_hold_is_not_a_collapse(name: str) -> None:
    assert alarm(TOKENIZER.encode(LEGITIMATE[name])) is None


@pytest.mark.parametrize(
    ("period", "repeats"), [(1, 128), (12, 128), (16, 96), (30, 52), (100, 16)]
)
def test_how_often_is_too_often(period: int, repeats: int) -> None:
    part = list(range(period))
    assert alarm(part * repeats) == period * repeats
    assert alarm([*[*(part * repeats)][:-1], -7]) is None
    assert alarm(part * (repeats - 1) + [-7] + part * (repeats - 1)) is None


def test_what_is_longer_than_the_window_is_not_seen() -> None:
    assert alarm(list(range(LONGEST_PERIOD)) * 20) == 8 * LONGEST_PERIOD
    assert alarm(list(range(LONGEST_PERIOD + 1)) * 20) is None


def test_it_stays_alarmed_while_the_loop_goes_on() -> None:
    guard = LoopGuard()
    alarms = [guard.push(token) for token in [5] * 200 + [6] * 3]
    assert alarms == [False] * 127 + [True] * 73 + [False] * 3


def defined(tokens: list[int]) -> int | None:
    """The first length at which the end is p tokens repeated often enough, for some p."""
    array, first = np.array(tokens), []
    for period in range(1, LONGEST_PERIOD + 1):
        total = period * min(128, max(8, -(-1536 // period)))
        for end in range(total, len(array) + 1):
            part = array[end - total : end]
            if part[-1] == part[-1 - period] and (part[period:] == part[:-period]).all():
                first.append(end)
                break
    return min(first, default=None)


@settings(deadline=None, max_examples=15)
@given(
    prefix=st.lists(st.integers(0, 3), max_size=30),
    part=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    repeats=st.integers(1, 160),
    torn=st.booleans(),
)
def test_it_is_what_it_is_defined_to_be(
    prefix: list[int], part: list[int], repeats: int, torn: bool
) -> None:
    tokens = (prefix + part * repeats)[:2500]
    if torn:
        tokens[len(tokens) // 2] = 9
    assert alarm(tokens) == defined(tokens)
