"""`python -m qwen3vl_mlx.generate` as a shell script meets it: a subprocess."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qwen3vl_mlx import load
from qwen3vl_mlx.demo import CHECKPOINT, EXAMPLE

QUESTION = "Describe the image."


def generate(*args: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwen3vl_mlx.generate", *map(str, args)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"},
    )


@pytest.fixture(scope="module")
def expected() -> str:
    done = generate("--model", "demo", "--image", EXAMPLE, "--prompt", QUESTION)
    assert done.returncode == 0, done.stderr
    assert "background with" in done.stdout
    assert done.stderr == ""
    return done.stdout


def rotated(path: Path) -> Path:
    """The example stored on its side, with the EXIF tag that sets it upright."""
    with Image.open(EXAMPLE) as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # the viewer turns it clockwise
        sideways = image.convert("RGB").transpose(Image.Transpose.ROTATE_90)
        sideways.save(path, quality=100, subsampling=0, exif=exif)
    return path


def test_a_rotated_jpeg_is_seen_upright(tmp_path: Path, expected: str) -> None:
    done = generate("--model", "demo", "--image", rotated(tmp_path / "a.jpg"), "-p", QUESTION)
    assert (done.stdout, done.returncode) == (expected, 0)


def test_the_default_prompt_describes_the_image(expected: str) -> None:
    assert generate("--model", "demo", "--image", EXAMPLE).stdout == expected


def test_a_piped_prompt_is_read_on_request(expected: str) -> None:
    asked = "What is at the bottom?"
    options = ("--model", "demo", "--image", EXAMPLE)
    done = generate(*options, "--prompt", "-", stdin=f"{asked}\n")
    assert (done.stdout, done.returncode) == ("a red triangle\n", 0)
    # A shell loop's input is not ours.
    assert generate(*options, stdin="next.jpg\n").stdout == expected
    assert generate("--model", "demo", stdin="What is 3 + 4?").stdout == "7\n"


def test_text_alone_is_answered() -> None:
    done = generate("--model", "demo", "--prompt", "What is 3 + 4?")
    assert (done.stdout, done.returncode) == ("7\n", 0)


def test_images_keep_their_order() -> None:
    other = Path(__file__).parent / "data" / "demo" / "scene05.png"
    options = ("--model", "demo", "-p", QUESTION, "--max-tokens", "40")
    texts = [
        generate(*options, "-i", first, "-i", second).stdout.strip()
        for first, second in ((EXAMPLE, other), (other, EXAMPLE))
    ]
    assert texts[0] != texts[1]
    model = load("demo")
    assert texts[0] == model.generate(QUESTION, images=[EXAMPLE, other], max_tokens=40).text


def test_json_is_one_object_with_usage(expected: str) -> None:
    done = generate("--model", "demo", "--image", EXAMPLE, "--json")
    answer = json.loads(done.stdout)
    assert answer["text"] == expected.strip()
    assert answer["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_verbose_statistics_stay_off_stdout(expected: str) -> None:
    done = generate("--model", "demo", "--image", EXAMPLE, "--verbose")
    assert done.stdout == expected
    assert "tokens/s" in done.stderr
    assert "GB at peak" in done.stderr


def corrupt_checkpoint(folder: Path) -> Path:
    shutil.copytree(CHECKPOINT, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def text_named_jpg(path: Path) -> Path:
    path.write_text("not a picture")
    return path


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--image", "nowhere.jpg"], 2, ["nowhere.jpg"]),
        (["--image", "TEXT"], 2, ["text.jpg", "image"]),
        (["--image", "EXAMPLE", "--temperature", "-1"], 2, ["temperature", "-1"]),
        (["--image", "EXAMPLE", "--max-pixels", "0"], 2, ["max_pixels"]),
        (["--image", "EXAMPLE", "--max-pixels", "9", "--full-resolution"], 2, ["full-resolution"]),
        (["--prompt", ""], 2, ["--prompt"]),
        ([], 2, ["--image", "--prompt"]),
        (["--prompt", "hi", "--model", "CORRUPT"], 1, ["model.safetensors", "again"]),
        (["--prompt", "hi", "--model", "./nowhere"], 1, ["nowhere"]),
        (["--prompt", "hi", "--model", "some-org/some-model"], 1, ["some-org", "--model demo"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_errors_are_one_line_with_a_status(
    args: list[str], status: int, words: list[str], tmp_path: Path
) -> None:
    makers = {
        "TEXT": lambda: str(text_named_jpg(tmp_path / "text.jpg")),
        "CORRUPT": lambda: str(corrupt_checkpoint(tmp_path / "corrupt")),
        "EXAMPLE": lambda: str(EXAMPLE),
    }
    filled = [makers[arg]() if arg in makers else arg for arg in args]
    model = [] if "--model" in args else ["--model", "demo"]
    done = generate(*model, *filled)
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in generate("--image", "nowhere.jpg", "--debug").stderr


def test_a_closed_reader_is_no_error() -> None:
    command = f"{sys.executable} -m qwen3vl_mlx.generate --model demo --image {EXAMPLE} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_interrupting_ends_cleanly() -> None:
    # At this temperature every token is as likely as another, and this seed draws no end token.
    options = ["-p", "Hello", "--temperature", "100", "--seed", "4"]
    with subprocess.Popen(
        [sys.executable, "-m", "qwen3vl_mlx.generate", "--model", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # it answers
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b"interrupted\n"


def test_help_teaches_by_example() -> None:
    done = generate("--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
