"""A run over many pictures, with a model that says what the test wants: what is asked, what is
written, and what ends it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from albums import Teller, captions, paint, records, use, value_of

from qwen3vl_mlx import caption
from qwen3vl_mlx.album import describing
from qwen3vl_mlx.answering import Question
from qwen3vl_mlx.client import SERVER_VARIABLE, ServerGoneError
from qwen3vl_mlx.engine.output import FinishReason
from qwen3vl_mlx.errors import (
    EngineClosedError,
    InputError,
    QueueFullError,
    Qwen3VLError,
    TooLargeError,
    TooLongError,
)

SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, "none")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Twelve pictures."""
    for i in range(12):
        paint(tmp_path / "album" / f"{i:02}.png", i)
    return tmp_path / "album"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "r.jsonl"


def run(*args: object) -> int:
    return caption.main(list(map(str, args)), "qwen3vl caption")


def failing(values: dict[int, Exception]) -> Callable[[Question], str]:
    """Says each picture's value, or raises what it has for it."""

    def say(question: Question) -> str:
        value = value_of(question.images[0])
        if value in values:
            raise values[value]
        return f"value {value}"

    return say


EXPECTED = {f"{i:02}.png": f"value {i}" for i in range(12)}


def test_every_picture_is_asked_once_and_as_many_at_once_as_is_worth_it(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = threading.Barrier(3, timeout=10)  # they wait for each other

    def say(question: Question) -> str:
        meeting.wait()
        return f"value {value_of(question.images[0])}"

    teller = use(monkeypatch, Teller(say, at_once=3))
    assert run(album, "--out", out) == 0
    assert captions(out) == EXPECTED
    assert len(teller.asked) == 12
    assert teller.most == 3
    assert teller.closed


def test_what_is_done_is_not_asked_and_no_model_is_loaded(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, Teller())
    assert run(album, "--out", out, "--limit", 5) == 0
    assert len(captions(out)) == 5
    assert run(album, "--out", out) == 0
    assert captions(out) == EXPECTED
    monkeypatch.setattr("qwen3vl_mlx.album.captioning.open_answerer", pytest.fail)
    capsys.readouterr()
    assert run(album, "--out", out) == 0
    assert capsys.readouterr().err == "note: 12 pictures done before, nothing to do\n"


def test_changed_pictures_and_other_questions_are_asked(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Teller())
    assert run(album, "--out", out) == 0
    paint(album / "03.png", 300)
    paint(album / "12.png", 12)
    teller = use(monkeypatch, Teller())
    assert run(album, "--out", out) == 0
    assert sorted(value_of(question.images[0]) for question in teller.asked) == [12, 300]
    for options in (
        ["--prompt", "Why?"],
        ["--system", "Be brief."],
        ["--temperature", 0],
        ["--max-pixels", 9999],
        ["--model", "demo"],
        ["--schema", SCHEMA],
        ["--force"],
    ):
        teller = use(monkeypatch, Teller(lambda _: '{"n": 1}'))
        assert run(album, "--out", out, *options) == 0
        assert len(teller.asked) == 13, options
    # What has no part in the answers changes nothing.
    assert run(album, "--out", out, "--at-once", 2, "--timeout", 9, "--quiet") == 0
    assert len(records(out)) == 14 + 7 * 13


def test_what_is_asked(album: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teller = use(monkeypatch, Teller(lambda _: '{"n": 7}'))
    prompt = album.parent / "prompt.txt"
    prompt.write_text("{filename} is {index} of {count}, {{ok}}.\n")
    options = ["--prompt", f"@{prompt}", "--system", "Be brief.", "--schema", SCHEMA]
    options += ["--max-pixels", "4000", "--seed", "3", "--timeout", "60"]
    assert run(album / "07.png", album, "--out", out, *options) == 0
    asked = {question.prompt: question for question in teller.asked}
    question = asked["01.png is 3 of 12, {ok}."]
    assert "07.png is 1 of 12, {ok}." in asked
    assert question.images == ((album / "01.png").read_bytes(),)
    assert question.system == "Be brief."
    assert question.grammar == {"type": "json_schema", "value": json.loads(SCHEMA)}
    assert (question.max_pixels, question.timeout) == (4000, 60.0)
    assert question.sampling["seed"] == 3
    record = records(out)[0]
    assert record["data"] == {"n": 7}
    assert (record["model"], record["finish_reason"], record["seconds"]) == ("teller", "stop", 1.25)
    assert (record["prompt_tokens"], record["completion_tokens"]) == (9, 4)
    assert (record["width"], record["height"]) == (4, 3)


def test_bad_pictures_are_written_down_and_the_others_go_on(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (album / "00.png").write_text("no picture")
    (album / "05.png").write_bytes((album / "04.png").read_bytes()[:-20])
    (album / "07.png").unlink()
    os.mkfifo(album / "07.png")
    (album / "09.png").unlink()
    (album / "09.png").symlink_to("nowhere")
    # The answerer knows a picture by another name only.
    refusal = {11: TooLongError("prompt is too long: 99 tokens")}

    def say(question: Question) -> str:
        data = question.images[0]
        assert isinstance(data, bytes)
        if data.endswith(b"IEND\xaeB`\x82"):
            return failing(refusal)(question)
        raise InputError("data URI is damaged")

    use(monkeypatch, Teller(say, at_once=1))
    assert run(album, "--out", out) == 3
    errors = {r["file"]: r["error"] for r in records(out) if "error" in r}
    words = {
        "00.png": "00.png is not an image that can be read",
        "05.png": "05.png is a damaged or truncated PNG image",
        "07.png": "07.png is no regular file",
        "09.png": "09.png was there and is gone",
        "11.png": "prompt is too long: 99 tokens",
    }
    assert errors.keys() == words.keys()
    assert all(errors[file].startswith(text) for file, text in words.items()), errors
    assert captions(out).keys() == EXPECTED.keys() - words.keys()
    err = capsys.readouterr().err
    assert "failed: 11.png: prompt is too long" in err
    assert "failed: 05.png is a damaged" in err
    assert err.endswith("error: 5 pictures failed\n")
    # They are not tried again, unless asked to be or changed, and the status says so.
    assert run(album, "--out", out) == 3
    assert "5 pictures failed before (--retry-failed" in capsys.readouterr().err
    assert len(records(out)) == 12
    paint(album / "05.png", 5)
    use(monkeypatch, Teller())
    assert run(album, "--out", out, "--retry-failed") == 3
    assert captions(out).keys() == EXPECTED.keys() - {"00.png", "07.png", "09.png"}


@pytest.mark.parametrize(
    ("reason", "closed", "text", "schema", "expected"),
    [
        ("length", True, "a long story", None, {"caption": "a long story"}),
        ("repetition", True, "no no no", None, {"caption": "no no no"}),
        ("length", False, "", None, {"error": "before the thought had; raise --max-tokens"}),
        ("timeout", True, "a", None, {"error": "--timeout"}),
        ("cancelled", True, "a", None, {"error": "cancelled"}),
        ("length", True, '{"n": ', SCHEMA, {"error": "no whole JSON (length); raise --max-tokens"}),
        ("constraint", True, '{"n": ', SCHEMA, {"error": "could not follow the schema"}),
        ("stop", True, '{"n": 1}', SCHEMA, {"data": {"n": 1}}),
        ("stop", True, "null", '{"type": "null"}', {"data": None}),
    ],
)
def test_answers_that_end_otherwise(
    album: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    reason: FinishReason,
    closed: bool,
    text: str,
    schema: str | None,
    expected: dict[str, Any],
) -> None:
    teller = use(monkeypatch, Teller(lambda _: text))
    teller.finish_reason, teller.reasoning_closed = reason, closed
    options = ["--schema", schema] if schema else []
    assert run(album / "00.png", "--out", out, *options) == (3 if "error" in expected else 0)
    (record,) = records(out)
    ((kind, value),) = expected.items()
    assert value in record[kind] if kind == "error" else record[kind] == value
    assert record["finish_reason"] == reason


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ServerGoneError("the server is gone"), 1),
        (EngineClosedError("the engine failed"), 1),
    ],
)
def test_what_is_no_pictures_fault_ends_the_run_and_keeps_what_was_done(
    album: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Qwen3VLError,
    status: int,
) -> None:
    use(monkeypatch, Teller(failing({8: error}), at_once=1))
    assert run(album, "--out", out) == status
    assert captions(out).keys() == {f"{i:02}.png" for i in range(8)}
    assert len(records(out)) == 8
    err = capsys.readouterr().err
    assert "8 of 12 pictures are done; the same command goes on from there" in err
    assert err.endswith(f"error: {error}\n")
    use(monkeypatch, Teller())
    assert run(album, "--out", out) == 0
    assert captions(out) == EXPECTED


