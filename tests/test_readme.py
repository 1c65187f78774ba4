"""The READMEs are executed: their shell lines, their Python, and the transcript one shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DETAILS = [
    ROOT / "qwen3vl_mlx" / part / "README.md"
    for part in ("album", "demo", "engine", "quant", "server")
]
BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```(sh|python)\n(.*?)```", re.DOTALL)
BLOCKS = [
    block
    for text in (README, *(path.read_text(encoding="utf-8") for path in DETAILS))
    for block in BLOCK.findall(text)
]


def shell_lines(wanted: str) -> list[str]:
    """Lines of the shell blocks that need `wanted`."""
    return [
        line
        for needs, language, text in BLOCKS
        if language == "sh" and needs == wanted
        for line in text.splitlines()
        if not line.startswith("python3 -m venv")  # CI runs the set-up commands on their own
    ]


def python_blocks(wanted: str) -> list[str]:
    return [text for needs, language, text in BLOCKS if language == "python" and needs == wanted]


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


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[str]:
    """Where the server that the examples talk to listens: `localhost:PORT`."""
    pytest.importorskip("fastapi")
    (_, start) = shell_lines("start")  # what it installs, the tests have
    more = ["--port", "0", "--image-root", str(ROOT)]  # `place` holds a link to there
    command = [sys.executable, *start.split()[1:], *more]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://(?:127\.0\.0\.1|localhost):(\d+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        address = f"localhost:{found[1]}"
        for _ in range(300):
            if '"ready"' in run(["curl", "-s", f"{address}/health"], place).stdout:
                break
            time.sleep(0.1)
        yield address
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.parametrize("line", shell_lines(""))
def test_shell_lines_work_as_written(line: str, place: Path) -> None:
    done = run(["bash", "-c", line], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", shell_lines("server"))
def test_the_server_answers_curl_as_written(line: str, server: str, place: Path) -> None:
    line = line.replace("curl ", "curl --fail-with-body ").replace("localhost:1234", server)
    done = run(["bash", "-c", line], place)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.strip()


def test_the_page_comes_up_as_written(place: Path) -> None:
    pytest.importorskip("gradio")
    (_, start) = shell_lines("app")
    words = [word for word in start.split()[1:] if word != "--open"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *words, "--port", "0"],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
            line = process.stdout.readline()
            assert line, said
            said += line
        page = run(["curl", "-s", "--fail", found[0]], place).stdout
        process.terminate()
        process.communicate(timeout=60)
    assert "Qwen3-VL" in page


@pytest.mark.parametrize("text", python_blocks("server"))
def test_the_server_answers_clients_as_written(text: str, server: str, place: Path) -> None:
    pytest.importorskip("openai")
    done = run([sys.executable, "-c", text.replace("localhost:1234", server)], place)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0


@pytest.mark.parametrize("text", python_blocks(""))
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
