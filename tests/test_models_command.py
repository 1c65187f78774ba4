"""`qwen3vl models list` and `info`: what they show of checkpoints, here and on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_stand_in
import models_running
import pytest
from cached import CHECKPOINTS, Cache, qwen, write
from hub_stand_in import StandIn
from models_running import OTHER, REPO, SHARDS, served

from qwen3vl_mlx import models_info
from qwen3vl_mlx.checkpoints import local_checkpoints
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.quant import policy

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library

cache, run, server = models_running.cache, models_running.run, hub_stand_in.server


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
