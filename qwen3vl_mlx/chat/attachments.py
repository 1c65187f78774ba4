"""The pictures named in a line of text: paths, however they were quoted or dragged, and URLs.

Knows the disk only through a function it is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from urllib.parse import unquote, urlsplit

from qwen3vl_mlx.media_decode import HEAD_BYTES, format_of

EXTENSIONS = (
    *("avif", "bmp", "dib", "gif", "heic", "heics", "heif", "heifs", "hif", "jfif", "jpe"),
    *("jpeg", "jpg", "png", "tif", "tiff", "webp"),
)

# U+202F and U+00A0 stand inside the names that macOS gives to screenshots: no spaces here.
_SPACE = " \t\r\n\v\f"
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’"}  # noqa: RUF001
_OPENING = "([{<\"'“‘«（「『【《"  # noqa: RUF001
_AFTER_QUOTE = _SPACE + ".,;:!?)]}>…。，！？；：）」』】》"  # noqa: RUF001
_ENDS_NAME = r"(?=$|[^\w.\-/\\%~]|[.](?![\w])|[^\x00-\x7f])"
_EXTENSION = re.compile(rf"(?<=[^\s/\\])\.(?:{'|'.join(EXTENSIONS)}){_ENDS_NAME}", re.I)
_URL = re.compile(r"https?://|file:|data:image/", re.I)
_ESCAPE = re.compile(r"\\([^A-Za-z0-9])")
_INNER = re.compile(rf"(?<=[{re.escape(_OPENING)},;:=]).|(?<=[^\x00-\x7f])[\x21-\x7e]", re.S)
_TOKEN = re.compile(rf"(?:\\.|[^\\{_SPACE}]|\\$)+", re.S)
_LONGEST_PATH_WORDS = 12  # of one name with plain spaces in it
_LONGEST_PATH = 1024


@dataclass(frozen=True)
class Found:
    """A text without its pictures. missing: what is named like a picture and is not there."""

    text: str
    sources: tuple[str, ...]  # URLs, and paths without quotes or escapes, in the order named
    missing: tuple[str, ...]


@dataclass(frozen=True)
class _Match:
    start: int
    stop: int
    source: str
    is_there: bool = True


def is_file(path: str) -> bool:
    """Whether the disk has a file there; `~` is expanded."""
    try:
        return os.path.isfile(os.path.expanduser(path))
    except ValueError:  # a null character
        return False


def may_be_picture(path: str) -> bool:
    """`is_file`, and for a name that does not say so, whether it begins as a picture does.

    People ask about `/bin/sh` in words.
    """
    if not is_file(path) or _is_picture(path):
        return is_file(path)
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return format_of(file.read(HEAD_BYTES)) is not None
    except OSError:
        return False


def find_pictures(text: str, exists: Callable[[str], bool] = may_be_picture) -> Found:
    """Take the pictures out of a text.

    A picture is a file or http(s) URL with a picture's extension, or any file that is named with
    its folder. Words that merely contain dots are none.
    """
    matches: list[_Match] = []
    at = 0
    while at < len(text):
        match = _match(text, at, exists)
        if match is not None and not match.is_there:
            match = _inside(text, match, exists) or match
        if match is not None:
            matches.append(match)
            at = match.stop
        else:
            at = _next_start(text, at)
    there = [match for match in matches if match.is_there]
    return Found(
        _without(text, there),
        tuple(match.source for match in there),
        tuple(match.source for match in matches if not match.is_there),
    )


def _match(text: str, at: int, exists: Callable[[str], bool]) -> _Match | None:
    if text[at] in _SPACE:
        return None
    return _quoted(text, at, exists) or _plain(text, at, exists)


def _inside(text: str, missing: _Match, exists: Callable[[str], bool]) -> _Match | None:
    """A picture that is there within what looked like one: other scripts set no spaces."""
    at = _next_start(text, missing.start)
    while at < missing.stop:
        match = _match(text, at, exists)
        if match is not None and match.is_there:
            return match
        at = _next_start(text, at)
    return None


def split_paths(text: str, exists: Callable[[str], bool] = is_file) -> list[str]:
    """The paths and URLs of a command's argument, which holds nothing else.

    Quotes and escapes are read as in `find_pictures`; one name with plain spaces is taken whole
    where the disk has it.
    """
    text = text.strip(_SPACE)
    if exists(text):
        return [text]
    sources = []
    at = 0
    while at < len(text):
        if text[at] in _SPACE:
            at += 1
            continue
        closed = _closing_quote(text, at)
        if closed is not None:
            sources.append(closed[0])
            at = closed[1]
            continue
        grown = _with_spaces(text, at, exists)
        token = _TOKEN.match(text, at)
        assert token is not None
        if grown is not None and not exists(unescaped(token[0])):
            sources.append(grown.source)
            at = grown.stop
        else:
            sources.append(token[0] if _URL.match(token[0]) else unescaped(token[0]))
            at = token.end()
    return sources


def _next_start(text: str, at: int) -> int:
    """Where the next word begins, or the next part of a word that can begin a path."""
    if text[at] in _SPACE or text[at] in _OPENING:
        return at + 1
    token = _TOKEN.match(text, at)
    if token is None:
        return at + 1
    found = _INNER.search(text, at + 1, token.end())
    return found.start() if found else token.end()


# Quoted.


def _closing_quote(text: str, at: int) -> tuple[str, int] | None:
    """What is quoted from `at` on, and where the quotation ends."""
    close = _QUOTES.get(text[at])
    if close is None or (at > 0 and (text[at - 1].isalnum())):
        return None
    content = ""
    start = at + 1
    while (end := text.find(close, start)) >= 0:
        content += text[start:end]
        if text.startswith("'\\''", end) and close == "'":  # how shells write one inside
            content += "'"
            start = end + 4
            continue
        if end + 1 == len(text) or text[end + 1] in _AFTER_QUOTE:
            return content, end + 1
        content += close
        start = end + 1
    return None


def _quoted(text: str, at: int, exists: Callable[[str], bool]) -> _Match | None:
    closed = _closing_quote(text, at)
    if closed is None or "\n" in closed[0]:
        return None
    content, stop = closed
    name = content.strip(_SPACE)
    if _URL.match(name):
        found = _url(name, exists)
        return _Match(at, stop, name, found.is_there) if found else None
    for path in dict.fromkeys((content, name, unescaped(name))):
        if (_is_picture(path) or _has_folder(path)) and exists(path):
            return _Match(at, stop, path)
    # A quotation that only ends in a picture is words: `"look at a.png"`.
    words = name.split()
    if _is_picture(name) and (len(words) == 1 or _has_folder(words[0])):
        others = [word for word in words[1:] if _has_folder(word)]
        return None if others else _Match(at, stop, name, False)
    return None


# Plain.


def _plain(text: str, at: int, exists: Callable[[str], bool]) -> _Match | None:
    token = _TOKEN.match(text, at)
    if token is None or (at > 0 and text[at - 1] == "\\"):
        return None
    word = token[0]
    if _URL.match(word):
        found = _url(word, exists)
        return found and _Match(at, at + found.stop, found.source, found.is_there)
    ends = _ends(word)
    for end in ends:
        for path in dict.fromkeys((unescaped(word[:end]), word[:end])):
            if (_is_picture(path) or _has_folder(path)) and exists(path):
                return _Match(at, at + end, path)
    grown = _with_spaces(text, at, exists)
    if grown is not None:
        return grown
    named = [end for end in ends if _is_picture(unescaped(word[:end]))]
    if not named or word[0] in _OPENING or not _begins_name(text, at):
        return None
    return _Match(at, at + named[0], unescaped(word[: named[0]]), False)


def _begins_name(text: str, at: int) -> bool:
    """Whether a name that is not on the disk may be said to begin here, rather than before."""
    if at == 0 or text[at - 1] in _SPACE or text[at - 1] in _OPENING:
        return True
    return text[at] in "/~."


def _ends(word: str) -> list[int]:
    """Where a name in a word may end, the longest first: after an extension, before punctuation."""
    trimmed = len(word.rstrip(".,;:!?)]}>\"'”’…。，！？；：）」』】》"))  # noqa: RUF001
    ends = {match.end() for match in _EXTENSION.finditer(word)}
    return sorted({len(word), trimmed, *ends} - {0}, reverse=True)


def _with_spaces(text: str, at: int, exists: Callable[[str], bool]) -> _Match | None:
    """A name with plain spaces in it that the disk has, from `at` on: the shortest one."""
    if not _begins_name(text, at):
        return None
    line = text[at : at + _LONGEST_PATH].split("\n", 1)[0]
    tokens = [match.end() for match in _TOKEN.finditer(line)][: _LONGEST_PATH_WORDS + 1]
    if len(tokens) < 2 or not _EXTENSION.search(line[: tokens[-1]]):
        return None
    inside = (
        match.end() for match in _EXTENSION.finditer(line[: tokens[-1]]) if match.end() > tokens[0]
    )
    for end in inside:
        if exists(line[:end]):
            return _Match(at, at + end, line[:end])
    return None


def _url(word: str, exists: Callable[[str], bool]) -> _Match | None:
    """A URL of a picture at the beginning of `word`, without the sentence's punctuation."""
    if word[:5].lower() == "data:":
        return _Match(0, len(word), word)
    stop = len(word)
    while stop and word[stop - 1] in ".,;:!?)]}>\"'”’…。，！？；：）」』】》":  # noqa: RUF001
        if word[stop - 1] == ")" and word.count("(", 0, stop) >= word.count(")", 0, stop):
            break
        stop -= 1
    url = word[:stop]
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that hold no address
        return None
    path = unquote(parts.path)
    if parts.scheme.lower() != "file":
        return _Match(0, stop, url) if _is_picture(path) and parts.netloc else None
    there = exists(path)
    return _Match(0, stop, url, there) if there or _is_picture(path) else None


