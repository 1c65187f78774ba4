"""Downloads, against a server on this machine: what is fetched, and every way it can go wrong."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from urllib.parse import quote

import numpy as np
import pytest
from offline import Network, only_loopback
from picture_web import NAMES, PIXELS, PNG, Handler, fetch_public, serving

from qwen3vl_mlx import media_http
from qwen3vl_mlx.errors import ImageError, TooLargeError, UnsupportedImageError
from qwen3vl_mlx.media import load_image
from qwen3vl_mlx.media_http import fetch, is_public


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}"


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


# ---- public addresses only


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return only_loopback(monkeypatch, NAMES)


@pytest.fixture
def public(server: str, network: Network, monkeypatch: pytest.MonkeyPatch) -> str:
    """http://pictures.example, at 127.0.0.1, which counts as public here: and nothing else does."""
    port = int(server.rpartition(":")[2])
    monkeypatch.setattr(media_http, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(media_http, "WEB_PORTS", (port,))
    return f"http://pictures.example:{port}"


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ("8.8.8.8 93.184.216.34 1.1.1.1 172.32.0.1 100.128.0.1 2606:4700::1111 2a00:1450::5", True),
        ("64:ff9b::8.8.8.8", True),
        ("127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 ::1 :: ::ffff:127.0.0.1 ::127.0.0.1", False),
        ("10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 100.127.255.255", False),
        ("169.254.169.254 169.254.0.1 168.63.129.16 100.100.100.200 192.0.0.192", False),
        ("fe80::1 fe80::1%1 fd00:ec2::254 fd20:ce::254 fc00::1 fec0::1", False),
        ("224.0.0.1 239.255.255.250 ff02::1 240.0.0.1 255.255.255.255 198.18.0.1", False),
        ("192.0.2.1 198.51.100.1 203.0.113.1 192.88.99.1 2001:db8::1 3fff::1", False),
        ("::ffff:10.0.0.1 ::ffff:8.8.8.8 2002:7f00:1:: 2002:808:808:: 2001:0:7f00:1::", False),
        ("64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::169.254.169.254 64:ff9b:1::1", False),
    ],
)
def test_public_addresses(addresses: str, expected: bool) -> None:
    for address in addresses.split():
        assert is_public(address) is expected, address


def test_only_global_unicast_addresses_are_public() -> None:
    rng = np.random.default_rng(1)
    for bits in rng.integers(0, 2**32, 2000, dtype=np.uint64):
        v4 = ipaddress.IPv4Address(int(bits))
        assert is_public(str(v4)) <= (v4.is_global and not v4.is_multicast and not v4.is_private)
        v6 = ipaddress.IPv6Address(int(bits) << 96 | 1)
        assert is_public(str(v6)) <= (v6.is_global and str(v6)[0] in "23")


LOOPBACK = [
    "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0x7f000001", "2130706433", "017700000001",
    "0177.0.0.1", "0", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::1%251]", "127.0.0.1.",
    "127\u30020\uff0e0\uff611", "%31%32%37.0.0.1", "\uff11\uff12\uff17.0.0.1",
    "\u2460\u2461\u2466.0.0.1", "127.0.0.1:443", "127.0.0.1:80",
]  # fmt: skip
LOCAL = [
    "localhost", "LocalHost", "localhost.", "a.localhost", "printer.local", "printer.local.",
    "metadata.google.internal", "printer.l\u00bacal", "nas.home.arpa", "printer\u3002local",
    "\uff4c\uff4f\uff43\uff41\uff4c\uff48ost", "metadata.example", "inside.example",
    "169.254.169.254", "10.0.0.1", "192.168.0.1:443", "[fd00:ec2::254]", "[fe80::1%25lo]",
]  # fmt: skip
ODD = [
    "me@pictures.example", "me:pw@127.0.0.1", "8.8.8.8@127.0.0.1", "pictures.example:22",
    "pictures.example:8080", "127.0.0.1:6379", "pictures.example:0", "pictures.example:-1",
    "8.8.8.8\\@127.0.0.1", "127.0.0.1#8.8.8.8", "a..b", "x" * 64, "[::1", "",
    "pictures.example:80x", "pictures.example%0d%0aX: y", "pictures.example%00.example",
    "pictures.example:99999999",
]  # fmt: skip


@pytest.mark.parametrize("host", [*LOOPBACK, *LOCAL, *ODD])
def test_nobody_is_asked_for_what_is_not_public(host: str, network: Network) -> None:
    for scheme in ("http", "https") if host in (*LOOPBACK[:3], *LOCAL[:2]) else ("http",):
        with pytest.raises(ImageError):
            fetch_public(f"{scheme}://{host}/a.png")
    assert network.connected == []


@pytest.mark.parametrize("host", LOCAL[:9])
def test_names_of_the_local_network_are_not_even_resolved(host: str, network: Network) -> None:
    with pytest.raises(ImageError, match="its host is of the local network"):
        fetch_public(f"http://{host}/a.png")
    assert network.resolved == []


def test_a_public_address_is_connected_to_as_it_was_resolved(public: str, network: Network) -> None:
    assert fetch_public(f"{public}/a.png") == PNG
    assert network.resolved == ["pictures.example"]
    assert network.connected == ["127.0.0.1"]


