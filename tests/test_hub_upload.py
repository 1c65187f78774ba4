"""Uploads and downloads against a stand-in of the Hub's HTTP API on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from qwen3vl_mlx import hub
from qwen3vl_mlx.errors import CheckpointError, HubError, InputError
from qwen3vl_mlx.hub_upload import upload

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library

REPO = "someone/a-model"
TOKEN = "hf_right"
Files = dict[str, bytes]


@dataclass
class Repo:
    """Files by commit and path, commits by branch."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        text = f"{branch} {len(self.commits)} {sorted(files)}"
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def at(self, revision: str) -> Files:
        return self.commits[self.branches.get(revision, revision)]


class StandIn(ThreadingHTTPServer):
    """The Hub: its repositories, its large files, what it was asked, and where it fails."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.blobs: Files = {}
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.fails: dict[str, int] = {}  # a pattern of "METHOD path": the status answered
        self.cuts: dict[str, int] = {}  # a file: how often its download stops half-way

    def make(self, name: str, files: Files, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs", **files})
        return repo

    def sent(self, pattern: str) -> list[str]:
        return [line for line in self.asked if re.search(pattern, line)]


class Handler(BaseHTTPRequestHandler):
    """One request. Methods named after what they answer; the route table is at the end."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = self.body()  # always read, or the next request starts in the middle of it
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.server.asked.append(line)
        for pattern, status in self.server.fails.items():
            if re.search(pattern, line):
                return self.json({"error": f"told to answer {status}"}, status)
        is_transfer = path.startswith("/lfs/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not is_transfer:
            return self.json({"error": "Invalid username or password."}, 401)
        for pattern, answer in ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                return answer(self, body, *found.groups())
        self.json({"error": f"the stand-in does not know {line}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def json(self, value: Any, status: int = 200) -> None:
        self.send_response(status)
        content = json.dumps(value).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            url = f"{self.server.endpoint}/{name}"
            return self.json({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.make(name, {}, private)
        self.json({"url": f"{self.server.endpoint}/{name}"})

    def valid_yaml(self, body: bytes) -> None:
        if b"license: nonsense" in json.loads(body)["content"].encode():
            return self.json({"errors": [{"message": '"license" must be one of'}]}, 400)
        self.json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = self.server.repos[name].at(revision)
        answers = []
        for file in json.loads(body)["files"]:
            path, there = file["path"], files.get(file["path"])
            large = path.endswith(".safetensors")
            answer = {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            if there is not None:
                git = hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
                answer["oid"] = hashlib.sha256(there).hexdigest() if large else git
            answers.append(answer)
        self.json({"files": answers})

    def batch(self, body: bytes, name: str) -> None:
        assert name in self.server.repos
        objects = []
        for asked in json.loads(body)["objects"]:
            if asked["oid"] not in self.server.blobs:
                href = f"{self.server.endpoint}/lfs/{asked['oid']}"
                asked["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(asked)
        self.json({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.json({})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        repo = self.server.repos[name]
        files = dict(repo.at(branch))
        for line in body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                assert key == "header", key
        commit = repo.commit(branch, files)
        url = f"{self.server.endpoint}/{name}/commit/{commit}"
        self.json({"success": True, "commitUrl": url, "commitOid": commit})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        branches = self.server.repos[name].branches
        if branch in branches:
            return self.json({"error": "Reference already exists"}, 409)
        branches[branch] = branches["main"]
        self.json({})

    def refs(self, body: bytes, name: str) -> None:
        self.json({"branches": [], "tags": [], "converts": []})

    def info(self, body: bytes, name: str, revision: str | None) -> None:
        repo = self.server.repos.get(name)
        if repo is None:
            return self.json({"error": "Repository not found"}, 404)
        revision = revision or "main"
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self.json({"id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        files = self.server.repos[name].at(revision)
        self.json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": etag(data)}
                for path, data in files.items()
            ]
        )

    def file(self, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self.server.repos[name]
        data = repo.at(revision).get(path)
        self.send_response(404 if data is None else 206 if self.headers.get("Range") else 200)
        self.send_header("X-Repo-Commit", repo.branches.get(revision, revision))
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.headers.get("Range"):
            self.server.ranges.append(f"{path} {self.headers['Range']}")
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            content = data[start:]
        else:
            content = data
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cuts.get(path):
            self.server.cuts[path] -= 1
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)


ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.valid_yaml),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", Handler.preupload),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(.+)", Handler.put),
    (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", Handler.commit),
    (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", Handler.branch),
    (r"GET /api/models/([^/]+/[^/]+)/refs", Handler.refs),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)/?", Handler.tree),
    (r"GET /api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", Handler.info),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.file),
]


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def closed_port() -> Iterator[str]:
    """An address of this machine where nothing answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.server_close()
    yield f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    thread = threading.Thread(target=stand_in.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    # constants, not the environment: the library has read that at its import.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # no stand-in for it
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    point_at(stand_in.endpoint, monkeypatch)
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()
    thread.join()


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )


def checkpoint(shards: int = 3, seed: bytes = b"a") -> Files:
    """A whole checkpoint's files, the first shard large enough to be cut."""
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    index = {"weight_map": {f"tensor {name}": name for name in names}}
    return {
        "config.json": b'{"model_type": "qwen3_vl"}',
        "tokenizer.json": b"{}",
        "merges.txt": b"a b",
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE": b"Apache-2.0",
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{name: (seed + name.encode()) * 20_000 for name in names},
    }


def write(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def without_attributes(files: Files) -> Files:
    return {name: data for name, data in files.items() if name != ".gitattributes"}


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
    files = (path for path in folder.rglob("*") if path.is_file())
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
