"""Pictures named in a line of text: a pure function, given which files there are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen3vl_mlx.chat.attachments import (
    EXTENSIONS,
    find_pictures,
    path_fragment,
    says_something,
    split_paths,
)
from qwen3vl_mlx.demo import EXAMPLE

FILES = {
    "photo.png",
    "a.png",
    "b.JPG",
    "My photo.png",
    "it's.png",
    "photo (1).png",
    "a.png.bak.png",
    "notes.txt",
    "/u/a.png",
    "/u/b.heic",
    "/u/My Pictures/a b.HEIC",
    "/u/My Pictures/c.Avif",
    "/u/it's & more (2).webp",
    "/u/scan",
    "/u/report.pdf",
    "/u/照片.png",
    "~/x.tiff",
    "./rel.jpeg",
    "../up.gif",
    "/u/Screenshot 2024-01-01 at 3.04.05\u202fPM.png",
    "/u/100%.png",
    "/u/v1.2/x.bmp",
}
PM = "/u/Screenshot 2024-01-01 at 3.04.05\u202fPM.png"
URL = "https://example.com/a/b.JPG?w=2&h=3#x"


def find(text: str) -> tuple[str, list[str], list[str]]:
    found = find_pictures(text, FILES.__contains__)
    return found.text, list(found.sources), list(found.missing)


@pytest.mark.parametrize(
    ("line", "text", "sources"),
    [
        ("What is this? photo.png", "What is this?", ["photo.png"]),
        ("Look at photo.png.", "Look at.", ["photo.png"]),
        ("Is photo.png blue?", "Is blue?", ["photo.png"]),
        ("photo.png", "", ["photo.png"]),
        ("(photo.png)", "()", ["photo.png"]),
        ("photo.png's colour, please", "'s colour, please", ["photo.png"]),
        ("a.png,b.JPG: which?", ",: which?", ["a.png", "b.JPG"]),
        ("compare a.png and b.JPG", "compare and", ["a.png", "b.JPG"]),
        ("b.JPG then a.png then b.JPG", "then then", ["b.JPG", "a.png", "b.JPG"]),
        ("see a.png.bak.png", "see", ["a.png.bak.png"]),
        # Quoted.
        ('see "photo.png" now', "see now", ["photo.png"]),
        ("see 'photo.png'!", "see!", ["photo.png"]),
        ("see “/u/My Pictures/a b.HEIC” now", "see now", ["/u/My Pictures/a b.HEIC"]),
        ('"/u/My Pictures/a b.HEIC"', "", ["/u/My Pictures/a b.HEIC"]),
        (r"'/u/it'\''s & more (2).webp' what?", "what?", ["/u/it's & more (2).webp"]),
        ('"it\'s.png" hm', "hm", ["it's.png"]),
        ("'/u/a.png' '/u/b.heic' which?", "which?", ["/u/a.png", "/u/b.heic"]),
        ('"What is in photo.png"', '"What is in"', ["photo.png"]),
        ("don't say what's in a.png, it's odd", "don't say what's in, it's odd", ["a.png"]),
        # Dragged: escaped.
        (r"/u/My\ Pictures/a\ b.HEIC what is it?", "what is it?", ["/u/My Pictures/a b.HEIC"]),
        (r"/u/it\'s\ \&\ more\ \(2\).webp ", "", ["/u/it's & more (2).webp"]),
        (
            r"/u/a.png /u/My\ Pictures/c.Avif /u/b.heic differ?",
            "differ?",
            ["/u/a.png", "/u/My Pictures/c.Avif", "/u/b.heic"],
        ),
        (PM.replace(" ", "\\ "), "", [PM]),
        (r"photo\ \(1\).png", "", ["photo (1).png"]),
        # Plain spaces, where the disk has it.
        ("/u/My Pictures/a b.HEIC what is it?", "what is it?", ["/u/My Pictures/a b.HEIC"]),
        ("My photo.png", "", ["My photo.png"]),
        ("What is on My photo.png?", "What is on?", ["My photo.png"]),
        ("photo (1).png", "", ["photo (1).png"]),
        (f"{PM} when?", "when?", [PM]),
        # Folders.
        ("~/x.tiff ./rel.jpeg ../up.gif", "", ["~/x.tiff", "./rel.jpeg", "../up.gif"]),
        ("read /u/scan please", "read please", ["/u/scan"]),
        ("read /u/report.pdf", "read", ["/u/report.pdf"]),
        ("/u/v1.2/x.bmp", "", ["/u/v1.2/x.bmp"]),
        ("/u/100%.png", "", ["/u/100%.png"]),
        ("看/u/照片.png是什么", "看是什么", ["/u/照片.png"]),
        ("photo.png。", "。", ["photo.png"]),
        # URLs.
        (f"see {URL}", "see", [URL]),
        (f"see ({URL}).", "see ().", [URL]),
        ("https://e.org/x_(1).png", "", ["https://e.org/x_(1).png"]),
        ("HTTP://E.ORG/X.PNG, ok?", ", ok?", ["HTTP://E.ORG/X.PNG"]),
        (f'"{URL}" ok', "ok", [URL]),
        ("what is https://example.com/about?", "what is https://example.com/about?", []),
        ("file:///u/My%20Pictures/a%20b.HEIC hm", "hm", ["file:///u/My%20Pictures/a%20b.HEIC"]),
        ("see data:image/png;base64,AAAA ok", "see ok", ["data:image/png;base64,AAAA"]),
        # No pictures.
        ("e.g. v1.2, Node.js and 3.14", "e.g. v1.2, Node.js and 3.14", []),
        ("what is a .png file? or *.png", "what is a .png file? or *.png", []),
        ("notes.txt", "notes.txt", []),
        ("the png of a jpg", "the png of a jpg", []),
        ("", "", []),
        ("  spaces  stay   inside ", "spaces  stay   inside", []),
        # Lines.
        ("first\nphoto.png\nsecond", "first\nsecond", ["photo.png"]),
        ("first photo.png \n  second", "first\n  second", ["photo.png"]),
    ],
)
def test_what_is_found(line: str, text: str, sources: list[str]) -> None:
    if "*.png" in line:  # a pattern is no name: it is told of, not sent
        assert find(line)[2] == ["*.png"]
        return
    assert find(line) == (text, sources, [])


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("see nope.png", "nope.png"),
        ("see nope.HEIC.", "nope.HEIC"),
        ("see /u/no/x.jpg, and?", "/u/no/x.jpg"),
        (r"/u/My\ Pictures/no.png", "/u/My Pictures/no.png"),
        ('"/u/My Pictures/no.png" what?', "/u/My Pictures/no.png"),
        ("'no pe.png' what?", "pe.png"),
        ("file:///u/no.png", "file:///u/no.png"),
        ("~/no.webp", "~/no.webp"),
    ],
)
def test_what_is_missing(line: str, missing: str) -> None:
    assert find(line)[1:] == ([], [missing])


@pytest.mark.parametrize("ending", EXTENSIONS)
def test_every_extension_in_any_case(ending: str) -> None:
    for name in (f"x.{ending}", f"x.{ending.upper()}", f"x.{ending.title()}"):
        assert find_pictures(f"see {name}!", {name}.__contains__).sources == (name,)


NAMES = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/"), min_size=1, max_size=12
).map(lambda name: f"/dir/{name}.png")
WORDS = st.lists(st.sampled_from(["what", "is", "on", "the", "left", "of"]), max_size=4).map(
    " ".join
)


@given(NAMES, WORDS, WORDS, st.sampled_from(["escaped", "single"]))
@example("/dir/a\\ b.png", "", "what", "escaped")
def test_what_a_terminal_pastes_is_found(name: str, before: str, after: str, how: str) -> None:
    """Whatever the name: escaped as macOS does, or quoted as shells do."""
    if how == "escaped":
        special = set(" !\"#$&'()*,;<=>?[\\]^`{|}~")
        pasted = "".join(f"\\{c}" if c in special else c for c in name)
    else:
        pasted = "'" + name.replace("'", "'\\''") + "'"
    found = find_pictures(f"{before} {pasted} {after}", {name}.__contains__)
    assert found.sources == (name,)
    assert found.text.split() == f"{before} {after}".split()


@given(st.text(max_size=80), st.sets(st.text(min_size=1, max_size=8), max_size=3))
@example("'\\''.png", set())
@example('"', {'"'})
def test_any_text_is_taken_apart(text: str, files: set[str]) -> None:
    found = find_pictures(text, files.__contains__)
    if not found.sources:
        assert found.text == text.strip()
    left = list(text)
    for character in found.text:  # nothing new, in the same order
        while left and left[0] != character:
            left.pop(0)
        assert left
        left.pop(0)
    split_paths(text, files.__contains__)
    path_fragment(text)


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a.png", ["a.png"]),
        ("My photo.png", ["My photo.png"]),
        ("a.png nowhere", ["a.png", "nowhere"]),
        (r"/u/My\ Pictures/a\ b.HEIC a.png", ["/u/My Pictures/a b.HEIC", "a.png"]),
        ("/u/My Pictures/a b.HEIC a.png", ["/u/My Pictures/a b.HEIC", "a.png"]),
        (f"'My photo.png' \"a.png\" {URL}", ["My photo.png", "a.png", URL]),
        ("https://example.com/about", ["https://example.com/about"]),
        ("", []),
    ],
)
def test_a_commands_paths(text: str, sources: list[str]) -> None:
    assert split_paths(text, FILES.__contains__) == sources


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("see ~/Pic", "~/Pic"),
        ("see /u/My\\ Pic", "/u/My\\ Pic"),
        ('see "/u/My Pic', '"/u/My Pic'),
        ("see ./a", "./a"),
        ("see folder/a", "folder/a"),
        ("see this", None),
        ("", None),
        ("a/b c", None),
    ],
)
def test_the_path_being_typed(text: str, fragment: str | None) -> None:
    assert path_fragment(text) == fragment


@pytest.mark.parametrize(("text", "says"), [("?", False), (" .,", False), ("é", True), ("3", True)])
def test_punctuation_alone_is_no_question(text: str, says: bool) -> None:
    assert says_something(text) is says


def test_a_file_that_is_no_picture_is_asked_about_in_words(tmp_path: Path) -> None:
    script, scan = tmp_path / "script", tmp_path / "scan"
    script.write_text("#!/bin/sh")
    shutil.copy(EXAMPLE, scan)  # a picture without an ending
    text = f"Is {script} like {scan} or {tmp_path}/gone?"
    found = find_pictures(text)
    assert found.sources == (str(scan),)
    assert str(script) in found.text
    assert found.missing == ()
