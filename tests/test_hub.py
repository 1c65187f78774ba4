"""A model's name to its folder: "demo", a path, a cached repository, or an error saying what to do.

No test reaches the network: `snapshot_download` is replaced, or the library is set offline.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from qwen3vl_mlx import hub
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import CheckpointError, HubError, InputError

REPO = "someone/a-model"


def complete(folder: Path, shards: int = 2) -> Path:
    """A folder that looks like a whole download."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    if shards == 1:
        (folder / "model.safetensors").write_bytes(b"")
        return folder
    names = [f"model-{i}.safetensors" for i in range(shards)]
    for name in names:
        (folder / name).write_bytes(b"")
    index = {"weight_map": {f"tensor {name}": name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Hub:
    """Stands for `snapshot_download`: what is cached, what the network says, and who asked."""

    def __init__(self, cached: Path | None, online: Path | Exception | None):
        self.cached, self.online = cached, online
        self.calls: list[tuple[str, str | None, bool]] = []

    def __call__(
        self,
        repo_id: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool = False,
    ) -> str:
        assert {"*.json", "*.jinja", "*.safetensors"} <= set(allow_patterns)
        self.calls.append((repo_id, revision, local_files_only))
        found = self.cached if local_files_only else self.online
        if isinstance(found, Exception):
            raise found
        if found is None:
            raise errors.LocalEntryNotFoundError("nothing is cached")
        return str(found)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def install(cached: Path | None, online: Path | Exception | None) -> Hub:
        fake = Hub(cached, online)
        monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
        return fake

    return install


def test_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("demo") == CHECKPOINT
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve("~/models") == tmp_path / "models"
    assert hub.resolve("models/mine") == Path("models/mine")  # before the Hub is asked


def test_a_folder_has_no_repository(tmp_path: Path) -> None:
    assert hub.snapshot(tmp_path) == hub.Snapshot(tmp_path, None, None)
    assert hub.snapshot("demo") == hub.Snapshot(CHECKPOINT, None, None)
    assert hub.config_folder(tmp_path) == tmp_path
    assert hub.config_folder("demo") == CHECKPOINT
    for find in (hub.snapshot, hub.config_folder):
        with pytest.raises(InputError, match="revision 'v1' is for models of the Hub"):
            find(tmp_path, "v1")
        with pytest.raises(CheckpointError, match="no folder 'nowhere'"):
            find("nowhere")


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "./nowhere",
        "../nowhere",
        "/nowhere/at/all",
        "a/b/c",
        "a b/c",
        "someone/",
        "/x",
    ],
)
def test_no_such_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="demo") as caught:
        hub.resolve(name)
    assert repr(name) in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is a file; give the folder"):
        hub.resolve(path)


def test_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN3VL_MODEL", raising=False)
    assert hub.default_model() == "mlx-community/Qwen3-VL-4B-Instruct-4bit"
    monkeypatch.setenv("QWEN3VL_MODEL", "demo")
    assert hub.default_model() == "demo"


@pytest.mark.parametrize("shards", [1, 2])
def test_a_complete_copy_needs_no_network(
    shards: int, fake_hub: Callable[..., Hub], tmp_path: Path
) -> None:
    folder = complete(tmp_path / "snapshot", shards)
    fake = fake_hub(folder, AssertionError("asked the network"))
    assert hub.resolve(REPO, "v1") == folder
    assert fake.calls == [(REPO, "v1", True)]


@pytest.mark.parametrize(
    "missing",
    ["config.json", "tokenizer.json", "model-1.safetensors", "model.safetensors.index.json"],
)
def test_an_incomplete_copy_is_completed(
    missing: str, fake_hub: Callable[..., Hub], tmp_path: Path
) -> None:
    partial = complete(tmp_path / "partial")
    (partial / missing).unlink()
    whole = complete(tmp_path / "whole")
    fake = fake_hub(partial, whole)
    assert hub.resolve(REPO, "v1") == whole
    assert fake.calls == [(REPO, "v1", True), (REPO, "v1", False)]


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "{}",
        '{"weight_map": []}',
        "[]",
        '{"weight_map": {"a": 1}}',
    ],
)
def test_a_damaged_index_is_fetched_again(
    index: str, fake_hub: Callable[..., Hub], tmp_path: Path
) -> None:
    partial = complete(tmp_path / "partial")
    (partial / "model.safetensors.index.json").write_text(index)
    fake_hub(partial, whole := complete(tmp_path / "whole"))
    assert hub.resolve(REPO) == whole


def http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status} of the Hub\nand more", response=response)


FAILURES: dict[str, tuple[Exception, list[str]]] = {
    "offline": (
        errors.LocalEntryNotFoundError("Got: ConnectError: no route\nand more"),
        [REPO, "cannot be reached (Got: ConnectError: no route)", "--model demo"],
    ),
    "set offline": (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1"), [REPO, "--model demo"]),
    "no connection": (ConnectionError("refused"), ["cannot be reached (refused)", "--model demo"]),
    "too slow": (TimeoutError(), ["cannot be reached (TimeoutError)", "--model demo"]),
    "connection lost": (errors.HTTPError("peer closed"), ["peer closed", "--model demo"]),
    "disk full": (OSError(28, "No space left on device"), [REPO, "No space left"]),
    "server error": (http(errors.HfHubHTTPError, 503), ["503 of the Hub", "--model demo"]),
    "no repository": (
        http(errors.RepositoryNotFoundError, 404),
        ["no repository someone/a-model", "hf auth login", "--model demo"],
    ),
    "bad name": (errors.HFValidationError("bad"), ["no repository", "--model demo"]),
    "gated": (http(errors.GatedRepoError, 403), [REPO, "gated", "hf auth login"]),
    "revision": (http(errors.RevisionNotFoundError, 404), [REPO, "no revision 'v9'"]),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_say_what_to_do(name: str, fake_hub: Callable[..., Hub]) -> None:
    failure, words = FAILURES[name]
    fake_hub(None, failure)
    with pytest.raises(HubError) as caught:
        hub.resolve(REPO, "v9")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is failure


def test_the_library_itself_set_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing replaced: a real cache on disk, and no network allowed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for find in (hub.resolve, hub.config_folder):
        with pytest.raises(HubError, match="--model demo"):
            find(REPO)
    home = tmp_path / "models--someone--a-model"
    folder = complete(home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    assert hub.resolve(REPO) == hub.config_folder(REPO) == folder
    assert hub.snapshot(REPO) == hub.Snapshot(folder, REPO, "0" * 40)


@pytest.mark.parametrize("name", ["someone/a--b", "-someone/b", "someone/" + "a" * 100])
def test_names_the_hub_does_not_allow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for find in (hub.resolve, hub.config_folder):
        with pytest.raises(HubError, match="no repository"):
            find(name)
