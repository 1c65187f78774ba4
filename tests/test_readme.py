"""README.md is executed: its shell lines, its Python, and the transcript it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- needs: \w+ -->\n)?```(sh|python)\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(README)

# The set-up commands make environments: CI runs them on their own.
SHELL = [
    line
    for needs, language, text in BLOCKS
    if language == "sh" and not needs
    for line in text.splitlines()
    if not line.startswith("python3 -m venv")
]
PYTHON = [text for needs, language, text in BLOCKS if language == "python" and not needs]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the lines run, one after the other: as in a clone, but what they write is not in it."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "qwen3vl_mlx").symlink_to(ROOT / "qwen3vl_mlx")
    return folder


def run(command: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        command,
        cwd=place,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("line", SHELL)
def test_shell_lines_work_as_written(line: str, place: Path) -> None:
    done = run(["bash", "-c", line], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("text", PYTHON)
def test_python_works_as_written(text: str, place: Path) -> None:
    done = run([sys.executable, "-c", text], place)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0  # each ends with a count of tokens: some were cached


def test_the_transcript_is_what_the_command_prints(place: Path) -> None:
    (setup, _) = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    command = setup.split("&& ")[-1].replace(".venv/bin/python", "python")
    shown = re.search(r"^> (.*)$", README, re.MULTILINE)
    assert shown
    assert run(["bash", "-c", command], place).stdout.strip() == shown[1]


def test_it_is_short_and_its_two_setup_commands_stand_alone() -> None:
    setup = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(setup) == 2
    assert len(README.splitlines()) <= 250
