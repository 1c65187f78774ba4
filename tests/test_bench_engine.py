"""The engine's benchmark and soak: what they count as right, and that they notice what is not."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import pytest

from qwen3vl_mlx import bench, bench_engine, soak
from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.bench_engine import CAPTIONS, GAINS, EngineWorkload, up_to_end
from qwen3vl_mlx.bench_measure import Peer, another_engine
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.engine.engine import EngineOptions

Workload = tuple[EngineWorkload, dict[str, bench_engine.Answer]]


@pytest.fixture(scope="module")
def asks(demo: Qwen3VL) -> list[soak.Ask]:
    return soak.answered_alone(demo, 2)


@pytest.fixture
def asked_alone(monkeypatch: pytest.MonkeyPatch, asks: list[soak.Ask]) -> list[soak.Ask]:
    """The questions that `soak.soak` asks; a test may falsify their answers."""
    known = list(asks)
    monkeypatch.setattr(soak, "answered_alone", lambda model, scenes: known)
    return known


def test_a_soak_finds_all_answers_right(demo: Qwen3VL, asked_alone: list[soak.Ask]) -> None:
    assert len({ask.answer for ask in asked_alone}) > 1  # a mix-up would show
    report = soak.soak(demo, 16, 4)
    assert report.clean
    assert report.right + report.cancelled == report.requests == 16
    assert report.right
    assert len(report.memory) == soak.STAGES
    assert str(report.right) in soak.table(report)


def test_a_soak_notices_another_answer(
    demo: Qwen3VL, asked_alone: list[soak.Ask], capsys: pytest.CaptureFixture[str]
) -> None:
    asked_alone[:] = [replace(ask, answer=(0, *ask.answer)) for ask in asked_alone]
    assert bench.main(["--soak", "6", "--at-once", "3", "--json"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["wrong"] + report["cancelled"] == 6  # cancelled before its first token
    assert report["wrong"]
    assert "are wrong" in err


def test_a_soak_notices_requests_that_fail(
    demo: Qwen3VL, asked_alone: list[soak.Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = another_engine(demo, EngineOptions())
    closed.close()
    monkeypatch.setattr(soak, "another_engine", lambda model, options: closed)
    report = soak.soak(demo, 4, 2)
    assert report.lost == 4
    assert "closed" in report.problems[0]


def test_a_soak_notices_requests_that_never_end(
    demo: Qwen3VL, asked_alone: list[soak.Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = another_engine(demo, EngineOptions())
    monkeypatch.setattr(soak, "another_engine", lambda model, options: stuck)
    with monkeypatch.context() as patch:
        patch.setattr(stuck.engine.scheduler, "step", lambda: time.sleep(0.01))
        report = soak.soak(demo, 8, 2, patience_sec=0.5)
    stuck.close()
    assert report.lost == 8
    assert "no request ended" in report.problems[-1]


@pytest.fixture(scope="module")
def workload(demo: Qwen3VL, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = tmp_path_factory.mktemp("pictures")
    return bench_engine.make_workload(demo, CHECKPOINT, folder, pixels=64 * 64, max_tokens=8)


def test_a_round_counts_the_answers_that_are_as_alone(demo: Qwen3VL, workload: Workload) -> None:
    work, alone = workload
    assert alone["first"] != alone["other"]  # else the wrong picture would go unseen
    guessing = another_engine(demo, EngineOptions(speculative="lookup"))
    found = bench_engine.measure(demo, guessing, work, {**alone, "moved": [0], "3": [0]})
    guessing.close()
    assert found["values"].keys() == CAPTIONS.keys()
    assert found["values"]["copied_per_step"] > 1
    wrong = {key: asked - right for key, (right, asked) in found["right"].items() if right < asked}
    each = ("new_in_turn", "new_at_once", "known_in_turn", "known_at_once")
    falsified = {"words_first_sec": 1, "moved_sec": 1, **{f"{key}_per_sec": 1 for key in each}}
    assert wrong == falsified


@pytest.mark.parametrize(
    ("tokens", "kept"), [([5, 6], [5, 6]), ([5, 1, 6, 2], [5]), ([2], []), ([], [])]
)
def test_answers_are_compared_up_to_their_first_end(tokens: list[int], kept: list[int]) -> None:
    assert up_to_end(tokens, (1, 2)) == kept


def test_a_report_has_medians_of_counted_rounds_and_gains(workload: Workload) -> None:
    work, alone = workload
    keys = [key for key in CAPTIONS if key != "copied_per_step"]

    def made(value: float, right: int) -> bench_engine.Round:
        values = {**dict.fromkeys(keys, value), "second_sec": value / 10, "copied_per_step": 2.5}
        return {"values": values, "right": dict.fromkeys(keys, (right, 1))}

    theirs = {**alone, "first": [0]}
    report = bench_engine.make_report(
        work,
        {"ours": [made(99, 0), made(1, 1), made(3, 1), made(2, 0)], "theirs": [made(4, 1)]},
        {"ours": alone, "theirs": theirs},
        runs=3,
    )
    ours = report["sides"]["ours"]
    assert ours["values"]["first_sec"] == {"median": 2, "min": 1, "max": 3}
    assert ours["right"]["first_sec"] == [2, 3]
    assert ours["gains"].keys() == GAINS.keys()
    assert ours["gains"]["second question"] == pytest.approx(10)
    assert ours["gains"]["same picture, moved"] == 1
    assert report["same_alone"] == (len(alone) - 1, len(alone))
    shown = bench_engine.table(json.loads(json.dumps(report)))
    for text in ("200.0 ms    2 of 3", "10.0 x", "2.50 tokens/pass", "2 tokens/s"):
        assert text in shown


def test_a_side_may_lack_measurements(workload: Workload) -> None:
    work, alone = workload
    some: bench_engine.Round = {"values": {"first_sec": 1.0}, "right": {"first_sec": (1, 1)}}
    report = bench_engine.make_report(work, {"theirs": [some]}, {"theirs": alone}, runs=1)
    assert report["sides"]["theirs"]["gains"] == {}
    assert " -" in bench_engine.table(report)


@pytest.mark.parametrize("argv", [["--soak", "0"], ["--soak", "4", "--at-once", "0"]])
def test_counts_below_one_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(argv) == 2
    assert f"{argv[-2]} must be at least 1" in capsys.readouterr().err


@pytest.mark.peer
def test_both_packages_answer_alike_alone(workload: Workload) -> None:
    pytest.importorskip("mlx_vlm")
    work, alone = workload
    payload: Any = [asdict(work), bench_engine.STEPS]
    with Peer(sys.executable, "bench_engine_peer.py", payload) as peer:
        assert peer.facts["alone"] == alone
        for road in peer.measure().values():
            assert road["right"]["first_sec"] == [1, 1]
            assert road["values"].keys() <= CAPTIONS.keys()
