"""Download a small file over HTTP(S) with the standard library, bounded in time, size and place."""

from __future__ import annotations

import http.client
import io
import ipaddress
import os
import selectors
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen3vl_mlx import __version__
from qwen3vl_mlx.errors import ImageError, TooLargeError

WEB_PORTS = (80, 443)
"""Ports that may be asked when only public addresses may. Another one is rarely a web server's, and
this machine's own services can have a public address too."""

_LOCAL_NAMES = ("local", "localhost", "internal", "home.arpa")  # asking for them is telling already
_CHUNK = 2**16
_OVERHEAD = 2**20  # bytes of headers and redirections that a download may add to its body
_LOOK_SEC = 0.25  # how often whoever waits looks whether it is still wanted
_LONGEST_URL = 2**14  # no server takes a longer one

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Beyond what `is_global` knows, or knew in the first releases of Python 3.10.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "100.64.0.0/10",  # carriers' NAT
            "168.63.129.16/32",  # Azure's host: a metadata service at a public address
            "192.0.0.0/24",
            "192.88.99.0/24",  # 6to4 relays
            "2001::/23",  # Teredo and other protocols
            "2001:db8::/32",
            "2002::/16",  # 6to4: some IPv4 address is inside
            "3fff::/20",
        ),
    )
)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet's.

    Not so: private, loopback, link-local, shared, multicast and reserved ones, metadata services,
    and IPv6 forms of IPv4 addresses, but for NAT64, which counts as what it stands for.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)))
        if ip not in _GLOBAL_UNICAST:
            return False
    if any(ip in network for network in _NOT_PUBLIC if network.version == ip.version):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def fetch(
    url: str,
    name: str,
    *,
    timeout: float,
    max_bytes: int,
    max_redirects: int = 5,
    public_only: bool = False,
    wanted: Callable[[], bool] = lambda: True,
) -> bytes:
    """Return the body at `url`; `name` stands for it in messages.

    timeout: seconds for the whole, redirections included.
    public_only: refuse all that `is_public` does, ports other than 80 and 443, and proxies. The
    address that is checked is the one that is connected to, for every redirection anew.
    wanted: asked while waiting, for whatever it is; the download ends soon after it says no.

    Raises:
        ImageError: a bad URL, a refused address, no connection, an HTTP error, or too slow.
        TooLargeError: over `max_bytes`.
    """
    visit = _Visit(name, time.monotonic() + timeout, max_bytes + _OVERHEAD, public_only, wanted)
    url = url[: _LONGEST_URL + 1]  # enough to be refused
    try:
        request = urllib.request.Request(
            urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"),  # spaces and accents are common
            headers={"User-Agent": f"qwen3vl-mlx/{__version__}"},
        )
        with _opener(visit, max_redirects).open(request, timeout=timeout) as response:
            return _body(response, name, max_bytes)
    except ImageError:
        raise
    except urllib.error.HTTPError as err:
        err.close()
        if 300 <= err.code < 400:
            raise ImageError(
                f"{name} redirects too often or to something else than http(s); use the final URL"
            ) from err
        raise ImageError(
            f"{name} could not be fetched: HTTP {err.code} "
            f"{http.client.responses.get(err.code, '')}; check the URL, or download the file and "
            "pass its path"
        ) from err
    except (OSError, http.client.HTTPException) as err:
        reason = err.reason if isinstance(err, urllib.error.URLError) else err
        if isinstance(err, http.client.InvalidURL):
            raise ImageError(f"{name} is not a valid URL; expected http(s)://host/path") from err
        if isinstance(reason, _TooMuchError):
            raise TooLargeError(f"{name} comes with too much that is no picture") from err
        if isinstance(reason, TimeoutError):
            raise ImageError(
                f"{name} timed out after {timeout:g} s; try again, or download the file and "
                "pass its path"
            ) from err
        raise ImageError(
            f"{name} could not be fetched ({reason}); check the URL and the connection"
        ) from err
    except ValueError as err:
        raise ImageError(f"{name} is not a valid URL; expected http(s)://host/path") from err


