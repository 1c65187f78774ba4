"""`qwen3vl watch` with files that come as they do in life: each is described once, and whole."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from albums import DEMO, captions, lines_in, records, run, start, until

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.demo.scenes import make_scene

QUICK = ("--settle", "0.3", "--patience", "2", *DEMO)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Drawn scenes. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("drawn")
    paths = [folder / f"{seed:02}.png" for seed in range(10)]
    for seed, path in enumerate(paths):
        make_scene(seed).draw().save(path)
    return paths


@contextmanager
def watching(
    folder: Path, *args: object, end: signal.Signals = signal.SIGINT
) -> Iterator[subprocess.Popen[str]]:
    """A watch under way, which is ended as a person or launchd does."""
    process = start("watch", folder, *args, *QUICK)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert line.startswith("note: watching"), line + process.stderr.read()
        yield process
        process.send_signal(end)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.communicate()


def put(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def trickle(source: Path, target: Path) -> None:
    """Write a file in pieces with pauses, one of them longer than a file is given to settle."""
    data = source.read_bytes()
    third = len(data) // 3
    with target.open("wb", buffering=0) as file:
        for start_at, pause in ((0, 0.15), (third, 0.7), (2 * third, 0.0)):
            file.write(data[start_at : start_at + third if pause else None])
            time.sleep(pause)  # the pace of the writer is what is tested


def test_each_file_once_however_it_comes(scenes: list[Path], tmp_path: Path, demo: Qwen3VL) -> None:
    folder, out = tmp_path / "in", tmp_path / "r.jsonl"
    folder.mkdir()
    put(scenes[0], folder / "there before.png")
    with watching(folder, "--out", out) as process:
        trickle(scenes[1], folder / "slow.png")
        put(scenes[2], folder / ".renamed.png.part")
        (folder / ".renamed.png.part").rename(folder / "renamed.png")
        for i, scene in enumerate(scenes[3:]):
            put(scene, folder / f"burst {i:02}.png")
        (folder / "broken.png").write_bytes(scenes[1].read_bytes()[:200])
        put(scenes[4], folder / "replaced.png")
        until(lambda: "replaced.png" in captions(out) if out.exists() else False, "replaced.png")
        (folder / "replaced.png").touch()
        until(lambda: lines_in(out) == 11, "11 lines")
        put(scenes[5], folder / "replaced.png")
        until(lambda: lines_in(out) == 12, "the new content")
        (folder / "renamed.png").unlink()
        put(scenes[6], folder / "last.png")
        until(lambda: lines_in(out) == 13, "the last one")
    assert process.returncode == 3  # one was broken
    texts = {
        path: demo.generate("Describe the image.", images=[path], temperature=0).text
        for path in scenes
    }
    expected = [("slow.png", texts[scenes[1]]), ("renamed.png", texts[scenes[2]])]
    expected += [(f"burst {i:02}.png", texts[scene]) for i, scene in enumerate(scenes[3:])]
    expected += [("replaced.png", texts[scenes[4]]), ("replaced.png", texts[scenes[5]])]
    expected += [("last.png", texts[scenes[6]])]
    found = [(r["file"], r["caption"]) for r in records(out) if "caption" in r]
    assert sorted(found) == sorted(expected)
    (broken,) = (r for r in records(out) if "error" in r)
    assert broken["file"] == "broken.png"
    assert "damaged or truncated" in broken["error"]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_watch_that_begins_again_does_what_came_meanwhile(
    scenes: list[Path], tmp_path: Path, end: signal.Signals
) -> None:
    folder, out = tmp_path / "in", tmp_path / "r.jsonl"
    folder.mkdir()
    put(scenes[0], folder / "old.png")
    with watching(folder, "--out", out, end=end) as process:
        put(scenes[1], folder / "first.png")
        until(lambda: lines_in(out) == 1, "first.png")
        if end == signal.SIGKILL:
            for i in range(2):
                put(scenes[2 + i], folder / f"under way {i}.png")
            until(lambda: lines_in(out) >= 2, "one of those under way")
    assert process.returncode == (0 if end == signal.SIGTERM else -signal.SIGKILL)
    put(scenes[7], folder / "meanwhile.png")
    expected = {"first.png", "meanwhile.png"}
    if end == signal.SIGKILL:
        expected |= {f"under way {i}.png" for i in range(2)}
    with watching(folder, "--out", out):
        until(lambda: lines_in(out) >= len(expected), "what came meanwhile")
        put(scenes[8], folder / "then.png")
        until(lambda: lines_in(out) >= len(expected) + 1, "then.png")
    assert captions(out).keys() == {*expected, "then.png"}
    # A caption run takes the same results, and does what was left alone.
    done = run("caption", folder, "--out", out, *DEMO)
    assert done.returncode == 0, done.stderr
    assert captions(out).keys() == {*expected, "then.png", "old.png"}


def test_lines_for_a_pipe_and_files_that_are_there(scenes: list[Path], tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    with watching(tmp_path, "--existing", "--recursive", "--prompt", "Describe {stem}.") as process:
        deep.mkdir(parents=True)
        put(scenes[0], deep / "deep.png")
        assert process.stdout is not None
        record = json.loads(process.stdout.readline())
    assert process.returncode == 0
    assert record["file"] == "a/b/deep.png"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "no such folder"),
        ([__file__], "is no folder"),
        ([".", "--prompt", "{count}"], "no variable {count}"),
        ([".", "--settle", "nan"], "--settle"),
        ([".", "--patience", "-1"], "--patience"),
    ],
)
def test_bad_options(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen3vl_mlx import watch

    assert watch.main(args, "qwen3vl watch") == 2
    assert words in capsys.readouterr().err
