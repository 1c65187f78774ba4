"""JSON as models write it: in fences, between sentences, cut off, with quotes of the wrong kind.

One pass over the text, whatever it holds: what ends a value that is not JSON is where the search
for the next one begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from qwen3vl_mlx.errors import InputError, Qwen3VLError

_DEEPEST = 64  # levels; no answer nests like that, and whoever walks the values may recurse
_SHOWN = 80  # characters of an answer in a message

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.S)
_START = re.compile(r"[\[{]")
_BLANK = re.compile(r"\s*")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_WORD = re.compile(r"-?[^\W\d]\w*")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.S)
# A quote ends a string only where JSON can go on after it: labels hold quotes and apostrophes.
_QUOTES = MappingProxyType(
    {
        '"': re.compile(r'\\.|"(?=\s*(?:[,:\]})]|\Z))', re.S),
        "'": re.compile(r"\\.|'(?=\s*(?:[,:\]})]|\Z))", re.S),
    }
)
_PAIRS = MappingProxyType({"[": "]", "{": "}", "(": ")"})
_ESCAPED = MappingProxyType(
    {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\"}
    | {'"': '"', "'": "'"}
)
_WORDS = MappingProxyType(
    {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
    | {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
)


class TaskError(Qwen3VLError, ValueError):
    """A model's answer does not hold what was asked for; the message shows how it begins."""


class Cut(dict[str, Any]):
    """An object whose end is missing: it has the members that are whole."""


@dataclass(frozen=True)
class Fragment:
    """A list or an object in a text, where it stands, and whether it is whole."""

    value: list[Any] | dict[str, Any]
    start: int
    end: int
    whole: bool


def parse_json(answer: str) -> Any:
    """The JSON value in an answer.

    Fences and sentences around it do not matter. Of several values it is the longest; objects one
    behind the other are a list. Where the answer is cut off, what is incomplete is left out.
    Raises TaskError where there is no JSON.
    """
    for text in (answer, *(match[1] for match in _FENCE.finditer(answer))):
        with suppress(ValueError, RecursionError):
            return json.loads(text)
    found = _joined(answer, list(fragments(answer)))
    best = max(found, key=lambda part: (part.whole, part.end - part.start), default=None)
    value = _without_cuts(best.value) if best else None
    if best is None or not (best.whole or _says_something(value)):
        shown = answer.strip()
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
        raise TaskError(f"the answer holds no JSON: {shown!r}")
    return value


def _joined(text: str, found: list[Fragment]) -> list[Fragment]:
    """Objects that stand one behind the other, with nothing or commas between, as one list."""
    joined: list[Fragment] = []
    for part in found:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.whole
            and isinstance(part.value, dict)
            and text[last.start] == "{"
            and not text[last.end : part.start].strip(" \t\r\n,;")
        ):
            before = last.value if isinstance(last.value, list) else [last.value]
            joined[-1] = Fragment([*before, part.value], last.start, part.end, True)
        else:
            joined.append(part)
    return joined


def _without_cuts(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_cuts(inner) for inner in value if not isinstance(inner, Cut)]
    if isinstance(value, dict):
        inside = {key: _without_cuts(inner) for key, inner in value.items()}
        return {
            key: kept for key, kept in inside.items() if kept or not isinstance(value[key], Cut)
        }
    return value


def _says_something(value: Any) -> bool:
    """Whether there is more to it than brackets."""
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(_says_something, value)) if isinstance(value, list) else True


@dataclass
class _Frame:
    """A list or an object that is being read."""

    opener: str
    value: list[Any] | dict[str, Any] = field(default_factory=list)
    key: str | None = None
    colon: bool = False  # the key's value comes next

    @property
    def wants_value(self) -> bool:
        return isinstance(self.value, list) or self.colon

    def put(self, value: Any) -> None:
        if isinstance(self.value, list):
            self.value.append(value)
        elif self.key is not None:
            self.value[self.key] = value
            self.key, self.colon = None, False


