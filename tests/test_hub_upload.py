"""Uploads and downloads against a stand-in of the Hub's HTTP API on this machine."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from hub_stand_in import (
    REPO,
    Files,
    StandIn,
    checkpoint,
    closed_port,
    point_at,
    without_attributes,
    write,
)
from hub_stand_in import server as server  # a fixture

from qwen3vl_mlx import hub
from qwen3vl_mlx.errors import CheckpointError, HubError, InputError
from qwen3vl_mlx.hub_upload import upload

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library

# Uploads


@pytest.mark.parametrize("private", [False, True])
def test_every_byte_arrives_in_one_commit(private: bool, server: StandIn, tmp_path: Path) -> None:
    files = checkpoint()
    hidden = {".DS_Store": b"x", ".cache/huggingface/a.json": b"{}", "sub/.hidden": b"x"}
    folder = write(tmp_path / "mine", {**files, **hidden, "sub/notes.txt": b"kept"})
    url = upload(folder, REPO, private=private)
    repo = server.repos[REPO]
    assert without_attributes(repo.at("main")) == {**files, "sub/notes.txt": b"kept"}
    assert url == f"{server.endpoint}/{REPO}/commit/{repo.branches['main']}"
    assert repo.private == private
    assert len(server.sent("/commit/")) == 1
    assert len(server.sent("PUT")) == 3


def test_the_same_again_sends_nothing(server: StandIn, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", checkpoint())
    url = upload(folder, REPO)
    server.asked.clear()
    assert upload(folder, REPO) == url
    assert not server.sent("PUT|/commit/")


def test_an_interrupted_upload_goes_on(server: StandIn, tmp_path: Path) -> None:
    files = checkpoint()
    folder = write(tmp_path / "mine", files)
    last = hashlib.sha256(files["model-00003-of-00003.safetensors"]).hexdigest()
    server.fails[f"PUT /lfs/{last}"] = 400
    with pytest.raises(HubError, match=r"400.*do the same again to go on"):
        upload(folder, REPO)
    assert set(server.repos[REPO].at("main")) == {".gitattributes"}  # all, or nothing
    arrived = set(server.blobs)
    server.fails.clear()
    server.asked.clear()
    upload(folder, REPO)
    assert without_attributes(server.repos[REPO].at("main")) == files
    assert not any(oid in line for oid in arrived for line in server.sent("PUT"))


def test_weights_of_an_earlier_checkpoint_go(server: StandIn, tmp_path: Path) -> None:
    old = {**checkpoint(shards=3), "notes.txt": b"mine", "adapter.safetensors": b"mine too"}
    repo = server.make(REPO, old)
    new = checkpoint(shards=1, seed=b"b")
    upload(write(tmp_path / "mine", new), REPO)
    kept = {name: old[name] for name in ("notes.txt", "adapter.safetensors")}
    assert without_attributes(repo.at("main")) == {**new, **kept}


def test_a_branch_is_made_and_main_is_left(server: StandIn, tmp_path: Path) -> None:
    repo = server.make(REPO, {"notes.txt": b"mine"})
    main = repo.branches["main"]
    folder = write(tmp_path / "mine", checkpoint())
    for _ in range(2):
        upload(folder, REPO, revision="4bit")
        assert repo.branches["main"] == main
        assert repo.at("4bit")["config.json"] == checkpoint()["config.json"]


def test_nothing_private_goes_where_all_can_read(server: StandIn, tmp_path: Path) -> None:
    server.make(REPO, {}, private=False)
    with pytest.raises(HubError, match=r"public: make it private.*nothing was uploaded"):
        upload(write(tmp_path / "mine", checkpoint()), REPO, private=True)
    assert not server.sent("preupload|PUT|/commit/")


REFUSALS = {
    "bad token": (r"POST /api/repos/create", 401, ["hf auth login", "does not accept this token"]),
    "no right to create": (
        r"POST /api/repos",
        403,
        ["may not write to", "'someone'", "answer 403"],
    ),
    "no such owner": (r"POST /api/repos", 404, ["user or organisation 'someone'", "answer 404"]),
    "no right to write": (r"preupload", 403, ["may not write to someone/a-model"]),
    "no right at the end": (r"/commit/", 403, ["may not write to someone/a-model"]),
    "no room": (r"PUT", 403, ["may not write to", "403"]),
    "server": (r"POST /api/repos/create", 500, ["someone/a-model", "500", "again"]),
    "no branch": (r"/branch/", 403, ["may not write to someone/a-model"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_to_do(name: str, server: StandIn, tmp_path: Path) -> None:
    pattern, status, words = REFUSALS[name]
    server.fails[pattern] = status
    with pytest.raises(HubError) as caught:
        upload(write(tmp_path / "mine", checkpoint(1)), REPO, revision="next")
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_token(server: StandIn, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="does not accept this token: run `hf auth login`"):
        upload(write(tmp_path / "mine", checkpoint(1)), REPO, token="hf_wrong")
    assert not server.repos


def test_a_card_the_hub_refuses(server: StandIn, tmp_path: Path) -> None:
    files = {**checkpoint(1), "README.md": b"---\nlicense: nonsense\n---\n"}
    with pytest.raises(HubError, match=r'README\.md.*"license" must be one of'):
        upload(write(tmp_path / "mine", files), REPO)
    assert not server.sent("PUT|/commit/")


def test_nobody_answers(server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as endpoint:
        point_at(endpoint, monkeypatch)
        with pytest.raises(HubError, match=r"cannot be reached.*refused.*again") as caught:
            upload(write(tmp_path / "mine", checkpoint(1)), REPO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model-00002-of-00003"])
def test_part_of_a_checkpoint_is_not_sent(missing: str, server: StandIn, tmp_path: Path) -> None:
    files = {name: data for name, data in checkpoint().items() if not name.startswith(missing)}
    with pytest.raises(CheckpointError, match=f"{re.escape(missing)}.*nothing was uploaded"):
        upload(write(tmp_path / "mine", files), REPO)
    assert not server.asked


@pytest.mark.parametrize(
    "name", ["a-model", "a/b/c", "", "../x", "a b/c", "someone/a--b", "someone/" + "a" * 100]
)
def test_malformed_names_are_not_asked_for(name: str, server: StandIn, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="OWNER/NAME") as caught:
        upload(write(tmp_path / "mine", checkpoint(1)), name)
    assert repr(name) in str(caught.value)
    assert not server.asked


def test_nobody_is_logged_in(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="not logged in to the Hub: run `hf auth login`"):
        upload(write(tmp_path / "mine", checkpoint(1)), REPO)
    assert not server.asked


# Downloads


def read(folder: Path) -> Files:
    """A folder's files, but for the hidden note of who downloaded them."""
    files = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_snapshot_is_pinned_and_whole(
    revision: str | None, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = checkpoint()
    repo = server.make(REPO, {**files, "pytorch_model.bin": b"no", "photo.png": b"no"})
    repo.commit("v2", {**files, "merges.txt": b"newer"})
    found = hub.snapshot(REPO, revision)
    assert (found.repo_id, found.commit) == (REPO, repo.branches[revision or "main"])
    wanted = {name: repo.at(revision or "main")[name] for name in files}
    assert read(found.folder) == wanted
    assert hub.snapshot(REPO, found.commit) == found  # by the commit itself, and offline:
    with closed_port() as endpoint:
        point_at(endpoint, monkeypatch)
        assert hub.snapshot(REPO, revision) == found
        assert hub.resolve(REPO, revision) == found.folder


def test_a_cut_download_goes_on_in_the_file(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = "model-00001-of-00003.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    repo = server.make(REPO, checkpoint())
    server.cuts[shard] = 1
    assert read(hub.snapshot(REPO).folder) == without_attributes(repo.at("main"))
    half = len(repo.at("main")[shard]) // 2
    assert server.ranges == [f"{shard} bytes={half}-"]


def test_an_interrupted_download_is_completed(server: StandIn, tmp_path: Path) -> None:
    shard = "model-00002-of-00003.safetensors"
    repo = server.make(REPO, checkpoint())
    server.fails[f"GET .*{shard}"] = 500
    with pytest.raises(HubError, match=REPO):
        hub.snapshot(REPO)
    cached = {path.name for path in tmp_path.rglob("*.*") if path.is_symlink()}
    server.fails.clear()
    server.asked.clear()
    assert read(hub.snapshot(REPO).folder) == without_attributes(repo.at("main"))
    fetched = {line.rsplit("/")[-1] for line in server.sent("GET .*/resolve/")}
    assert shard in fetched
    assert fetched.isdisjoint(cached)


def test_the_config_alone(server: StandIn) -> None:
    repo = server.make(REPO, checkpoint())
    folder = hub.config_folder(REPO)
    assert read(folder) == {"config.json": checkpoint()["config.json"]}
    assert folder.name == repo.branches["main"]
    server.asked.clear()
    assert hub.config_folder(REPO) == folder
    assert not server.asked
    assert hub.snapshot(REPO).folder == folder  # fetches the rest
    assert hub.is_complete(folder)


def test_no_config_there(server: StandIn) -> None:
    server.make(REPO, {"notes.txt": b""})
    with pytest.raises(HubError, match=f"{REPO} has no config"):
        hub.config_folder(REPO)
    with pytest.raises(HubError, match="no revision 'v9'"):
        hub.snapshot(REPO, "v9")
