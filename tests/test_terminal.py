"""The chat as a person meets it: in a terminal, and in a pipe."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from asking import QUESTION, SCENES, TRUTH

from qwen3vl_mlx.demo import CHECKPOINT

SCENE = SCENES / "scene18.png"
COMMAND = ("-m", "qwen3vl_mlx.chat", "--model", "demo", "--temperature", "0")
SECONDS = 20
PROMPT = "\x1b[?2004h"  # it opens, and takes pasted text
STYLES = re.compile(r"\x1b(\[[\d;?]*[A-Za-z]|\][^\x07\x1b]*(\x07|\x1b\\))")


class Person:
    """Sits at a terminal of 100 by 30."""

    def __init__(self, home: Path, *args: str, **environment: str):
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TMUX")}
        self.process = pexpect.spawn(
            sys.executable,
            list(args or COMMAND),
            env={
                **kept,
                "HOME": str(home),
                "XDG_STATE_HOME": str(home / "state"),
                "HF_HUB_OFFLINE": "1",
                "TERM": "xterm-256color",
                "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody answers where the cursor is
                **environment,
            },
            encoding="utf-8",
            timeout=SECONDS,
            dimensions=(30, 100),
        )
        self.process.delaybeforesend = None
        self.seen = ""

    def types(self, text: str) -> None:
        self.process.send(text)

    def says(self, line: str) -> None:
        self.types(line + "\r")

    def sees(self, words: str) -> str:
        """Wait for words; returns what was shown before them, without styles."""
        self.process.expect_exact(words)
        shown: str = self.process.before + words
        self.seen += shown
        return STYLES.sub("", shown)

    def sees_answer(self) -> str:
        """Wait for the numbers below an answer and the prompt; returns answer and numbers."""
        before = self.sees(" first after ")
        return before + self.sees(PROMPT)

    def leaves(self) -> int:
        """Wait for the end; returns the exit status."""
        self.process.expect(pexpect.EOF)
        self.seen += self.process.before
        self.process.close()
        status: int | None = self.process.exitstatus
        assert status is not None, f"killed by {self.process.signalstatus}"
        return status


@pytest.fixture
def sit(tmp_path: Path) -> Iterator[Callable[..., Person]]:
    people: list[Person] = []

    def sits(*args: str, **environment: str) -> Person:
        people.append(Person(tmp_path, *args, **environment))
        return people[-1]

    yield sits
    for person in people:
        person.process.close(force=True)


def test_a_whole_conversation(sit: Callable[..., Person], tmp_path: Path) -> None:
    picture = tmp_path / "My Pictures" / "a b.PNG"
    picture.parent.mkdir()
    picture.write_bytes(SCENE.read_bytes())
    person = sit(KITTY_WINDOW_ID="1")
    person.sees("/help")
    dragged = str(picture).replace(" ", "\\ ")
    person.says(f"{dragged} {QUESTION}")
    person.sees("\x1b_Ga=T,")  # the preview
    answer = person.sees_answer()
    assert TRUTH in answer
    assert "visual" in answer
    person.says("What shape is purple?")
    assert re.search(r"star\s.*\d+ cached", person.sees_answer(), re.S)
    person.says("/set top_k 5")
    person.sees("top_k is 5")
    person.says("\\system Be brief.")
    person.sees("told so")
    person.says("/retry")
    assert "star" in person.sees_answer()
    person.says("/save garden")
    person.sees("the cache of")
    person.says("/stats")
    person.sees("answers       3")
    person.says("/exit")
    assert person.leaves() == 0
    (history,) = tmp_path.rglob("chat_history")  # elsewhere on a Mac
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+What shape is purple?" in history.read_text()

    again = sit("-m", "qwen3vl_mlx.chat", "--load", "garden", "--no-history")
    assert "2 turns of garden" in again.sees("> What shape is purple?")
    again.says("What color is the background?")
    cached = re.search(r"(\d+) cached", again.sees_answer())
    assert cached is not None
    assert int(cached[1]) > 40
    again.says("/set")
    assert re.search(r"top_k\s+5", again.sees("number_images"))
    again.types("\x04")
    assert again.leaves() == 0
    assert "background" not in history.read_text()


def test_ctrl_c(sit: Callable[..., Person]) -> None:
    person = sit()
    person.sees("/help")
    for line in ("/set temperature 100", "/set ignore_eos on"):
        person.says(line)
        person.sees(" is ")
    person.says("Hello")
    person.sees("\x1b[?2026h")  # a first piece
    person.types("What is 3 + 4?")  # meanwhile: not shown, kept for the prompt
    person.types("\x03")
    person.sees("stopped")
    person.sees(PROMPT)
    person.types("\x03")
    for line in ("/temperature 0", "/set ignore_eos off", "/clear"):
        person.says(line)
    person.sees("forgotten: 1 turn")
    person.says("What is 3 + 4?")
    assert re.search(r"\b7\b", person.sees_answer())
    person.types("\x03")
    person.sees("Ctrl-C again")
    person.types("\x03")
    assert person.leaves() == 0


def test_pasted_and_mistaken(sit: Callable[..., Person], tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(SCENE.read_bytes())
    person = sit("-m", "qwen3vl_mlx.chat", "--model", "demo", "--temperature", "0", "--plain")
    person.sees(PROMPT)
    person.types(f"\x1b[200~{tmp_path}/a b.png\r\nDescribe the image.\x1b[201~")
    person.says("")
    answer = person.sees_answer()
    assert TRUTH in answer
    assert answer.count("first after") == 1  # one message, its two lines together
    person.says("What shape is purple? nope.png")
    person.sees("no such file: nope.png")
    person.sees("nope.png")  # it stands there to be mended
    person.types("\x7f" * len(" nope.png"))
    person.says("")
    assert "star" in person.sees_answer()
    person.types("first line\\\rsecond line\x1b\rthird")
    person.sees("third")
    person.types("\x03")
    person.says("/hel")
    person.sees("did you mean /help?")
    person.types("\x03\x03")
    assert person.leaves() == 0
    assert "\x1b[2m" not in person.seen  # plain


def slow(seconds: float) -> str:
    return (
        "import sys, time; from qwen3vl_mlx.chat import command, loader; "
        f"loader.ModelChoice.load = lambda *a, **k: time.sleep({seconds}); "
        "sys.exit(command.main(['--model', 'demo']))"
    )


def test_leaving_while_the_model_loads(sit: Callable[..., Person]) -> None:
    person = sit("-c", slow(600))
    person.sees("loading demo")
    person.types("typed")
    person.sees("typed")
    person.types("\x03")  # drops what was typed
    person.sees("again leaves")
    person.types("\x03")
    assert person.leaves() == 130
    person = sit("-c", slow(600))
    person.sees("> ")
    person.says("What is 3 + 4?")
    person.sees("loading demo ...")
    person.types("\x03")
    assert person.leaves() == 130
    person = sit("-c", slow(600))
    person.sees("> ")
    person.types("\x04")
    assert person.leaves() == 0


def test_ctrl_c_while_another_model_loads_goes_on_with_the_old_one(
    sit: Callable[..., Person],
) -> None:
    script = (
        "import sys, time; from qwen3vl_mlx.chat import command, loader; "
        "load = loader.ModelChoice.load; "
        "loader.ModelChoice.load = lambda self, **options: "
        "print('asleep') or time.sleep(600) if self.quantize else load(self, **options); "
        "sys.exit(command.main(['--model', 'demo', '--temperature', '0']))"
    )
    person = sit("-c", script)
    person.sees("> ")
    person.says(f"{QUESTION} {SCENE}")
    person.sees_answer()
    person.says("/model demo 4bit")
    person.sees("loading demo 4bit")
    person.sees("asleep")
    person.types("\x03")
    person.sees("stopped")
    person.sees(PROMPT)
    person.sees("/model")  # stands there again
    person.types("\x03")
    person.says("What shape is purple?")
    assert "star" in person.sees_answer()
    person.types("\x12shape\r\r")  # found in the history, and asked again
    assert "star" in person.sees_answer()
    person.types("\x04")
    assert person.leaves() == 0


def test_a_model_that_cannot_be_loaded(sit: Callable[..., Person], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in CHECKPOINT.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes()[: 10**6])
    person = sit("-m", "qwen3vl_mlx.chat", "--model", str(folder))
    person.sees("error: ")
    assert "model.safetensors" in person.sees("\n")
    assert person.leaves() == 1


# In a pipe.


def piped(stdin: str, *args: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *COMMAND, *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=home,
        env={
            **os.environ,
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "HF_HUB_OFFLINE": "1",
        },
    )


def test_piped(tmp_path: Path) -> None:
    lines = f"{QUESTION} {SCENE}\n\nWhat shape is purple?\n/clear\nWhat is 3 + 4?\n"
    done = piped(lines, home=tmp_path)
    assert done.stdout == f"{TRUTH}\nstar\n7\n"
    assert done.stderr == "forgotten: 2 turns; settings and system message stay\n"
    assert done.returncode == 0
    assert list(tmp_path.rglob("chat_history")) == []  # of pipes there is none


def test_piped_errors_are_told_and_passed_over(tmp_path: Path) -> None:
    lines = "/imagine a.png\nwhat is on nope.png?\nWhat is 3 + 4?\n/exit\nWhat is 1 + 1?\n"
    done = piped(lines, "-v", home=tmp_path)
    assert done.stdout == "7\n"
    errors = done.stderr.splitlines()
    assert errors[0] == "error: there is no command /imagine; did you mean /image?"
    assert errors[1].startswith("error: no such file: nope.png")
    assert "tokens/s" in errors[2]
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--image", "nope.png"], "nope.png"),
        (["--load", "nothing"], "nothing"),
        (["--max-pixels", "9", "--full-resolution"], "full-resolution"),
        (["--model", "./nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_one_line(args: list[str], words: str, tmp_path: Path) -> None:
    done = piped("", *args, home=tmp_path)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert done.returncode == (1 if "--model" in args else 2)


def test_an_interrupted_pipe_says_so(tmp_path: Path) -> None:
    options = ("--temperature", "100", "--ignore-eos")
    with subprocess.Popen(
        [sys.executable, *COMMAND, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        process.stdout.read(1)  # it answers
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert errors == b"interrupted\n"


def test_help_teaches_by_example() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qwen3vl_mlx.chat", "--help"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert "examples:" in done.stdout
    heavy = re.compile(r"\| +(mlx|numpy|PIL|rich|prompt_toolkit)\b")
    assert not heavy.search(done.stderr)
