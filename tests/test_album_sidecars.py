"""Texts beside pictures: made of their records, and never in place of what somebody else wrote."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from albums import OTHER, OURS, SCHEMA, opened, paint, picture_of, record_of

from qwen3vl_mlx.album.finding import Picture
from qwen3vl_mlx.album.sidecars import MANIFEST
from qwen3vl_mlx.errors import OutputError


@pytest.mark.parametrize(
    ("schema", "kind", "value", "name", "text"),
    [
        (None, "caption", "a dog\r\nand a cat", "a.png.txt", "a dog\r\nand a cat\n"),
        (SCHEMA, "data", {"name": "é"}, "a.png.json", '{\n  "name": "é"\n}\n'),
    ],
)
def test_sidecars(tmp_path: Path, schema: Any, kind: Any, value: Any, name: str, text: str) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    sidecars = opened("sidecar", schema)
    assert sidecars.add(record_of(picture, value, kind)) is None
    sidecars.close()
    assert (tmp_path / name).read_bytes().decode() == text
    assert sorted(os.listdir(tmp_path)) == sorted([MANIFEST, "a.png", name])


@pytest.mark.parametrize("force", [False, True])
def test_a_sidecar_of_somebody_else_stays_unless_forced(tmp_path: Path, force: bool) -> None:
    foreign, edited, ours = (
        picture_of(paint(tmp_path / f"{name}.png")) for name in ("foreign", "edited", "ours")
    )
    (tmp_path / "foreign.png.txt").write_text("mine")
    first = opened("sidecar", fingerprint=OTHER)
    for picture in (edited, ours):
        first.add(record_of(picture, "old", fingerprint=OTHER))
    first.close()
    (tmp_path / "edited.png.txt").write_text("better")
    again = opened("sidecar", force=force)
    statuses = [again.status(picture) for picture in (foreign, edited, ours)]
    again.close()
    if force:
        assert statuses == ["new", "other settings", "other settings"]
    else:
        assert statuses == ["kept", "kept", "other settings"]


@pytest.mark.parametrize("earlier", [None, "an old answer"])
def test_a_sidecar_that_was_not_come_to_is_made_of_its_record(
    tmp_path: Path, earlier: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    sidecars = opened("sidecar")
    if earlier is not None:
        sidecars.add(record_of(picture, earlier, fingerprint=OTHER))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen3vl_mlx.album.sidecars.replace_text", killed)
    with pytest.raises(KeyboardInterrupt):
        sidecars.add(record_of(picture, "the answer"))
    sidecars.close()
    monkeypatch.undo()
    again = opened("sidecar")
    assert again.status(picture) == "done"
    again.close()
    assert (tmp_path / "a.png.txt").read_text() == "the answer\n"


def test_an_edited_sidecar_of_a_finished_picture_stays(tmp_path: Path) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    sidecars = opened("sidecar")
    sidecars.add(record_of(picture))
    (tmp_path / "a.png.txt").write_text("better")
    assert sidecars.status(picture) == "done"
    sidecars.close()
    assert (tmp_path / "a.png.txt").read_text() == "better"


def test_captions_and_data_have_sidecars_of_their_own(tmp_path: Path) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    for _ in range(2):
        text = opened("sidecar")
        if text.status(picture) != "done":
            text.add(record_of(picture))
        text.close()
        data = opened("sidecar", SCHEMA, fingerprint=OTHER)
        if data.status(picture) != "done":
            data.add(record_of(picture, {"name": "x"}, "data", OTHER))
        data.close()
    assert len((tmp_path / MANIFEST).read_bytes().splitlines()) == 2


def test_the_nearest_manifest_is_the_one_and_folders_may_be_moved(tmp_path: Path) -> None:
    path = paint(tmp_path / "photos" / "2024" / "a.png")
    root = tmp_path / "photos"
    sidecars = opened("sidecar")
    sidecars.add(record_of(Picture(str(root), "2024/a.png", str(path))))
    sidecars.close()
    root.rename(tmp_path / "moved")
    below = picture_of(tmp_path / "moved" / "2024" / "a.png")
    again = opened("sidecar", fingerprint=OURS)
    assert again.status(below) == "done"
    again.close()
    assert not (tmp_path / "moved" / "2024" / MANIFEST).exists()


def test_a_place_that_takes_no_sidecar_fails_that_picture_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = picture_of(paint(tmp_path / "a.png"))
    sidecars = opened("sidecar")
    replace = os.replace

    def refuse(number: int) -> Callable[..., None]:
        def refused(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        return refused

    monkeypatch.setattr(os, "replace", refuse(errno.EACCES))
    assert "cannot be written" in (sidecars.add(record_of(picture)) or "")
    monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
    with pytest.raises(OutputError):
        sidecars.add(record_of(picture))
    monkeypatch.setattr(os, "replace", replace)
    assert sidecars.status(picture) == "done"  # and is written now
    sidecars.close()
    assert (tmp_path / "a.png.txt").read_text() == "a dog\n"


def test_a_run_waits_for_another_in_the_same_folder(tmp_path: Path) -> None:
    """A folder action starts a run for each picture that is dropped."""
    pictures = [picture_of(paint(tmp_path / f"{name}.png")) for name in "ab"]
    first = opened("sidecar")
    first.add(record_of(pictures[0], "a dog"))
    known: list[str] = []

    def other() -> None:
        second = opened("sidecar")
        known.extend(second.status(picture) for picture in pictures)
        second.close()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(0.5)
    assert known == []
    first.close()
    thread.join(30)
    assert known == ["done", "new"]
