"""`qwen3vl ask`: one question, answered alike by a model loaded here and by a running server."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import environment, qwen3vl, served
from PIL import Image

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.demo import EXAMPLE

pytest.importorskip("fastapi")

BOTTOM = "What is at the bottom?"
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue", "purple"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of somebody whose server runs."""
    home = tmp_path_factory.mktemp("served")
    with served(home):
        yield home


@pytest.fixture(params=["loading", "server"])
def road(request: pytest.FixtureRequest, home: Path, server: Path) -> tuple[Path, list[str]]:
    """(home, options): the same command, answered both ways."""
    if request.param == "server":
        return server, []
    return home, ["--model", "demo"]


def rotated() -> bytes:
    """The example stored on its side, with the EXIF tag that sets it upright."""
    with Image.open(EXAMPLE) as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        sideways = image.convert("RGB").transpose(Image.Transpose.ROTATE_90)
        file = io.BytesIO()
        sideways.save(file, "JPEG", quality=100, subsampling=0, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("args", "stdin", "said"),
    [
        ([BOTTOM, EXAMPLE], b"", "a red triangle"),
        ([EXAMPLE], b"", "A blue background with"),
        ([BOTTOM, "-"], rotated(), "a red triangle"),
        (["--prompt", "-", EXAMPLE], b"What is at the bottom?\n", "a red triangle"),
        (["--seed", "1", BOTTOM, "--image", EXAMPLE, "--quiet"], b"", "a red triangle"),
        (["What is 3 + 4?"], b"", "7"),
        (
            ["What color is the star?", EXAMPLE, "--schema", json.dumps(SCHEMA)],
            b"",
            r'"colour"\s*:\s*"(red|blue|purple)"',
        ),
        ([BOTTOM, EXAMPLE, "--regex", "a (blue|green) [a-z]+"], b"", r"^a (blue|green) [a-z]+$"),
        (["What is 3 + 4?", "--logit-bias", "22=-100"], b"", "8"),
    ],
    ids=lambda value: str(value[0])[:20] if isinstance(value, list) else "",
)
def test_an_answer(
    args: list[str | Path], stdin: bytes, said: str, road: tuple[Path, list[str]]
) -> None:
    home, options = road
    done = qwen3vl("ask", *args, "--temperature", "0", *options, home=home, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(said, done.stdout, re.MULTILINE)


def test_both_roads_give_one_answer(home: Path, server: Path, demo: Qwen3VL) -> None:
    options = ["--json", "--temperature", "0", "--max-pixels", "65536", "--system", "Be brief."]
    local = qwen3vl("ask", EXAMPLE, *options, "--model", "demo", home=home)
    remote = qwen3vl("ask", EXAMPLE, *options, home=server)
    answers = [json.loads(done.stdout) for done in (local, remote)]
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": EXAMPLE},
                {"type": "text", "text": "Describe the image."},
            ],
        },
    ]
    expected = demo.generate(messages, temperature=0, max_pixels=65536)
    for answer in answers:
        assert answer["text"] == expected.text
        assert answer["finish_reason"] == "stop"
        assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
        assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens
    assert answers[0].keys() == answers[1].keys()


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        ([], b"", ["nothing to answer", "--help"]),
        (["  ", EXAMPLE], b"", ["empty"]),
        (["nowhere.PNG"], b"", ["nowhere.PNG"]),
        ([BOTTOM, "nowhere.png"], b"", ["nowhere.png", "question comes first"]),
        ([EXAMPLE, BOTTOM], b"", [BOTTOM, "question comes first"]),
        (["Describe my photo.jpg"], b"", ["my photo.jpg", "word of its own"]),
        ([BOTTOM, "-"], b"", ["stdin is empty"]),
        ([BOTTOM, "-", "-"], b"x", ["once"]),
        ([BOTTOM, "-"], b"GIF89a123", ["bytes", "GIF"]),
        ([BOTTOM, EXAMPLE, "--temperature", "-1"], b"", ["temperature", "-1"]),
        ([BOTTOM, EXAMPLE, "--regex", "("], b"", ["regex"]),
        ([BOTTOM, EXAMPLE, "--schema", "none.json"], b"", ["--schema", "none.json"]),
        ([BOTTOM, EXAMPLE, "--quiet", "--verbose"], b"", ["--quiet"]),
        ([BOTTOM, EXAMPLE, "--full-resolution", "--max-pixels", "9"], b"", ["--max-pixels"]),
        ([BOTTOM, EXAMPLE, "--thinking-budget", "9"], b"", ["think"]),
    ],
    ids=lambda value: " ".join(map(str, value))[-30:] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told_in_a_line(
    args: list[str | Path], stdin: bytes, words: list[str], road: tuple[Path, list[str]]
) -> None:
    home, options = road
    done = qwen3vl("ask", *args, *options, home=home, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "messages[" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("options", "more", "status", "words"),
    [
        (["--server", "SOCKET"], {}, 0, ""),
        ([], {"QWEN3VL_SERVER": "SOCKET"}, 0, ""),
        (["--model", "demo"], {}, 0, ""),
        (["--server", "/nowhere.sock"], {}, 1, "/nowhere.sock"),
        (["--server", "SOCKET", "--model", "org/other"], {}, 2, "demo, not org/other"),
        (["--server", "SOCKET", "--quantize", "4bit"], {}, 2, "--quantize"),
        (["--server", "ftp://here"], {}, 2, "http://HOST:PORT"),
        # What the server does not run is loaded, and cannot be had here.
        (["--model", "org/other"], {}, 1, "org/other"),
        ([], {"QWEN3VL_SERVER": "none", "QWEN3VL_MODEL": "org/other"}, 1, "org/other"),
        (["--no-server"], {"QWEN3VL_MODEL": "org/other"}, 1, "org/other"),
    ],
)
def test_who_is_asked(
    options: list[str], more: dict[str, str], status: int, words: str, server: Path
) -> None:
    socket = str(server / "state" / "qwen3vl" / "server.sock")
    options = [option.replace("SOCKET", socket) for option in options]
    more = {name: value.replace("SOCKET", socket) for name, value in more.items()}
    done = qwen3vl("ask", "What is 3 + 4?", *options, home=server, **more)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert done.stdout == ("7\n" if status == 0 else "")


