"""What is known of this machine without MLX: system, chip, Python, memory.

Everything is asked through small functions that are given, so that any machine can be described
on any other.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

# A command's output without the space around it; None where it is not there or fails.
Run: TypeAlias = "Callable[[Sequence[str]], str | None]"
# A file's text; None where it cannot be read.
Read: TypeAlias = "Callable[[str], str | None]"


@dataclass(frozen=True)
class Host:
    """What Python says of where it runs, as `platform` spells it.

    system: "Darwin", "Linux". version: macOS's, or the kernel's. machine: what this Python was
    built for: "arm64", "x86_64".
    """

    system: str
    version: str
    machine: str
    python: tuple[int, int, int]


@dataclass(frozen=True)
class Machine:
    """A machine. Memory in bytes; None for what could not be found out.

    translated: Python runs under Rosetta. wired_limit: what the GPU may use, by the owner's
    `iogpu.wired_limit_mb`; None is macOS's own choice.
    """

    host: Host
    chip: str | None
    translated: bool
    total: int | None
    available: int | None
    wired_limit: int | None

    @property
    def is_mac(self) -> bool:
        return self.host.system == "Darwin"

    @property
    def is_apple_silicon(self) -> bool:
        return self.is_mac and (self.host.machine == "arm64" or self.translated)


def this_host() -> Host:
    """Where this Python runs."""
    system = platform.system()
    version = platform.mac_ver()[0] if system == "Darwin" else platform.release()
    return Host(system, version, platform.machine(), sys.version_info[:3])


def look(host: Host, run: Run, read: Read) -> Machine:
    """Describe the machine of `host`."""
    if host.system == "Darwin":
        return _mac(host, run)
    return _linux(host, read)


def _mac(host: Host, run: Run) -> Machine:
    wired = _number(run(["sysctl", "-n", "iogpu.wired_limit_mb"]))
    return Machine(
        host=host,
        chip=run(["sysctl", "-n", "machdep.cpu.brand_string"]) or None,
        translated=run(["sysctl", "-n", "sysctl.proc_translated"]) == "1",
        total=_number(run(["sysctl", "-n", "hw.memsize"])),
        available=_free_pages(run(["vm_stat"]) or ""),
        wired_limit=wired * 2**20 if wired else None,
    )


def _free_pages(vm_stat: str) -> int | None:
    """Bytes that programs could get now, by `vm_stat`: free pages and those that can be dropped."""
    size = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = re.findall(r"Pages (?:free|inactive|speculative):\s+(\d+)\.", vm_stat)
    return int(size[1]) * sum(map(int, pages)) if size and pages else None


def _linux(host: Host, read: Read) -> Machine:
    memory = read("/proc/meminfo") or ""
    chip = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo") or "", re.MULTILINE)
    return Machine(
        host=host,
        chip=chip[1] if chip else None,
        translated=False,
        total=_kilobytes(memory, "MemTotal"),
        available=_kilobytes(memory, "MemAvailable"),
        wired_limit=None,
    )


def _kilobytes(text: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def run_command(words: Sequence[str]) -> str | None:
    """Run a command, for three seconds at most."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=3, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read_file(path: str) -> str | None:
    """A file's text."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