def test_one_picture_that_breaks_the_machine_does_not_keep_the_others_waiting(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = {4: RuntimeError("out of memory"), 9: Qwen3VLError("the server says: it broke")}
    use(monkeypatch, Teller(failing(poison), at_once=2))
    assert run(album, "--out", out) == 3
    errors = {r["file"]: r["error"] for r in records(out) if "error" in r}
    assert errors == {
        "04.png": "RuntimeError: out of memory",
        "09.png": "the server says: it broke",
    }
    assert captions(out).keys() == EXPECTED.keys() - errors.keys()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("thinking_budget is for Thinking models"), 2),
        (RuntimeError("no kernel"), 1),
        (Qwen3VLError("the server says: broken"), 1),
    ],
)
def test_what_every_picture_meets_ends_the_run_soon_and_marks_none(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    (album / "01.png").write_text("bad by itself")
    teller = use(monkeypatch, Teller(failing(dict.fromkeys(range(12), error)), at_once=1))
    assert run(album, "--out", out) == status
    assert len(teller.asked) == 3
    assert [record["file"] for record in records(out)] == ["01.png"]


def test_two_doubtful_pictures_are_written_down_at_the_end(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Teller(failing(dict.fromkeys(range(12), RuntimeError("no")))))
    assert run(album / "01.png", album / "02.png", "--out", out) == 3
    assert [record["error"] for record in records(out)] == ["RuntimeError: no"] * 2


def test_a_full_queue_is_asked_again(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describing, "_FIRST_WAIT", 0.001)
    refusals = [QueueFullError("full")] * 20

    def say(question: Question) -> str:
        if refusals:
            raise refusals.pop()
        return f"value {value_of(question.images[0])}"

    use(monkeypatch, Teller(say))
    assert run(album, "--out", out) == 0
    assert captions(out) == EXPECTED


def test_ctrl_c_keeps_what_was_answered(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teller = use(monkeypatch, Teller(at_once=1))
    add = "qwen3vl_mlx.album.progress.Progress.tick"
    ticks = iter(range(100))

    def interrupt(_: Any) -> None:
        if next(ticks) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(add, interrupt)
    assert run(album, "--out", out) == 130
    done = captions(out)
    assert 0 < len(done) < 12
    assert teller.closed
    err = capsys.readouterr().err
    assert f"{len(done)} of 12 pictures are done" in err
    monkeypatch.undo()
    use(monkeypatch, Teller())
    assert run(album, "--out", out) == 0
    assert captions(out) == EXPECTED


def test_a_folder_that_is_gone_is_not_a_thousand_failures(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(question: Question) -> str:
        value = value_of(question.images[0])
        if value == 3:
            shutil.rmtree(album)
        return f"value {value}"

    use(monkeypatch, Teller(say, at_once=1))
    assert run(album, "--out", out) == 1
    assert len(captions(out)) == len(records(out)) == 4
    assert "album is gone: was its disk removed?" in capsys.readouterr().err


def test_lines_go_to_stdout_without_out(
    album: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, Teller())
    assert run(album, "--quiet") == 0
    done = capsys.readouterr()
    assert {r["file"]: r["caption"] for r in map(json.loads, done.out.splitlines())} == EXPECTED
    assert done.err == ""


def test_a_dry_run_prints_prompts_and_touches_nothing(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, Teller())
    assert run(album, "--out", out, "--limit", 10, "--prompt", "{stem}?") == 0
    before = out.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr("qwen3vl_mlx.album.captioning.open_answerer", pytest.fail)
    assert run(album, "--out", out, "--dry-run", "--prompt", "{stem}?") == 0
    assert capsys.readouterr().out == "10.png (new)\n    10?\n11.png (new)\n    11?\n"
    assert run(album, "--out", album / "new.csv", "--dry-run") == 0
    assert out.read_bytes() == before
    assert not (album / "new.csv").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prompt", "{foo}"], "no variable {foo}; known: {filename}"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "@nowhere.txt"], "--prompt: nowhere.txt cannot be read"),
        (["--schema", "{"], "--schema is no JSON"),
        (["--schema", '{"type": "nonsense"}'], "cannot be used"),
        (["--temperature", "-1"], "temperature"),
        (["--max-pixels", "9", "--full-resolution"], "exclude each other"),
        (["--at-once", "0"], "--at-once"),
        (["--limit", "0"], "--limit"),
        (["--timeout", "0"], "timeout"),
        (["--glob", "a/b"], "--recursive"),
        (["--out", "r.pdf"], "NAME.jsonl"),
        (["nowhere"], "no such folder or file: nowhere"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    album: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    words: str,
) -> None:
    monkeypatch.setattr("qwen3vl_mlx.album.captioning.open_answerer", pytest.fail)
    monkeypatch.chdir(album)
    before = sorted(os.listdir(album))
    assert run(album, *args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert sorted(os.listdir(album)) == before


def test_an_empty_folder_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qwen3vl_mlx.album.captioning.open_answerer", pytest.fail)
    assert run(tmp_path) == 0
    assert "no pictures were found (--recursive looks deeper)" in capsys.readouterr().err


def test_pictures_too_large_for_a_server_hold_nobody_up(
    album: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are in a row: the same words are no doubt about the run."""
    refused = {number: TooLargeError("the body is longer than 5 bytes") for number in range(4)}
    use(monkeypatch, Teller(failing(refused), at_once=1))
    assert run(album, "--out", out) == 3
    found = records(out)
    assert len(found) == 12
    assert sum("error" in record for record in found) == 4
