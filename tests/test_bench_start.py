"""What a script waits for, measured: both roads answer, and the table says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import qwen3vl

pytest.importorskip("fastapi")

from qwen3vl_mlx import bench_start


def test_both_roads_are_measured(tmp_path: Path) -> None:
    done = qwen3vl("bench", "--start", "--runs", "1", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["seconds"]) == {bench_start.LOADING, bench_start.SERVED}
    for values in report["seconds"].values():
        (value,) = values
        assert 0 < value < 120
    assert report["ratios"] == {}


def test_ratios_are_of_medians() -> None:
    seconds = {
        bench_start.LOADING: [1.0, 9.0, 2.0],
        bench_start.SERVED: [0.5, 0.5, 0.5],
        bench_start.PEER: [8.0, 8.0, 20.0],
    }
    report = bench_start.Report("demo", 65536, seconds)
    assert report.ratios[bench_start.LOADING] == 0.25
    assert report.ratios[bench_start.SERVED] == 0.0625
    lines = bench_start.table(report).splitlines()
    assert "0.250 x" in next(line for line in lines if line.startswith(bench_start.LOADING))


def test_a_model_that_cannot_be_served_is_told(tmp_path: Path) -> None:
    from qwen3vl_mlx.errors import Qwen3VLError

    with (
        pytest.raises(Qwen3VLError, match="server did not start"),
        bench_start._served("/nowhere/at/all", tmp_path / "a.sock"),
    ):
        pass
