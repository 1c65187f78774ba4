"""Files that are no image, or a bad one: each is to be refused, soon and with little memory."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from pictures import HAS_AVIF, encode, png_header
from PIL import Image

SCENE = np.kron(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5, np.ones((16, 16, 1), np.uint8))
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", *(["AVIF"] if HAS_AVIF else []))


def malformed() -> dict[str, bytes]:
    """Name and bytes of each."""
    return dict(_files())


def _files() -> Iterator[tuple[str, bytes]]:
    yield from _no_images()
    for form in FORMATS:
        whole = encode(SCENE, form)
        yield f"{form} head only", whole[:40]
        yield f"{form} half", whole[: len(whole) // 2]
        if form not in ("BMP", "WEBP"):  # there that is a picture
            yield f"{form} zeros after the head", whole[:40] + bytes(len(whole))
    yield from _bombs()
    yield from _odd_pngs()


def _no_images() -> Iterator[tuple[str, bytes]]:
    png = encode(SCENE, "PNG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", png)
    yield "empty", b""
    yield "zeros", bytes(5000)
    yield "text", b"GIF89 is what I am not"
    yield "html", b"<!DOCTYPE html><script>alert(1)</script>"
    yield (
        "svg",
        (
            b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
            b'<svg xmlns="http://www.w3.org/2000/svg"><text>&x;</text></svg>'
        ),
    )
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run"
    yield "pdf", b"%PDF-1.7\n1 0 obj<<>>endobj\ntrailer<<>>"
    yield "gzip of a png", gzip.compress(png)
    yield "gzip bomb", gzip.compress(bytes(10**7))
    yield "zip", archive.getvalue()
    yield "private key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA"
    yield "mp4", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(100)
    yield "jpeg 2000", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100)
    yield "psd", b"8BPS\0\x01" + bytes(100)
    yield "ico", b"\0\0\x01\0\x01\0\x10\x10\0\0\x01\0\x20\0" + bytes(100)
    yield "elf", b"\x7fELF\x02\x01\x01" + bytes(100)


def _bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that ask for much."""
    yield "PNG of 4 Gpixel", png_header(65_535, 65_535)
    yield "PNG of 2**62 pixels", png_header(2**31 - 1, 2**31 - 1)
    yield "PNG of 200 Mpixel", _png(20_000, 10_000)
    yield "PNG 300 times as wide as high", _png(3000, 10)
    yield "GIF of 4 Gpixel", _resized(encode(SCENE, "GIF"), 6, "<HH", 65_535, 65_535)
    yield "BMP of 2 Gpixel", _resized(encode(SCENE, "BMP"), 18, "<ii", 50_000, -50_000)
    yield "JPEG of 4 Gpixel", _jpeg_resized(65_500, 65_500)
    yield "TIFF of 4 Gpixel", _tiff(65_535, 65_535)
    yield "WEBP canvas of 268 Mpixel", _webp_canvas(16_384, 16_384)
    yield "JPEG of 1000 scans", _jpeg_of_scans(1000)
    yield "JPEG of a million segments", b"\xff\xd8" + b"\xff\xfe\0\2" * 10**6
    yield "JPEG of markers without length", b"\xff\xd8" + b"\xff\x01" * 10**6


def _odd_pngs() -> Iterator[tuple[str, bytes]]:
    png = encode(SCENE, "PNG")
    start = png.index(b"IDAT")
    length = int.from_bytes(png[start - 4 : start], "big")
    yield "PNG whose pixels are no zlib", png[: start + 4] + b"\xaa" * length + bytes(4) + png[-12:]
    yield "PNG with a wrong checksum", png[:29] + b"\0\0\0\0" + png[33:]
    yield "PNG without pixels", png[: start - 4] + png[-12:]
    yield "PNG of no width", png_header(0, 10)
    yield "PNG of no height", png_header(10, 0)
    yield "PNG that is mostly comments", png[:33] + _chunk(b"zTXt", _long_text()) * 100 + png[33:]


def _png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _long_text() -> bytes:
    return b"note\0\0" + zlib.compress(bytes(10**6), 9)


def _resized(data: bytes, at: int, layout: str, width: int, height: int) -> bytes:
    """With another size in the header, which begins `at`."""
    size = struct.pack(layout, width, height)
    return data[:at] + size + data[at + len(size) :]


def _jpeg_resized(width: int, height: int) -> bytes:
    data = encode(SCENE, "JPEG")
    return _resized(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


def _tiff(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def _webp_canvas(width: int, height: int) -> bytes:
    """An animation of one small frame on a large canvas."""
    frame = encode(np.zeros((1, 1, 3), np.uint8), "WEBP", lossless=True)[12:]
    anmf = bytes(16) + frame + bytes(len(frame) % 2)
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(data)) + data
        for name, data in ((b"VP8X", b"\2\0\0\0" + size), (b"ANIM", bytes(6)), (b"ANMF", anmf))
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG of 49 Mpixel, its last scan repeated: half a minute's work."""
    buffer = io.BytesIO()
    Image.new("L", (7000, 7000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]
