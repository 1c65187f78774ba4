"""Files that clients of the server name: below its folders, and nowhere else."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from malformed import SCENE
from offline import Network, only_loopback
from pictures import encode
from reading import cut, uri

from qwen3vl_mlx.errors import (
    ImageError,
    TooLargeError,
)
from qwen3vl_mlx.server.picture_files import read_below

PNG = encode(SCENE, "PNG")
OTHER = encode(SCENE[::-1], "PNG")
SECRET = b"root:x:0:0:the secret"


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return only_loopback(monkeypatch, {"pictures.example": ["127.0.0.1"]})


# ---- files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`root` with pictures, links of every kind in it, and what lies outside."""
    root, outside = tmp_path / "shown", tmp_path / "shown-outside"
    for folder in (root / "inner", outside, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    for path in (root / "a.png", root / "inner" / "my photo é#1%.png", outside / "b.png"):
        path.write_bytes(PNG)
    (root / "secret.txt").write_bytes(SECRET)
    (outside / "secret.txt").write_bytes(SECRET)
    (root / "link.png").symlink_to(root / "a.png")
    (root / "relative.png").symlink_to("inner/../a.png")
    (root / "folder").symlink_to(root / "inner")
    (root / "out.png").symlink_to(outside / "b.png")
    (root / "out").symlink_to(outside)
    (root / "up").symlink_to("..")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "broken.png").symlink_to(root / "gone.png")
    (tmp_path / "elsewhere" / "in").symlink_to(root)
    os.mkfifo(root / "pipe")
    (root / "to-pipe").symlink_to(root / "pipe")
    (root / "to-zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(root)  # such a name is short
        bound.bind("socket")
        os.chdir(here)
    return root


@pytest.mark.parametrize(
    "path",
    ["{root}/a.png", "{root}/inner/my photo é#1%.png", "{root}/link.png", "{root}/relative.png",
     "{root}/folder/my photo é#1%.png", "{root}/inner/../a.png", "{root}//./a.png",
     "file://{root}/a.png", "file://localhost{root}/inner/my%20photo%20%C3%A9%231%25.png",
     "a.png", "./inner/../a.png", "~/a.png", "{root}/up/shown/a.png"],
)  # fmt: skip
def test_files_below_a_root_are_read(
    path: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    (there,) = cut(path.format(root=tree), image_roots=(tree,))
    (same,) = cut(uri(PNG))
    assert there.identity == same.identity


def test_a_root_may_be_a_link_and_is_known_by_both_names(tree: Path) -> None:
    link = tree.parent / "elsewhere" / "in"
    for root, path in ((link, link), (link, tree), (tree, tree)):
        cut(f"{path}/a.png", image_roots=(tree.parent / "elsewhere" / "none", root))
    with pytest.raises(ImageError, match="not below"):
        cut(f"{link}/a.png", image_roots=(tree,))  # that folder was not given


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{root}-outside/b.png", "not below"),
        ("{root}/../shown-outside/b.png", "not below"),
        ("{root}/inner/../../shown-outside/b.png", "not below"),
        ("{root}/out.png", "not below"),
        ("{root}/out/b.png", "not below"),
        ("{root}/up/shown-outside/b.png", "not below"),
        ("{root}/out/../shown-outside/b.png", "no such file"),  # dots go by the letters
        ("file://{root}/%2e%2e/shown-outside/b.png", "not below"),
        ("file://{root}/..%2fshown-outside%2fb.png", "not below"),
        ("file:///etc/passwd", "not below"),
        ("file:{root}-outside/b.png", "not below"),
        ("/etc/passwd", "not below"),
        ("/dev/zero", "not below"),
        ("/proc/self/environ", "not below"),
        ("~root/a.png", "not below|no such file"),
        ("/", "not below"),
        ("..", "not below"),
        ("{root}/to-zero", "not below"),
        ("{root}", "is a folder"),
        ("{root}/", "is a folder"),
        ("{root}/inner", "is a folder"),
        ("{root}/folder", "is a folder"),
        ("{root}/pipe", "not a regular file"),
        ("{root}/to-pipe", "not a regular file"),
        ("{root}/socket", "not a regular file"),
        ("{root}/loop.png", "no such file"),
        ("{root}/broken.png", "no such file"),
        ("{root}/gone.png", "no such file"),
        ("{root}/a.png/a.png", "no such file"),
        ("{root}/\0a.png", "no such file"),
        ("{root}/a.png\0.txt", "no such file"),
        ("{root}/\ud800.png", "no such file"),
        ("{root}/" + "x" * 300, "no such file"),
        ("{root}/" + "x./" * 3000, "no such file"),
        ("{root}/" + "x./" * 10_000, "not below"),  # longer than a path can be
        ("{root}/secret.txt", "is not an image file"),
    ],
)
def test_all_else_is_refused_and_nothing_is_told_of_it(
    path: str, says: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"^messages\[0\]\.content\[0\]\.image_url: ") as caught:
        cut(path.format(root=tree), image_roots=(tree,))
    assert time.monotonic() - start < 5  # a FIFO would wait for ever
    message = str(caught.value).replace(str(tree), "")
    assert any(word in message for word in says.split("|"))
    assert "secret" not in message.partition("is not an image")[2]
    assert "shown-outside" not in message.partition("image_url: ")[2].partition(" is ")[2]


