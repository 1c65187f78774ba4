"""Results files: whatever ends a run, no record is lost, none comes twice, and no other file is
harmed."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from albums import OTHER, OURS, SCHEMA, opened, paint, picture_of, record_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_mlx.album.finding import Picture
from qwen3vl_mlx.album.formats import CsvRows, JsonLines
from qwen3vl_mlx.album.records import plain_name
from qwen3vl_mlx.errors import InputError, OutputError

NASTY = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\n\r,;{}\\\0\u2028'), max_size=30
)


def files_of(path: Path, schema: Any) -> list[str]:
    """The files that a reader who knows nothing of us finds in results."""
    if path.suffix == ".csv":
        text = path.read_bytes().decode()
        return [row["file"] for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]
    return [json.loads(line)["file"] for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
@settings(max_examples=50, deadline=None)
@given(values=st.lists(NASTY, min_size=1, max_size=5), share=st.floats(0, 1), asks=st.booleans())
def test_any_beginning_goes_on_to_each_file_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, values: list[str], share: float, asks: bool
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    schema = SCHEMA if asks else None
    pictures = [Picture("/p", f"{i}.jpg", f"/p/{i}.jpg") for i in range(len(values))]
    answers = [{"name": v, "size": 1.5, "parts": [v]} if asks else v for v in values]
    kinds: Any = "data" if asks else "caption"
    made = [record_of(p, v, kinds) for p, v in zip(pictures, answers, strict=True)]

    whole = opened(folder / f"whole-{name}", schema)
    for record in made:
        whole.add(record)
    whole.close()
    data = (folder / f"whole-{name}").read_bytes()

    end = round(share * len(data))
    path = folder / name
    path.write_bytes(data[:end])
    notes: list[str] = []
    again = opened(path, schema, note=notes.append)
    kept = again.index.entries.keys()
    for record in made:
        if record.picture.path not in kept:
            again.add(record)
    again.close()

    assert sorted(files_of(path, schema)) == sorted(picture.file for picture in pictures)
    assert sorted(path.read_bytes()) == sorted(data)
    assert len(notes) <= 1
    opened(path, schema, note=pytest.fail).close()


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_a_record_is_not_asked_again_where_only_its_lines_end_is_missing(
    tmp_path: Path, name: str
) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    results = opened(tmp_path / name)
    results.add(record_of(picture))
    results.close()
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-1])
    again = opened(tmp_path / name, note=pytest.fail)
    assert again.status(picture) == "done"
    again.close()
    assert (tmp_path / name).read_bytes() == data


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_zeros_that_a_power_failure_leaves_are_cut_off(tmp_path: Path, name: str) -> None:
    results = opened(tmp_path / name)
    results.add(record_of(picture_of(paint(tmp_path / "a.png"))))
    results.close()
    whole = (tmp_path / name).read_bytes()
    for rest in (b"\0" * 300, whole[-40:-20] + b"\0" * 50 if name == "r.csv" else b"\0\0\n"):
        (tmp_path / name).write_bytes(whole + rest)
        opened(tmp_path / name).close()
        assert (tmp_path / name).read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", b"dear diary"),
        ("r.jsonl", b"dear diary\n"),
        ("r.jsonl", b'{"id": 1}\n{"id": 2}\n'),
        ("r.jsonl", b'{"file": "x"}\n'),
        ("r.jsonl", b"[" * 100_000 + b"\n"),
        ("r.jsonl", b'{"file": "a", "pa\n{"file": "b", "path": "b", "settings": "c"}\n'),
        ("r.csv", b"a,b\n1,2\n"),
        ("r.csv", b"dear diary"),
        ("r.csv", b'"file","caption"\n'),
        ("r.csv", b"\xff\xfe\0"),
    ],
)
def test_a_file_of_somebody_else_is_refused_and_left_as_it_is(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="was not written by this command"):
        opened(tmp_path / name)
    assert (tmp_path / name).read_bytes() == content


def test_other_columns_are_refused(tmp_path: Path) -> None:
    opened(tmp_path / "r.csv", SCHEMA).close()
    with pytest.raises(InputError, match="these columns"):
        opened(tmp_path / "r.csv")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("r.txt", "NAME.jsonl"),
        ("nowhere/r.jsonl", "no folder"),
        ("folder.jsonl", "is no file"),
        ("pipe.jsonl", "is no file"),
    ],
)
def test_places_that_are_none(tmp_path: Path, out: str, words: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match=words):
        opened(tmp_path / out)


@pytest.mark.parametrize("out", ["r.jsonl", "r.csv", "sidecar"])
def test_one_run_at_a_time(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3vl_mlx.album.sidecars._WAIT_SEC", 0.1)
    picture = picture_of(paint(tmp_path / "a.png"))
    where = out if out == "sidecar" else tmp_path / out
    first = opened(where)
    assert first.status(picture) == "new"
    with pytest.raises(InputError, match="another run"):
        opened(where).status(picture)
    first.close()
    second = opened(where)
    second.status(picture)
    second.close()


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_a_full_disk_leaves_no_half_record(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [picture_of(paint(tmp_path / f"{i}.png", i)) for i in range(2)]
    results = opened(tmp_path / name)
    results.add(record_of(pictures[0]))
    before = (tmp_path / name).read_bytes()
    write = os.write

    def half(fd: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OutputError, match="the disk is full; what it holds is kept"):
        results.add(record_of(pictures[1]))
    assert (tmp_path / name).read_bytes() == before
    monkeypatch.undo()
    results.add(record_of(pictures[1]))
    results.close()
    assert files_of(tmp_path / name, None) == ["0.png", "1.png"]


def test_results_that_were_removed_meanwhile_are_not_written_into_the_void(tmp_path: Path) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    results = opened(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").unlink()
    with pytest.raises(OutputError, match="removed or replaced"):
        results.add(record_of(picture))
    results.close()


def repaint(path: Path) -> None:
    paint(path, 99)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def save_again(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(2, 2))


@pytest.mark.parametrize("out", ["r.jsonl", "r.csv", "sidecar"])
@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda path: None, "done"),
        (touch, "done"),
        (save_again, "done"),
        (repaint, "changed"),
        (os.unlink, "changed"),
    ],
)
def test_what_makes_a_picture_another_one(
    tmp_path: Path, out: str, change: Callable[[Path], None], status: str
) -> None:
    path = paint(tmp_path / "a.png")
    picture = picture_of(path)
    where = out if out == "sidecar" else tmp_path / out
    results = opened(where)
    assert results.status(picture) == "new"
    results.add(record_of(picture))
    assert results.status(picture) == "done"
    results.close()
    change(path)
    again = opened(where)
    assert again.status(picture) == status
    again.close()


@pytest.mark.parametrize("out", ["r.jsonl", "r.csv"])
def test_a_folder_that_was_moved_is_known_again(tmp_path: Path, out: str) -> None:
    path = paint(tmp_path / "disk" / "in" / "a.png")
    root = str(tmp_path / "disk")
    results = opened(tmp_path / out)
    results.add(record_of(Picture(root, "in/a.png", str(path))))
    results.close()
    copy = tmp_path / "copy" / "in" / "a.png"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    again = opened(tmp_path / out)
    here = Picture(str(tmp_path / "copy"), "in/a.png", str(copy))
    assert again.status(here) == "new"  # beside the other one it is a picture of its own
    (tmp_path / "disk").rename(tmp_path / "disk 1")
    assert again.status(here) == "done"
    again.close()


@pytest.mark.parametrize("out", ["r.jsonl", "r.csv"])
def test_answers_to_each_question_are_kept(tmp_path: Path, out: str) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    for fingerprint, before in ((OURS, "new"), (OTHER, "other settings"), (OURS, "done")):
        results = opened(tmp_path / out, fingerprint=fingerprint)
        assert results.status(picture) == before
        if before != "done":
            results.add(record_of(picture, fingerprint=fingerprint))
        results.close()


@pytest.mark.parametrize("out", ["r.jsonl", "r.csv", "sidecar"])
def test_failures_are_remembered(tmp_path: Path, out: str) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    where = out if out == "sidecar" else tmp_path / out
    results = opened(where)
    results.add(record_of(picture, "a.png is damaged", "error"))
    results.close()
    again = opened(where)
    assert again.status(picture) == "failed"
    again.add(record_of(picture))
    assert again.status(picture) == "done"
    again.close()


@pytest.mark.parametrize("form", [JsonLines(), CsvRows(None)])
def test_names_that_are_not_utf8_survive(form: Any) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    data = form.encode(record_of(Picture("/p", name, "/p/" + name)))
    data.decode()  # it is UTF-8
    parsed = form.parse(data)
    assert plain_name(parsed["file"]) == plain_name(name) == r"caf\udce9.jpg"
    if isinstance(form, JsonLines):
        assert os.fsencode(json.loads(data)["file"]) == b"caf\xe9.jpg"


def test_a_column_for_each_property() -> None:
    form = CsvRows(SCHEMA)
    data = {"name": "x", "size": None, "parts": [1, {"a": 2}], "more": 1}
    row = form.parse(form.encode(record_of(Picture("/p", "a.jpg", "/p/a.jpg"), data, "data")))
    assert row is not None
    # "size" is the file's already.
    assert (row["name"], row["data.size"], row["parts"]) == ("x", "", '[1, {"a": 2}]')
    assert "more" not in row
    whole = CsvRows({"type": "array"})
    row = whole.parse(whole.encode(record_of(Picture("/p", "a", "/p/a"), [True], "data")))
    assert row is not None
    assert row["data"] == "[true]"


def test_columns_are_those_of_json_lines() -> None:
    record = record_of(Picture("/p", "a.jpg", "/p/a.jpg"))
    assert set(record.to_dict()) <= set(CsvRows(None).columns)
    long = record_of(Picture("/p", "a.jpg", "/p/a.jpg"), "x" * 200_000)
    assert CsvRows(None).parse(CsvRows(None).encode(long)) is not None


def test_looking_changes_nothing(tmp_path: Path) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    for out in ("r.jsonl", "r.csv", "sidecar"):
        results = opened(out if out == "sidecar" else tmp_path / out, read_only=True)
        assert results.status(picture) == "new"
        results.close()
    assert os.listdir(tmp_path) == ["a.png"]
    (tmp_path / "r.jsonl").write_bytes(b'{"file": "a')
    opened(tmp_path / "r.jsonl", read_only=True, note=pytest.fail).close()
    assert (tmp_path / "r.jsonl").read_bytes() == b'{"file": "a'
