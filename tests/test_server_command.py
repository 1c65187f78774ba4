"""The server's command line: what it refuses, what it is without options, what it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.server import command
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.start import model_name


@pytest.fixture(autouse=True)
def no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.API_KEY_VARIABLE, raising=False)


def options(*words: str) -> ServerOptions:
    return command.server_options(command.parser("serve").parse_args(list(words)))


def test_without_options_it_is_for_this_machine_alone() -> None:
    assert options() == ServerOptions(image_roots=(Path.home(),))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mymac.local"])
def test_other_machines_need_a_key_or_a_word(host: str) -> None:
    with pytest.raises(InputError, match="--api-key"):
        options("--host", host)
    for words in (("--insecure",), ("--api-key", "k")):
        opened = options("--host", host, *words)
        assert opened.image_roots == ()  # nobody elsewhere reads this machine's files
        assert opened.api_keys == tuple(words[1:])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_loopback_needs_none(host: str) -> None:
    assert options("--host", host).image_roots


def test_keys_come_from_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("two\n\n  three \n")
    monkeypatch.setenv(command.API_KEY_VARIABLE, "one")
    words = ["--api-key", "zero", "--api-key-file", str(tmp_path / "keys")]
    assert options(*words).api_keys == ("zero", "one", "two", "three")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--port", "70000"], "--port"),
        (["--max-pixels", "0"], "--max-pixels"),
        (["--max-images", "0"], "--max-images"),
        (["--cors-origin", "*"], "--cors-origin"),
        (["--cors-origin", "localhost:3000"], "--cors-origin"),
        (["--image-root", "/no/such/folder"], "--image-root"),
        (["--api-key", " "], "API key"),
        (["--api-key", "schlüssel"], "API key"),
        (["--api-key-file", "/no/such/file"], "--api-key-file"),
        (["--api-key-file", "/dev/null"], "holds no key"),
    ],
)
def test_bad_options_are_named(words: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        options(*words)


def test_image_roots_keep_their_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients may name files by it: on macOS /tmp is a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert options("--image-root", "link").image_roots == (tmp_path / "link",)
    assert options("--image-root", "none").image_roots == ()


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--max-batch", "3"], "max_batch", 3),
        (["--max-queue", "9"], "max_queue", 9),
        (["--kv-bits", "8"], "kv_bits", 8),
        (["--memory-limit", "8GB"], "memory_limit", 8 * 2**30),
        (["--prefix-cache", "0"], "prefix_cache_bytes", 0),
        (["--feature-cache", "1.5M"], "feature_cache_bytes", 3 * 2**19),
        (["--cache-folder", "~/kept"], "cache_folder", Path.home() / "kept"),
        (["--lookup"], "speculative", "lookup"),
    ],
)
def test_engine_options_arrive(words: list[str], name: str, value: Any) -> None:
    engine = command.engine_options(command.parser("serve").parse_args(words))
    assert getattr(engine, name) == value


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30s", 30), ("10m", 600), ("1.5h", 5400), ("2d", 172800)]
)
def test_times(text: str, seconds: float) -> None:
    assert options("--idle-unload", text).idle_unload_sec == seconds


@pytest.mark.parametrize("text", ["", "0", "-5m", "10 minutes", "nan", "1e9"])
def test_what_is_no_time_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        options(f"--idle-unload={text}")
    assert refused.value.code == 2
    assert "such as 30s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "demo"),
        ("mlx-community/Qwen3-VL-4B-Instruct-4bit", "mlx-community/Qwen3-VL-4B-Instruct-4bit"),
        ("/models/mine/", "mine"),
        ("./mine", "mine"),
        ("~/mine", "mine"),
        ("a/b/c", "c"),
    ],
)
def test_clients_call_the_model_by_its_name(model: str, name: str) -> None:
    assert model_name(model) == name


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--host", "0.0.0.0"], 2, "--host 0.0.0.0"),
        (["--quantize", "5bti"], 2, "no quantization '5bti'"),
        (["--topology", "exceptions.yml"], 2, "--quantize"),
        (["--topology", "/no/such.yml", "--quantize", "4bit"], 2, "/no/such.yml"),
        (["--draft", "/no/such"], 1, "/no/such"),
        (["--model", "/no/such"], 1, "/no/such"),
        (["--kv-bits", "8", "--max-batch", "0"], 2, "max_batch"),
    ],
)
def test_wrong_options_end_it_with_one_line(
    words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--model", "demo", *words]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_server_open_to_others_goes_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Mac.lan")
    opened = options("--host", "0.0.0.0", "--insecure", "--allowed-host", "vl.example")
    assert opened.allowed_hosts == ("vl.example", "mac.lan", "mac", "mac.local")
    assert options().allowed_hosts == ()
