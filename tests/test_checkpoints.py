"""What is listed of this machine: the Hub's cache on disk, folders and the demo."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cached import CHECKPOINTS, Cache, qwen, write

from qwen3vl_mlx.checkpoints import (
    LocalCheckpoint,
    checkpoint_at,
    disk_use,
    local_checkpoints,
    quantization_name,
)
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import CheckpointError
from qwen3vl_mlx.hub_cache import CachedRepo, cached_repo
from qwen3vl_mlx.models.config import parse_config
from qwen3vl_mlx.quant.apply import assign, config_section, quantizable_shapes
from qwen3vl_mlx.quant.recipes import AFFINE_BITS, FIXED_MODES, MIXED, parse_recipe

REPO = "someone/Qwen3-VL-4B-Instruct"
RELEASED = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Cache(tmp_path / "hub")


def in_cache() -> dict[str, LocalCheckpoint]:
    return {each.name: each for each in local_checkpoints() if each.source == "hub cache"}


def test_the_demo_is_always_there(cache: Cache) -> None:
    (only,) = local_checkpoints()
    assert (only.name, only.folder, only.source, only.usable) == ("demo", CHECKPOINT, "demo", True)
    assert only.nbytes == sum(path.stat().st_size for path in CHECKPOINT.iterdir())


def test_only_this_family_is_listed(cache: Cache) -> None:
    cache.add(REPO, qwen())
    cache.add(
        "a/b-Qwen3-VL-like", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"}
    )
    cache.add(
        "Qwen/Qwen3-4B", {"config.json": b'{"model_type": "qwen3"}', "model.safetensors": b"x"}
    )
    cache.add("a/damaged", {"config.json": b"{", "model.safetensors": b"x"})
    cache.add("a/looked-at", {"config.json": qwen()["config.json"]})
    cache.add("gpt2", qwen())  # of no owner: not a name that can be loaded
    (cache.root / "datasets--a--b" / "snapshots").mkdir(parents=True)
    (cache.root / "models--a--empty").mkdir()
    (cache.root / "version.txt").write_text("1")
    assert list(in_cache()) == [REPO]


def test_what_is_said_of_a_checkpoint(cache: Cache) -> None:
    folder = cache.add(REPO, qwen(weights=50 * 10**9))  # sparse: whoever reads it takes minutes
    os.utime(folder / "model.safetensors", (1.5e9, 1.4e9))
    found = in_cache()[REPO]
    assert found.to_dict() == {
        "name": REPO,
        "revision": None,
        "model": "4B Instruct",
        "quantization": "bf16",
        "bytes": 50 * 10**9 + sum(len(v) for v in qwen().values() if isinstance(v, bytes)) - 7,
        "complete": True,
        "missing": [],
        "problem": None,
        "last_used": "2017-07-14T02:40:00+00:00",
        "source": "hub cache",
        "folder": str(folder),
        "commit": folder.name,
        "refs": ["main"],
        "downloaded_here": False,
    }
    json.dumps(found.to_dict())


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_and_kinds(name: str, tmp_path: Path) -> None:
    *_, kind = name.split("-")
    size = name.removeprefix("Qwen3-VL-").removesuffix(f"-{kind}")
    found = checkpoint_at(write(tmp_path / "renamed", qwen(name)))  # not by the folder's name
    assert (found.size, found.kind, found.model) == (size, kind, f"{size} {kind}")


def test_an_unknown_shape_has_no_size(tmp_path: Path) -> None:
    text = {**json.loads(qwen()["config.json"])["text_config"], "num_hidden_layers": 7}
    assert checkpoint_at(write(tmp_path / "Mine-4B", qwen(text_config=text))).size == ""


NAMES = [*(f"{bits}bit" for bits in AFFINE_BITS), "4bit-g32", *FIXED_MODES, *MIXED]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["Qwen3-VL-2B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_a_recipe_is_known_again(name: str, model: str) -> None:
    values = json.loads((CHECKPOINTS / model / "config.json").read_text(encoding="utf-8"))
    config = parse_config(values)
    shapes = quantizable_shapes(config)
    made = assign(parse_recipe(name, config.text.num_hidden_layers), shapes)
    section = config_section(made)
    values |= {"quantization": section, "quantization_config": section}
    assert quantization_name(values, parse_config(values)) == name


LAYER = "language_model.model.layers.3.mlp.down_proj"
FOUR = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    ("changes", "name", "problem"),
    [
        ({}, "bf16", None),
        ({"dtype": "float16"}, "fp16", None),
        ({"torch_dtype": "float32"}, "fp32", None),
        ({"quantization": FOUR}, "4bit", None),
        ({"quantization": {**FOUR, "vision_tower": False}}, "4bit", None),
        ({"quantization": {**FOUR, LAYER: {"group_size": 64, "bits": 5}}}, "mixed", None),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8", None),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq", "quant_method"),
        ({"quantization": {"bits": 4}}, "", "group_size"),
        ({"text_config": []}, "", "text_config"),
        ({"vision_config": {"depth": "x"}}, "", "vision_config"),
    ],
)
def test_names_of_quantizations(
    changes: dict[str, Any], name: str, problem: str | None, cache: Cache
) -> None:
    cache.add(REPO, qwen(**changes))
    found = in_cache()[REPO]
    assert found.quantization == name
    assert found.usable == (problem is None)
    assert problem is None or problem in str(found.problem)


def test_an_interrupted_download_is_marked(cache: Cache) -> None:
    shard = "model-00002-of-00002.safetensors"
    cache.add(REPO, qwen(shards=2), missing=(shard,), parts={"abc": 1_000_000, "abc.1f": 5_000})
    found = in_cache()[REPO]
    assert (found.complete, found.usable, found.missing) == (False, False, (shard,))
    (whole,) = (f.nbytes for f in found.files if f.name == "model-00001-of-00002.safetensors")
    sizes = [f.nbytes for f in found.files if f.name.endswith(".incomplete")]
    assert (sorted(sizes), whole) == ([5_000, 1_000_000], len(b"weights" + shard.encode()))


def test_space_reserved_is_not_yet_used(cache: Cache) -> None:
    cache.add(REPO, qwen(), missing=("model.safetensors",))
    with (cache.repo(REPO) / "blobs" / "abc.incomplete").open("wb") as file:
        file.truncate(10**10)
    assert in_cache()[REPO].nbytes < 10**6


def test_without_its_config_a_name_tells_the_family(cache: Cache) -> None:
    files = qwen(shards=2)
    cache.add("someone/Qwen3-VL-8B-Thinking-4bit", files, missing=("config.json",))
    cache.add("someone/other", files, missing=("config.json",))
    (found,) = in_cache().values()
    assert (found.model, found.missing) == ("8B Thinking", ("config.json",))


def test_a_link_to_nothing_is_a_missing_file(cache: Cache) -> None:
    folder = cache.add(REPO, qwen())
    (folder / "model.safetensors").resolve().unlink()
    cache.add(
        REPO,
        {"tokenizer.json": b"{}", "config.json": qwen()["config.json"], "model.safetensors": b"2"},
        refs=(),
    )
    found = [each for each in local_checkpoints() if each.source == "hub cache"]
    assert [each.missing for each in found] == [()]  # the other has no weights left


def test_revisions_share_what_they_have_in_common(cache: Cache) -> None:
    first = cache.add(REPO, {**qwen(weights=10**6), "README.md": b"1"}, refs=("v1", "refs/pr/1"))
    second = cache.add(REPO, {**qwen(weights=10**6), "README.md": b"2"})
    third = cache.add(REPO, qwen(weights=10**6 + 1), refs=())
    found = [each for each in local_checkpoints() if each.source == "hub cache"]
    by_folder = {each.folder: each for each in found}
    assert {each.name for each in found} == {REPO}
    assert found[0].folder == second  # what `load` takes without a revision comes first
    assert [by_folder[f].revision for f in (first, second, third)] == [
        "refs/pr/1",
        None,
        third.name,
    ]
    small = sum(len(v) for v in qwen(weights=0).values() if isinstance(v, bytes))
    assert disk_use([by_folder[first], by_folder[second]]) == 10**6 + small + 2
    assert disk_use(found) == 2 * 10**6 + 1 + small + 2
    assert by_folder[first].nbytes == by_folder[second].nbytes == 10**6 + small + 1


def test_folders_that_are_named(cache: Cache, tmp_path: Path) -> None:
    one = write(tmp_path / "models" / "one", qwen(quantization=FOUR))
    two = write(tmp_path / "models" / "two", qwen("Qwen3-VL-2B-Thinking", shards=2))
    (two / "model-00001-of-00002.safetensors").unlink()
    write(tmp_path / "models" / "llama", {"config.json": b'{"model_type": "llama"}'})
    (tmp_path / "models" / "notes").mkdir()
    found = [each for each in local_checkpoints([tmp_path / "models"]) if each.source == "folder"]
    assert [(c.name, c.model, c.quantization, c.complete) for c in found] == [
        (str(one), "4B Instruct", "4bit", True),
        (str(two), "2B Thinking", "bf16", False),
    ]
    assert [c.folder for c in local_checkpoints([one]) if c.source == "folder"] == [one]
    assert not any(each.revision or each.commit for each in found)
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
        local_checkpoints([tmp_path / "nowhere"])
    with pytest.raises(CheckpointError, match=r"llama.* holds no Qwen3-VL checkpoint.*mlx-lm"):
        checkpoint_at(tmp_path / "models" / "llama")


def interrupted(repo: CachedRepo, cache: Cache) -> Path:
    """What has arrived of a download when Ctrl-C ends it."""
    with suppress(KeyboardInterrupt), repo.noting():
        half = cache.add(REPO, qwen(shards=2), refs=("v3",), missing=("tokenizer.json",))
        cache.add(REPO, {"config.json": b"{}"}, refs=("v4",))  # no weights: nothing to claim
        raise KeyboardInterrupt
    return half


def test_what_was_downloaded_here_is_noted_until_it_goes(cache: Cache) -> None:
    repo = cached_repo(REPO)
    theirs = cache.add(REPO, qwen())
    with repo.noting():
        cache.add("someone/else", qwen())
        ours = cache.add(REPO, qwen(weights=b"other"), refs=("v2",))
    half = interrupted(repo, cache)
    claimed = {path.name for path in repo.snapshots() if repo.was_downloaded_here(path.name)}
    assert claimed == {ours.name, half.name}
    flags = {c.folder: c.downloaded_here for c in local_checkpoints() if c.name == REPO}
    assert flags == {theirs: False, ours: True, half: True}
    repo.forget(ours.name)
    repo.forget(half.name)
    assert not any(each.downloaded_here for each in local_checkpoints())
    assert {path.name for path in repo.folder.iterdir()} == {"blobs", "refs", "snapshots"}


def test_what_another_program_fetched_again_is_not_claimed(cache: Cache) -> None:
    """As `hf cache rm` and `hf download` leave it: the same commit in a folder of the same name."""
    with cached_repo(REPO).noting():
        snapshot = cache.add(REPO, qwen())
    assert cached_repo(REPO).was_downloaded_here(snapshot.name)
    shutil.rmtree(snapshot)
    assert cache.add(REPO, qwen()) == snapshot
    assert not any(each.downloaded_here for each in local_checkpoints())


def test_a_download_goes_on_where_no_note_can_be_made(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.add(REPO, qwen())

    def full(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(Path, "touch", full)
    with cached_repo(REPO).noting():
        cache.add(REPO, qwen(weights=b"other"), refs=())
    assert not any(each.downloaded_here for each in local_checkpoints())


def test_a_list_needs_neither_mlx_nor_the_network() -> None:
    code = (
        "import sys\n"
        "from qwen3vl_mlx.checkpoints import local_checkpoints\n"
        "assert local_checkpoints()\n"
        "print([name for name in ('mlx', 'numpy', 'PIL', 'httpx', 'httpx2', 'requests')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_times_are_of_the_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", qwen())
    for path in folder.iterdir():
        os.utime(path, (1.6e9, 1.6e9))
    os.utime(folder / "model.safetensors", (1.5e9, 1.4e9))
    (folder / "config.json").read_bytes()
    used = checkpoint_at(folder).last_used
    assert used is not None
    assert math.isclose(used, 1.5e9)
