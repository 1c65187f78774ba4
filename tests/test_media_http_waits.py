"""Downloads that take long: each has one deadline and ends soon after nobody wants it."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from offline import Network, only_loopback
from picture_web import NAMES, PNG, Handler, fetch_public, serving

from qwen3vl_mlx import media_http
from qwen3vl_mlx.errors import ImageError
from qwen3vl_mlx.media import load_image
from qwen3vl_mlx.media_http import fetch


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    return only_loopback(monkeypatch, NAMES)


@pytest.fixture
def public(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """http://pictures.example, at 127.0.0.1, which counts as public here: and nothing else does."""
    port = int(server.rpartition(":")[2])
    monkeypatch.setattr(media_http, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(media_http, "WEB_PORTS", (port,))
    return f"http://pictures.example:{port}"


@pytest.mark.parametrize("path", ["/silent", "/trickle"])
def test_timeout_holds_for_silence_and_for_a_trickle(server: str, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"timed out after 0.3 s"):
        load_image(server + path, timeout=0.3)
    assert time.monotonic() - start < 4


@pytest.fixture
def silent(public: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of what takes connections and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(media_http, "WEB_PORTS", (port,))
        yield port


@pytest.fixture
def deaf(silent: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of what takes no connection more, and refuses none."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = listener.getsockname()[1]
        monkeypatch.setattr(media_http, "WEB_PORTS", (port,))
        with suppress(TimeoutError):
            for _ in range(300):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=0.2))
            pytest.skip("this system takes any number of connections")
        yield port


def gives_up(url: str, public_only: bool) -> None:
    """Soon after its time is over, and soon after nobody wants it."""
    for timeout, wanted_sec, says in ((0.3, 99.0, r"timed out after 0.3 s"), (30, 0.1, "nobody")):
        start = time.monotonic()
        with pytest.raises(ImageError, match=says):
            fetch(
                url,
                "it",
                timeout=timeout,
                max_bytes=100,
                public_only=public_only,
                wanted=lambda end=start + wanted_sec: time.monotonic() < end,
            )
        assert time.monotonic() - start < 4


@pytest.mark.parametrize("public_only", [True, False])
def test_a_connection_that_does_not_come_about(deaf: int, public_only: bool) -> None:
    gives_up(f"http://pictures.example:{deaf}/", public_only)


@pytest.mark.parametrize("public_only", [True, False])
def test_a_handshake_that_is_not_answered(silent: int, public_only: bool) -> None:
    gives_up(f"https://pictures.example:{silent}/", public_only)


def test_a_proxy_that_does_not_answer(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent}")
    gives_up("https://proxied.example/a.png", public_only=False)


@pytest.mark.parametrize("public_only", [True, False])
def test_a_resolver_that_does_not_answer(
    public: str, public_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: go_on.wait(30) and [])
    gives_up(f"{public}/a.png", public_only)
    go_on.set()


@pytest.mark.parametrize("path", ["/silent", "/trickle", "/slow-headers", "/continue"])
def test_the_whole_download_has_one_deadline(path: str, server: str, public: str) -> None:
    start = time.monotonic()
    for url in (server, public):
        with pytest.raises(ImageError, match=r"timed out after 0.3 s"):
            fetch(url + path, "it", timeout=0.3, max_bytes=100, public_only=url == public)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("path", ["/silent", "/trickle", "/slow-headers"])
def test_a_download_ends_when_nobody_wants_it(path: str, public: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match="nobody waits"):
        fetch(
            public + path,
            "it",
            timeout=10,
            max_bytes=100,
            public_only=True,
            wanted=lambda: time.monotonic() < start + 0.1,
        )
    assert time.monotonic() - start < 4


# ---- TLS and proxies


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Has a certificate for pictures.example that is trusted here."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=pictures.example",
             "-addext", "subjectAltName=DNS:pictures.example"],
            check=True, capture_output=True,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs openssl to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    return context


def test_certificates_are_for_the_name_in_the_url(
    tls: ssl.SSLContext, public: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.socket = tls.wrap_socket(httpd.socket, server_side=True)
    monkeypatch.setattr(media_http, "WEB_PORTS", (httpd.server_port,))
    with serving(httpd) as port:
        for path in ("a.png", "chunked", "hops/1"):
            assert fetch_public(f"https://pictures.example:{port}/{path}") == PNG
        with pytest.raises(ImageError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch_public(f"https://other.example:{port}/a.png")
        with pytest.raises(ImageError, match="timed out"):
            fetch_public(f"https://pictures.example:{port}/silent", timeout=0.3)


def test_proxies_are_asked_where_any_address_may_be(
    tls: ssl.SSLContext, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.tls = tls
    with serving(httpd) as port:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        for url in ("http://proxied.example/a.png", "https://pictures.example/chunked"):
            assert fetch(url, "it", timeout=5, max_bytes=10**6) == PNG
        with pytest.raises(ImageError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch("https://other.example/a.png", "it", timeout=5, max_bytes=10**6)
    assert network.resolved == ["127.0.0.1"] * 3
