"""`qwen3vl caption` on drawn scenes, as a person meets it: killed, interrupted, run twice."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
from pathlib import Path
from tempfile import mkdtemp

import pytest
from albums import DEMO, captions, lines_in, records, run, start, until
from test_imports import HEAVY, NEVER, loaded_by

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.client import listens
from qwen3vl_mlx.demo.scenes import make_scene

NUM_SCENES = 12


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawn scenes, and a picture that is cut off. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("scenes")
    for seed in range(NUM_SCENES):
        make_scene(seed).draw().save(folder / f"scene {seed:02}.png")
    whole = (folder / "scene 00.png").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="session")
def expected(scenes: Path, demo: Qwen3VL) -> dict[str, str]:
    """What the model says of each picture when it is asked alone."""
    return {
        path.name: demo.generate("Describe the image.", images=[path], temperature=0).text
        for path in sorted(scenes.glob("*.png"))
    }


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_kill_9_at_any_moment_loses_nothing_and_repeats_nothing(
    scenes: Path, expected: dict[str, str], tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    args = (scenes, "--out", out, "--at-once", 2, *DEMO)
    head = 1 if name == "r.csv" else 0
    rng = random.Random(name)
    before = head
    for _ in range(2):
        process = start("caption", *args)
        wanted = min(before + rng.randint(1, 3), head + NUM_SCENES)
        until(lambda n=wanted, p=process: lines_in(out) >= n or p.poll() is not None, "lines")
        process.kill()
        process.communicate()
        assert lines_in(out) >= before
        before = lines_in(out)
    with out.open("ab") as file:  # as if the write itself had been cut
        file.write(b'"torn, "' if head else b'{"file": "scene 0')
    done = run("caption", *args)
    assert done.returncode == 3, done.stderr
    assert "which was cut off" in done.stderr
    if head:
        with out.open(newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
    else:
        rows = records(out)
    assert sorted(row["file"] for row in rows) == sorted([*expected, "cut.jpg"])
    assert {r["file"]: r["caption"] for r in rows if not r.get("error")} == expected
    again = run("caption", *args)
    assert again.returncode == 3
    assert "12 pictures done before, nothing to do" in again.stderr
    assert "1 picture failed before (--retry-failed asks again)" in again.stderr


def test_ctrl_c_and_two_runs_at_once(
    scenes: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "r.jsonl"
    args = (scenes, "--glob", "*.png", "--out", out, *DEMO)
    process = start("caption", *args, "--at-once", 1)
    until(lambda: lines_in(out) >= 2 or process.poll() is not None, "two lines")
    second = run("caption", *args)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr.startswith(f"error: {out} is being written by another run")
    assert process.returncode == 130, err
    assert "of 12 pictures are done; the same command goes on from there" in err
    assert err.endswith("interrupted\n")
    assert 2 <= len(captions(out)) < NUM_SCENES
    assert run("caption", *args).returncode == 0
    assert captions(out) == expected


def test_a_server_that_dies_keeps_what_it_answered(
    scenes: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "r.jsonl"
    folder = Path(mkdtemp(prefix="q3"))  # names of sockets have to be short
    address = folder / "s"
    args = (scenes, "--glob", "*.png", "--out", out, "--temperature", 0)
    server = start("cli", "serve", "--model", "demo", "--socket", address)
    try:
        until(lambda: listens(address) or server.poll() is not None, "a server")
        process = start("caption", *args, "--server", address, "--at-once", 1)
        until(lambda: lines_in(out) >= 3 or process.poll() is not None, "three lines")
        server.kill()
        _, err = process.communicate(timeout=60)
    finally:
        server.kill()
        server.communicate()
        shutil.rmtree(folder)
    assert process.returncode == 1
    assert f"error: the server at {address} " in err
    assert 3 <= len(captions(out)) < NUM_SCENES
    # The same model here goes on where the server ended.
    done = run("caption", *args, "--model", "demo", "--no-server")
    assert done.returncode == 0, done.stderr
    assert captions(out) == expected


def test_sidecars_and_a_reader_that_leaves(
    scenes: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    for name in list(expected)[:4]:
        os.link(scenes / name, tmp_path / name)
    done = run("caption", tmp_path, "--out", "sidecar", *DEMO)
    assert done.returncode == 0, done.stderr
    for name in list(expected)[:4]:
        assert (tmp_path / f"{name}.txt").read_text() == expected[name] + "\n"
    process = start("caption", tmp_path, *DEMO, "--at-once", 1)
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert first["caption"] == expected[first["file"]]


def test_prompts_are_filled_and_answers_keep_to_a_schema(scenes: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "string", "enum": ["one", "two"]}')
    out = tmp_path / "r.csv"
    picture = scenes / "scene 01.png"
    done = run("caption", picture, "--schema", schema, "--prompt", "{stem}", "--out", out, *DEMO)
    assert done.returncode == 0, done.stderr
    with out.open(newline="", encoding="utf-8") as table:
        (row,) = csv.DictReader(table)
    assert json.loads(row["data"]) in ("one", "two")
    assert row["file"] == "scene 01.png"


@pytest.mark.parametrize("name", ["caption", "watch"])
def test_help_is_quick_and_says_what_matters(name: str) -> None:
    code = f"import qwen3vl_mlx.{name} as command; command.parser('x').format_help()"
    assert not loaded_by(code) & {*HEAVY, *NEVER, "tqdm", "watchfiles"}
    done = run("cli", name, "--help")
    assert done.returncode == 0, done.stderr
    for word in ("{filename}", "{exif_date}", "Exit status", "3 ", "--schema", "sidecar"):
        assert word in done.stdout
