"""The server's benchmark and soak: what their clients see, count and compare."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_mlx import bench, bench_server, bench_server_clients, bench_server_soak
from qwen3vl_mlx.bench_server import compare, judge, make_questions
from qwen3vl_mlx.bench_server_clients import Answer, Server, Side, ask, question, serving
from qwen3vl_mlx.bench_server_soak import soak
from qwen3vl_mlx.demo import CHECKPOINT, EXAMPLE
from qwen3vl_mlx.errors import InputError, Qwen3VLError
from qwen3vl_mlx.processing.tokenizer import Tokenizer

SCRIPT = str(Path(__file__).with_name("scripted_server.py"))
SAID = "So it is."


def scripted(mode: str) -> Side:
    return Side(mode, (sys.executable, SCRIPT, mode), "model")


def about(text: str) -> bench_server_clients.Question:
    return question(text, EXAMPLE.read_bytes(), 8)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(scripted("good")) as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(CHECKPOINT)


# -- clients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "pieces"), [("plain", 4), ("commented", 2)])
def test_a_client_puts_the_pieces_together(server: Server, text: str, pieces: int) -> None:
    answer = ask(server, about(text))
    assert (answer.text, answer.finish_reason, answer.problem) == (SAID, "stop", "")
    assert len(answer.times) == pieces
    assert list(answer.times) == sorted(answer.times)
    assert answer.times[0] > 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("refused", "status 503"),
        ("broken", "it broke"),
        ("cut", "without [DONE]"),
        ("open", "without a finish reason"),
        ("damaged", "JSONDecodeError"),
    ],
)
def test_a_client_tells_what_went_wrong(server: Server, text: str, problem: str) -> None:
    assert problem in ask(server, about(text)).problem


@pytest.mark.parametrize(("leave_after", "text"), [(0, ""), (1, "So"), (3, "So it is")])
def test_a_client_may_leave(server: Server, leave_after: int, text: str) -> None:
    answer = ask(server, about("plain"), leave_after)
    assert (answer.text, answer.finish_reason, answer.problem) == (text, None, "")


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        (Answer("ab", (), "stop"), True),
        (Answer("ab", (), "length"), False),
        (Answer("a", (), "stop"), False),
        (Answer("a"), True),  # its client left
        (Answer("b"), False),
        (Answer("a", problem="broken"), False),
    ],
)
def test_answers_are_compared_as_far_as_they_were_read(answer: Answer, same: bool) -> None:
    assert answer.is_as(Answer("ab", (), "stop")) == same


# -- processes -----------------------------------------------------------------------------------


def test_a_server_is_ended_with_the_block_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_server_clients, "_STOP_SEC", 0.2)
    for mode, status in (("good", 0), ("stays", -signal.SIGKILL)):
        with pytest.raises(ZeroDivisionError), serving(scripted(mode)) as started:
            raise ZeroDivisionError
        assert started.process.returncode == status


def test_sigterm_ends_the_server_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), serving(scripted("good")) as started:
        signal.raise_signal(signal.SIGTERM)
    assert started.process.returncode == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_server_that_dies_is_quoted() -> None:
    with pytest.raises(Qwen3VLError, match="status 1; it said: no room"), serving(scripted("dies")):
        pass


@pytest.mark.parametrize("python", ["/no/such/python", sys.executable])
def test_a_peer_that_is_not_there_is_bad_input(python: str) -> None:
    if python == sys.executable and _has("mlx_vlm"):
        pytest.skip("mlx-vlm is here")
    with pytest.raises(InputError, match="--compare-mlx-vlm"):
        bench_server_clients.mlx_vlm(python, "model")


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


# -- measuring -----------------------------------------------------------------------------------


def test_questions_have_pictures_of_their_own() -> None:
    asked = make_questions(9, 5)
    pictures = {each["messages"][0]["content"][0]["image_url"]["url"] for each in asked}
    assert len(pictures) == 9
    assert all(each["max_tokens"] == 5 and each["temperature"] == 0 for each in asked)
    assert "min_pixels" not in asked[0]


def test_questions_may_have_larger_pictures() -> None:
    from qwen3vl_mlx.media import load_image

    for each in make_questions(3, 5, 40_000):
        picture = load_image(each["messages"][0]["content"][0]["image_url"]["url"])
        assert picture.width * picture.height == pytest.approx(40_000, rel=0.02)
        assert each["min_pixels"] < picture.width * picture.height < each["max_pixels"]


def test_a_measurement_counts_what_clients_saw(tokenizer: Tokenizer) -> None:
    alone = [Answer("a red circle", (), "stop")] * 4
    answers = [
        Answer("a red circle", (1.0, 1.5, 2.0), "stop"),
        Answer("a red circle", (3.0, 3.1), "stop"),
        Answer("a blue circle", (2.0,), "stop"),
        Answer("a", problem="broken"),
    ]
    found = judge(answers, alone, tokenizer, 2.0)
    assert (found["asked"], found["as_alone"], found["failed"]) == (4, 2, 1)
    assert found["problems"] == ["broken"]
    values = found["values"]
    assert values["first_p50_sec"] == 2
    assert values["gap_p50_sec"] == pytest.approx(0.5)
    tokens = sum(len(tokenizer.encode(answer.text)) for answer in answers)
    assert values["tokens_per_sec"] == tokens / 2


def test_servers_are_compared_with_themselves_and_each_other(tokenizer: Tokenizer) -> None:
    sides = [scripted("good"), scripted("mixes")]
    report = compare(sides, make_questions(6, 8), tokenizer, (1, 3))
    good, mixes = report["sides"].values()
    assert [good[n]["as_alone"] for n in (1, 3)] == [6, 6]
    assert mixes[1]["as_alone"] == 6
    assert mixes[3]["as_alone"] < 6
    assert report["same_alone"] == [6, 6]
    gains = report["times_as_good"][3]
    ours, theirs = good[3]["values"], mixes[3]["values"]
    assert gains["tokens_per_sec"] == ours["tokens_per_sec"] / theirs["tokens_per_sec"]
    assert gains["first_p99_sec"] == theirs["first_p99_sec"] / ours["first_p99_sec"]
    shown = bench_server.table(report)
    assert "6 of 6" in shown
    assert f"{mixes[3]['as_alone']} of 6" in shown
    json.dumps(report)


def test_a_measurement_ends_in_time(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_server, "_LIMIT_SEC", 0.0)
    report = compare([scripted("good")], make_questions(2, 8), tokenizer, (1,))
    assert report["sides"]["good"][1]["failed"] == 2
    assert "problem: good: not asked" in bench_server.table(report)


# -- the soak ------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_server_soak, "_SAMPLE_SEC", 0.05)
    monkeypatch.setattr(bench_server_soak, "_IDLE_SEC", 0.2)


@pytest.mark.usefixtures("quick")
def test_a_soak_finds_a_good_server_clean() -> None:
    report = soak(scripted("good"), make_questions(3, 8), 0.5, 6)
    assert report.clean
    assert report.right
    assert report.left
    assert report.requests == report.right + report.left
    assert len(report.memory) == bench_server_soak.STAGES
    assert report.memory[0].active == 1e6
    assert report.memory[0].free == 2e6
    assert 1e6 < report.memory[0].rss < 1e9
    assert f"right {report.right}" in bench_server_soak.table(report)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("mode", "fault", "problem"),
    [
        ("mixes", "wrong", "'So it is.' became 'So was another"),
        ("fails", "failed", "it broke"),
        ("forgets", "unfinished", None),
        ("stays", "exit_status", None),
    ],
)
def test_a_soak_notices(
    mode: str, fault: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_server_clients, "_STOP_SEC", 0.2)
    report = soak(scripted(mode), make_questions(3, 8), 0.4, 4)
    assert vars(report)[fault]
    assert not report.clean
    assert problem is None or any(problem in each for each in report.problems)


@pytest.mark.parametrize("option", ["--server-soak", "--at-once"])
def test_counts_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--server", option, "0"]) == 2
    assert f"{option} must be at least 1" in capsys.readouterr().err


# -- the command, and real servers ---------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_server, "QUESTIONS", 6)
    monkeypatch.setattr(bench_server, "CLIENTS", (3,))
    monkeypatch.setattr(bench_server_soak, "QUESTIONS", 6)


@pytest.mark.usefixtures("few")
def test_the_command_shows_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_server_clients, "ours", lambda model: scripted("good"))
    assert bench.main(["--server"]) == 0
    assert "6 of 6" in capsys.readouterr().out


@pytest.mark.usefixtures("few", "quick")
def test_the_command_fails_where_a_soak_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_server_clients, "ours", lambda model: scripted("forgets"))
    assert bench.main(["--server-soak", "1", "--at-once", "2"]) == 1
    out, err = capsys.readouterr()
    assert "still there at the end 1" in out
    assert "error: " in err


@pytest.mark.usefixtures("few", "quick")
def test_our_server_stands_a_soak(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    assert bench.main(["--server-soak", "1", "--at-once", "6", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["right"]
    assert report["left"]


@pytest.mark.peer
@pytest.mark.usefixtures("few")
def test_both_servers_are_asked_alike(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("mlx_vlm", "fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    assert bench.main(["--server", "--compare-mlx-vlm", sys.executable, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["same_alone"] == [6, 6]
    assert all(found["failed"] == 0 for side in report["sides"].values() for found in side.values())
