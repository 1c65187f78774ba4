"""Pictures on their way into the chat: previews' bytes, the clipboard, sources of all kinds."""

from __future__ import annotations

import io
import os
import re
import stat
import sys
from base64 import b64decode, b64encode
from pathlib import Path

import pytest
from asking import SCENES
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen3vl_mlx.chat import preview
from qwen3vl_mlx.chat.pictures import pasted_picture, picture_of, read_picture
from qwen3vl_mlx.errors import ImageError, InputError
from qwen3vl_mlx.media import load_image
from qwen3vl_mlx.media_clipboard import clipboard_image

SCENE = SCENES / "scene18.png"

# Previews.


@pytest.mark.parametrize(
    ("environment", "way"),
    [
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode"}, "iterm2"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "3"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "iTerm.app"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, None),
        ({"TERM": "screen", "KITTY_WINDOW_ID": "3"}, None),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "3"}, None),
        ({}, None),
    ],
)
def test_which_terminals_take_pictures(environment: dict[str, str], way: str | None) -> None:
    assert preview.protocol(environment) == way


def big() -> Image.Image:
    return Image.effect_noise((1600, 800), 90).convert("RGB")


def test_iterm2_is_sent_one_small_png() -> None:
    sent = preview.encode(big(), "iterm2", columns=100)
    match = re.fullmatch(
        r"\x1b\]1337;File=inline=1;size=(\d+);width=(\d+);height=(\d+);preserveAspectRatio=1:"
        r"([A-Za-z0-9+/=]+)\x07\n",
        sent,
    )
    assert match is not None
    data = b64decode(match[4], validate=True)
    assert int(match[1]) == len(data)
    with Image.open(io.BytesIO(data)) as small:
        assert small.format == "PNG"
        assert small.width == 2 * small.height <= 960
    assert int(match[2]) == 4 * int(match[3])  # cells are twice as high as wide
    assert int(match[3]) <= preview.MOST_ROWS


def test_kitty_is_sent_pieces_that_join_to_a_png() -> None:
    sent = preview.encode(big(), "kitty", columns=100)
    commands = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", sent)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in commands) + "\n" == sent
    assert len(commands) > 1
    first = dict(pair.split("=") for pair in commands[0][0].split(","))
    assert (first["a"], first["f"], first["q"], first["m"]) == ("T", "100", "2", "1")
    assert int(first["r"]) <= preview.MOST_ROWS
    assert [keys for keys, _ in commands[1:]] == ["m=1"] * (len(commands) - 2) + ["m=0"]
    assert all(len(data) <= 4096 and len(data) % 4 == 0 for _, data in commands)
    data = b64decode("".join(data for _, data in commands), validate=True)
    with Image.open(io.BytesIO(data)) as small:
        small.load()
        assert small.format == "PNG"


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 300))
def test_previews_fit_any_terminal(width: int, height: int, columns: int) -> None:
    wide, rows = preview.cells((width, height), columns)
    assert 1 <= wide <= max(1, columns - 2)
    assert 1 <= rows <= preview.MOST_ROWS


# Sources.


def test_a_pictures_file_is_kept_as_it_was(tmp_path: Path) -> None:
    data = SCENE.read_bytes()
    for source in (str(SCENE), SCENE.as_uri(), f"data:image/png;base64,{b64encode(data).decode()}"):
        attached = read_picture(source)
        assert attached.picture.data == data
        assert attached.image == load_image(SCENE) == attached.picture.image()
        assert attached.picture.size == attached.image.size
    assert read_picture(str(SCENE)).picture.name == "scene18.png"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.png", "nowhere.png"),
        ("/", "directory"),
        ("ftp://e.org/x.png", "scheme"),
        ("data:image/png;base64,AAAA", "image"),
        ("http://127.0.0.1:1/x.png", "127.0.0.1"),
    ],
)
def test_what_is_no_picture(source: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        read_picture(source)


def test_a_url_is_downloaded_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SCENE.read_bytes()
    asked: list[str] = []

    def fetch(url: str, name: str, **_: object) -> bytes:
        asked.append(url)
        return data

    monkeypatch.setattr("qwen3vl_mlx.media_http.fetch", fetch)
    attached = read_picture("https://example.com/a/b.png?token=secret")
    assert (attached.picture.name, attached.picture.data) == ("b.png", data)
    assert attached.picture.image() == load_image(SCENE)
    assert asked == ["https://example.com/a/b.png?token=secret"]


def test_heic(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "My Photo.HEIC"
    heif.from_pillow(Image.open(SCENE).convert("RGB")).save(path, quality=-1)
    attached = read_picture(str(path))
    assert attached.picture.size == Image.open(SCENE).size
    assert picture_of(attached.picture.data, "again").image == attached.image


# The clipboard.


@pytest.fixture
def clipboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for tools that stand in for the system's."""
    for name in ("WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(
        "shutil.which", lambda name: str(tool) if (tool := tmp_path / name).exists() else None
    )
    return tmp_path


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("name", "display"), [("wl-paste", "WAYLAND_DISPLAY"), ("xclip", "DISPLAY")]
)
def test_the_clipboard_on_linux(
    clipboard: Path, monkeypatch: pytest.MonkeyPatch, name: str, display: str
) -> None:
    monkeypatch.setenv(display, "0")
    tool(clipboard, name, f"cat '{SCENE}'")
    image = clipboard_image()
    assert image == load_image(SCENE)
    kept = pasted_picture(image, 2).picture
    assert (kept.name, kept.image()) == ("pasted 2.png", image)
    tool(clipboard, name, "echo 'Nothing is copied' >&2; exit 1")
    with pytest.raises(InputError, match="no picture on the clipboard"):
        clipboard_image()
    tool(clipboard, name, "echo broken >&2; exit 1")
    with pytest.raises(ImageError, match="broken"):
        clipboard_image()
    tool(clipboard, name, "echo text")
    with pytest.raises(InputError):
        clipboard_image()


def test_without_a_tool_it_says_which(clipboard: Path) -> None:
    with pytest.raises(InputError, match=r"wl-paste .* xclip"):
        clipboard_image()


def test_the_clipboard_on_a_mac(
    clipboard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    png = SCENE.read_bytes().hex().upper()
    pixels = f'case "$2" in *PNGf*) printf "«data PNGf%s»\\n" {png} ;; *) exit 1 ;; esac'
    tool(clipboard, "osascript", pixels)
    assert clipboard_image() == load_image(SCENE)
    # A file copied in Finder has its icon beside it: the file is meant.
    other = tmp_path / "other scene.png"
    other.write_bytes((SCENES / "scene22.png").read_bytes())
    file = f'case "$2" in *furl*) echo "{other}" ;; *) printf "«data PNGf%s»\\n" {png} ;; esac'
    tool(clipboard, "osascript", file)
    assert clipboard_image() == load_image(other)
    tool(clipboard, "osascript", "exit 1")
    with pytest.raises(InputError, match="no picture"):
        clipboard_image()
    os.remove(clipboard / "osascript")
