"""When a file that comes into a folder is whole, and which files are none of a watch's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from albums import paint

from qwen3vl_mlx.album import arrivals as module
from qwen3vl_mlx.album.arrivals import Arrivals
from qwen3vl_mlx.album.describing import FolderGoneError
from qwen3vl_mlx.album.finding import Picture, Selection
from qwen3vl_mlx.album.records import Stamp, stamp_at
from qwen3vl_mlx.album.watch_state import left_alone
from qwen3vl_mlx.errors import InputError


class Clock:
    """time.monotonic that a test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def watching(folder: Path, known: dict[str, Stamp] | None = None, **options: object) -> Arrivals:
    selection = Selection(recursive=True)
    return Arrivals([str(folder)], selection, known or {}, settle=0.5, patience=10.0)


def whole(arrivals: Arrivals) -> list[str]:
    found = []
    while (picture := arrivals.whole()) is not None:
        found.append(picture.file)
    return found


def finish(arrivals: Arrivals, path: Path) -> None:
    (picture,) = [w.picture for w in arrivals.under_way.values() if w.picture.file == path.name]
    arrivals.settled(picture, stamp_at(str(path)))


def test_a_file_is_whole_when_it_has_been_left_alone(tmp_path: Path, clock: Clock) -> None:
    arrivals = watching(tmp_path)
    path = tmp_path / "a.png"
    path.write_bytes(b"1")
    arrivals.see([str(path)])
    for size in range(2, 6):
        clock.now += 0.4
        path.write_bytes(b"1" * size)
        assert whole(arrivals) == []
    clock.now += 0.4
    assert whole(arrivals) == []
    clock.now += 0.2
    assert whole(arrivals) == ["a.png"]
    assert whole(arrivals) == []  # it is under way
    arrivals.see([str(path)])
    finish(arrivals, path)
    clock.now += 60
    arrivals.see([str(path)])
    assert whole(arrivals) == []


def test_what_changes_while_it_is_under_way_is_looked_at_again(
    tmp_path: Path, clock: Clock
) -> None:
    arrivals = watching(tmp_path)
    path = paint(tmp_path / "a.png", 1)
    arrivals.see([])
    clock.now += 1
    assert whole(arrivals) == ["a.png"]
    stamp = stamp_at(str(path))
    path.write_bytes(b"another")
    (waiting,) = arrivals.under_way.values()
    arrivals.settled(waiting.picture, stamp)
    clock.now += 1
    assert whole(arrivals) == ["a.png"]


def test_the_rest_of_a_damaged_file_is_waited_for(tmp_path: Path, clock: Clock) -> None:
    arrivals = watching(tmp_path)
    path = paint(tmp_path / "a.png", 1)
    arrivals.see([])
    tries = 0
    for _ in range(200):
        clock.now += 0.1
        picture = arrivals.whole()
        if picture is not None:
            tries += 1
            if not arrivals.may_grow(picture):
                break
            arrivals.put_back(picture)
    else:
        pytest.fail("its time never ran out")
    assert 1010 <= clock.now <= 1013
    assert 4 <= tries <= 10
    # More of it starts the wait anew.
    finish(arrivals, path)
    path.write_bytes(b"more")
    arrivals.see([str(path)])
    clock.now += 1
    picture = arrivals.whole()
    assert picture is not None
    assert arrivals.may_grow(picture)


def test_events_are_hints_only(tmp_path: Path, clock: Clock) -> None:
    arrivals = watching(tmp_path)
    arrivals.see([])
    silent = paint(tmp_path / "silent.png")  # no event tells of it
    paint(tmp_path / "in" / "folder.png")
    (tmp_path / "notes.txt").write_text("")
    paint(tmp_path / ".hidden.png")
    paint(tmp_path / ".in" / "hidden.png")
    outside = paint(tmp_path.parent / f"{tmp_path.name}-outside.png")
    paths = [tmp_path / "gone.png", tmp_path / "notes.txt", tmp_path / ".hidden.png", outside]
    arrivals.see(map(str, [*paths, tmp_path / ".in" / "hidden.png"]))
    assert arrivals.waiting == {}
    arrivals.see([str(tmp_path / "in")])  # a folder that came as a whole
    clock.now += 1
    assert sorted(whole(arrivals)) == ["in/folder.png", "silent.png"]
    late = paint(tmp_path / "late.png")
    clock.now += 60
    arrivals.see([])
    clock.now += 1
    assert whole(arrivals) == ["late.png"]
    assert silent.exists()
    assert late.exists()


