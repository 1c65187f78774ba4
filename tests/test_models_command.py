"""`qwen3vl models`: what it shows, fetches and removes, and what it leaves alone."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_hub_upload
from cached import CHECKPOINTS, Cache, qwen, tree, write
from test_hub_upload import TOKEN, Handler, StandIn

from qwen3vl_mlx import models_info
from qwen3vl_mlx.checkpoints import local_checkpoints
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.hub_cache import cached_repo
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.models_command import main
from qwen3vl_mlx.quant import policy

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library

REPO = "someone/Qwen3-VL-4B-Instruct"
OTHER = "someone/Qwen3-VL-8B-Thinking"
server = test_hub_upload.server  # a fixture
SHARDS = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]


@pytest.fixture(autouse=True)
def whole_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in says of files, too, that a repository or a revision is not there."""
    *others, (pattern, answer) = test_hub_upload.ROUTES

    def file(handler: Handler, body: bytes, name: str, revision: str, path: str) -> None:
        repo = handler.server.repos.get(name)
        if repo is not None and (revision in repo.branches or revision in repo.commits):
            return answer(handler, body, name, revision, path)
        handler.send_response(404)
        handler.send_header("X-Error-Code", "RevisionNotFound" if repo else "RepoNotFound")
        handler.send_header("Content-Length", "0")
        return handler.end_headers()

    monkeypatch.setattr(test_hub_upload, "ROUTES", [*others, (pattern, file)])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Cache(tmp_path / "hub")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """`run(*words)`: the command's status, stdout and stderr. Stdin is no terminal."""

    def ran(*words: object) -> SimpleNamespace:
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return ran


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


# List


def test_an_empty_machine_is_told_what_to_do(cache: Cache, run: Callable[..., Any]) -> None:
    done = run("list")
    assert done.status == 0
    assert re.search(r"^demo +bf16 +6\.\d\d MB", done.out, re.MULTILINE)
    assert "qwen3vl models download mlx-community/Qwen3-VL-4B-Instruct-4bit" in done.out
    assert run().out == done.out  # the default


def test_a_list_is_aligned_and_says_what_is_wrong(cache: Cache, run: Callable[..., Any]) -> None:
    cache.add(REPO, qwen(weights=3 * 10**9))
    cache.add(REPO, qwen(weights=3 * 10**9, dtype="float16"), refs=("v2",))
    cache.add(OTHER, qwen("Qwen3-VL-8B-Thinking", shards=2), missing=(SHARDS[1],))
    cache.add("a/b", qwen(quantization_config={"quant_method": "awq"}))
    done = run("list")
    header, *rows = done.out.split("\n\n")[0].splitlines()
    starts = [header.index(word) for word in ("name", "weights", "last used", "state")]
    for row in rows:
        assert len(row.split()) >= 5
        assert all(row[start - 1] == " " and row[start] != " " for start in starts[1:])
    assert [row.split()[0] for row in rows] == ["a/b", REPO, f"{REPO}@v2", OTHER, "demo"]
    assert f"qwen3vl models download {OTHER}\n" in done.out
    assert f"{SHARDS[1]} has not arrived" in done.out
    assert "a/b cannot be used: config.json: quantization_config.quant_method is 'awq'" in done.out
    assert re.search(r"^3\.01 GB on disk", done.out, re.MULTILINE)


def test_a_list_for_programs(cache: Cache, tmp_path: Path, run: Callable[..., Any]) -> None:
    cache.add(REPO, qwen(weights=10**6))
    mine = write(tmp_path / "mine", qwen(weights=10**6))
    found = json.loads(run("list", "--json", mine).out)
    assert [each["name"] for each in found["checkpoints"]] == [REPO, str(mine), "demo"]
    assert found["bytes"] == sum(each["bytes"] for each in found["checkpoints"])
    assert found["cache"] == str(cache.root)
    nowhere = run("list", tmp_path / "nowhere")
    assert (nowhere.status, nowhere.out) == (1, "")
    assert nowhere.err.startswith("error: no folder ")


# Download


def served(server: StandIn, **changes: Any) -> dict[str, bytes]:
    files = {name: data for name, data in qwen(shards=2, weights=b"w" * 10**6, **changes).items()
             if isinstance(data, bytes)}  # fmt: skip
    server.make(REPO, {**files, "README.md": b"---\nlicense: apache-2.0\n---\n", "x.bin": b"no"})
    return files


def test_a_download_prints_its_folder_and_is_done_once(
    server: StandIn,
    run: Callable[..., Any],
) -> None:
    files = served(server)
    done = run("download", REPO)
    folder = Path(done.out.removesuffix("\n"))
    assert done.status == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"} == files
    assert f"{REPO}: 2.01 MB in " in done.err
    (found,) = (each for each in local_checkpoints() if each.name == REPO)
    assert found.usable
    assert found.downloaded_here
    server.asked.clear()
    again = run("download", REPO)
    assert (again.status, again.out) == (0, done.out)
    assert "on this machine already" in again.err
    assert not server.asked


