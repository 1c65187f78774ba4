"""A server's socket: for its owner only, gone when it is gone, never somebody else's."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from commands import at, qwen3vl, served

pytest.importorskip("fastapi")

from qwen3vl_mlx import client
from qwen3vl_mlx.errors import InputError, Qwen3VLError
from qwen3vl_mlx.server.unix_socket import listen_at


def test_only_the_owner_can_connect_and_nothing_stays(tmp_path: Path) -> None:
    path = tmp_path / "own" / "a.sock"
    with listen_at(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert client.listens(path)
    assert not path.exists()
    assert not client.listens(path)


def test_a_socket_left_by_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    assert path.is_socket()
    with listen_at(path):
        assert client.listens(path)


def test_one_that_listens_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with listen_at(path):
        with pytest.raises(Qwen3VLError, match="already"), listen_at(path):
            pass
        assert client.listens(path)


@pytest.mark.parametrize("name", ["text.txt", "a/" * 60 + "long.sock", "text.txt/a.sock"])
def test_what_is_no_socket_is_not_touched(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("mine")
    with pytest.raises(InputError, match="--socket"), listen_at(tmp_path / name):
        pass
    assert (tmp_path / "text.txt").read_text() == "mine"


def test_the_end_does_not_remove_what_took_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with listen_at(path):
        path.unlink()
        path.write_text("another")
    assert path.read_text() == "another"


def test_a_socket_of_another_user_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.sock"
    with listen_at(path):
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
        assert not client.listens(path)


def test_the_server_with_socket_and_port(tmp_path: Path) -> None:
    path = tmp_path / "state" / "qwen3vl" / "server.sock"
    with served(tmp_path, "--port", "0") as process:
        assert client.served_models(at(path)) == ["demo"]
        again = qwen3vl("serve", "--model", "demo", "--socket", home=tmp_path)
        assert (again.returncode, "already" in again.stderr) == (1, True)
        process.terminate()
        assert process.stderr is not None
        log = process.stderr.read().decode()
    assert "Listening on http://127.0.0.1:" in log
    assert f"Listening on {path}" in log
    assert not path.exists()


def test_a_socket_alone_opens_no_port(tmp_path: Path) -> None:
    with served(tmp_path) as process:
        found = Path(f"/proc/{process.pid}/net/tcp")
        if not found.exists():
            pytest.skip("the system does not tell")
        inodes = {
            os.readlink(fd)[8:-1]
            for fd in Path(f"/proc/{process.pid}/fd").iterdir()
            if os.path.islink(fd) and os.readlink(fd).startswith("socket:")
        }
        listening = [line.split() for line in found.read_text().splitlines()[1:]]
        assert not [row for row in listening if row[3] == "0A" and row[9] in inodes]


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://localhost:1234", "http://localhost:1234"),
        ("http://localhost:1234/v1/", "http://localhost:1234"),
        ("https://mac.local", "https://mac.local"),
        ("/a/b.sock", "/a/b.sock"),
        ("unix:///a/b.sock", "/a/b.sock"),
        ("none", None),
        ("OFF", None),
    ],
)
def test_addresses(given: str, address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.SERVER_VARIABLE, given)
    for found in (client.find_server(), client.find_server(given)):
        assert (found and found.address) == address


@pytest.mark.parametrize(
    "given",
    ["ftp://a", "http://", "http://a/other", "http://a:b", "http://[::1", "http://a:99999"],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="address"):
        client.find_server(given)


def test_two_that_start_at_once_never_share_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find that nobody listens, and only one may go on."""
    path = tmp_path / "a.sock"
    monkeypatch.setattr("qwen3vl_mlx.server.unix_socket.listens", lambda _: False)
    with listen_at(path):
        inode = path.stat().st_ino
        with pytest.raises(Qwen3VLError, match="already"), listen_at(path):
            pass
        assert path.stat().st_ino == inode


@pytest.mark.parametrize(
    ("options", "large"), [(["--socket"], True), (["--socket", "--port", "0"], False), ([], False)]
)
def test_a_socket_alone_takes_what_is_taken_without_a_server(
    options: list[str], large: bool
) -> None:
    from qwen3vl_mlx.media import MAX_SOURCE_PIXELS
    from qwen3vl_mlx.server.arguments import parser
    from qwen3vl_mlx.server.command import server_options

    found = server_options(parser("serve").parse_args(options))
    assert (found.max_image_pixels == MAX_SOURCE_PIXELS) is large
    assert (found.max_body_bytes >= 2**30) is large
    named = server_options(parser("serve").parse_args([*options, "--max-body", "5M"]))
    assert named.max_body_bytes == 5 * 2**20
