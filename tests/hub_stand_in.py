"""A stand-in for the Hub's HTTP API on this machine: repositories, uploads, downloads, failures."""

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
        repo = self.server.repos.get(name)
        if repo is None or not (revision in repo.branches or revision in repo.commits):
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if repo else "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
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