def test_a_revision_is_fetched(server: StandIn, run: Callable[..., Any]) -> None:
    files = served(server)
    commit = server.repos[REPO].commit("v2", {**files, SHARDS[0]: b"newer"})
    done = run("download", REPO, "--revision", "v2")
    assert Path(done.out.strip()).name == commit
    wrong = run("download", REPO, "--revision", "v9")
    assert (wrong.status, wrong.out) == (1, "")
    assert "has no revision 'v9'" in wrong.err


def test_another_family_is_refused_before_its_weights(
    server: StandIn,
    run: Callable[..., Any],
) -> None:
    server.make("a/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    done = run("download", "a/llama")
    assert (done.status, done.out) == (1, "")
    assert "this package runs Qwen3-VL checkpoints only; mlx-lm runs text models" in done.err
    assert not server.sent("safetensors")


def test_a_disk_too_small_is_refused_with_numbers(
    server: StandIn,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served(server)
    free = SimpleNamespace(free=270_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    done = run("download", REPO)
    assert (done.status, done.out) == (1, "")
    assert "needs 2.01 MB more" in done.err
    assert "has 270.00 MB free" in done.err
    assert "HF_HUB_CACHE" in done.err
    assert not server.sent("GET .*safetensors$")
    free.free = 271_000_000
    assert run("download", REPO).status == 0


def test_what_is_here_needs_no_room(
    server: StandIn, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served(server)
    server.fails[f"GET .*{SHARDS[1]}"] = 500
    failed = run("download", REPO)
    assert (failed.status, failed.out) == (1, "")
    assert "the Hub cannot be reached" in failed.err
    server.fails.clear()
    server.asked.clear()
    room = SimpleNamespace(free=270_000_000)  # for half of it, and what a disk keeps free
    monkeypatch.setattr("shutil.disk_usage", lambda folder: room)
    done = run("download", REPO)
    assert done.status == 0
    assert re.search(r"2\.01 MB in \d+ files, 1\.\d\d MB of it here already", done.err)
    assert not server.sent(f"GET .*{SHARDS[0]}")


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("demo", 2, "comes with this package"),
        ("a b", 1, "give a checkpoint's folder, a Hub id"),
        ("some/body-else", 1, "the Hub has no repository some/body-else"),
    ],
)
def test_names_that_cannot_be_downloaded(
    name: str,
    status: int,
    words: str,
    server: StandIn,
    run: Callable[..., Any],
) -> None:
    done = run("download", name)
    assert (done.status, done.out) == (status, "")
    assert words in done.err
    assert len(re.findall("^error: ", done.err, re.MULTILINE)) == 1


def test_a_folder_is_not_downloaded(tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run("download", tmp_path)
    assert (done.status, done.out) == (2, "")
    assert "is a folder on this machine" in done.err


@dataclass
class Hold:
    """A file whose download stops half-way until it is let go."""

    name: str
    half_way: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def hold(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    held = Hold(SHARDS[1])
    *others, (pattern, answer) = test_hub_upload.ROUTES

    def file(handler: Handler, body: bytes, repo: str, revision: str, path: str) -> None:
        whole = handler.wfile
        if path == held.name and handler.command == "GET" and not held.go_on.is_set():
            handler.wfile = HalfWay(whole, held)
        answer(handler, body, repo, revision, path)
        handler.wfile = whole

    monkeypatch.setattr(test_hub_upload, "ROUTES", [*others, (pattern, file)])
    yield held
    held.go_on.set()


class HalfWay(io.BufferedIOBase):
    """What waits in the middle of a long answer."""

    def __init__(self, whole: Any, held: Hold):
        self.whole, self.held = whole, held

    def write(self, data: Any) -> int:
        middle = len(data) // 2 if len(data) > 10_000 else 0
        if middle:
            self.whole.write(data[:middle])
            self.whole.flush()
            self.held.half_way.set()
            assert self.held.go_on.wait(30)
        return int(self.whole.write(data[middle:]) or 0) + middle


def command(*words: str, endpoint: str, hub: Path) -> dict[str, Any]:
    """Arguments of subprocess.Popen for the command, with the stand-in as its Hub."""
    home = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(hub), "HF_TOKEN": TOKEN}
    return {
        "args": [sys.executable, "-m", "qwen3vl_mlx.models_command", *words],
        "env": {**os.environ, **home, "HF_HUB_DISABLE_XET": "1"},
        "text": True,
    }


def test_ctrl_c_keeps_what_arrived(
    server: StandIn, hold: Hold, tmp_path: Path, run: Callable[..., Any]
) -> None:
    served(server)
    words = command("download", REPO, endpoint=server.endpoint, hub=tmp_path / "cache")
    process = subprocess.Popen(**words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert hold.half_way.wait(30)
    deadline = time.monotonic() + 30
    while not any(path.name == SHARDS[0] for path in tmp_path.rglob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    lines = list(iter(process.stderr.readline, "stopping; Ctrl-C again leaves at once\n"))
    hold.go_on.set()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in "".join(lines) + err
    assert re.search(r"^1\.\d\d MB of 2\.01 MB are kept.* the rest$", err, re.MULTILINE)
    assert err.endswith("interrupted\n")
    server.asked.clear()
    assert run("download", REPO).status == 0
    assert not server.sent(f"GET .*{SHARDS[0]}")


def test_ctrl_c_twice_waits_for_nothing(server: StandIn, hold: Hold, tmp_path: Path) -> None:
    served(server)
    words = command("download", REPO, endpoint=server.endpoint, hub=tmp_path / "cache")
    process = subprocess.Popen(**words, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert hold.half_way.wait(30)
    process.send_signal(signal.SIGINT)
    list(iter(process.stderr.readline, "stopping; Ctrl-C again leaves at once\n"))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.stderr.close()


# Info


def test_info_of_the_demo(run: Callable[..., Any]) -> None:
    found = json.loads(run("info", "demo", "--json").out)
    weights = (CHECKPOINT / "model.safetensors").stat().st_size
    assert found["parameters"] == 3_405_376
    assert found["bits_per_weight"] == pytest.approx(8 * weights / 3_405_376, abs=1e-4)
    assert found["files"]["model.safetensors"] == weights
    assert found["architecture"]["layers"] == 5
    assert (found["sampling"]["temperature"], found["license"]) == (0, "apache-2.0")
    shown = run("info", "demo").out
    for words in ("3.41 million", "16.04 bits", "greedy", "apache-2.0", "2,048 tokens"):
        assert words in shown


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("Qwen3-VL-2B-Instruct", 2.13, 2.13),
        ("Qwen3-VL-8B-Thinking", 8.77, 8.77),
        ("Qwen3-VL-30B-A3B-Instruct", 31.07, 3.9),
        ("Qwen3-VL-235B-A22B-Thinking", 235.7, 22.8),
    ],
)
def test_parameters(
    name: str, billions: float, active: float, tmp_path: Path, run: Callable[..., Any]
) -> None:
    folder = write(tmp_path / "one", qwen(name))
    found = json.loads(run("info", folder, "--json").out)
    assert found["parameters"] / 1e9 == pytest.approx(billions, rel=0.02)
    assert found["active_parameters"] / 1e9 == pytest.approx(active, rel=0.02)
    assert ("of them for each token" in run("info", folder).out) == (billions != active)


def test_memory_is_the_planners(tmp_path: Path) -> None:
    config = read_config(CHECKPOINTS / "Qwen3-VL-8B-Instruct")
    plan = policy.make_plan(config, policy.Request("auto"))
    (four,) = (each for each in plan.candidates if each.name == "4bit")
    folder = write(tmp_path / "one", qwen("Qwen3-VL-8B-Instruct", weights=four.nbytes))
    memory = models_info.describe(str(folder))["memory"]
    assert memory["needed_bytes"] == four.need
    assert memory["fits"] == (four.need <= plan.memory.usable)


def test_defaults_are_those_of_the_models_card(tmp_path: Path) -> None:
    for kind, penalty in (("Instruct", 1.5), ("Thinking", 0)):
        folder = write(tmp_path / kind, qwen(f"Qwen3-VL-8B-{kind}"))
        sampling = models_info.describe(str(folder))["sampling"]
        assert sampling["temperature"] > 0
        assert sampling["presence_penalty"] == penalty


def test_of_a_hub_id_only_the_config_is_fetched(
    server: StandIn,
    run: Callable[..., Any],
) -> None:
    files = served(server)
    found = json.loads(run("info", REPO, "--json").out)
    fetched = {line.rsplit("/")[-1] for line in server.sent("GET .*/resolve/")}
    assert fetched == {"config.json"}
    assert found["weight_bytes"] == sum(len(files[name]) for name in SHARDS)
    assert found["files"]["tokenizer.json"] == 2
    assert (found["complete"], found["sampling"]) == (False, None)
    shown = run("info", REPO).out
    assert f"not on this machine: qwen3vl models download {REPO}" in shown
    server.fails["/api/models/"] = 403  # what is known without the list is shown all the same
    assert json.loads(run("info", REPO, "--json").out)["weight_bytes"] is None
    assert not [each for each in local_checkpoints() if each.name == REPO]


@pytest.mark.parametrize("name", ["nowhere", "someone/nothing"])
def test_info_of_nothing(name: str, cache: Cache, run: Callable[..., Any]) -> None:
    done = run("info", name)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("error: ")


# Remove


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
