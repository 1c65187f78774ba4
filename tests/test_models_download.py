"""`qwen3vl models download`: what is fetched, what is refused, and what an interrupt leaves."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_stand_in
import models_running
import pytest
from hub_stand_in import Handler, StandIn
from models_running import REPO, SHARDS, command, served

from qwen3vl_mlx.checkpoints import local_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library

run, server = models_running.run, hub_stand_in.server


def test_a_download_prints_its_folder_and_is_done_once(
    server: StandIn,
    run: Callable[..., Any],
) -> None:
    files = served(server)
    done = run("download", REPO)
    folder = Path(done.out.removesuffix("\n"))
    assert done.status == 0
    assert {p.name: p.read_bytes() for p in folder.glob("[!.]*") if p.name != "README.md"} == files
    assert f"{REPO}: 2.01 MB in " in done.err
    (found,) = (each for each in local_checkpoints() if each.name == REPO)
    assert found.usable
    assert found.downloaded_here
    server.asked.clear()
    again = run("download", REPO)
    assert (again.status, again.out) == (0, done.out)
    assert "on this machine already" in again.err
    assert not server.asked


def test_a_revision_is_fetched(server: StandIn, run: Callable[..., Any]) -> None:
    files = served(server)
    commit = server.repos[REPO].commit("v2", {**files, SHARDS[0]: b"newer"})
    done = run("download", REPO, "--revision", "v2")
    assert Path(done.out.strip()).name == commit
    wrong = run("download", REPO, "--revision", "v9")
    assert (wrong.status, wrong.out) == (1, "")
    assert "has no revision 'v9'" in wrong.err


def test_another_family_is_refused_before_its_weights(
    server: StandIn,
    run: Callable[..., Any],
) -> None:
    server.make("a/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    done = run("download", "a/llama")
    assert (done.status, done.out) == (1, "")
    assert "this package runs Qwen3-VL checkpoints only; mlx-lm runs text models" in done.err
    assert not server.sent("safetensors")


def test_a_disk_too_small_is_refused_with_numbers(
    server: StandIn,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served(server)
    free = SimpleNamespace(free=270_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    done = run("download", REPO)
    assert (done.status, done.out) == (1, "")
    assert "needs 2.01 MB more" in done.err
    assert "has 270.00 MB free" in done.err
    assert "HF_HUB_CACHE" in done.err
    assert not server.sent("GET .*safetensors$")
    free.free = 271_000_000
    assert run("download", REPO).status == 0


def test_what_is_here_needs_no_room(
    server: StandIn, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served(server)
    server.fails[f"GET .*{SHARDS[1]}"] = 500
    failed = run("download", REPO)
    assert (failed.status, failed.out) == (1, "")
    assert "the Hub cannot be reached" in failed.err
    server.fails.clear()
    server.asked.clear()
    room = SimpleNamespace(free=270_000_000)  # for half of it, and what a disk keeps free
    monkeypatch.setattr("shutil.disk_usage", lambda folder: room)
    done = run("download", REPO)
    assert done.status == 0
    assert re.search(r"2\.01 MB in \d+ files, 1\.\d\d MB of it here already", done.err)
    assert not server.sent(f"GET .*{SHARDS[0]}")


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("demo", 2, "comes with this package"),
        ("a b", 1, "give a checkpoint's folder, a Hub id"),
        ("some/body-else", 1, "the Hub has no repository some/body-else"),
    ],
)
def test_names_that_cannot_be_downloaded(
    name: str,
    status: int,
    words: str,
    server: StandIn,
    run: Callable[..., Any],
) -> None:
    done = run("download", name)
    assert (done.status, done.out) == (status, "")
    assert words in done.err
    assert len(re.findall("^error: ", done.err, re.MULTILINE)) == 1


def test_a_folder_is_not_downloaded(tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run("download", tmp_path)
    assert (done.status, done.out) == (2, "")
    assert "is a folder on this machine" in done.err


@dataclass
class Hold:
    """A file whose download stops half-way until it is let go."""

    name: str
    half_way: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def hold(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    held = Hold(SHARDS[1])
    *others, (pattern, answer) = hub_stand_in.ROUTES

    def file(handler: Handler, body: bytes, repo: str, revision: str, path: str) -> None:
        whole = handler.wfile
        if path == held.name and handler.command == "GET" and not held.go_on.is_set():
            handler.wfile = HalfWay(whole, held)
        answer(handler, body, repo, revision, path)
        handler.wfile = whole

    monkeypatch.setattr(hub_stand_in, "ROUTES", [*others, (pattern, file)])
    yield held
    held.go_on.set()


class HalfWay(io.BufferedIOBase):
    """What waits in the middle of a long answer."""

    def __init__(self, whole: Any, held: Hold):
        self.whole, self.held = whole, held

    def write(self, data: Any) -> int:
        middle = len(data) // 2 if len(data) > 10_000 else 0
        if middle:
            self.whole.write(data[:middle])
            self.whole.flush()
            self.held.half_way.set()
            assert self.held.go_on.wait(30)
        return int(self.whole.write(data[middle:]) or 0) + middle


def test_ctrl_c_keeps_what_arrived(
    server: StandIn, hold: Hold, tmp_path: Path, run: Callable[..., Any]
) -> None:
    served(server)
    words = command("download", REPO, endpoint=server.endpoint, hub=tmp_path / "cache")
    process = subprocess.Popen(**words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert hold.half_way.wait(30)
    deadline = time.monotonic() + 30
    while not any(path.name == SHARDS[0] for path in tmp_path.rglob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    lines = list(iter(process.stderr.readline, "stopping; Ctrl-C again leaves at once\n"))
    hold.go_on.set()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in "".join(lines) + err
    assert re.search(r"^1\.\d\d MB of 2\.01 MB are kept.* the rest$", err, re.MULTILINE)
    assert err.endswith("interrupted\n")
    server.asked.clear()
    assert run("download", REPO).status == 0
    assert not server.sent(f"GET .*{SHARDS[0]}")


def test_ctrl_c_twice_waits_for_nothing(server: StandIn, hold: Hold, tmp_path: Path) -> None:
    served(server)
    words = command("download", REPO, endpoint=server.endpoint, hub=tmp_path / "cache")
    process = subprocess.Popen(**words, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert hold.half_way.wait(30)
    process.send_signal(signal.SIGINT)
    list(iter(process.stderr.readline, "stopping; Ctrl-C again leaves at once\n"))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.stderr.close()