def test_without_roots_no_file_is_read(tree: Path) -> None:
    for path in (f"{tree}/a.png", f"file://{tree}/a.png", "a.png"):
        with pytest.raises(ImageError, match="not read by this server"):
            cut(path)


def test_nothing_outside_is_looked_at(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    for name in ("lstat", "stat", "readlink", "open"):
        real = getattr(os, name)

        def watched(path: Any, *args: Any, real: Any = real, **options: Any) -> Any:
            looked.append(os.fsdecode(path) if isinstance(path, (str, bytes, Path)) else "")
            return real(path, *args, **options)

        monkeypatch.setattr(os, name, watched)
    for path in ("/net/host.example/a.png", "file:///net/host.example/a.png", "/a", "AAAA/BBBB"):
        with pytest.raises(ImageError, match="not below"):
            cut(path, image_roots=(tree,))
    assert not [path for path in looked if "host.example" in path or path == "/a" or "BBB" in path]
    with pytest.raises(ImageError, match="no such file"):
        cut(f"{tree}/host.example", image_roots=(tree,))
    assert [
        path for path in looked if "host.example" in path
    ]  # so the watch sees what is looked at


@pytest.mark.parametrize(
    ("victim", "target"),
    [("inner", "../shown-outside"), ("inner/b.png", "../../shown-outside/b.png")],
)
def test_a_link_put_in_the_way_meanwhile_is_not_followed(
    victim: str, target: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between resolving a path and opening it, its folder, or the file, becomes a link."""
    (tree / "inner" / "b.png").write_bytes(OTHER)
    real = os.path.realpath

    def swapped(path: Any, *, strict: bool) -> str:
        resolved = real(path, strict=strict)
        if strict:
            (tree / victim).rename(tree.parent / "old")
            (tree / victim).symlink_to(target)
        return resolved

    monkeypatch.setattr(os.path, "realpath", swapped)
    with pytest.raises(ImageError, match=r"no such file|not a regular file"):
        read_below(f"{tree}/inner/b.png", [tree], "it", 10**6)
    assert (tree / "inner" / "b.png").read_bytes() == PNG  # where the link leads


def test_files_have_a_size_limit(tree: Path) -> None:
    cut(f"{tree}/a.png", image_roots=(tree,), max_download_bytes=len(PNG))
    with pytest.raises(TooLargeError, match=f"larger than the {len(PNG) - 1} bytes"):
        cut(f"{tree}/a.png", image_roots=(tree,), max_download_bytes=len(PNG) - 1)


def test_no_descriptor_is_left_open(tree: Path) -> None:
    folder = Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")
    before = len(list(folder.iterdir()))
    for _ in range(20):
        read_below(f"{tree}/inner/my photo é#1%.png", [tree], "it", 10**6)
        for path in ("secret.txt", "pipe", "inner", "out.png", "gone.png", "inner/gone/a"):
            with pytest.raises(ImageError):
                read_below(f"{tree}/{path}", [tree], "it", 10**6)
    assert len(list(folder.iterdir())) <= before + 1
