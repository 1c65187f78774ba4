"""`qwen3vl models remove`: what goes, after which question, and what is left alone."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models_running
import pytest
from cached import Cache, qwen, tree, write
from models_running import OTHER, REPO, SHARDS, command

from qwen3vl_mlx.checkpoints import local_checkpoints
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.hub_cache import cached_repo

cache, run = models_running.cache, models_running.run  # fixtures


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`answer(text)`: somebody sits at the terminal and types it."""

    def typed(text: str) -> None:
        stdin = SimpleNamespace(isatty=lambda: True, readline=lambda: f"{text}\n")
        monkeypatch.setattr("sys.stdin", stdin)

    return typed


def ours(repo_id: str, cache: Cache, *args: Any, **options: Any) -> Path:
    """A snapshot that this package downloaded."""
    with cached_repo(repo_id).noting():
        return cache.add(repo_id, *args, **options)


def test_what_was_downloaded_here_goes_with_yes(cache: Cache, run: Callable[..., Any]) -> None:
    ours(REPO, cache, qwen(weights=10**6))
    cache.add(OTHER, qwen("Qwen3-VL-8B-Thinking"))
    before = tree(cache.repo(OTHER))
    refused = run("remove", REPO)
    assert refused.status == 2
    assert "--yes answers" in refused.err
    assert cache.repo(REPO).exists()
    done = run("remove", REPO, "--yes")
    assert (done.status, done.out) == (0, "freed 1.01 MB\n")
    assert not cache.repo(REPO).exists()
    assert tree(cache.repo(OTHER)) == before
    assert run("remove", REPO, "--yes").status == 1  # it is not here any more


@pytest.mark.parametrize("text", ["", "n", "no", "yes please", REPO])
def test_only_a_yes_is_one(
    text: str, cache: Cache, run: Callable[..., Any], answer: Callable[[str], None]
) -> None:
    ours(REPO, cache, qwen())
    before = tree(cache.root)
    answer(text)
    done = run("remove", REPO)
    assert (done.status, done.out) == (1, "")
    assert "nothing was removed" in done.err
    assert tree(cache.root) == before
    answer("y")
    assert run("remove", REPO).status == 0
    assert not cache.repo(REPO).exists()


@pytest.mark.parametrize("text", ["", "y", "yes", "Qwen3-VL-4B-Instruct"])
def test_what_others_put_there_goes_by_its_name_only(
    text: str, cache: Cache, run: Callable[..., Any], answer: Callable[[str], None]
) -> None:
    cache.add(REPO, qwen())
    before = tree(cache.root)
    for words in ([], ["--yes"]):
        refused = run("remove", REPO, *words)
        assert refused.status == 2
        assert "--yes-not-mine" in refused.err
    answer(text)
    for words in ([], ["--yes"]):
        assert run("remove", REPO, *words).status == 1
    assert tree(cache.root) == before
    answer(REPO)
    assert run("remove", REPO).status == 0
    assert not cache.repo(REPO).exists()


def test_a_mixture_is_not_ours(cache: Cache, run: Callable[..., Any]) -> None:
    ours(REPO, cache, qwen())
    theirs = cache.add(REPO, qwen(weights=b"theirs"), refs=("v2",))
    assert run("remove", REPO, "--yes").status == 2
    assert run("remove", REPO, "--revision", "v2", "--yes").status == 2
    assert run("remove", REPO, "--revision", "main", "--yes").status == 0
    assert [each.folder for each in local_checkpoints() if each.name == REPO] == [theirs]
    cache.add(REPO, qwen())  # again, and not by us
    assert run("remove", REPO, "--revision", "main", "--yes").status == 2
    assert run("remove", REPO, "--yes-not-mine").status == 0
    assert not cache.repo(REPO).exists()


def test_a_dry_run_removes_nothing(cache: Cache, run: Callable[..., Any]) -> None:
    ours(REPO, cache, qwen(weights=10**6))
    before = tree(cache.root)
    for words in ([], ["--yes"], ["--yes-not-mine"]):
        done = run("remove", REPO, "--dry-run", *words)
        assert (done.status, done.out) == (0, "would free 1.01 MB; nothing was removed\n")
    assert tree(cache.root) == before


def test_shared_files_stay(cache: Cache, run: Callable[..., Any]) -> None:
    files = qwen(shards=2, weights=b"w" * 10**6)
    kept = cache.add(REPO, files)
    extra = b"x" * 500_000
    newer = {**files, SHARDS[1]: extra}
    parts = {"abc": 700_000}  # of a file that either may need
    gone = cache.add(REPO, newer, refs=("v2",), missing=("tokenizer.json",), parts=parts)
    whole = {path.name: path.read_bytes() for path in kept.iterdir()}
    done = run("remove", REPO, "--revision", gone.name[:10], "--yes-not-mine")
    assert (done.status, done.out) == (0, "freed 0.50 MB\n")
    assert "1.01 MB that other revisions share" in done.err
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == whole
    assert not gone.exists()
    assert (cache.repo(REPO) / "blobs" / "abc.incomplete").exists()
    assert not any(path.read_bytes() == extra for path in (cache.repo(REPO) / "blobs").iterdir())
    (left,) = (each for each in local_checkpoints() if each.name == REPO)
    assert left.complete