def test_files_that_go_before_they_are_whole_are_forgotten(tmp_path: Path, clock: Clock) -> None:
    arrivals = watching(tmp_path)
    path = paint(tmp_path / "a.png")
    arrivals.see([str(path)])
    path.rename(tmp_path / "b.png")
    arrivals.see([str(path), str(tmp_path / "b.png")])
    clock.now += 1
    assert whole(arrivals) == ["b.png"]
    assert arrivals.waiting == {}


def test_a_folder_that_is_gone_ends_the_watch(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    arrivals = watching(folder)
    arrivals.see([])
    shutil.rmtree(folder)
    clock.now += 60
    with pytest.raises(FolderGoneError, match="is gone"):
        arrivals.see([])


# What was there before


def alone(folder: Path, out: str | None, *, existing: bool = False, **selection: bool) -> list[str]:
    known = left_alone(str(folder), Selection(**selection), out, lambda _: None, existing=existing)
    assert all(stamp_at(path) == stamp for path, stamp in known.items() if os.path.exists(path))
    return sorted(os.path.relpath(path, folder) for path in known)


@pytest.mark.parametrize("kind", ["jsonl", "sidecar"])
def test_what_was_there_first_is_left_alone_for_ever(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "in"
    paint(folder / "old.png")
    out = "sidecar" if kind == "sidecar" else str(tmp_path / "r.jsonl")
    assert alone(folder, out) == ["old.png"]
    paint(folder / "new.png")
    assert alone(folder, out) == ["old.png"]
    # Others' files, and other results, begin anew; so does a watch for other files.
    assert alone(folder, str(tmp_path / "other.jsonl")) == ["new.png", "old.png"]
    assert alone(folder, out, recursive=True) == ["new.png", "old.png"]
    # What was taken in once stays so.
    assert alone(folder, out, recursive=True, existing=True) == []
    assert alone(folder, out, recursive=True) == []


def test_without_a_file_nothing_is_remembered(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    assert alone(tmp_path, None) == ["a.png"]
    paint(tmp_path / "b.png")
    assert alone(tmp_path, "-") == ["a.png", "b.png"]
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"patterns": [], "files": {"a": 1}}'])
def test_a_state_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    alone(tmp_path, "sidecar")
    (state,) = tmp_path.iterdir()
    json.loads(state.read_text())
    state.write_text(content)
    with pytest.raises(InputError, match=f"{state.name} cannot be read"):
        alone(tmp_path, "sidecar")


def test_pictures_know_where_they_were_found() -> None:
    assert Picture("/a", "b/c.png", "/x/c.png").place == "/a/b/c.png"


def test_touching_what_was_there_first_makes_no_news(tmp_path: Path, clock: Clock) -> None:
    path = paint(tmp_path / "old.png", 1)
    stamp = stamp_at(str(path))
    assert stamp is not None
    arrivals = watching(tmp_path, {str(path): stamp})
    os.utime(path, ns=(1, stamp.modified_ns + 10**9))
    arrivals.see([str(path)])
    clock.now += 1
    assert whole(arrivals) == []
    path.write_bytes(path.read_bytes() + b"more")
    arrivals.see([str(path)])
    clock.now += 1
    assert whole(arrivals) == ["old.png"]


@pytest.mark.parametrize("seconds", [-(10**12), 10**13])
def test_times_of_no_calendar_are_no_fault(seconds: int) -> None:
    assert Stamp(1, seconds * 10**9).modified == ""
