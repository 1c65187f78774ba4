"""Markdown that is still being written, as lines for a terminal: finished blocks, and the last one.

A block is finished when the next one has begun with a whole line, so that no list is taken for
ended at the blank line between two of its items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

_STYLES = Theme(
    {  # readable on light and dark grounds alike
        "markdown.code": "cyan",
        "markdown.code_block": "none",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold",
        "markdown.h3": "bold italic",
        "markdown.h4": "italic",
        "markdown.h5": "italic",
        "markdown.h6": "italic",
        "markdown.link_url": "underline",
        "markdown.item.bullet": "bold",
        "markdown.item.number": "bold",
    }
)


class _LeftHeading(Heading):
    """Headings stand where the text stands."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text: Text = self.text.copy()
        text.justify = "left"
        yield text


class _Code(CodeBlock):
    """Code between its fences, not indented: what is copied runs."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        named = "" if self.lexer_name == "text" else self.lexer_name
        yield Text(f"```{named}", "dim")
        code = str(self.text).rstrip()
        yield Syntax(
            code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default"
        )
        yield Text("```", "dim")


class _Block(Markdown):
    """One block, parsed already."""

    elements = {  # noqa: RUF012
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, tokens: Sequence[Token]):
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = list(tokens)


def _parser() -> MarkdownIt:
    """Loses nothing: HTML, TeX's backslashes and what looks like a definition show as written."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    return parser.disable(["reference", "escape", "image"])


@dataclass
class Blocks:
    """Takes a text as it comes and gives its blocks back, each once."""

    parser: MarkdownIt = field(default_factory=_parser)
    text: str = ""  # of the blocks that are not finished

    def push(self, text: str) -> list[str]:
        """More text; returns the blocks that are finished by now."""
        self.text += text
        whole = self.text[: self.text.rfind("\n") + 1]
        starts = _starts(self.parser.parse(whole))
        lines = whole.splitlines(keepends=True)
        blocks = ["".join(lines[start:stop]) for start, stop in pairwise(starts)]
        if blocks:
            self.text = self.text[len("".join(lines[: starts[-1]])) :]
        return blocks

    def flush(self) -> str:
        """What is left at the end."""
        text, self.text = self.text, ""
        return text


def _starts(tokens: Sequence[Token]) -> list[int]:
    """The lines in which blocks begin."""
    return [token.map[0] for token in tokens if token.level == 0 and token.map]


def render(text: str, width: int, color: bool = True) -> list[str]:
    """Markdown as lines of at most `width` cells, with ANSI styles; no blank ones around."""
    tokens = _parser().parse(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":  # answers mean their line ends: texts they have read
                child.type = "hardbreak"
    console = Console(
        width=max(width, 10),
        theme=_STYLES,
        force_terminal=True,
        color_system="standard" if color else None,
        highlight=False,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(_Block(tokens))
    lines = [line.rstrip(" ") for line in capture.get().split("\n")]
    while lines and not _seen(lines[0]):
        lines.pop(0)
    while lines and not _seen(lines[-1]):
        lines.pop()
    return lines


def wrapped(line: str, width: int) -> list[str]:
    """One line of plain text as lines of at most `width` cells, broken between words."""
    lines = Text(line).wrap(Console(width=max(width, 1)), max(width, 1), tab_size=4)
    return [piece.plain.rstrip(" ") for piece in lines] or [""]


def _seen(line: str) -> bool:
    return bool(Text.from_ansi(line).plain.strip())
