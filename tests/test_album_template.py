"""What a picture says of itself, and prompts that are filled with it."""

from __future__ import annotations

import io
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import IFDRational

from qwen3vl_mlx.album.facts import Facts, read_facts
from qwen3vl_mlx.album.finding import Picture
from qwen3vl_mlx.album.template import VARIABLES, Context, read_template
from qwen3vl_mlx.errors import InputError

TAKEN = "2024:05:31 18:03:11"
WHEN = datetime(2024, 5, 31, 18, 3, 11)


def exif(**changes: Any) -> Image.Exif:
    """EXIF as a telephone writes it."""
    made = Image.Exif()
    tags = {0x010F: "Apple", 0x0110: "iPhone 15 Pro", 0x0112: 6} | changes.get("tags", {})
    for tag, value in tags.items():
        made[tag] = value
    made.get_ifd(0x8769).update({0x9003: TAKEN} | changes.get("details", {}))
    place = {1: "N", 2: (48.0, 51.0, 30.12), 3: "W", 4: (2.0, 17.0, 40.2)}
    made.get_ifd(0x8825).update(place | changes.get("gps", {}))
    return made


def encoded(form: str, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_what_a_camera_wrote_is_read(form: str) -> None:
    facts = read_facts(encoded(form, exif=exif().tobytes()))
    # Its pixels lie on their side.
    assert facts == Facts(30, 40, WHEN, "Apple iPhone 15 Pro", (48.858367, -2.2945))


def test_heic() -> None:
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    made = exif(tags={0x0112: 1})
    heif.from_pillow(Image.new("RGB", (40, 30))).save(file, exif=made.tobytes())
    facts = read_facts(file.getvalue())
    assert (facts.width, facts.height) == (40, 30)
    assert facts.taken == WHEN
    assert facts.camera == "Apple iPhone 15 Pro"


def test_nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [encoded("PNG"), encoded("JPEG", exif=exif())]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert [read_facts(data).width for data in pictures] == [40, 30]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tags": {0x0110: "Apple iPhone"}}, {"camera": "Apple iPhone"}),
        ({"tags": {0x010F: "", 0x0110: "X100\0"}}, {"camera": "X100"}),
        ({"details": {0x9003: "0000:00:00 00:00:00"}}, {"taken": None}),
        ({"details": {0x9003: "soon", 0x9004: TAKEN}}, {"taken": WHEN}),
        ({"gps": {1: "S"}}, {"gps": (-48.858367, -2.2945)}),
        ({"gps": {2: (95.0, 0.0, 0.0)}}, {"gps": None}),
        ({"gps": {4: (IFDRational(0, 0), 0.0, 0.0)}}, {"gps": None}),
    ],
)
def test_odd_values(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    facts = read_facts(encoded("JPEG", exif=exif(**changes)))
    assert {name: getattr(facts, name) for name in expected} == expected


WHOLE = encoded("JPEG", exif=exif())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.integers(0, len(WHOLE)), st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_damage_is_no_error(end: int, at: int, value: int) -> None:
    data = bytearray(WHOLE)
    data[at] = value
    assert isinstance(read_facts(bytes(data[:end])), Facts)
    assert isinstance(read_facts(bytes(data)), Facts)


def context(file: str = "2024/a{b}.jpg", facts: Facts | None = None) -> Context:
    modified = time.mktime((2023, 1, 2, 12, 0, 0, 0, 0, -1))
    picture = Picture("/photos", file, "/photos/" + file)
    return Context(picture, facts or Facts(30, 40, WHEN, "X100", (1.5, -2)), modified, 3, 12)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{filename}|{stem}|{folder}|{path}", "a{b}.jpg|a{b}|2024|/photos/2024/a{b}.jpg"),
        ("{index} of {count}", "3 of 12"),
        ("{date} {exif_date}", "2024-05-31 2024-05-31 18:03:11"),
        ("{camera} {width}x{height} {gps}", "X100 30x40 1.50000, -2.00000"),
        ('Say {{"a": 1}}', 'Say {"a": 1}'),
        ("No variables.", "No variables."),
    ],
)
def test_variables_are_filled(text: str, filled: str) -> None:
    assert read_template(text).fill(context()) == filled


def test_what_is_not_known_is_empty_and_the_date_is_the_files() -> None:
    template = read_template("[{exif_date}{camera}{width}{height}{gps}] {date}")
    assert template.fill(context(facts=Facts())) == "[] 2023-01-02"


def test_every_variable_fills_for_every_name() -> None:
    names = read_template("".join(f"{{{name}}}" for name in VARIABLES))
    text = names.fill(context(os.fsdecode(b"caf\xe9/\xff.jpg")))
    assert "caf\ufffd" in text
    text.encode()  # no lone surrogates


@pytest.mark.parametrize(
    "text", ["{foo}", "{", "}", "{}", "{0}", "{index:03}", "{path!r}", "{a.b}"]
)
def test_what_is_no_variable_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(InputError, match=r"\{filename\}.*\{\{ and \}\} for braces"):
        read_template(text)


def test_a_watch_cannot_count() -> None:
    with pytest.raises(InputError, match=r"no variable \{index\}") as refused:
        read_template("{index}", counting=False)
    assert "{count}" not in str(refused.value)


def test_files_of_a_folder_do_not_say_more_than_their_folder(tmp_path: Path) -> None:
    picture = Picture(str(tmp_path), "a.jpg", str(tmp_path / "a.jpg"))
    made = Context(picture, Facts(), 0.0, 1, 1)
    assert read_template("{folder}").fill(made) == tmp_path.name