def _body(response: http.client.HTTPResponse, name: str, max_bytes: int) -> bytes:
    """Read the body piece by piece: the announced length is a hint, `max_bytes` the law."""
    announced = response.headers.get("Content-Length", "")
    too_large = f"{name} is larger than the {max_bytes} bytes allowed; use a smaller file"
    if announced.isdecimal() and int(announced) > max_bytes:
        raise TooLargeError(too_large)
    body = bytearray()
    while piece := response.read1(_CHUNK):
        body += piece
        if len(body) > max_bytes:
            raise TooLargeError(too_large)
    if announced.isdecimal() and len(body) < int(announced):
        raise ImageError(
            f"{name}: the connection closed after {len(body)} of {announced} bytes; try again"
        )
    return bytes(body)


# ---- connections


class _TooMuchError(OSError):
    """More than the body may be large. No ValueError, which http.client takes for its own."""


@dataclass
class _Visit:
    """What the connections of one download share."""

    name: str
    deadline: float  # on the clock of time.monotonic
    bytes_left: int
    public_only: bool
    wanted: Callable[[], bool]

    def seconds_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if not self.wanted():
            raise ConnectionAbortedError("nobody waits for it any more")
        return left

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to `host`. What is resolved and checked here is what is connected to."""
        failure: Exception = OSError("its host has no address")
        if self.public_only:
            host = self._checked(host, port)
            failure = self._refused("its host is of this machine or a private network")
        for family, kind, protocol, _, address in self._resolved(host, port):
            if self.public_only and not is_public(str(address[0])):
                continue
            connection = socket.socket(family, kind, protocol)
            try:
                self._reach(connection, address)
                return connection
            except OSError as err:
                connection.close()
                self.seconds_left()  # else it is for the next one
                failure = err
        raise failure

    def _checked(self, host: str, port: int) -> str:
        host = host.encode("idna").decode("ascii")  # its dots and letters have many spellings
        if "@" in host:
            raise self._refused("it has a user name in it")
        if f".{host.rstrip('.').lower()}".endswith(tuple(f".{name}" for name in _LOCAL_NAMES)):
            raise self._refused("its host is of the local network")
        if port not in WEB_PORTS:
            raise self._refused(f"its port is {port}, not 80 or 443")
        return host

    def _resolved(self, host: str, port: int) -> list[Any]:
        """What getaddrinfo says: on a thread that is left alone when it takes too long."""
        answer: Future[list[Any]] = Future()

        def resolve() -> None:
            try:
                answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, ValueError) as err:  # ValueError: no name at all
                answer.set_exception(err)

        threading.Thread(target=resolve, name="resolve", daemon=True).start()
        while not answer.done():
            wait([answer], self.patience())
        return answer.result()

    def _reach(self, connection: socket.socket, address: Any) -> None:
        connection.setblocking(False)
        try:
            connection.connect(address)
        except BlockingIOError:
            with selectors.DefaultSelector() as selector:
                selector.register(connection, selectors.EVENT_WRITE)
                while not selector.select(self.patience()):
                    pass
            if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code)) from None
        connection.settimeout(self.seconds_left())

    def secure(self, connection: socket.socket, host: str) -> ssl.SSLSocket:
        """TLS over a connection, with a certificate for `host`."""
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        secured = context.wrap_socket(
            connection, server_hostname=host, do_handshake_on_connect=False
        )
        try:
            while True:
                secured.settimeout(self.patience())
                try:
                    secured.do_handshake()
                    break
                except TimeoutError:  # it goes on where it was
                    continue
            secured.settimeout(self.seconds_left())
        except OSError:
            secured.close()
            raise
        return secured

    def patience(self) -> float:
        """Seconds to wait until the next look."""
        return min(self.seconds_left(), _LOOK_SEC)

    def _refused(self, why: str) -> ImageError:
        return ImageError(
            f"{self.name} is refused or leads to what is: {why}; only pictures of the public web "
            "are fetched here, so send this one as a data: URI"
        )


class _Reader(io.RawIOBase):
    """A socket's bytes, with an eye on the clock and the count between any two of them."""

    def __init__(self, connection: socket.socket, visit: _Visit):
        self._connection, self._visit = connection, visit
        self._hold = connection.makefile("rb", buffering=0)  # the socket stays open as long

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        visit = self._visit
        while True:
            self._connection.settimeout(visit.patience())
            try:
                count = self._connection.recv_into(buffer)
            except TimeoutError:
                continue
            visit.bytes_left -= count
            if visit.bytes_left < 0:
                raise _TooMuchError
            return count

    def close(self) -> None:
        self._hold.close()
        super().close()


