"""Pixels: formats, modes, alpha, depth, orientation, limits and damage."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import ALPHA, HAS_AVIF, NOISE, QUARTERS, UPRIGHT, encode, exif, pixels, png_header
from PIL import Image, ImageFile, PngImagePlugin

from qwen3vl_mlx.errors import ImageError
from qwen3vl_mlx.media import MAX_ASPECT, load_image


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    part = alpha[:, :, None] / 255
    return rgb * part + 255 * (1 - part)


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


@pytest.mark.parametrize(
    ("mode", "saved"),
    [("RGBA", False), ("RGBA", True), ("RGBa", False), ("LA", False), ("LA", True), ("La", False),
     ("PA", False)],
)  # fmt: skip
def test_alpha_is_composited_on_white(mode: str, saved: bool) -> None:
    grey = mode in ("LA", "La", "PA")
    rgb = np.repeat(NOISE[:, :, :1], 3, axis=2) if grey else NOISE
    if mode == "PA":  # Pillow's own conversion to PA loses the alpha
        picture = Image.frombytes("PA", (31, 23), np.dstack([rgb[:, :, 0], ALPHA]).tobytes())
        picture.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    else:
        straight = Image.fromarray(np.dstack([rgb, ALPHA]))
        picture = (straight.convert("LA") if grey else straight).convert(mode)
    source = encode(picture, "PNG") if saved else picture
    # premultiplied modes keep few levels where alpha is low
    assert np.abs(pixels(source) - on_white(rgb, ALPHA)).max() <= 2


@pytest.mark.parametrize(
    ("mode", "key"),
    [("P", 2), ("P", bytes([255, 0, 128, 255])), ("L", 2), ("RGB", (2, 2, 2)), ("1", 0)],
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
def test_16_bit_keeps_the_high_byte(source: Any) -> None:
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
    tags = exif(orientation).tobytes()  # pillow_heif reads no turn from an Exif object
    if form == "PIL":
        source: Any = Image.fromarray(QUARTERS)
        source.info["exif"] = tags
    elif form == "TIFF":
        source = encode(QUARTERS, form, tiffinfo={0x0112: orientation})
    else:
        source = encode(QUARTERS, form, exif=tags)
    expected = UPRIGHT[orientation](QUARTERS)
    once = pixels(source)
    assert once.shape == expected.shape
    assert np.abs(once.astype(int) - expected).mean() < 4
    result = load_image(source)
    assert not result.info
    assert not result.getexif()
    np.testing.assert_array_equal(pixels(result), once)


def test_heic_holds_the_turn_twice_as_iphones_write_it() -> None:
    data = encode(QUARTERS, "HEIF", exif=exif(6).tobytes())
    heif = pillow_heif.open_heif(data)
    tags = Image.Exif()
    tags.load(heif.info["exif"])
    assert tags[0x0112] == 6  # in EXIF ...
    assert heif.size == (64, 96)  # ... and as a transform of the container
    assert pixels(data).shape == (96, 64, 3)


def test_orientation_may_stand_behind_the_pixels() -> None:
    data = encode(QUARTERS, "PNG", exif=exif(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]  # 12 bytes of IEND
    assert pixels(moved).shape == (96, 64, 3)


def exif_entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack(">HHI", tag, kind, count) + value.ljust(4, b"\0")


TIFF_HEAD = b"Exif\0\0MM\0*\0\0\0\x08"
TURN = exif_entry(0x0112, 3, 1, b"\0\x06")
TEXT_RESOLUTION = exif_entry(0x011A, 2, 4, b"abc\0")  # a rational by the standard


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (b"Exif\0\0garbage", False),
        (TIFF_HEAD + b"\0\x09", False),  # announces nine tags, holds none
        (TIFF_HEAD + b"\0\x02" + TURN + TEXT_RESOLUTION + bytes(4), True),
        (TIFF_HEAD + b"\0\x01" + exif_entry(0x0112, 3, 1, b"\0\x63") + bytes(4), False),
        (TIFF_HEAD + b"\0\x01" + exif_entry(0x0112, 2, 2, b"6\0") + bytes(4), False),
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PIL"])
@pytest.mark.filterwarnings("ignore:.*EXIF.*:UserWarning")
def test_damaged_exif_does_not_cost_the_picture(form: str, block: bytes, turned: bool) -> None:
    if form == "PIL":
        source: Any = Image.fromarray(QUARTERS)
        source.info["exif"] = block
    else:
        source = encode(QUARTERS, form, exif=block)
    assert pixels(source).shape == ((96, 64, 3) if turned else (64, 96, 3))


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
    assert pixels(encode(NOISE, "PNG"), max_source_pixels=23 * 31).shape == (23, 31, 3)
    with pytest.raises(ImageError, match=r"31x23 = 713 pixels, over the limit of 712"):
        load_image(encode(NOISE, "PNG"), max_source_pixels=23 * 31 - 1)
    with pytest.raises(ImageError, match="over the limit of 178956970"):
        load_image(png_header(60_000, 60_000))  # decoding would say "truncated"
    with pytest.raises(ImageError, match="truncated"):
        load_image(png_header(6_000, 6_000))
    with pytest.raises(ImageError, match="over the limit of 100"):
        load_image(encode(QUARTERS, "HEIF")[:-50], max_source_pixels=100)
    with pytest.raises(ImageError, match=r"smaller picture .*max_source_pixels.*--max-image-pix"):
        load_image(encode(NOISE, "PNG"), max_source_pixels=1)


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
    data = encode(NOISE, "GIF")
    data = data[:6] + struct.pack("<HH", 1, 1) + data[10:]  # the frame is larger than the screen
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(ImageError, match="bomb"):
        load_image(data)


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
        **({"avif": encode(small, "AVIF")} if HAS_AVIF else {}),
    }


SAMPLES = samples()


def attempt(data: bytes) -> np.ndarray | None:
    """The pixels, or None for an ImageError; anything else is a defect."""
    try:
        return pixels(data)
    except ImageError:
        return None


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_half_picture(name: str, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file cut anywhere gives the whole picture or an error, whatever others set in Pillow."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = SAMPLES[name]
    whole = pixels(data)
    results = [attempt(data[:cut]) for cut in range(0, len(data), 1 + len(data) // 150)]
    given_anyway = [result for result in results if result is not None]
    assert len(given_anyway) < len(results) - 20
    for result in given_anyway:
        np.testing.assert_array_equal(result, whole)


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
    attempt(data)


@pytest.mark.parametrize(
    "error",
    [OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, RuntimeError,
     MemoryError, OverflowError, ZeroDivisionError, struct.error, zlib.error,
     Image.DecompressionBombError],
)  # fmt: skip
def test_whatever_a_plugin_raises_is_an_image_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("odd data")

    data = encode(NOISE, "PNG")
    for step in ("load", "_open"):
        monkeypatch.setattr(PngImagePlugin.PngImageFile, step, fail)
        with pytest.raises(ImageError, match=r"bytes is a damaged .* PNG image \(.*odd data"):
            load_image(data)
