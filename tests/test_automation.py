"""What the automation README tells other programs to run, run as they would."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import environment, served

pytest.importorskip("fastapi")

from qwen3vl_mlx.demo import EXAMPLE

README = (Path(__file__).parents[1] / "qwen3vl_mlx/album/README.md").read_text(encoding="utf-8")
COMMAND = "/Users/me/qwen3vl/bin/qwen3vl"
BLOCK = re.compile(r"\*\*(.+?)\.\*\*.+?```\w*\n(.+?)```", re.DOTALL)
EXAMPLES = dict(BLOCK.findall(README.split("## In other programs")[1].split("\n## ")[0]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("mac")
    with served(home):
        yield home


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    folder = tmp_path / "My Pictures"
    folder.mkdir()
    return Path(shutil.copy(EXAMPLE, folder / "a 'b'.png"))


def run(
    script: str, *args: str | Path, home: Path, stdin: bytes = b"", **more: str
) -> subprocess.CompletedProcess[bytes]:
    ours = f"{shlex.quote(sys.executable)} -m qwen3vl_mlx.cli"
    assert COMMAND in script
    done = subprocess.run(
        ["sh", "-c", script.replace(COMMAND, ours), "sh", *map(str, args)],
        input=stdin,
        capture_output=True,
        timeout=120,
        env=environment(home, **more),
    )
    assert done.returncode == 0, done.stderr.decode()
    return done


def test_all_programs_have_an_example() -> None:
    names = " ".join(EXAMPLES)
    for program in ("Shortcuts", "AppleScript", "Automator", "Folder Action", "Hazel", "cron"):
        assert program in names


def test_shortcuts(server: Path) -> None:
    done = run(EXAMPLES["Shortcuts"], home=server, stdin=EXAMPLE.read_bytes())
    assert done.stdout.strip()
    assert done.stderr == b""


def fake(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_key_that_explains_the_screen(server: Path, tmp_path: Path) -> None:
    """macOS's screencapture fills a clipboard that Pillow reads as Wayland's here."""
    clipboard = tmp_path / "clipboard.png"
    fake(tmp_path, "screencapture", f'[ "$1" = -ic ] && cp {EXAMPLE} {clipboard}')
    fake(tmp_path, "wl-paste", f"case $* in *-l*) echo image/png;; *) cat {clipboard};; esac")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    wayland = {"WAYLAND_DISPLAY": "wayland-0", "XDG_SESSION_TYPE": "wayland"}
    done = run(EXAMPLES["A key that explains the screen"], home=server, PATH=path, **wayland)
    assert done.stdout.strip()
    assert clipboard.exists()


def test_applescript(server: Path, photo: Path) -> None:
    found = re.search(r'do shell script "(.+?)" & quoted form of picture', EXAMPLES["AppleScript"])
    assert found
    done = run(f"{found[1]} {shlex.quote(str(photo))}", home=server)
    assert done.stdout.strip()


def test_automator(server: Path, photo: Path) -> None:
    other = Path(shutil.copy(EXAMPLE, photo.with_name("second.png")))
    (name,) = (name for name in EXAMPLES if name.startswith("Automator"))
    with ThreadPoolExecutor() as pool:  # as two pictures that are dropped one after the other
        list(pool.map(lambda each: run(EXAMPLES[name], each, home=server), (photo, other)))
    for each in (photo, other):
        assert each.with_name(f"{each.name}.txt").read_text().strip()


def test_hazel(server: Path, photo: Path) -> None:
    run(EXAMPLES["Hazel"], photo, home=server)
    (renamed,) = photo.parent.glob("*.png")
    assert re.fullmatch(r"[a-z]{2,12}(-[a-z]{2,12}){1,4}\.png", renamed.name)
    assert renamed.read_bytes() == EXAMPLE.read_bytes()


def test_cron(server: Path, photo: Path) -> None:
    line = EXAMPLES["cron"].strip()
    schedule, command = line.split(" ", 5)[:5], line.split(" ", 5)[5]
    assert all(re.fullmatch(r"[\d*,/-]+", part) for part in schedule)
    pictures = server / "Pictures"
    shutil.copytree(photo.parent, pictures / "2024", dirs_exist_ok=True)
    for _ in range(2):  # the second night there is nothing new
        run(command, home=server)
        (record,) = (server / "captions.jsonl").read_text().splitlines()
        assert json.loads(record)["file"].endswith(photo.name)