def _is_picture(name: str) -> bool:
    return any(match.end() == len(name) for match in _EXTENSION.finditer(name))


def _has_folder(name: str) -> bool:
    return name.startswith(("/", "~/", "./", "../"))


def unescaped(name: str) -> str:
    r"""Without the backslashes a terminal writes before spaces and signs: `a\ b` is `a b`."""
    return _ESCAPE.sub(r"\1", name)


# What is left.


def _without(text: str, matches: list[_Match]) -> str:
    """The text between the matches, its spaces tidied where something was taken out."""
    if not matches:
        return text.strip()
    left = text[: matches[0].start]
    for match, following in zip(matches, chain(matches[1:], [None]), strict=True):
        left = _joined(left, text[match.stop : following.start if following else len(text)])
    return left.strip()


def _joined(left: str, right: str) -> str:
    ends, begins = left.rstrip(" \t"), right.lstrip(" \t")
    closes = right[:1] in ("'", '"', "”", "’")  # noqa: RUF001
    if closes or not begins or begins[0] in ".,;:!?)]}\n" or not ends or ends[-1] in "([{\n":
        if ends.endswith("\n") and begins.startswith("\n"):
            begins = begins[1:]
        return ends + begins
    gap = len(left) > len(ends) or len(right) > len(begins)
    return ends + (" " if gap else "") + begins


def says_something(text: str) -> bool:
    """Whether there is a question in what is left, rather than a lone full stop."""
    return any(character.isalnum() for character in text)


def path_fragment(text: str) -> str | None:
    """The beginning of a path that ends a text which is being typed, as it stands; else None."""
    *_, last = chain([None], _fragments(text))
    return last


def _fragments(text: str) -> Iterator[str]:
    """The last word, or what follows the last open quotation mark, if it can begin a path."""
    match = re.search(rf"(?:\\.|[^\\{_SPACE}])+$", text, re.S)
    if match and re.match(r"~/|\.{0,2}/|[^/\\]+/", match[0].lstrip("\"'")):
        yield match[0]
    for quote in "\"'":
        start = text.rfind(quote)
        opens = start >= 0 and text.count(quote) % 2 and (start == 0 or text[start - 1] in _SPACE)
        if opens and "/" in text[start:]:
            yield text[start:]
