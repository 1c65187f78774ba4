"""`qwen3vl service`: what launchd is told, as far as it can be seen without a launchd."""

from __future__ import annotations

import json
import plistlib
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import qwen3vl, served

pytest.importorskip("fastapi")

from qwen3vl_mlx import service
from qwen3vl_mlx.errors import InputError, OutputError, Qwen3VLError

PRINTED = """gui/501/io.github.qwen3vl-mlx.server = {
	active count = 1
	path = /Users/me/Library/LaunchAgents/io.github.qwen3vl-mlx.server.plist
	state = running
	program = /usr/bin/python3
	arguments = {
		python3
	}
	pid = 4242
	last exit code = (never exited)
}
"""


class Launchd:
    """Answers `launchctl` as told, and notes what it was asked."""

    def __init__(self, printed: str = "", busy: int = 0, broken: bool = False):
        self.asked: list[list[str]] = []
        self.printed, self.busy, self.broken = printed, busy, broken

    def __call__(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.asked.append(list(command))
        word = command[1]
        status, said = 0, ""
        if word == "bootout":
            status, said = (0, "") if self.printed else (3, "No such process")
        elif word == "bootstrap" and (self.broken or self.busy > 0):
            self.busy -= 1
            status, said = 5, "Bootstrap failed: 5: Input/output error"
        elif word == "print":
            status, said = (0, self.printed) if self.printed else (113, "")
        return subprocess.CompletedProcess(command, status, said, "" if status == 0 else said)


def act(args: list[str], home: Path, launchd: Launchd, platform: str = "darwin") -> None:
    parsed = service.parser("qwen3vl service").parse_args(args)
    service.act(parsed, home, platform, launchd)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(service, "_TRY_SEC", 0)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def plist(home: Path) -> Path:
    return home / "Library" / "LaunchAgents" / f"{service.LABEL}.plist"


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        ([], ["--socket", "--idle-unload", "10m"]),
        (["--", "--model", "demo", "--port", "0"], ["--model", "demo", "--port", "0"]),
    ],
)
def test_install_writes_an_agent_and_starts_it(
    serve: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3VL_MODEL", "org/mine")
    launchd = Launchd(busy=2)  # as right after an agent was stopped
    act(["install", *serve], tmp_path, launchd)
    written = plistlib.loads(plist(tmp_path).read_bytes())
    assert written["Label"] == service.LABEL
    assert written["ProgramArguments"] == [sys.executable, "-m", "qwen3vl_mlx.server", *expected]
    assert written["RunAtLoad"] is True
    assert written["EnvironmentVariables"]["QWEN3VL_MODEL"] == "org/mine"
    assert Path(written["StandardErrorPath"]).parent.is_dir()
    assert stat.S_IMODE(plist(tmp_path).stat().st_mode) == 0o600
    words = [command[1] for command in launchd.asked]
    assert words == ["bootout", "bootstrap", "bootstrap", "bootstrap", "kickstart"]
    assert launchd.asked[1][-1] == str(plist(tmp_path))
    assert [path.name for path in plist(tmp_path).parent.iterdir()] == [plist(tmp_path).name]


@pytest.mark.parametrize(
    "serve",
    [
        ["--no-such-option"],
        ["--host", "0.0.0.0"],  # open to others without a key
        ["--port", "many"],
        ["--help"],
    ],
)
def test_options_that_the_server_would_refuse_are_refused_now(
    serve: list[str], tmp_path: Path
) -> None:
    launchd = Launchd()
    with pytest.raises(InputError):
        act(["install", "--", *serve], tmp_path, launchd)
    assert not plist(tmp_path).exists()
    assert launchd.asked == []


def test_remove_takes_away_what_install_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act(["install"], tmp_path, Launchd())
    launchd = Launchd(PRINTED)
    act(["remove"], tmp_path, launchd)
    assert not plist(tmp_path).exists()
    assert [command[1] for command in launchd.asked] == ["bootout"]
    with pytest.raises(InputError, match="no service"):
        act(["remove"], tmp_path, Launchd())
    assert "removed" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["install", "remove"])
@pytest.mark.parametrize(
    "content", [plistlib.dumps({"ProgramArguments": ["/bin/other"]}), b"<not a plist", b"[]"]
)
def test_somebody_elses_agent_is_never_touched(
    command: str, content: bytes, tmp_path: Path
) -> None:
    plist(tmp_path).parent.mkdir(parents=True)
    plist(tmp_path).write_bytes(content)
    launchd = Launchd(PRINTED)
    with pytest.raises(InputError, match=service.LABEL):
        act([command], tmp_path, launchd)
    assert plist(tmp_path).read_bytes() == content
    assert launchd.asked == []


def test_a_start_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(Qwen3VLError, match="Input/output error"):
        act(["install"], tmp_path, Launchd(broken=True))


def test_a_folder_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "Library").write_text("a file")
    with pytest.raises(OutputError, match="plist"):
        act(["install"], tmp_path, Launchd())


def test_status_on_a_mac(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    act(["install"], tmp_path, Launchd())
    capsys.readouterr()
    act(["status", "--json"], tmp_path, Launchd(PRINTED))
    status = json.loads(capsys.readouterr().out)
    assert (status["installed"], status["running"], status["pid"]) == (True, True, 4242)
    assert status["answers"] is False
    with pytest.raises(Qwen3VLError, match="no server"):
        act(["status"], tmp_path, Launchd())


def test_elsewhere_it_prints_what_it_would_do(tmp_path: Path) -> None:
    done = qwen3vl("service", "install", "--", "--model", "demo", "--socket", home=tmp_path)
    assert done.returncode == 0
    assert "nothing was installed" in done.stderr
    begin, end = done.stdout.index("<?xml"), done.stdout.index("</plist>") + len("</plist>")
    definition = plistlib.loads(done.stdout[begin:end].encode())
    assert definition["ProgramArguments"][2:] == [service._MODULE, "--model", "demo", "--socket"]
    assert str(plist(tmp_path)) in done.stdout
    assert "launchctl bootstrap" in done.stdout
    assert not plist(tmp_path).exists()
    removed = qwen3vl("service", "remove", home=tmp_path)
    assert (removed.returncode, "bootout" in removed.stdout) == (0, True)
    assert "nothing was removed" in removed.stderr


def test_status_follows_the_socket(tmp_path: Path) -> None:
    assert qwen3vl("service", "status", home=tmp_path).returncode == 1
    with served(tmp_path):
        done = qwen3vl("service", "status", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert (status["answers"], status["model"]) == (True, "demo")


@pytest.mark.parametrize(
    ("serve", "address"),
    [
        (["--socket=/tmp/other.sock"], "/tmp/other.sock"),
        (["--socket", "/tmp/other.sock", "--port", "1"], "/tmp/other.sock"),
        (["--model", "demo", "--port", "1"], "http://localhost:1"),
        (["--model", "demo"], "http://localhost:1234"),
        ([], "server.sock"),
    ],
)
def test_status_asks_where_the_installed_server_listens(
    serve: list[str], address: str, tmp_path: Path
) -> None:
    act(["install", "--", *serve], tmp_path, Launchd())
    found = service.server_of(service.Service(service.LABEL, tmp_path))
    assert found.address.endswith(address)


def test_relative_paths_mean_the_same_in_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN3VL_MODEL", "mine")
    act(["install", "--", "--socket", "--image-root", "mine"], tmp_path, Launchd())
    written = plistlib.loads(plist(tmp_path).read_bytes())
    assert written["WorkingDirectory"] == str(tmp_path)
    assert written["EnvironmentVariables"]["QWEN3VL_MODEL"] == str(tmp_path / "mine")
