"""load_image: every kind of source, what it refuses and how, and what transformers makes of it."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pictures import ALPHA, NOISE, UPRIGHT, encode, exif, pixels
from PIL import Image

from qwen3vl_mlx.errors import ImageError
from qwen3vl_mlx.media import MAX_ASPECT, describe_source, load_image

PNG = encode(NOISE, "PNG")
PNG += b"\0" * ((1 - len(PNG)) % 3)  # its base64 ends in "=="
B64 = base64.b64encode(PNG).decode()
TINY_BMP = encode(np.zeros((1, 1, 3), np.uint8), "BMP")


# ---- sources


def text_sources() -> dict[str, str]:
    assert B64.endswith("==")
    assert "+" in B64
    assert "/" in B64
    lines = "\r\n".join(B64[i : i + 76] for i in range(0, len(B64), 76))
    urlsafe = base64.urlsafe_b64encode(PNG).decode()
    return {
        "data base64": f"data:image/png;base64,{B64}",
        "data case, lines, spaces": f" DATA:image/png;BASE64,{lines}\n",
        "data unpadded": f"data:;base64,{B64.rstrip('=')}",
        "data escaped base64": f"data:image/png;base64,{quote(B64, safe='')}",
        "data percent": f"data:image/png,{quote(PNG)}",
        "base64": B64,
        "base64 lines": f"\n{lines}\n",
        "base64 unpadded": B64.rstrip("="),
        "base64 urlsafe": urlsafe,
        "base64 urlsafe unpadded": urlsafe.rstrip("="),
    }


@pytest.mark.parametrize("text", text_sources().values(), ids=text_sources().keys())
def test_text_that_holds_the_image(text: str) -> None:
    np.testing.assert_array_equal(pixels(text), NOISE)


@pytest.mark.parametrize("name", ["photo.png", "my photo é#1%.PNG", "no-suffix", "lie.jpg"])
def test_paths_and_file_urls(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    url = f"file://{quote(str(path))}"
    local = url.replace("file://", "file://localhost")
    for source in (
        str(path),
        path,
        name,
        f"~/{name}",
        Path("~") / name,
        url,
        local,
        url[:5] + url[7:],
    ):
        np.testing.assert_array_equal(pixels(source), NOISE)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_bytes_like(kind: type) -> None:
    if kind is io.BytesIO:  # a view of another's buffer
        np.testing.assert_array_equal(pixels(io.BytesIO(PNG).getbuffer()), NOISE)
    else:
        np.testing.assert_array_equal(pixels(kind(PNG)), NOISE)


def test_an_existing_path_wins_over_base64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = base64.urlsafe_b64encode(TINY_BMP).decode()
    monkeypatch.chdir(tmp_path)
    assert pixels(text).shape == (1, 1, 3)
    Path(text).write_bytes(PNG)
    np.testing.assert_array_equal(pixels(text), NOISE)


@pytest.mark.parametrize(
    "source",
    ["missing.jpg", "/no/such/dir/a.png", "~/nope.png", "~nobody-here/a.png", "a\0b.png",
     "x.y" * 5000, "abcd", "A" * 300, "\ud800.png", Path("missing.jpg"), "file:///no/such/a.png", "file:///a%00b"],
)  # fmt: skip
def test_no_such_file(source: str | Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        load_image(source)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "no such file: ''"),
        (b"", "empty"),
        ("data:image/png;base64,", "empty"),
        ("ftp://host/a.png", "scheme"),
        ("s3://bucket/a.png", "scheme"),
        ("file://otherhost/a.png", "another host"),
        ("file://[/a.png", "valid URL"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,iVBOR*w0KG", "not valid base64"),
        ("data:image/png;base64,iVBOR", "not valid base64"),
        ("data:text/plain,hello", r"starts with b'hello'"),
        (base64.b64encode(b"hello" * 999).decode(), "base64 text .* is not an image"),
        (B64[:1000], "truncated PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "expected JPEG, PNG"),
        (b"%PDF-1.7\n", "expected JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected JPEG, PNG"),
        (b"BM is how this text begins, but it is no bitmap", "expected JPEG, PNG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "expected JPEG, PNG"),
        (encode(NOISE, "PPM"), "expected JPEG, PNG"),
        (encode(NOISE, "ICO"), "expected JPEG, PNG"),
        (None, "NoneType object is not an image source; expected a path"),
        (3, "int object"),
        ([NOISE], "list object"),
        (Image.new("RGB", (0, 5)), "0x5: it has no pixels"),
        (Image.new("I", (2, 2), -1), "from -1 to -1; expected 0 to 65535"),
        (Image.new("F", (2, 2), 300), "from 300.0 to 300.0; expected 0 to 255"),
        (Image.new("F", (2, 2), float("nan")), "nan"),
        (Image.new("RGB", (MAX_ASPECT + 1, 1)), "201x1: one side is over 200"),
        (encode(Image.new("L", (2, 401)), "PNG"), "2x401"),
    ],
)  # fmt: skip
def test_refused(source: Any, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(source)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [("text.jpg", b"just some words", "text.jpg is not an image"),
     ("empty.png", b"", "empty.png is empty"),
     ("cut.png", PNG[:700], "cut.png is a damaged or truncated PNG")],
)  # fmt: skip
def test_refused_files(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=says):
        load_image(tmp_path / name)


def test_refused_kinds_of_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path, says in ((tmp_path, "is a directory"), (tmp_path / "pipe", "not a regular file")):
        with pytest.raises(ImageError, match=says):
            load_image(path)


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Root may read everything, so be nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.usefixtures("ordinary_user")
def test_permission_denied() -> None:
    with tempfile.TemporaryDirectory() as folder:
        secret, locked = Path(folder, "secret.png"), Path(folder, "locked")
        secret.write_bytes(PNG)
        secret.chmod(0)
        locked.mkdir(0)
        for path in (secret, locked / "a.png"):
            with pytest.raises(ImageError, match="permission denied"):
                load_image(str(path))
        locked.chmod(0o700)


@given(st.text() | st.text("abcXYZ019+/=-_ \n", min_size=1, max_size=3000))
@example("~\0")
@settings(max_examples=200, deadline=None)
def test_any_text_is_refused_with_an_image_error(text: str) -> None:
    with pytest.raises(ImageError):
        load_image(text)
    assert len(describe_source(text)) < 200


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("photos/cat.jpg", "photos/cat.jpg"),
        (Path("photos/cat.jpg"), "photos/cat.jpg"),
        ("https://me:pw@host:81/a/b.png?token=secret#x", "https://host:81/a/b.png?..."),
        ("http://host/a.png", "http://host/a.png"),
        ("http://[", "URL"),
        ("data:image/png;base64," + "A" * 16000, "data URI (image/png, 12 kB)"),
        (" DATA:image/png ;BASE64," + "A" * 16000, "data URI (image/png , 12 kB)"),
        ("data:,abc", "data URI (no type, 3 bytes)"),
        ("data:text/plain;base64", "data URI (text/plain, 0 bytes)"),
        ("https://me:" + "secret" * 3000 + "@host/", "URL of 18017 characters"),
        (B64, "base64 text (2 kB)"),
        (PNG, "bytes"),
        (np.zeros((480, 640, 3), np.uint8), "array (480, 640, 3)"),
        (Image.new("L", (4, 3)), "PIL image (4x3, L)"),
        (None, "NoneType object"),
        ("line\nbreak\x1b.png", "line?break?.png"),
        ("d/" * 300 + "z.png", "d/" * 40 + "..." + ("d/" * 300 + "z.png")[-80:]),
    ],
)
def test_describe_source(source: Any, name: str) -> None:
    assert describe_source(source) == name


# ---- optional packages and imports


@pytest.mark.parametrize(
    "brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0heic", b"msf1\0\0\0\0hevc"]
)
def test_heif_without_pillow_heif_says_what_to_install(
    brands: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(64)
    with pytest.raises(ImageError, match=r'pip install "qwen3vl-mlx\[heif\]"'):
        load_image(data)
    assert pixels(encode(NOISE, "AVIF")).shape == (23, 31, 3)  # Pillow's own


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, qwen3vl_mlx.media;"
        "print({'PIL', 'numpy', 'urllib.request', 'pillow_heif', 'mlx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


# ---- transformers


@pytest.mark.parity
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_jpeg_pixels_are_those_of_transformers(orientation: int, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers.image_utils")
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(NOISE, "JPEG", quality=90, exif=exif(orientation)))
    np.testing.assert_array_equal(pixels(path), np.asarray(hf.load_image(str(path))))


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_png_pixels_are_those_of_transformers(mode: str, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers.image_utils")
    path = tmp_path / "drawing.png"
    path.write_bytes(encode(Image.fromarray(NOISE).convert(mode), "PNG"))
    np.testing.assert_array_equal(pixels(path), np.asarray(hf.load_image(str(path))))


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_that_of_transformers_image_processor(mode: str) -> None:
    hf = pytest.importorskip("transformers.image_transforms")
    picture = Image.fromarray(np.dstack([NOISE, ALPHA]))
    picture = picture.convert("RGB").quantize(8) if mode == "P" else picture.convert(mode)
    data = encode(picture, "PNG", **({"transparency": 3} if mode == "P" else {}))
    expected = hf.convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    np.testing.assert_array_equal(pixels(data), expected)
