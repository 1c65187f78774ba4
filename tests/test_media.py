"""load_image: every kind of source, pixel format and orientation; what it refuses and how."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from qwen3vl_mlx.errors import ImageError
from qwen3vl_mlx.media import MAX_ASPECT, describe_source, load_image

RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (23, 31, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (23, 31), dtype=np.uint8)
# Four flat colours, all different under every turn, that lossy formats keep within a few levels.
QUARTERS = np.kron(
    np.array([[[200, 30, 30], [30, 180, 40]], [[40, 50, 210], [230, 220, 60]]], np.uint8),
    np.ones((32, 48, 1), np.uint8),
)

# EXIF 2.32, tag 0x0112: from the stored array to the upright one.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def encode(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def pixels(source: object, **options: int) -> np.ndarray:
    picture = load_image(source, **options)  # type: ignore[arg-type]
    assert picture.mode == "RGB"
    return np.asarray(picture)


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    part = alpha[:, :, None] / 255
    return rgb * part + 255 * (1 - part)


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels would begin."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = struct.pack(">I", 9000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + idat


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
def test_paths_and_file_urls(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    url = f"file://{quote(str(path))}"
    local = url.replace("file://", "file://localhost")
    for source in (str(path), path, name, f"~/{name}", Path("~") / name, url, local, url[:5] + url[7:]):
        np.testing.assert_array_equal(pixels(source), NOISE)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_bytes_like(kind: type) -> None:
    if kind is io.BytesIO:  # a view of another's buffer
        np.testing.assert_array_equal(pixels(io.BytesIO(PNG).getbuffer()), NOISE)
    else:
        np.testing.assert_array_equal(pixels(kind(PNG)), NOISE)


def test_an_existing_path_wins_over_base64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = base64.urlsafe_b64encode(TINY_BMP).decode()
    monkeypatch.chdir(tmp_path)
    assert pixels(text).shape == (1, 1, 3)
    Path(text).write_bytes(PNG)
    np.testing.assert_array_equal(pixels(text), NOISE)


@pytest.mark.parametrize(
    "source",
    ["missing.jpg", "/no/such/dir/a.png", "~/nope.png", "~nobody-here/a.png", "a\0b.png", "x.y" * 5000,
     "abcd", "A" * 300, "\ud800.png", Path("missing.jpg"), "file:///no/such/a.png", "file:///a%00b"],
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
def test_refused(source: object, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [("text.jpg", b"just some words", "text.jpg is not an image"), ("empty.png", b"", "empty.png is empty"),
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
        ("data:,abc", "data URI (no type, 3 bytes)"),
        (B64, "base64 text (2 kB)"),
        (PNG, "bytes"),
        (np.zeros((480, 640, 3), np.uint8), "array (480, 640, 3)"),
        (Image.new("L", (4, 3)), "PIL image (4x3, L)"),
        (None, "NoneType object"),
        ("line\nbreak\x1b.png", "line?break?.png"),
        ("d/" * 300 + "z.png", "d/" * 40 + "..." + ("d/" * 300 + "z.png")[-80:]),
    ],
)
def test_describe_source(source: object, name: str) -> None:
    assert describe_source(source) == name  # type: ignore[arg-type]


# ---- formats and modes


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encode(NOISE, form, **options)), NOISE)


@pytest.mark.parametrize("form", ["JPEG", "MPO", "WEBP", "GIF", "AVIF", "HEIF"])
def test_lossy_formats_come_close(form: str) -> None:
    difference = np.abs(pixels(encode(QUARTERS, form)).astype(int) - QUARTERS)
    assert difference.mean() < 4


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_or_page_is_taken(form: str) -> None:
    first, second = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    data = encode(first, form, save_all=True, append_images=[second])
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() < 8
    two = Image.open(io.BytesIO(data))
    two.seek(1)  # the caller chose
    assert np.abs(pixels(two).astype(int) - (0, 0, 255)).max() < 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    picture = Image.fromarray(NOISE).convert(mode)
    np.testing.assert_array_equal(pixels(picture), np.asarray(picture.convert("RGB")))


def test_cmyk_jpeg_has_true_colours() -> None:
    data = encode(Image.fromarray(QUARTERS).convert("CMYK"), "JPEG")  # Adobe's inverted kind
    assert np.abs(pixels(data).astype(int) - QUARTERS).mean() < 6


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
@pytest.mark.parametrize("saved", [False, True])
def test_alpha_is_composited_on_white(mode: str, saved: bool) -> None:
    grey = mode in ("LA", "La", "PA")
    rgb = np.repeat(NOISE[:, :, :1], 3, axis=2) if grey else NOISE
    straight = Image.fromarray(np.dstack([rgb, ALPHA]))
    if mode == "PA":
        picture = straight.convert("LA").convert("PA")
    else:
        picture = straight.convert("LA") if grey else straight
        picture = picture.convert(mode)
    if saved and mode in ("RGBA", "LA"):
        picture = Image.open(io.BytesIO(encode(picture, "PNG")))
    # premultiplied modes keep few levels where alpha is low
    assert np.abs(pixels(picture) - on_white(rgb, ALPHA)).max() <= 2


@pytest.mark.parametrize(
    ("mode", "key"), [("P", 2), ("P", bytes([255, 0, 128, 255])), ("L", 2), ("RGB", (2, 2, 2)), ("1", 0)]
)  # fmt: skip
@pytest.mark.parametrize("form", ["PNG", "PIL"])
def test_transparent_keys_and_palettes(mode: str, key: object, form: str) -> None:
    index = np.arange(24, dtype=np.uint8).reshape(4, 6) % 4
    picture = Image.fromarray(index)
    if mode == "P":
        picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    elif mode == "1":
        picture = Image.fromarray(index > 1)
    else:
        picture = picture.convert(mode)
    rgb = np.asarray(picture.convert("RGB")).copy()
    alpha = np.full(index.shape, 255)
    if isinstance(key, bytes):
        alpha = np.array(list(key))[index]
    else:
        alpha[np.all(rgb == np.array(key), -1) if mode != "P" else index == key] = 0
    assert (alpha < 255).any()
    picture.info["transparency"] = key
    source = encode(picture, "PNG", transparency=key) if form == "PNG" else picture
    assert np.abs(pixels(source) - on_white(rgb, alpha)).max() <= 1


WIDE = np.array([[0, 255, 256, 4660, 32767, 32768, 65279, 65280, 65535]], np.uint16)


def wide_pictures() -> dict[str, object]:
    grey = Image.fromarray(WIDE)
    big = Image.frombytes("I;16B", (9, 1), WIDE.astype(">u2").tobytes())
    return {
        "array": WIDE,
        "big-endian array": WIDE.astype(">u2"),
        "array HW1": WIDE[:, :, None],
        "I;16": grey,
        "I;16B": big,
        "I": Image.fromarray(WIDE.astype(np.int32)),
        "PNG": encode(grey, "PNG"),
        "TIFF": encode(grey, "TIFF"),
        "TIFF big-endian": encode(big, "TIFF"),
    }


@pytest.mark.parametrize("source", wide_pictures().values(), ids=wide_pictures().keys())
def test_16_bit_keeps_the_high_byte(source: object) -> None:
    high = [0, 0, 1, 18, 127, 128, 254, 255, 255]
    np.testing.assert_array_equal(pixels(source), np.repeat(np.array(high), 3).reshape(1, 9, 3))


def test_16_bit_transparent_level_is_white() -> None:
    data = encode(Image.fromarray(WIDE), "PNG", transparency=256)
    assert pixels(data)[0, :4, 0].tolist() == [0, 0, 255, 18]


@pytest.mark.parametrize(
    ("values", "grey"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 1.6, 255.0], [0, 2, 255])]
)
@pytest.mark.parametrize("saved", [False, True])
def test_float_pictures(values: list[float], grey: list[int], saved: bool) -> None:
    picture = Image.fromarray(np.array([values], np.float32))
    assert picture.mode == "F"
    assert pixels(encode(picture, "TIFF") if saved else picture)[0, :, 1].tolist() == grey


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (NOISE, NOISE),
        (NOISE[::-1, ::2], NOISE[::-1, ::2]),
        (ALPHA, np.repeat(ALPHA[:, :, None], 3, 2)),
        (ALPHA[:, :, None], np.repeat(ALPHA[:, :, None], 3, 2)),
        (np.dstack([NOISE, ALPHA]), on_white(NOISE, ALPHA)),
        (np.dstack([NOISE, ALPHA]) / 255, on_white(NOISE, ALPHA)),
        (NOISE.astype(np.uint16) * 257, NOISE),
        (NOISE / 255, NOISE),
        ((NOISE / 255).astype(np.float32), NOISE),
        ((NOISE / 255).astype(np.float16), NOISE),
        (ALPHA > 99, np.where((ALPHA > 99)[:, :, None], 255, [0, 0, 0])),
    ],
)
def test_arrays(array: np.ndarray, expected: np.ndarray) -> None:
    before = array.copy()
    assert np.abs(pixels(array) - expected).max() <= (1 if array.shape[2:] == (4,) else 0)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (NOISE.transpose(2, 0, 1), r"array \(3, 23, 31\).*channels-first.*transpose"),
        (NOISE[None], "batch"),
        (NOISE[:, :, :2], r"expected \(H, W\)"),
        (NOISE[0, 0], r"expected \(H, W\)"),
        (NOISE[:0], "no pixels"),
        (NOISE.astype(np.float32), r"values from 0 to 255; floats must lie in \[0, 1\]"),
        (np.full((2, 2), -0.1), r"\[0, 1\]"),
        (np.array([[0.5, np.nan]]), r"\[0, 1\]"),
        (np.array([[0.5, np.inf]]), r"\[0, 1\]"),
        (NOISE.astype(np.int64), "dtype int64; expected uint8"),
        (NOISE.astype(np.uint32), "dtype uint32"),
        (NOISE.astype(object), "dtype object"),
        (np.zeros((201, 1)), "one side is over 200"),
    ],
)
def test_refused_arrays(array: np.ndarray, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(array)


# ---- orientation


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "PIL"])
def test_orientation_is_applied_exactly_once(form: str, orientation: int) -> None:
    tags = exif(orientation)
    if form == "PIL":
        source: object = Image.fromarray(QUARTERS)
        source.info["exif"] = tags.tobytes()  # type: ignore[attr-defined]
    elif form == "TIFF":
        source = encode(QUARTERS, form, tiffinfo={0x0112: orientation})
    else:
        source = encode(QUARTERS, form, exif=tags)
    expected = UPRIGHT[orientation](QUARTERS)
    once = pixels(source)
    assert once.shape == expected.shape
    assert np.abs(once.astype(int) - expected).mean() < 4
    result = load_image(source)  # type: ignore[arg-type]
    assert not result.info
    assert not result.getexif()
    np.testing.assert_array_equal(pixels(result), once)


def test_heic_holds_the_turn_twice_as_iphones_write_it() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    data = encode(QUARTERS, "HEIF", exif=exif(6))
    heif = pillow_heif.open_heif(data)
    tags = Image.Exif()
    tags.load(heif.info["exif"])
    assert tags[0x0112] == 6  # in EXIF ...
    assert heif.size == (64, 96)  # ... and as a transform of the container
    assert pixels(data).shape == (96, 64, 3)


def exif_entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack(">HHI", tag, kind, count) + value.ljust(4, b"\0")


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (b"Exif\0\0garbage", False),
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x09", False),  # announces nine tags, holds none
        # a sound orientation beside a resolution that is text
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + exif_entry(0x0112, 3, 1, b"\0\x06")
         + exif_entry(0x011A, 2, 4, b"abc\0") + b"\0\0\0\0", True),
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + exif_entry(0x0112, 3, 1, b"\0\x63") + b"\0\0\0\0", False),
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + exif_entry(0x0112, 2, 2, b"6\0") + b"\0\0\0\0", False),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*EXIF.*:UserWarning")
def test_damaged_exif_does_not_cost_the_picture(block: bytes, turned: bool) -> None:
    data = encode(QUARTERS, "JPEG", exif=block)
    assert pixels(data).shape == ((96, 64, 3) if turned else (64, 96, 3))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16", "La"])
def test_the_callers_picture_is_left_alone(mode: str) -> None:
    picture = Image.fromarray(WIDE) if mode == "I;16" else Image.new(mode, (5, 3), 7)
    picture.info.update(exif=exif(6).tobytes(), dpi=(72, 72))
    before = (picture.tobytes(), picture.size, picture.mode, dict(picture.info))
    result = load_image(picture)
    result.paste((1, 2, 3), (0, 0, *result.size))
    assert (picture.tobytes(), picture.size, picture.mode, dict(picture.info)) == before


# ---- limits and damage


def test_the_pixel_limit_is_read_from_the_header() -> None:
    assert pixels(PNG, max_source_pixels=23 * 31).shape == (23, 31, 3)
    with pytest.raises(ImageError, match=r"31x23 = 713 pixels, over the limit of 712"):
        load_image(PNG, max_source_pixels=23 * 31 - 1)
    with pytest.raises(ImageError, match="over the limit of 178956970"):
        load_image(png_header(60_000, 60_000))  # decoding would say "truncated"
    with pytest.raises(ImageError, match="truncated"):
        load_image(png_header(6_000, 6_000))
    with pytest.raises(ImageError, match="over the limit of 100"):
        load_image(encode(QUARTERS, "HEIF"), max_source_pixels=100)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP"])
@pytest.mark.parametrize("pillows_limit", [400, 300])  # at 713 pixels Pillow warns, and refuses
def test_pillows_own_limit_plays_no_part(
    form: str, pillows_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(encode(NOISE, form)).shape == (23, 31, 3)


def test_pillows_error_inside_a_plugin_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(NOISE, "TIFF", compression="tiff_lzw") + encode(NOISE, "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(ImageError, match="bomb"):
        load_image(encode(NOISE, "WEBP"))
    assert data


def test_sides_up_to_the_aspect_limit_pass() -> None:
    assert pixels(Image.new("RGB", (1, MAX_ASPECT))).shape == (MAX_ASPECT, 1, 3)


def samples() -> dict[str, bytes]:
    small = Image.fromarray(NOISE)
    two = {"save_all": True, "append_images": [small.rotate(180)]}
    return {
        "jpeg": encode(small, "JPEG", exif=exif(6)),
        "jpeg progressive": encode(small, "JPEG", progressive=True),
        "mpo": encode(small, "MPO", **two),
        "png": encode(small, "PNG", exif=exif(6)),
        "png palette": encode(small.quantize(8), "PNG", transparency=2),
        "apng": encode(small, "PNG", **two),
        "gif": encode(small, "GIF", **two),
        "webp": encode(small, "WEBP", exif=exif(6)),
        "webp lossless": encode(np.dstack([NOISE, ALPHA]), "WEBP", lossless=True),
        "bmp": encode(small, "BMP"),
        "bmp palette": encode(small.quantize(16), "BMP"),
        "tiff": encode(small, "TIFF"),
        "tiff lzw": encode(small, "TIFF", compression="tiff_lzw"),
        "tiff float": encode(small.convert("F"), "TIFF"),
        "heic": encode(small, "HEIF"),
        "avif": encode(small, "AVIF"),
    }


SAMPLES = samples()


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_half_picture(name: str, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file cut anywhere gives the whole picture or an error, whatever others set in Pillow."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = SAMPLES[name]
    whole = pixels(data)
    refused = 0
    for cut in range(0, len(data), 1 + len(data) // 150):
        try:
            np.testing.assert_array_equal(pixels(data[:cut]), whole)
        except ImageError:
            refused += 1
    assert refused > 20


@given(
    name=st.sampled_from(sorted(SAMPLES)),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=8
    ),
)
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_give_a_picture_or_an_image_error(
    name: str, edits: list[tuple[float, int, bytes]]
) -> None:
    data = SAMPLES[name]
    for where, cut, put in edits:
        at = int(len(data) * where**3)  # most of what breaks a parser is near the front
        data = data[:at] + put + data[at + cut :]
    try:
        picture = load_image(data)
    except ImageError as err:
        assert str(err)
    else:
        assert picture.mode == "RGB"


# ---- optional packages and imports


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0heic", b"msf1\0\0\0\0hevc"])
def test_heif_without_pillow_heif_says_what_to_install(
    brands: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(64)
    with pytest.raises(ImageError, match=r'pip install "qwen3vl-mlx\[heif\]"'):
        load_image(data)
    assert pixels(SAMPLES["avif"]).shape == (23, 31, 3)  # Pillow's own


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, qwen3vl_mlx.media;"
        "sys.exit(str({'PIL', 'numpy', 'urllib.request', 'pillow_heif'} & set(sys.modules))"
        " if {'PIL', 'numpy', 'urllib.request', 'pillow_heif'} & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