def test_what_an_interrupt_left_goes_too(cache: Cache, run: Callable[..., Any]) -> None:
    files = qwen(shards=2, weights=b"w" * 10**6)
    cache.add(REPO, files, missing=(SHARDS[1],), parts={"abc": 2 * 10**6})
    done = run("remove", REPO, "--yes-not-mine")
    assert (done.status, done.out) == (0, "freed 3.01 MB\n")
    assert not cache.repo(REPO).exists()


def test_a_copy_with_the_same_commits_stays(cache: Cache, run: Callable[..., Any]) -> None:
    cache.add(REPO, qwen())
    shutil.copytree(cache.repo(REPO), cache.repo(OTHER), symlinks=True)
    shutil.copytree(cache.repo(REPO), cache.root / "datasets--someone--copy", symlinks=True)
    before = tree(cache.repo(OTHER))
    assert run("remove", REPO, "--yes-not-mine").status == 0
    assert not cache.repo(REPO).exists()
    assert tree(cache.repo(OTHER)) == before
    assert (cache.root / "datasets--someone--copy").exists()


def test_a_damaged_repository_goes_whole(cache: Cache, run: Callable[..., Any]) -> None:
    folder = cache.add(REPO, qwen())
    (folder / "tokenizer.json").resolve().unlink()  # a link to nothing: the library gives up on it
    cache.add(REPO, qwen(weights=b"2"), refs=("v2",), missing=("tokenizer.json",))
    refused = run("remove", REPO, "--revision", "v2", "--yes-not-mine")
    assert refused.status == 1
    assert "is damaged" in refused.err
    assert run("remove", REPO, "--yes-not-mine").status == 0
    assert not cache.repo(REPO).exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["demo"], 2, "the demo checkpoint comes with this package"),
        ([CHECKPOINT], 2, "the demo checkpoint comes with this package"),
        (["a/llama"], 1, "is of another family"),
        (["a/nothing"], 1, "is not on this machine"),
        (["nowhere"], 1, "no folder 'nowhere'"),
        ([REPO, "--revision", "v9"], 1, "has no revision 'v9' here; it has main"),
    ],
)
def test_what_is_never_removed(
    words: list[object], status: int, message: str, cache: Cache, run: Callable[..., Any]
) -> None:
    cache.add(REPO, qwen())
    cache.add("a/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    before = tree(cache.root), tree(CHECKPOINT)
    done = run("remove", *words, "--yes-not-mine")
    assert (done.status, done.out) == (status, "")
    assert message in done.err
    assert (tree(cache.root), tree(CHECKPOINT)) == before


def test_a_folder_keeps_what_is_its_owners(tmp_path: Path, run: Callable[..., Any]) -> None:
    mine = write(
        tmp_path / "mine", {**qwen(weights=10**6), "holiday.json": b"{}", "notes.txt": b""}
    )
    (mine / "pictures").mkdir()
    (mine / "pictures" / "model.safetensors").write_bytes(b"a picture")
    elsewhere = write(tmp_path / "elsewhere", {"LICENSE": b"theirs"})
    (mine / "LICENSE").symlink_to(elsewhere / "LICENSE")
    assert run("remove", mine, "--yes").status == 2
    done = run("remove", mine, "--yes-not-mine")
    assert (done.status, done.out) == (0, "freed 1.01 MB\n")
    assert "stays       holiday.json, notes.txt, pictures" in done.err
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {
        "mine/holiday.json",
        "mine/notes.txt",
        "mine/pictures/model.safetensors",
        "elsewhere/LICENSE",
    }


def test_a_folder_of_a_checkpoint_alone_goes(tmp_path: Path, run: Callable[..., Any]) -> None:
    mine = write(tmp_path / "models" / "mine", qwen(shards=2))
    assert run("remove", mine, "--yes-not-mine").status == 0
    assert list((tmp_path / "models").iterdir()) == []


def test_links_are_not_followed(cache: Cache, tmp_path: Path, run: Callable[..., Any]) -> None:
    mine = write(tmp_path / "mine", qwen())
    (tmp_path / "link").symlink_to(mine)
    snapshot = cache.add(REPO, qwen())
    cache.repo(OTHER).symlink_to(cache.repo(REPO))
    before = tree(tmp_path)
    for name, status in ((tmp_path / "link", 2), (snapshot, 2), (OTHER, 1)):
        done = run("remove", name, "--yes-not-mine")
        assert (done.status, done.out) == (status, "")
    assert tree(tmp_path) == before


def test_no_folder_but_a_checkpoints(tmp_path: Path, run: Callable[..., Any]) -> None:
    for name, files in {
        "empty": {},
        "llama": {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"},
        "damaged": {"config.json": b"{", "model.safetensors": b"x"},
    }.items():
        write(tmp_path / name, files)
        before = tree(tmp_path)
        assert run("remove", tmp_path / name, "--yes-not-mine").status == 1
        assert tree(tmp_path) == before


def test_at_a_real_terminal(tmp_path: Path, cache: Cache) -> None:
    cache.add(REPO, qwen())
    main_end, end = pty.openpty()
    words = command("remove", REPO, endpoint="http://127.0.0.1:1", hub=cache.root)
    process = subprocess.Popen(**words, stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    while b"Type its name to remove it:" not in shown:
        shown += os.read(main_end, 1000)
    os.write(main_end, REPO.encode() + b"\n")
    assert process.wait(30) == 0
    os.close(main_end)
    assert not cache.repo(REPO).exists()
    assert b"not by qwen3vl" in shown
