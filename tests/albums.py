"""Folders of pictures, and a model that says what a test wants: for `caption` and `watch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from qwen3vl_mlx.album import captioning, watching
from qwen3vl_mlx.album.facts import Facts
from qwen3vl_mlx.album.finding import Picture
from qwen3vl_mlx.album.records import Record, Stamp, digest_at
from qwen3vl_mlx.album.results import Results, open_results
from qwen3vl_mlx.answering import Question
from qwen3vl_mlx.engine.output import Chunk, FinishReason, make_usage

OURS, OTHER = "aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"  # fingerprints of settings
SCHEMA = {"type": "object", "properties": {"name": {}, "size": {}, "parts": {}}}
USAGE = make_usage(prompt=9, completion=4, cached=0, started=0.0, first=0.5, ended=1.25, peak=0)
DEMO = ("--model", "demo", "--no-server", "--temperature", "0")


def paint(path: Path, value: int = 7) -> Path:
    """A small picture, another one for each value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (value % 256, value // 256, 0)).save(path)
    return path


def value_of(data: Any) -> int:
    """The value of a picture that `paint` has made, from its bytes."""
    import io

    with Image.open(io.BytesIO(data)) as image:
        red, green, _ = image.convert("RGB").getpixel((0, 0))
    return red + 256 * green


class Teller:
    """An answerer that answers what `say` returns or raises; the picture's value by default."""

    where = "a teller"
    model = "teller"

    def __init__(self, say: Callable[[Question], str] | None = None, at_once: int = 3):
        self.say = say or (lambda question: f"value {value_of(question.images[0])}")
        self.at_once = at_once
        self.finish_reason: FinishReason = "stop"
        self.reasoning_closed = True
        self.asked: list[Question] = []
        self.now = self.most = 0
        self.closed = False
        self._lock = threading.Lock()

    @contextmanager
    def stream(self, question: Question) -> Iterator[Iterator[Chunk]]:
        with self._lock:
            self.asked.append(question)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            text = self.say(question)
            half = len(text) // 2
            last = Chunk(
                finish_reason=self.finish_reason,
                usage=USAGE,
                reasoning_closed=self.reasoning_closed,
            )
            yield iter([Chunk(text=text[:half]), Chunk(text=text[half:]), last])
        finally:
            with self._lock:
                self.now -= 1

    def answer(self, question: Question) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


def use(monkeypatch: Any, teller: Teller) -> Teller:
    """Let commands in this process ask `teller`."""
    for module in (captioning, watching):
        monkeypatch.setattr(module, "open_answerer", lambda args, *, at_once: teller)
    return teller


# Results without a run


def quiet(_: str) -> None:
    pass


def picture_of(path: Path) -> Picture:
    return Picture(str(path.parent), path.name, os.path.realpath(path))


def record_of(
    picture: Picture, value: Any = "a dog", outcome: Any = "caption", fingerprint: str = OURS
) -> Record:
    stamp = Stamp.of(os.stat(picture.path)) if os.path.exists(picture.path) else Stamp(1, 10**18)
    sha256 = digest_at(picture.path)
    return Record(picture, fingerprint, outcome, value, Facts(4, 3), stamp, sha256, "demo", "stop")


def opened(out: Path | str, schema: Any = None, **options: Any) -> Results:
    note = options.pop("note", quiet)
    return open_results(str(out), options.pop("fingerprint", OURS), schema, note, **options)


# Results of a run


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def captions(path: Path) -> dict[str, str]:
    """Captions by file, each of which must be there once."""
    found = [record for record in records(path) if "caption" in record]
    assert set(Counter(record["file"] for record in found).values()) <= {1}
    return {record["file"]: record["caption"] for record in found}


def command(name: str, *args: object) -> list[str]:
    return [sys.executable, "-m", f"qwen3vl_mlx.{name}", *map(str, args)]


def start(name: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    """A command under way, its stdout and stderr to be read."""
    return subprocess.Popen(
        command(name, *args),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "QWEN3VL_SERVER": "none"},
        **options,
    )


def run(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    """A command from beginning to end."""
    process = start(name, *args)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.02)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
