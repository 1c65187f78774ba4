"""Which files of a folder are pictures to look at: each once, in order, however it is linked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from qwen3vl_mlx.album.finding import Selection, checked_pattern, find
from qwen3vl_mlx.errors import InputError

DEEP = Selection(recursive=True)


def make(root: Path, *files: str) -> None:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def found(*sources: object, selection: Selection = DEEP) -> list[str]:
    problems: list[str] = []
    pictures = list(find([str(source) for source in sources], selection, problems.append))
    assert not problems
    return [picture.file for picture in pictures]


def test_pictures_are_known_by_their_names_in_any_case(tmp_path: Path) -> None:
    names = ["a.jpg", "b.JPEG", "c.HEIC", "d.heif", "e.webp", "f.Png", "g.tiff", "h.avif", "i.gif"]
    make(tmp_path, *names, "notes.txt", "jpg", "movie.mov", "a.jpg.txt", "raw.dng")
    assert found(tmp_path) == names


def test_folders_come_after_their_own_files_and_only_if_asked(tmp_path: Path) -> None:
    make(tmp_path, "b/1.jpg", "b/a/2.jpg", "a/3.jpg", "z.jpg", "c.jpg")
    assert found(tmp_path) == ["c.jpg", "z.jpg", "a/3.jpg", "b/1.jpg", "b/a/2.jpg"]
    assert found(tmp_path, selection=Selection()) == ["c.jpg", "z.jpg"]


def test_what_is_hidden_unfinished_or_a_library_is_left_out(tmp_path: Path) -> None:
    hidden = [".a.jpg", "._b.jpg", ".cache/c.jpg", "d.jpg.download/d.jpg", "e.crdownload/e.jpg"]
    library = ["L.photoslibrary/originals/0/f.jpg", "L.photoslibrary/resources/derivatives/g.jpg"]
    make(tmp_path, *hidden, *library, "seen.jpg")
    assert found(tmp_path) == ["seen.jpg"]
    assert found(tmp_path / "L.photoslibrary") == ["originals/0/f.jpg"]
    with pytest.raises(InputError, match="--recursive"):
        found(tmp_path / "L.photoslibrary", selection=Selection())


@pytest.mark.parametrize(
    ("globs", "excludes", "expected"),
    [
        (["IMG_*"], [], ["IMG_1.jpg", "x/img_2.HEIC"]),
        (["*.heic"], [], ["x/img_2.HEIC"]),
        (["*.dat"], [], ["odd.dat"]),
        (["x/*"], [], ["x/img_2.HEIC", "y/x/deep.jpg"]),
        (["**/*.jpg"], [], ["IMG_1.jpg", "y/x/deep.jpg"]),
        ([], ["x"], ["IMG_1.jpg"]),
        ([], ["y/x"], ["IMG_1.jpg", "x/img_2.HEIC"]),
        ([], ["*.jpg"], ["x/img_2.HEIC"]),
        (["img*", "deep*"], ["*_1*"], ["x/img_2.HEIC", "y/x/deep.jpg"]),
    ],
)
def test_patterns(
    tmp_path: Path, globs: list[str], excludes: list[str], expected: list[str]
) -> None:
    make(tmp_path, "IMG_1.jpg", "IMG_1.jpg.txt", "odd.dat", "x/img_2.HEIC", "y/x/deep.jpg")
    checked = [
        tuple(checked_pattern("--glob", text, recursive=True) for text in given)
        for given in (globs, excludes)
    ]
    selection = Selection(*checked, recursive=True)
    files = found(tmp_path, selection=selection)
    assert files == expected
    # An event that names a file is judged as a walk judges it.
    everything = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(files) == sorted(filter(selection.reaches, everything))


@pytest.mark.parametrize("pattern", ["", "/x.jpg", "a/**/b.jpg", "**/"])
def test_patterns_that_would_match_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="--glob"):
        checked_pattern("--glob", pattern, recursive=True)
    with pytest.raises(InputError, match="--recursive"):
        checked_pattern("--exclude", "a/b.jpg", recursive=False)


def test_links_that_go_in_circles_end_and_each_file_comes_once(tmp_path: Path) -> None:
    make(tmp_path, "album/a.jpg", "album/in/b.jpg")
    (tmp_path / "album" / "in" / "up").symlink_to(tmp_path / "album")
    (tmp_path / "album" / "self").symlink_to("self")
    (tmp_path / "album" / "same.jpg").symlink_to("a.jpg")
    album = tmp_path / "album"
    assert found(album) == ["a.jpg", "in/b.jpg"]
    assert found(album / "in", album, album / "a.jpg") == ["b.jpg", "up/a.jpg"]


def test_files_given_are_taken_whatever_their_names(tmp_path: Path) -> None:
    make(tmp_path, "scan", ".hidden.jpg")
    assert found(tmp_path / "scan", tmp_path / ".hidden.jpg") == ["scan", ".hidden.jpg"]
    with pytest.raises(InputError, match=r"no such folder or file: .*nowhere"):
        found(tmp_path, tmp_path / "nowhere")


def test_a_broken_link_is_a_picture_that_will_fail(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to("nothing.jpg")
    assert found(tmp_path) == ["gone.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into everything")
def test_a_folder_that_is_closed_is_told_of(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    problems: list[str] = []
    try:
        files = [picture.file for picture in find([str(tmp_path)], DEEP, problems.append)]
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert files == ["a.jpg"]
    assert len(problems) == 1
    assert "closed cannot be looked into" in problems[0]


def test_a_folder_that_goes_meanwhile_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.jpg", "b/c.jpg")
    scandir = os.scandir

    def closing(path: str) -> object:
        if path.endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closing)
    problems: list[str] = []
    assert [p.file for p in find([str(tmp_path)], DEEP, problems.append)] == ["a.jpg"]
    assert "b cannot be looked into (Permission denied)" in problems[0]


@pytest.mark.skipif(sys.platform == "darwin", reason="its disks hold UTF-8 only")
def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(path, "wb"):
        pass
    (picture,) = find([str(tmp_path)], DEEP, pytest.fail)
    assert os.fsencode(picture.path) == path
