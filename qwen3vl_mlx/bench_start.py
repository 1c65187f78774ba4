"""What a script waits for: from the start of a process to the first text of its answer."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from qwen3vl_mlx import client
from qwen3vl_mlx.bench_measure import Workload, last_line, seconds_of
from qwen3vl_mlx.errors import Qwen3VLError

_READY_SEC = 600.0
_POLL_SEC = 0.05
LOADING, SERVED, PEER = "ask, loading", "ask, of a server", "mlx_vlm.generate"


@dataclass(frozen=True)
class Report:
    """Seconds by side, a number for each counted run."""

    model: str
    pixels: int
    seconds: Mapping[str, Sequence[float]]

    @property
    def ratios(self) -> dict[str, float]:
        """Medians over mlx-vlm's; empty without it."""
        if PEER not in self.seconds:
            return {}
        peer = median(self.seconds[PEER])
        return {side: median(values) / peer for side, values in self.seconds.items()}


def compare(workload: Workload, folder: Path, runs: int, peer_python: str | None) -> Report:
    """Each side in turn, `runs` times, after a round that is not counted.

    Raises Qwen3VLError where a process fails.
    """
    question = [workload.prompt, "--image", workload.image]
    options = ["--max-tokens", "1", "--temperature", "0", "--full-resolution"]
    socket = folder / "bench.sock"
    ask = [sys.executable, "-m", "qwen3vl_mlx.cli", "ask", *question, *options]
    sides = {
        LOADING: [*ask, "--no-server", "--model", workload.model],
        SERVED: [*ask, "--server", str(socket)],
    }
    if peer_python is not None:
        command = [peer_python, "-m", "mlx_vlm.generate", "--model", workload.model]
        command += ["--image", workload.image, "--prompt", workload.prompt]
        sides[PEER] = [*command, "--max-tokens", "1", "--temperature", "0"]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with _served(workload.model, socket):
        for _ in range(runs + 1):
            for side, command in sides.items():
                seconds[side].append(seconds_of(command, until_text=True))
    counted = {side: values[1:] for side, values in seconds.items()}
    return Report(workload.model, workload.pixels, counted)


@contextmanager
def _served(model: str, socket: Path) -> Iterator[None]:
    """A server that keeps no prompts and no pictures: every question is new to it."""
    command = [sys.executable, "-m", "qwen3vl_mlx.server", "--model", model]
    command += ["--socket", str(socket), "--prefix-cache", "0", "--feature-cache", "0"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process,
    ):
        try:
            until = time.monotonic() + _READY_SEC
            while not _is_ready(socket):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise Qwen3VLError(f"the server did not start: {last_line(log.read())}")
                time.sleep(_POLL_SEC)
            yield
        finally:
            process.terminate()


def _is_ready(socket: Path) -> bool:
    server = client.Server(str(socket), socket, os.environ.get(client.API_KEY_VARIABLE))
    return client.listens(socket) and client.is_ready(server)


def table(report: Report) -> str:
    """The report for people."""
    lines = [
        f"{report.model}: seconds from process start to the first text about a picture of "
        f"{report.pixels:,} pixels",
        "",
        f"{'':<20}{'median':>10}{'least':>10}{'most':>10}{'of mlx-vlm':>14}",
    ]
    for side, values in report.seconds.items():
        cells = "".join(f"{1e3 * v:>7,.0f} ms" for v in (median(values), min(values), max(values)))
        ratio = f"{report.ratios[side]:>12.3f} x" if report.ratios else ""
        lines.append(f"{side:<20}{cells}{ratio}")
    return "\n".join(lines)