def test_a_name_that_changes_between_check_and_use(
    public: str, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(address: str) -> bool:  # the name leads elsewhere as soon as it was looked at
        network.names["pictures.example"] = ["127.0.0.2"]
        return address == "127.0.0.1"

    monkeypatch.setattr(media_http, "is_public", judge)
    assert fetch_public(f"{public}/a.png") == PNG
    with pytest.raises(ImageError, match="private network"):
        fetch_public(f"{public}/a.png")
    assert network.connected == ["127.0.0.1"]


def test_of_several_addresses_only_public_ones_are_tried(public: str, network: Network) -> None:
    assert fetch_public(public.replace("pictures", "mixed") + "/a.png") == PNG
    assert network.connected == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("http://inside.example:PORT/a.png", "this machine or a private network"),
        ("//inside.example:PORT/a.png", "this machine or a private network"),
        ("http://127.0.0.2:PORT/a.png", "this machine or a private network"),
        ("https://[::1]:PORT/a.png", "this machine or a private network"),
        ("http://metadata.example:PORT/latest/meta-data", "this machine or a private network"),
        ("http://localhost:PORT/a.png", "local network"),
        ("http://me@pictures.example:PORT/a.png", "user name"),
        ("http://pictures.example:22/a.png", "its port is 22"),
        ("http://pictures.example/a.png", "its port is 80"),
        ("file:///etc/passwd", "something else than http"),
        ("ftp://pictures.example:PORT/a.png", "unknown url type"),
        ("gopher://pictures.example:PORT/_", "something else than http"),
        ("data:image/png;base64,AAAA", "something else than http"),
    ],
)
def test_every_redirection_is_checked(
    target: str, says: str, public: str, network: Network
) -> None:
    for first in ("", "http://other.example:PORT/to/"):
        network.connected.clear()
        hop = first + (quote(target, safe="") if first else target)
        with pytest.raises(ImageError, match=says):
            fetch_public(f"{public}/to/{quote(hop, safe='')}")
        assert set(network.connected) == {"127.0.0.1"}


@pytest.mark.parametrize(("most", "hops"), [(0, 0), (1, 1), (3, 3)])
def test_redirections_are_counted(most: int, hops: int, public: str, network: Network) -> None:
    direct = f"{public}/hops/{hops - 1}" if hops else f"{public}/a.png"
    assert fetch_public(direct, max_redirects=most) == PNG
    with pytest.raises(ImageError, match="redirects too often"):
        fetch_public(f"{public}/hops/{hops}", max_redirects=most)
    network.connected.clear()
    with pytest.raises(ImageError, match="redirects too often"):
        fetch_public(f"{public}/loop", max_redirects=most)
    assert len(network.connected) <= most + 1


def test_no_proxy_is_asked_on_behalf_of_public_addresses(
    public: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, server.replace("127.0.0.1", "127.0.0.3"))
    monkeypatch.delenv("no_proxy")
    assert fetch_public(f"{public}/a.png") == PNG


@pytest.mark.parametrize("host", ["bücher.example", "BÜCHER.example", "bücher\u3002example"])
def test_host_names_in_any_letters(host: str, public: str, network: Network) -> None:
    url = public.replace("pictures.example", host) + "/host"
    assert fetch_public(url) == PNG
    assert fetch_public(f"{public}/to/{quote(quote(url, safe=':/'), safe='')}") == PNG
    assert set(network.resolved) == {"xn--bcher-kva.example", "pictures.example"}
    assert fetch(url, "it", timeout=5, max_bytes=10**6) == PNG


@pytest.mark.parametrize("host", ["ü" * 64, "ü..example", "a\u00a0\u2028b.example"])
def test_host_names_that_no_letters_can_write(host: str, network: Network) -> None:
    for public_only in (True, False):
        with pytest.raises(ImageError, match=r"\(IDNA\); use the form .* begins with xn--"):
            fetch(f"http://{host}/a", "it", timeout=5, max_bytes=9, public_only=public_only)
    assert network.resolved == []


def test_urls_have_a_longest(network: Network) -> None:
    for text in ("a" * 16384, "é" * 6000, "é" * 2**20):
        with pytest.raises(ImageError, match="a URL of more than 16384 characters"):
            fetch_public(f"http://pictures.example/{text}")
    assert network.resolved == []


def test_redirections_have_a_longest_url(public: str, network: Network) -> None:
    assert fetch_public(f"{public}/hops/1?{'a' * 16000}") == PNG
    with pytest.raises(ImageError, match="a URL of more than 16384 characters"):
        fetch_public(f"{public}/far")
    assert network.resolved == ["pictures.example"] * 4  # three for the first


def test_the_next_address_is_tried(
    public: str, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.names["pictures.example"] = ["127.0.0.2", "127.0.0.1"]  # at the first nobody listens
    monkeypatch.setattr(media_http, "is_public", lambda address: address.startswith("127."))
    assert fetch_public(f"{public}/a.png") == PNG
    assert fetch(f"{public}/a.png", "it", timeout=5, max_bytes=10**6) == PNG
    assert network.connected == ["127.0.0.2", "127.0.0.1"] * 2


# ---- bounds


def test_what_comes_before_the_picture_is_bounded_too(public: str) -> None:
    with pytest.raises(TooLargeError, match="too much that is no picture"):
        fetch_public(f"{public}/heavy-redirect", timeout=20)


def test_limits_have_an_error_of_their_own(server: str) -> None:
    for path in ("/announced", "/endless"):
        with pytest.raises(TooLargeError):
            load_image(server + path, max_bytes=10**5)
    for path in ("/page", "/gzip"):  # what is compressed stays so
        with pytest.raises(UnsupportedImageError):
            load_image(server + path)