@dataclass
class _Watched:
    """A connected socket, as far as an HTTP response needs one, be it a proxy's to CONNECT."""

    connection: socket.socket
    visit: _Visit

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self.connection, self.visit))


class _Connection(http.client.HTTPConnection):
    visit: _Visit

    def connect(self) -> None:
        self.sock = self.visit.connect(self.host, self.port)
        if self._tunnel_host:  # type: ignore[attr-defined]  # https by way of a proxy
            self._tunnel()  # type: ignore[attr-defined]


class _SecureConnection(_Connection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        host = self._tunnel_host or self.host  # type: ignore[attr-defined]
        self.sock = self.visit.secure(self.sock, host)


def _response(
    visit: _Visit, connection: socket.socket, debuglevel: int = 0, method: str | None = None
) -> http.client.HTTPResponse:
    return http.client.HTTPResponse(_Watched(connection, visit), debuglevel, method)  # type: ignore[arg-type]


class _Handler(urllib.request.HTTPHandler):
    """Opens http and https, with connections of one visit."""

    def __init__(self, visit: _Visit):
        super().__init__()
        self._visit = visit

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_Connection, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_SecureConnection, request)

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if len(request.full_url) > _LONGEST_URL:
            raise ImageError(
                f"{self._visit.name} has, or redirects to, a URL of more than {_LONGEST_URL} "
                "characters; use a shorter one"
            )
        if request.host:
            request.host = self._in_ascii(request.host)
        return super().http_request(request)

    https_request = http_request

    def _in_ascii(self, host: str) -> str:
        """As names are resolved, and as servers know themselves: IDNA (RFC 3490)."""
        if host.isascii():
            return host
        name, colon, port = host.partition(":")
        try:
            return name.encode("idna").decode("ascii") + colon + port
        except UnicodeError as err:
            raise ImageError(
                f"{self._visit.name}: its host cannot be written in ASCII (IDNA); use the form "
                "of its name that begins with xn--"
            ) from err

    def _open(
        self, kind: type[_Connection], request: urllib.request.Request
    ) -> http.client.HTTPResponse:
        return self.do_open(partial(_connection, kind, self._visit), request)


def _connection(
    kind: type[_Connection], visit: _Visit, host: str, *, timeout: float
) -> _Connection:
    connection = kind(host, timeout=timeout)
    connection.visit = visit
    connection.response_class = partial(_response, visit)  # type: ignore[assignment]
    return connection


def _opener(visit: _Visit, max_redirects: int) -> urllib.request.OpenerDirector:
    """An opener that knows http and https alone: no redirect can reach a file or an FTP server."""

    class Redirects(urllib.request.HTTPRedirectHandler):
        max_repeats = 1
        max_redirections = max_redirects

    opener = urllib.request.OpenerDirector()
    opener.add_handler(_Handler(visit))
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    opener.add_handler(urllib.request.UnknownHandler())
    if max_redirects:  # the handler itself follows one before it counts
        opener.add_handler(Redirects())
    if not visit.public_only:
        opener.add_handler(urllib.request.ProxyHandler())
    return opener
