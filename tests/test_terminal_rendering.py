"""Answers drawn on a terminal while they come: what stays on the screen and above it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text

from qwen3vl_mlx.chat.markdown import Blocks, render
from qwen3vl_mlx.chat.plain import PlainView, harmless
from qwen3vl_mlx.chat.rendering import MarkdownView
from qwen3vl_mlx.chat.screen import Terminal
from qwen3vl_mlx.engine.output import Chunk, FinishReason, make_usage

ANSWER = """# What I see

A *blue* background with `code`, <b>HTML</b> and 5 \\times 3.
A second line.

1. one

2. two
   - nested

3. three

```python
def f(x):
    return x

print(f(1))
```

| shape | colour |
|-------|-------:|
| star  | purple |

> quoted

[{"bbox_2d": [1, 2, 3, 4], "label": "a_b_c"}]

[note]: this is no definition
"""


class Glass:
    """A terminal of `rows`: what it shows, and what has scrolled above it for good."""

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self.above: list[str] = []
        self.lines = [""]
        self.row = self.column = 0
        self.erased = 0  # cells of whole lines that were taken away

    def feed(self, text: str) -> None:
        for piece in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
            if piece == "\n":
                self._down()
            elif piece == "\r":
                self.column = 0
            elif piece.startswith("\x1b"):
                self._command(piece)
            else:
                self._put(piece)

    def _command(self, piece: str) -> None:
        kind, count = piece[-1], piece[2:-1]
        if kind == "A":
            assert int(count) <= self.row, "above the screen's first line"
            self.row -= int(count)
        elif kind == "K":
            self.lines[self.row] = self.lines[self.row][: self.column]
        elif kind == "J":
            assert self.column == 0
            self.erased += sum(len(line.strip()) for line in self.lines[self.row :])
            self.lines[self.row :] = [""]
        else:
            assert kind in "mhl"

    def _put(self, text: str) -> None:
        for character in text:
            if self.column == self.columns:
                self._down()
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append("")
        if len(self.lines) > self.rows:
            self.above.append(self.lines.pop(0))
            self.row -= 1

    @property
    def text(self) -> list[str]:
        return [line.rstrip() for line in [*self.above, *self.lines]]


class Pipe(io.StringIO):
    def __init__(self, glass: Glass):
        super().__init__()
        self.glass = glass

    def write(self, text: str) -> int:
        self.glass.feed(text)
        return len(text)


def ticks() -> Iterator[float]:
    now = 0.0
    while True:
        now += 1.0  # every piece is drawn
        yield now


def drawn(pieces: list[str], columns: int = 40, rows: int = 12) -> Glass:
    glass = Glass(columns, rows)
    clock = ticks()
    view = MarkdownView(Pipe(glass), size=lambda: (columns, rows), clock=lambda: next(clock))
    view.begin()
    for piece in pieces:
        view.push(piece)
    view.end()
    return glass


def plain(lines: list[str]) -> list[str]:
    return [Text.from_ansi(line).plain.rstrip() for line in lines]


def whole(text: str, columns: int = 40) -> list[str]:
    """The blocks, each drawn at once, an empty line between them."""
    blocks = Blocks()
    found = [*blocks.push(text), blocks.flush()]
    lines: list[str] = []
    for block in found:
        some = plain(render(block, columns))
        lines += ["", *some] if lines and some else some
    return [*lines, ""] if lines else [""]


def cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("rows", [3, 8, 100])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_nothing_is_lost_or_shown_twice(size: int, rows: int) -> None:
    """However it comes, and however low the screen: the same lines, in the scrollback too."""
    glass = drawn(cut(ANSWER, size), rows=rows)
    assert glass.text == whole(ANSWER)
    shown = "\n".join(glass.text)
    for words in ("<b>HTML</b>", "\\times", "a_b_c", "[note]: this is no definition", "A second"):
        assert words in shown
    assert "```python\ndef f(x):\n    return x\n\nprint(f(1))\n```" in shown  # runs when copied


PARTS = st.sampled_from(
    [
        *("a b", "\n", "\n\n", "- x", "1. y", "```", "    z", "| a | b |\n|---|---|\n", "> q"),
        *("# h", "**b", "**", "`", "$x_1$", "---", "===", "[t](u)", "<p>", "word " * 9, "\t"),
        *("\\", "&lt;", "* ", "1", "![x](y)", "[a]: b"),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, max_size=25), st.sampled_from([3, 6, 30]), st.sampled_from([10, 33]))
def test_any_answer_ends_as_its_blocks_say(pieces: list[str], rows: int, columns: int) -> None:
    text = "".join(pieces)
    assert drawn(cut(text, 3), columns, rows).text == whole(text, columns)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, max_size=25), st.integers(1, 9))
def test_blocks_are_the_text(pieces: list[str], size: int) -> None:
    text = "".join(pieces)
    blocks = Blocks()
    found = [block for piece in cut(text, size) for block in blocks.push(piece)]
    joined = "".join([*found, blocks.flush()])
    assert text.endswith(joined)
    assert not text[: len(text) - len(joined)].strip()


@pytest.mark.parametrize("text", ["word " * 400, "- item\n" * 60, "```\n" + "x = 1\n" * 60 + "```"])
def test_a_block_taller_than_the_screen_comes_whole_and_does_not_flicker(text: str) -> None:
    glass = drawn(cut(text, 5), rows=10)
    assert glass.text == whole(text)
    assert glass.erased == 0  # lines are written over, never blanked first


def test_a_resized_terminal_loses_nothing() -> None:
    glass = Glass(40, 12)
    clock, width = ticks(), [40]
    view = MarkdownView(Pipe(glass), size=lambda: (width[0], 12), clock=lambda: next(clock))
    view.push("one two\n\nthree ")
    width[0] = 30
    view.push("four")
    view.end()
    assert glass.text[-2:] == ["three four", ""]
    assert "one two" in glass.text


def test_a_thought_is_dimmed_and_stands_apart() -> None:
    out = io.StringIO()
    view = MarkdownView(out, size=lambda: (40, 12))
    view.think("I look.")
    view.push("A star.")
    view.end()
    assert "\x1b[2mI look.\x1b[0m" in out.getvalue()
    assert plain(out.getvalue().split("\n"))[-4:-1] == ["I look.", "", "A star."]
    simple = io.StringIO()
    other = PlainView(simple)
    other.think("I ")
    other.think("look.")
    other.push("A star.")
    other.end()
    assert simple.getvalue() == "Thought: I look.\n\nA star.\n"


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("rows", [4, 30])
def test_a_thought_is_wrapped_between_words(size: int, rows: int) -> None:
    thought = "I see " + "shapes and " * 30 + "\n\nSo it is.\n  - a star"
    glass = Glass(40, rows)
    view = MarkdownView(Pipe(glass), size=lambda: (40, rows))
    for piece in cut(thought, size):
        view.think(piece)
    view.push("A star.")
    view.end()
    assert glass.text[-3:] == ["", "A star.", ""]
    said = glass.text[:-3]
    assert "\n".join(said).split() == thought.split()
    assert said[-3:] == ["", "So it is.", "  - a star"]
    assert max(map(len, said)) <= 40


def test_a_model_cannot_steer_the_terminal() -> None:
    evil = "a\x1b]0;title\x07b\x1b[2Jc\x9bd\te\r\nf"
    assert harmless(evil) == "a\ufffd]0;title\ufffdb\ufffd[2Jc\ufffdd\te\nf"
    for view_of in (PlainView, lambda out: MarkdownView(out, size=lambda: (80, 24))):
        out = io.StringIO()
        view = view_of(out)
        view.think(evil)
        view.push(evil)
        view.end()
        assert "\x1b]0" not in out.getvalue()
        assert "\x1b[2J" not in out.getvalue()


class Quiet:
    """A session of which nothing is asked but this."""

    visual_tokens = 18

    def rest(self) -> None:
        raise AssertionError("nobody pressed Ctrl-C")


@pytest.mark.parametrize(
    ("chunks", "shown"),
    [
        ([Chunk("A star.")], "A star.\n\n3 tokens"),
        ([], "the answer is empty\n\n3 tokens"),
        ([Chunk(reasoning="Hm.")], "Thought: Hm.\n\n3 tokens"),
    ],
)
def test_what_stands_below_an_answer(
    chunks: list[Chunk], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = make_usage(
        prompt=30, completion=3, cached=20, started=0, first=0.5, ended=1.5, peak=10**6
    )
    end = Chunk(finish_reason="stop", usage=usage)
    terminal = Terminal(plain=True, previews=False)
    assert terminal.answer(Quiet(), iter([*chunks, end])) is False
    numbers = "3 tokens · 2.0 tokens/s · first after 0.50 s · prompt 30 · 20 cached · 18 visual"
    assert capsys.readouterr().out == f"\n{shown.replace('3 tokens', numbers)}\n\n"


@pytest.mark.parametrize(
    ("reason", "closed", "words"),
    [("length", False, "thinking"), ("length", True, "max_tokens"), ("repetition", True, "itself")],
)
def test_how_an_answer_was_cut_off_is_said(
    reason: FinishReason, closed: bool, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = make_usage(prompt=1, completion=1, cached=0, started=0, first=1, ended=1, peak=1)
    end = Chunk("x", finish_reason=reason, usage=usage, reasoning_closed=closed)
    Terminal(plain=True, previews=False).answer(Quiet(), iter([end]))
    assert words in capsys.readouterr().out
