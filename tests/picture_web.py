"""Web servers on this machine that answer in every way, and names that lead to them."""

from __future__ import annotations

import gzip
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import numpy as np
from PIL import Image

from qwen3vl_mlx.media_http import fetch

NAMES = {
    "pictures.example": ["127.0.0.1"],
    "other.example": ["127.0.0.1"],
    "inside.example": ["127.0.0.2"],
    "mixed.example": ["127.0.0.2", "::1", "127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "xn--bcher-kva.example": ["127.0.0.1"],
}
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

    def drip(self, first: bytes, piece: bytes) -> None:
        self.wfile.write(first)
        for _ in range(100):
            self.wfile.write(piece)
            time.sleep(0.05)

    def do_GET(self) -> None:
        try:
            self.route(self.path.partition("?")[0])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_CONNECT(self) -> None:
        """Be the proxy, and what it leads to."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
        self.handle_one_request()
        self.close_connection = True

    def route(self, path: str) -> None:
        path = path.removeprefix("http://proxied.example")
        hop, _, count = path.rpartition("/")
        if hop == "/hops":
            self.redirect(f"/hops/{int(count) - 1}" if int(count) else "/a.png")
        elif path in ("/a.png", "/a%20picture%20%C3%A9.png"):
            self.answer(PNG)
        elif path == "/agent" and self.headers["User-Agent"].startswith("qwen3vl-mlx/"):
            self.answer(PNG, "application/octet-stream")
        elif path == "/host" and self.headers["Host"].startswith("xn--bcher-kva.example:"):
            self.answer(PNG)
        elif path == "/chunked":
            self.stream(PNG, 1, 0)
        elif path == "/to-file":
            self.redirect("file:///etc/hostname")
        elif path == "/to-ftp":
            self.redirect("ftp://127.0.0.1/a.png")
        elif path == "/loop":
            self.redirect("/loop")
        elif path == "/far":
            self.redirect("/a.png?" + "a" * 20_000)
        elif path == "/page":
            self.answer(b"<!DOCTYPE html><title>Sign in</title>", "text/html")
        elif path == "/announced":
            self.answer(PNG, length=10**12)
        elif path == "/endless":
            self.stream(bytes(2**16), 10**6, 0)
        elif path == "/short":
            self.answer(PNG[:-50], length=len(PNG))
        elif path == "/silent":
            time.sleep(5)
            self.answer(PNG)
        elif path == "/gzip":
            self.answer(gzip.compress(bytes(10**7)), length=None)
        elif path == "/slow-headers":
            self.drip(b"HTTP/1.1 200 OK\r\nX-Long: ", b"a")
        elif path == "/continue":
            self.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n")
        elif path == "/heavy-redirect":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            while True:
                self.wfile.write(bytes(2**16))
        elif path.startswith("/to/"):
            self.redirect(unquote(path[4:]).replace("PORT", str(self.server.server_port)))
        elif path == "/trickle":
            self.stream(b"\x89", 100, 0.05)
        else:
            self.send_error(404)


@contextmanager
def serving(httpd: ThreadingHTTPServer) -> Iterator[int]:
    httpd.handle_error = lambda *_: None  # clients may leave, and refuse a certificate
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield httpd.server_port
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def fetch_public(url: str, timeout: float = 5.0, max_redirects: int = 3) -> bytes:
    return fetch(
        url,
        "the picture",
        timeout=timeout,
        max_bytes=10**6,
        max_redirects=max_redirects,
        public_only=True,
    )