def test_a_server_is_asked_without_mlx(server: Path) -> None:
    script = (
        "import sys; from qwen3vl_mlx.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'mlx', 'numpy', 'PIL', 'tokenizers', 'jinja2', 'rich', 'asyncio'}; "
        "print(sorted(heavy & set(sys.modules)), status)"
    )
    command = [sys.executable, "-c", script, "ask", BOTTOM, str(EXAMPLE), "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(server))
    assert done.stdout.splitlines() == ["a red triangle", "[] 0"], done.stderr


def test_an_answer_cut_off_has_not_its_form(road: tuple[Path, list[str]]) -> None:
    home, options = road
    asked = [BOTTOM, EXAMPLE, "--schema", json.dumps(SCHEMA), "--temperature", "0"]
    done = qwen3vl("ask", *asked, "--max-tokens", "3", *options, home=home)
    assert done.returncode == 1
    assert "cut off (length)" in done.stderr
    whole = qwen3vl("ask", *asked, *options, home=home)
    assert (whole.returncode, json.loads(whole.stdout).keys()) == (0, {"colour"})


def test_a_closed_reader_is_no_fault_of_the_server(road: tuple[Path, list[str]]) -> None:
    home, options = road
    command = [sys.executable, "-m", "qwen3vl_mlx.cli", "ask", str(EXAMPLE), *options]
    line = f"{shlex.join(command)} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, env=environment(home)
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # it may have been quicker than its reader


def test_a_full_disk_is_told_as_that(server: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no such device here")
    command = [sys.executable, "-m", "qwen3vl_mlx.cli", "ask", str(EXAMPLE)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(server)
        )
    assert done.returncode == 1
    assert "space" in done.stderr
    assert "server" not in done.stderr


def test_ctrl_c_ends_the_answer_on_the_server(server: Path) -> None:
    socket = server / "state" / "qwen3vl" / "server.sock"
    command = [sys.executable, "-m", "qwen3vl_mlx.cli", "ask", "Hello", "--temperature", "100"]
    with subprocess.Popen(
        [*command, "--seed", "4", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(server),
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"interrupted\n")
    metrics = ["curl", "-s", "--unix-socket", str(socket), "http://localhost/metrics"]
    for _ in range(200):
        said = subprocess.run(metrics, capture_output=True, text=True, timeout=30).stdout
        if "qwen3vl_answers_in_flight 0.0" in said:
            break
    else:
        pytest.fail("the answer goes on")


def test_shell_quoting_of_the_examples_holds() -> None:
    """Every example in --help is a command that bash can parse."""
    done = subprocess.run(
        [sys.executable, "-m", "qwen3vl_mlx.ask", "--help"], capture_output=True, text=True
    )
    text = done.stdout.split("examples:")[1].split("\n\n")[0].replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) >= 6
    for line in lines:
        assert "ask" in shlex.split(line)
