"""`qwen3vl doctor` as it runs: the self-test, whom it asks, what it prints and how it ends."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_stand_in import closed_port

from qwen3vl_mlx import doctor, doctor_self_test
from qwen3vl_mlx.doctor_checks import Check, MlxState

GIB = 2**30

# The self-test


def test_the_self_test_passes_here() -> None:
    check = doctor_self_test.check_self_test()
    assert check.status == "ok", check.text
    assert check.facts["tokens_per_sec"] > 0
    assert check.facts["first_token_sec"] > 0


def says(**changes: object) -> list[str]:
    """A command that prints a result with these changes."""
    right = {
        "answer": doctor_self_test.ANSWER,
        "load_sec": 0.1,
        "first_token_sec": 0.2,
        "tokens_per_sec": 30.0,
        "heic": "ok",
    }
    return [sys.executable, "-c", f"print({json.dumps({**right, **changes})!r})"]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (says(), "ok", "first token after 0.20 s, 30 tokens/s; HEIC is read"),
        (says(heic="not installed"), "ok", "30 tokens/s"),
        (says(heic="no decoder"), "warning", "HEIC cannot be read: no decoder"),
        (says(answer="A cat."), "problem", "the demo answered 'A cat.'"),
        ([sys.executable, "-c", "raise ValueError('no kernel')"], "problem", "no kernel"),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 6)"], "problem", "by signal 6"),
    ],
)
def test_ends_of_the_self_test(words: list[str], status: str, text: str) -> None:
    check = doctor_self_test.check_self_test(words)
    assert check.status == status
    assert text in check.text


def test_a_self_test_that_hangs_is_ended() -> None:
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    check = doctor_self_test.check_self_test(words, limit=0.2)
    assert (check.status, check.text) == ("problem", "no answer within 0 s")


# The command


class Answers(BaseHTTPRequestHandler):
    """A Hub, or a server, that says the same to everything."""

    status, body = 200, b""

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def listen() -> Iterator[Callable[..., str]]:
    """`listen(status, body)`: an address of this machine that answers so."""
    servers: list[ThreadingHTTPServer] = []

    def listening(status: int = 200, body: bytes = b"") -> str:
        handler = type("Handler", (Answers,), {"status": status, "body": body})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield listening
    for each in servers:
        each.shutdown()
        each.server_close()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache, no server, no token and no Hub but those of the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_TOKEN", "QWEN3VL_SERVER", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_the_hub_is_asked_with_no_token(
    listen: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint := listen())
    check = doctor.hub(offline=False)
    assert (check.status, check.text) == ("ok", f"{endpoint} answers; logged in")
    assert "hf_secret" not in repr(check)
    assert doctor.hub(offline=True).facts["reachable"] is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert doctor.hub(offline=False).facts["reachable"] is None


@pytest.mark.parametrize("endpoint", [None, "http://", "nonsense", "http://[::1"])
def test_a_hub_that_is_not_there(endpoint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as closed:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint or closed)
        check = doctor.hub(offline=False)
    assert (check.status, check.facts["reachable"]) == ("warning", False)
    assert "\n" not in check.text


def test_servers(listen: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.server().facts["address"] is None
    address = listen(body=json.dumps({"data": [{"id": "owner/a-model"}]}).encode())
    monkeypatch.setenv("QWEN3VL_SERVER", address)
    assert doctor.server().text == f"runs at {address} with owner/a-model"
    for wrong in ("ftp://x", listen(status=500, body=b"{}")):
        monkeypatch.setenv("QWEN3VL_SERVER", wrong)
        assert doctor.server().status == "warning"
    with closed_port() as closed:
        monkeypatch.setenv("QWEN3VL_SERVER", closed)
        assert doctor.server().status == "warning"


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main(["--json", "--offline", "--no-self-test"])
    found = json.loads(capsys.readouterr().out)
    names = ["system", "python", "mlx", "memory", "fit", "packages", "checkpoints", "hub", "server"]
    assert list(found["checks"]) == names
    statuses = {check["status"] for check in found["checks"].values()}
    assert found["status"] in statuses
    assert status == int("problem" in statuses)
    assert found["checks"]["fit"]["recommended"]["model"].startswith("Qwen/Qwen3-VL-")


CHECKS = {
    "ready": ([Check("a", "ok", "fine"), Check("b", "ok", "fine too")], 0, "Ready."),
    "warned": (
        [Check("a", "ok", "fine"), Check("b", "warning", "slow", "wait")],
        0,
        "Ready, with a warning about: b.",
    ),
    "broken": (
        [Check("a", "problem", "gone", "mend it"), Check("b", "warning", "slow", "wait")],
        1,
        "Not ready: a.",
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_statuses(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, status, words = CHECKS[name]
    monkeypatch.setattr(doctor, "checks", lambda **options: iter(checks))
    assert doctor.main([]) == status
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(words)
    for check in checks:
        line = re.search(rf"^{check.status} +{check.name} +{check.text}$", out, re.MULTILINE)
        assert line is not None
        assert check.todo is None or f"-> {check.todo}" in out
    assert doctor.main(["--json"]) == status
    found: Mapping[str, Any] = json.loads(capsys.readouterr().out)
    worst = {"ready": "ok", "warned": "warning", "broken": "problem"}[name]
    assert found["status"] == worst


def test_without_mlx_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "mlx_state", lambda: MlxState(None, error="no libmlx"))
    found = {check.name: check for check in doctor.checks(offline=True, self_test=False)}
    assert found["mlx"].status == "problem"
    assert "fit" not in found
    assert found["memory"].facts["usable_bytes"] is None
    assert found["checkpoints"].facts["bytes"] == 0


def test_metal_is_asked_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    state = doctor.mlx_state()
    assert state.metal == mx.metal.is_available()
    monkeypatch.setattr(mx, "metal", SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(mx, "device_info", dict)  # says nothing of the working set
    assert doctor.mlx_state() == MlxState(state.version, metal=True)
    told = {"max_recommended_working_set_size": 12 * GIB}
    monkeypatch.setattr(mx, "device_info", lambda: told)
    assert doctor.mlx_state().working_set == 12 * GIB
