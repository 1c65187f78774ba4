"""Large pictures are taken a piece at a time, so that other threads get their turn in between."""

from __future__ import annotations

import base64
import binascii
import struct
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx import media, media_decode
from qwen3vl_mlx.errors import ImageError, TooLargeError, UnsupportedImageError
from qwen3vl_mlx.media import TextKind, decode_text, load_image


def decoded_at_once(text: str, kind: TextKind) -> bytes | None:
    """What a text holds, or None if it is malformed: by the rules, and without pieces."""
    raw = text.encode()
    if kind == "data":
        header, comma, payload = text.strip()[5:].partition(",")
        raw = unquote_to_bytes(payload)
        if not comma or not header.lower().rstrip().endswith(";base64"):
            return raw if comma else None
    raw = raw.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\v\f").rstrip(b"=")
    try:
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except binascii.Error:
        return None


FAULTS = ["=", "%3D", "==", "%", "%%", "%4", "%zz", "*", ",", "é", "\xa0", "\x1c", "A"]
SPACES = [" ", "\n", "\r\n", "\t\v\f", "%0A", "%20"]


@st.composite
def payloads(draw: st.DrawFn) -> str:
    """Base64 of either alphabet, with or without padding, lines, escapes and faults."""
    encode = draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))
    text = encode(draw(st.binary(max_size=40))).decode()
    if draw(st.booleans()):
        text = text.rstrip("=")
    escaped = draw(st.sampled_from(["", "+/", "=", "-_", "AQgw048", "+/="]))
    text = "".join(f"%{ord(c):02x}" if c in escaped else c for c in text)
    put = st.sampled_from(SPACES if draw(st.booleans()) else SPACES + FAULTS)
    for where, what in draw(st.lists(st.tuples(st.integers(0, 60), put), max_size=3)):
        text = text[:where] + what + text[where:]
    return text


HEADERS = ["", "image/png;base64", "image/png;BASE64 ", ";base64", "base64", "a;b=c", ";base64;"]


@given(header=st.sampled_from(HEADERS), payload=payloads(), piece=st.integers(3, 30))
@settings(max_examples=500, deadline=None)
def test_text_is_decoded_in_pieces_as_at_once(header: str, payload: str, piece: int) -> None:
    sizes = []

    def b64decode(data: bytes, *, validate: bool) -> bytes:
        sizes.append(len(data))
        return base64.b64decode(data, validate=validate)

    texts: tuple[tuple[str, TextKind], ...] = (
        (f" data:{header},{payload}\n", "data"),
        (payload, "base64"),
    )
    for text, kind in texts:
        expected = decoded_at_once(text, kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(media, "_PIECE", piece)
            patch.setattr(media, "b64decode", b64decode)
            try:
                assert decode_text(text, kind, "it") == expected
            except ImageError:
                assert expected is None
    assert max(sizes, default=0) <= 2 * piece + 3  # an "é" is two bytes


def test_escapes_are_counted_and_surrogates_are_no_picture() -> None:
    with pytest.raises(TooLargeError, match="too many % escapes"):
        decode_text("data:;base64," + "%41" * (2**22 + 1), "data", "it")
    for text in ("data:,\ud800", "data:;base64,AAAA\ud800", "A" * 2000 + "\ud800"):
        with pytest.raises(ImageError):
            load_image(text)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("start", [0, 2, 5])
def test_markers_are_found_wherever_they_lie(
    piece: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_decode, "_PIECE", piece)
    for gap in range(12):
        for inside in (b"\0", b"\xff\0", b"\xff"):
            data = b"\xff\xd8" + (inside * 12)[:gap] + b"\xff\xda\0"
            expected = media_decode._JPEG_MARKER.search(data, start)
            found = media_decode._next_marker(data, start)
            assert (found and found.span()) == (expected and expected.span())


def test_only_the_beginning_tells_the_format() -> None:
    brands = b"ftypisom" + bytes(4) + b"isom" * 100_000 + b"avif"
    with pytest.raises(UnsupportedImageError):
        load_image(struct.pack(">I", 4 + len(brands)) + brands)
