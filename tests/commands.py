"""`qwen3vl` as a shell script meets it: a subprocess with a home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3vl_mlx import client


def environment(home: Path, **more: str) -> dict[str, str]:
    """What a command finds: no Hub, no server but that of `home`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("QWEN3VL_")}
    own = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "HF_HUB_OFFLINE": "1"}
    return {**inherited, **own, "COLUMNS": "80", **more}


def qwen3vl(
    *args: str | Path, home: Path, stdin: bytes = b"", **more: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "qwen3vl_mlx.cli", *map(str, args)],
        input=stdin,
        capture_output=True,
        timeout=120,
        env=environment(home, **more),
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


@contextmanager
def served(home: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`qwen3vl serve --socket` with the demo checkpoint, ready to answer."""
    socket = home / "state" / "qwen3vl" / "server.sock"
    command = [sys.executable, "-m", "qwen3vl_mlx.cli", "serve", "--model", "demo", "--socket"]
    with subprocess.Popen(
        [*command, *options], env=environment(home), stderr=subprocess.PIPE
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (client.listens(socket) and client.is_ready(at(socket))):
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=60)


def at(socket: Path) -> client.Server:
    return client.Server(str(socket), socket)
