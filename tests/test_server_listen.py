"""Where a server listens, what it logs and how many connections it takes."""

from __future__ import annotations

import errno
import logging
import re
import resource
import socket

import pytest

pytest.importorskip("fastapi", reason="the server is an extra")

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.server import run


def test_all_addresses_of_a_name_get_one_port() -> None:
    sockets = run.listen("localhost", 0)
    try:
        assert len({each.getsockname()[1] for each in sockets}) == 1
        assert "127.0.0.1" in {each.getsockname()[0] for each in sockets}
    finally:
        for each in sockets:
            each.close()


def test_answers_do_not_wait_for_the_client_s_system() -> None:
    """asyncio sets TCP_NODELAY on connections whose listening socket says that it is TCP."""
    (listening,) = run.listen("127.0.0.1", 0)
    with listening:
        assert listening.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('127.0.0.1:5 - "GET /health HTTP/1.1" 200', False),
        ('127.0.0.1:5 - "HEAD /health HTTP/1.1" 200', False),
        ('127.0.0.1:5 - "GET /metrics HTTP/1.1" 200', False),
        ('127.0.0.1:5 - "GET /health HTTP/1.1" 503', True),
        ('127.0.0.1:5 - "GET /healthy HTTP/1.1" 200', True),
        ('127.0.0.1:5 - "POST /v1/messages HTTP/1.1" 200', True),
    ],
)
def test_polls_are_not_logged(line: str, shown: bool) -> None:
    (hides,) = run._log_config(False)["loggers"]["uvicorn.access"]["filters"]
    hidden = run._log_config(False)["filters"][hides]["()"]()
    record = logging.makeLogRecord({"msg": line})
    assert hidden.filter(record) is shown
    assert not run._log_config(True)["loggers"]["uvicorn.access"]["filters"]


@pytest.mark.parametrize("host", ["[::1]", "::1"])
def test_an_ipv6_address(host: str) -> None:
    try:
        (listening,) = run.listen(host, 0)
    except InputError:
        pytest.skip("this machine has no IPv6")
    with listening:
        port = listening.getsockname()[1]
        assert run._url(host, listening) == f"http://[::1]:{port}"


def test_everybody_s_address_is_shown_as_one_that_works() -> None:
    with run.listen("127.0.0.1", 0)[0] as listening:
        port = listening.getsockname()[1]
        assert run._url("0.0.0.0", listening) == f"http://localhost:{port}"
        assert run._url("127.0.0.1", listening) == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("failure", [socket.gaierror(-2, "Name not known"), UnicodeError("long")])
def test_a_host_that_is_none(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(InputError, match="host 'nowhere' is no address of this machine"):
        run.listen("nowhere", 0)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EADDRNOTAVAIL, "host 'here' is no address of this machine"),
        (errno.EACCES, "this user may not listen on port 80: choose one above 1023"),
        (errno.ENOBUFS, "cannot listen on port 80 of here: no room"),
    ],
)
def test_an_address_that_is_refused(
    number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, "no room")

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(Exception, match=re.escape(message)):
        run.listen("here", 80)


INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "raised"),
    [
        (256, INFINITY, 10**9, 65536),
        (256, INFINITY, 10240, 10240),  # macOS
        (1024, 4096, 10**9, 4096),
        (1024, 1048576, 10**9, 65536),
        (100_000, 1048576, 10**9, 100_000),
        (INFINITY, INFINITY, 10**9, INFINITY),
        (256, INFINITY, 100, 256),
    ],
)
def test_the_limit_of_open_files_is_raised(
    soft: int, hard: int, allowed: int, raised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [soft, hard]

    def change(which: int, limits: tuple[int, int]) -> None:
        if limits[0] > allowed:
            raise ValueError("current limit exceeds maximum limit")
        now[:] = limits

    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", change)
    run.raise_file_limit()
    assert now == [raised, hard]