def fragments(text: str) -> Iterator[Fragment]:
    """All lists and objects in a text, in order, those that are cut off too. Never raises."""
    if not isinstance(text, str):
        raise InputError(f"an answer is a text, got {type(text).__name__}")
    at = 0
    while (start := _START.search(text, at)) is not None:
        part = _Reader(text, start.start()).read()
        at = part.end
        yield part


class _Reader:
    """Reads one list or object from where it opens."""

    def __init__(self, text: str, start: int):
        self.text = text
        self.start = self.at = start
        self.frames: list[_Frame] = []
        self.result: list[Any] | dict[str, Any] | None = None

    def read(self) -> Fragment:
        while self.result is None and self._step():
            pass
        if self.result is not None:
            return Fragment(self.result, self.start, self.at, whole=True)
        while self.result is None:
            self._close(cut=True)
        return Fragment(self.result, self.start, self.at, whole=False)

    def _step(self) -> bool:
        """Take one token; False where the text ends or goes on as JSON cannot."""
        blank = _BLANK.match(self.text, self.at)
        self.at = blank.end() if blank else self.at
        char = self.text[self.at : self.at + 1]
        frame = self.frames[-1] if self.frames else None
        if char in _PAIRS and (frame is None or frame.wants_value):
            return self._open(char)
        if frame is None or not char or char in _PAIRS:
            return False
        if char in ("]", "}", ")"):
            return self._closed_by(char)
        if char == ",":
            taken = frame.key is None
        elif char == ":":
            taken = frame.key is not None and not frame.colon
            frame.colon = frame.colon or taken
        elif char in _QUOTES:
            return self._string(frame, _QUOTES[char])
        else:
            return self._number(frame) or self._word(frame)
        self.at += taken
        return taken

    def _open(self, char: str) -> bool:
        if len(self.frames) == _DEEPEST:
            return False
        self.frames.append(_Frame(char, {} if char == "{" else []))
        self.at += 1
        return True

    def _closed_by(self, char: str) -> bool:
        """Close down to the frame that `char` belongs to: inner ends are forgotten at times."""
        depth = next(
            (n for n, each in enumerate(reversed(self.frames)) if _PAIRS[each.opener] == char), None
        )
        if depth is None:
            return False
        for _ in range(depth + 1):
            self._close(cut=False)
        self.at += 1
        return True

    def _close(self, *, cut: bool) -> None:
        value = self.frames.pop().value
        if cut and isinstance(value, dict):
            value = Cut(value)
        if self.frames:
            self.frames[-1].put(value)
        else:
            self.result = value

    def _string(self, frame: _Frame, end: re.Pattern[str]) -> bool:
        first = at = self.at + 1
        while (match := end.search(self.text, at)) is not None and match[0][0] == "\\":
            at = match.end()
        if match is None:  # no string ends behind here, so this one takes the rest
            self.at = len(self.text)
            return False
        string = _unescaped(self.text[first : match.start()])
        if frame.wants_value:
            frame.put(string)
        elif frame.key is None:
            frame.key = string
        else:
            return False
        self.at = match.end()
        return True

    def _number(self, frame: _Frame) -> bool:
        match = _NUMBER.match(self.text, self.at)
        # At the end of the text more digits may be missing.
        if match is None or match.end() == len(self.text) or not frame.wants_value:
            return False
        frame.put(_as_number(match[0]))
        self.at = match.end()
        return True

    def _word(self, frame: _Frame) -> bool:
        match = _WORD.match(self.text, self.at)
        if match is None or (frame.wants_value and match[0] not in _WORDS):
            return False
        if frame.wants_value:
            frame.put(_WORDS[match[0]])
        elif frame.key is None:
            frame.key = match[0]
        else:
            return False
        self.at = match.end()
        return True


def _as_number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:  # a fraction, or more digits than Python turns into an integer
        return float(text)


def _unescaped(raw: str) -> str:
    if "\\" not in raw:
        return raw
    text = _ESCAPE.sub(_escape, raw)
    # Two escapes make one character beyond the first 65,536; half of one is none.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _escape(match: re.Match[str]) -> str:
    if match[1]:
        return chr(int(match[1], 16))
    return _ESCAPED.get(match[2], match[0])  # LaTeX is often left unescaped
