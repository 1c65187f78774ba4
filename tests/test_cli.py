"""`qwen3vl COMMAND` and the exit codes all commands share."""

from __future__ import annotations

import pytest

from qwen3vl_mlx import __version__, cli
from qwen3vl_mlx.errors import HubError, ImageError


@pytest.mark.parametrize(
    ("argv", "status", "out", "err"),
    [
        (["--help"], 0, "generate", ""),
        (["--version"], 0, __version__, ""),
        ([], 2, "", "usage:"),
        (["paint"], 2, "", "no command 'paint'"),
        (["generate", "--image", "nowhere.png"], 2, "", "error: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands(
    argv: list[str], status: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == status
    printed = capsys.readouterr()
    assert out in printed.out
    assert err in printed.err
    assert bool(printed.out) == bool(out)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"qwen3vl {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ImageError("a\nb"), 2, "error: a b\n"),
        (HubError("far away"), 1, "error: far away\n"),
        (KeyError("x"), 1, "error: KeyError: 'x' (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_one_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert cli.run(fail) == status
    assert capsys.readouterr().err == line


def test_debug_lets_errors_through() -> None:
    def fail() -> None:
        raise ImageError("bad")

    with pytest.raises(ImageError):
        cli.run(fail, debug=True)
