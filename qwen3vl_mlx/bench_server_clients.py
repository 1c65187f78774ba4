"""A server of ours or mlx-vlm's on this machine, and clients that stream chat answers from it.

The clients use the standard library alone, a thread and a connection each, so that measuring needs
no package that serving does not.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, TypeAlias

from qwen3vl_mlx.bench_measure import last_line
from qwen3vl_mlx.demo import EXAMPLE
from qwen3vl_mlx.errors import InputError, Qwen3VLError

Question: TypeAlias = Mapping[str, Any]  # the body of a chat completion, without the model

_HOST = "127.0.0.1"
_START_SEC = 180.0  # until a server must have answered its first question
_SILENCE_SEC = 60.0  # the longest a client waits for anything to come
_STOP_SEC = 15.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Side:
    """How a server is started, and what it calls the model."""

    name: str
    command: tuple[str, ...]  # without the port
    model: str


@dataclass(frozen=True)
class Server:
    """A process that answers on a port of this machine."""

    side: Side
    port: int
    process: subprocess.Popen[bytes]


@dataclass(frozen=True)
class Answer:
    """What a client got. times: of each piece of text, in seconds since the question was sent."""

    text: str
    times: tuple[float, ...] = ()
    finish_reason: str | None = None  # None: the client left, or there was a problem
    problem: str = ""

    def is_as(self, alone: Answer) -> bool:
        """Whether it is that answer, or the start of it where the client left."""
        if self.finish_reason is None:
            return not self.problem and alone.text.startswith(self.text)
        return (self.text, self.finish_reason) == (alone.text, alone.finish_reason)


def ours(model: str) -> Side:
    """Our server as its command starts it by default."""
    command = (sys.executable, "-m", "qwen3vl_mlx.server", "--model", model, "--host", _HOST)
    return Side("qwen3vl_mlx", command, "default")


def mlx_vlm(python: str, model: str) -> Side:
    """mlx-vlm's server as its command starts it by default. Raises InputError.

    python: an interpreter that has mlx-vlm; this package need not be there. Written against
    mlx-vlm 0.7.10.
    """
    ask = "from importlib.metadata import version; print(version('mlx-vlm'))"
    try:
        found = subprocess.run([python, "-c", ask], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--compare-mlx-vlm: {python} cannot be run: {error}") from error
    if found.returncode:
        problem = last_line(found.stderr)
        raise InputError(f"--compare-mlx-vlm: {python} has no mlx-vlm: {problem}")
    # It loads the model of a request, so that the name must be the one it was started with.
    command = (python, "-m", "mlx_vlm.server", "--model", model, "--host", _HOST)
    return Side(f"mlx-vlm {found.stdout.decode().strip()}", command, model)


def question(text: str, png: bytes, max_tokens: int) -> Question:
    """A greedy question about one picture."""
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": text},
    ]
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0}


@contextmanager
def serving(side: Side) -> Iterator[Server]:
    """Start a server, wait until it has answered a question, and end it in any case.

    Raises Qwen3VLError where it ends, refuses, or takes too long.
    """
    with closing(socket.socket()) as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
    command = [*side.command, "--port", str(port)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log, _ended_by_sigterm():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=offline
        )
        server = Server(side, port, process)
        try:
            if problem := _wait_until_ready(server):
                log.seek(0)
                said = last_line(log.read())
                raise Qwen3VLError(f"the server of {side.name} {problem}; it said: {said}")
            yield server
        finally:
            _stop(process)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that what it started is ended too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_until_ready(server: Server) -> str:
    """What is wrong with a server that does not answer."""
    warm_up = question("What is this?", EXAMPLE.read_bytes(), 8)
    deadline = time.monotonic() + _START_SEC
    while True:
        answer = ask(server, warm_up)
        if not answer.problem:
            return ""
        if server.process.poll() is not None:
            return f"ended with status {server.process.returncode}"
        if time.monotonic() > deadline:
            return f"does not answer: {answer.problem}"
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SEC)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def ask(server: Server, question: Question, leave_after: int | None = None) -> Answer:
    """Stream an answer; `leave_after` closes the connection after so many pieces of text.

    What goes wrong is the answer's `problem`.
    """
    body = json.dumps({**question, "model": server.side.model, "stream": True})
    texts: list[str] = []
    times: list[float] = []
    began = time.perf_counter()
    try:
        with closing(HTTPConnection(_HOST, server.port, timeout=_SILENCE_SEC)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            if leave_after == 0:
                return Answer("")
            with connection.getresponse() as response:
                if response.status != 200:
                    said = response.read(300).decode(errors="replace")
                    return Answer("", problem=f"status {response.status}: {said}")
                reason = None
                for event in _events(response):
                    for choice in event["choices"]:
                        reason = choice["finish_reason"] or reason
                        delta = choice["delta"]
                        if text := delta.get("content") or delta.get("reasoning_content"):
                            texts.append(text)
                            times.append(time.perf_counter() - began)
                    if len(texts) == leave_after:
                        return Answer("".join(texts), tuple(times))
    except (OSError, HTTPException, ValueError, KeyError) as error:
        return Answer("".join(texts), problem=f"{type(error).__name__}: {error}")
    problem = "" if reason else "the stream ended without a finish reason"
    return Answer("".join(texts), tuple(times), reason, problem)


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events. Raises ValueError for an error, or an end without [DONE]."""
    for line in lines:
        if not line.startswith(b"data: "):
            continue  # empty lines and comments
        if line.strip() == b"data: [DONE]":
            return
        event: dict[str, Any] = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise ValueError(f"error event: {event['error']}")
        yield event
    raise ValueError("the stream ended without [DONE]")


def answers_alone(server: Server, questions: Sequence[Question]) -> list[Answer]:
    """Ask one question after another. Raises Qwen3VLError where one is not answered."""
    answers = []
    for question in questions:
        answer = ask(server, question)
        if answer.problem:
            raise Qwen3VLError(f"{server.side.name}, asked alone: {answer.problem}")
        answers.append(answer)
    return answers


def numbers(server: Server) -> dict[str, float]:
    """What our server's /metrics says, without what has labels."""
    with closing(HTTPConnection(_HOST, server.port, timeout=_SILENCE_SEC)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    lines = [line.split() for line in text.splitlines() if line[:1] != "#" and "{" not in line]
    return {name: float(value) for name, value in lines}


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    statm = Path(f"/proc/{pid}/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True)
    return 1024 * int(told.stdout)
