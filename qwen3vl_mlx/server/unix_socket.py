"""A Unix socket that only its owner can open, and that is gone when the server is."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qwen3vl_mlx.client import listens
from qwen3vl_mlx.errors import InputError, Qwen3VLError
from qwen3vl_mlx.folders import make_private

_LONGEST = 103  # bytes of a path that macOS takes; Linux takes 107


@contextmanager
def listen_at(path: Path) -> Iterator[socket.socket]:
    """Listen at `path`; on leaving, the socket is closed and its file removed.

    A file that a killed server left there is replaced, anything else is not. Raises InputError for
    a path that cannot be one, Qwen3VLError where another server listens.
    """
    if len(os.fsencode(path)) > _LONGEST:
        raise InputError(f"--socket {path}: a socket's path has at most {_LONGEST} bytes")
    with ExitStack() as stack:
        try:
            make_private(path.parent)
            stack.enter_context(_claimed(path))
        except OSError as error:
            raise InputError(f"--socket {path}: {error.strerror or error}") from error
        if listens(path):
            raise _taken(path)
        yield stack.enter_context(_bound(path))


def _taken(path: Path) -> Qwen3VLError:
    return Qwen3VLError(f"a server listens at {path} already: stop it, or name another --socket")


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Keep other servers off: two that start at once would replace each other's socket.

    The lock's file stays; it is the lock that counts. Raises OSError, Qwen3VLError.
    """
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(path) from None
        yield
    finally:
        os.close(lock)


@contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and path.stat().st_uid == os.getuid():
            path.unlink()
        mask = os.umask(0o177)  # nobody can connect between the making and a chmod
        try:
            made.bind(str(path))
        finally:
            os.umask(mask)
        made.listen(socket.SOMAXCONN)
        identity = _identity(path)
    except OSError as error:
        made.close()
        raise InputError(f"--socket {path}: {error.strerror or error}") from error
    try:
        yield made
    finally:
        made.close()
        with suppress(OSError):
            if _identity(path) == identity:  # nobody else has taken the place
                path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
