"""Downloads, against a server on this machine: what is fetched, and every way it can go wrong."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from qwen3vl_mlx.errors import ImageError
from qwen3vl_mlx.media import load_image

PIXELS = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: bytes, kind: str = "image/png", length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def stream(self, piece: bytes, times: int, pause: float) -> None:
        """Send chunks without announcing how many."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(times):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            time.sleep(pause)
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self) -> None:
        try:
            self.route(self.path.partition("?")[0])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def route(self, path: str) -> None:
        hop, _, count = path.rpartition("/")
        if hop == "/hops":
            self.redirect(f"/hops/{int(count) - 1}" if int(count) else "/a.png")
        elif path in ("/a.png", "/a%20picture%20%C3%A9.png"):
            self.answer(PNG)
        elif path == "/agent" and self.headers["User-Agent"].startswith("qwen3vl-mlx/"):
            self.answer(PNG, "application/octet-stream")
        elif path == "/chunked":
            self.stream(PNG, 1, 0)
        elif path == "/to-file":
            self.redirect("file:///etc/hostname")
        elif path == "/to-ftp":
            self.redirect("ftp://127.0.0.1/a.png")
        elif path == "/loop":
            self.redirect("/loop")
        elif path == "/page":
            self.answer(b"<!DOCTYPE html><title>Sign in</title>", "text/html")
        elif path == "/announced":
            self.answer(PNG, length=10**12)
        elif path == "/endless":
            self.stream(bytes(2**16), 10**6, 0)
        elif path == "/short":
            self.answer(PNG[:-50], length=len(PNG))
        elif path == "/silent":
            time.sleep(2)
            self.answer(PNG)
        elif path == "/trickle":
            self.stream(b"\x89", 40, 0.05)
        else:
            self.send_error(404)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.mark.parametrize(
    "path", ["/a.png", "/a.png?size=2&token=x#top", "/a picture é.png", "/a%20picture%20%C3%A9.png",
             "/agent", "/chunked", "/hops/1", "/hops/4"],
)  # fmt: skip
def test_fetches_a_picture(server: str, path: str) -> None:
    for url in (server + path, server.replace("http", "HTTP") + path, f" {server}{path}\n"):
        np.testing.assert_array_equal(np.asarray(load_image(url)), PIXELS)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/missing.png", "HTTP 404"),
        ("/to-file", r"redirects too often or to something else than http\(s\)"),
        ("/to-ftp", "unknown url type: ftp"),
        ("/loop", "redirects too often"),
        ("/hops/9", "redirects too often"),
        ("/page", "not an image .* starts with b'<!DOCTYPE html>"),
        ("/announced", "larger than the 67108864 bytes"),
        ("/short", f"closed after {len(PNG) - 50} of {len(PNG)} bytes"),
    ],
)
def test_refusals_name_the_reason_and_hide_the_query(server: str, path: str, says: str) -> None:
    with pytest.raises(ImageError, match=says) as caught:
        load_image(f"{server}{path}?token=secret")
    assert path in str(caught.value)
    assert "secret" not in str(caught.value)


def test_max_bytes_is_the_law(server: str) -> None:
    load_image(f"{server}/a.png", max_bytes=len(PNG))
    load_image(f"{server}/chunked", max_bytes=len(PNG))
    for path in ("/a.png", "/chunked"):
        with pytest.raises(ImageError, match=f"larger than the {len(PNG) - 1} bytes"):
            load_image(server + path, max_bytes=len(PNG) - 1)
    with pytest.raises(ImageError, match="larger than the 1000000 bytes"):
        load_image(f"{server}/endless", max_bytes=10**6)


@pytest.mark.parametrize("path", ["/silent", "/trickle"])
def test_timeout_holds_for_silence_and_for_a_trickle(server: str, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"timed out after 0.3 s"):
        load_image(server + path, timeout=0.3)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///a.png", "http://[::1/a.png", "http://127.0.0.1:port/a.png?token=secret",
     "http://me:secret@[/a.png", "http://\0/a.png", "http://me:secret@127.0.0.1:99999/a.png"],
)  # fmt: skip
def test_bad_urls(url: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(url, timeout=2)
    assert "secret" not in str(caught.value)


def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(ImageError, match="could not be fetched"):
        load_image(f"http://127.0.0.1:{port}/a.png")
