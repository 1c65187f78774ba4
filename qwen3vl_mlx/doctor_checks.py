"""What `qwen3vl doctor` looks at: each check is a function of facts, and says what to do."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qwen3vl_mlx import cli
from qwen3vl_mlx.checkpoints import LocalCheckpoint, disk_use
from qwen3vl_mlx.errors import Qwen3VLError
from qwen3vl_mlx.machine import Machine
from qwen3vl_mlx.tables import short

if TYPE_CHECKING:
    from qwen3vl_mlx.quant.plan import Candidate, Memory, Plan

Status: TypeAlias = Literal["ok", "warning", "problem"]

OLDEST_MACOS = (14, 0)  # of MLX's wheels
M5_MACOS = (26, 2)  # from which on MLX uses the neural accelerators of an M5's GPU
PYTHONS = ((3, 10), (3, 13))
EXTRAS = {
    "heif": "HEIC photos",
    "app": "the web page",
    "server": "the server",
    "video": "video files",
}
# Smallest first. 32B is left out: 30B-A3B needs as much memory and answers several times as fast.
RECOMMENDED = ("2B", "4B", "8B", "30B-A3B", "235B-A22B")
GOOD = ("Baseline", "Near-lossless", "Good", "Acceptable")
_LITTLE_DISK = 10 * 10**9
_LITTLE_MEMORY = 2 * 2**30


@dataclass(frozen=True)
class Check:
    """What was found. todo: what to do about a warning or a problem; facts: for --json."""

    name: str
    status: Status
    text: str
    todo: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MlxState:
    """MLX as it is on this machine. error: why it cannot be imported. Memory in bytes.

    working_set: what Metal recommends to use at most; None without Metal, or unknown.
    """

    version: str | None
    metal: bool = False
    working_set: int | None = None
    error: str | None = None


def version(text: str) -> tuple[int, ...]:
    """`26.2.1` as numbers; what is none counts as 0."""
    return tuple(int(part) if part.isdecimal() else 0 for part in text.split("."))


def check_system(machine: Machine) -> Check:
    """The operating system and the chip: MLX is made for Macs with Apple silicon."""
    host = machine.host
    chip = machine.chip or host.machine
    facts = {"system": host.system, "version": host.version, "chip": machine.chip}
    named = {"Darwin": "macOS"}.get(host.system, host.system)
    text = f"{named} {host.version}, {chip}"
    if host.system == "Linux":
        todo = "fine for trying and testing; for real models take a Mac with Apple silicon"
        return Check("system", "warning", f"{text}: without Metal, MLX is slow", todo, facts)
    if not machine.is_mac:
        return Check("system", "problem", f"{text}: MLX does not run here", "use a Mac", facts)
    if not machine.is_apple_silicon:
        todo = "use a Mac with Apple silicon (M1 or newer)"
        return Check("system", "problem", f"{text}: MLX needs Apple silicon", todo, facts)
    if version(host.version) < OLDEST_MACOS:
        return Check("system", "problem", f"{text}: too old for MLX", "update to macOS 14", facts)
    if "M5" in chip.split() and version(host.version) < M5_MACOS:
        todo = "update to macOS 26.2: from there on MLX uses the M5's neural accelerators"
        return Check("system", "warning", text, todo, facts)
    return Check("system", "ok", text, facts=facts)


def check_python(machine: Machine, executable: str = sys.executable) -> Check:
    """Python's version, and whether it is native."""
    host = machine.host
    name = ".".join(map(str, host.python))
    facts = {
        "version": name,
        "architecture": host.machine,
        "translated": machine.translated,
        "executable": executable,
    }
    text = f"{name} for {host.machine} ({short(Path(executable))})"
    if machine.translated:
        todo = "install a Python for arm64 (python.org, Homebrew in /opt/homebrew, uv) and use that"
        return Check("python", "problem", f"{text} runs under Rosetta", todo, facts)
    oldest, newest = PYTHONS
    if not oldest <= host.python[:2] <= newest:
        todo = f"use Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
        return Check("python", "problem", text, todo, facts)
    return Check("python", "ok", text, facts=facts)


def check_mlx(machine: Machine, state: MlxState) -> Check:
    """MLX and whether it reaches the GPU."""
    facts = {"version": state.version, "metal": state.metal, "working_set_bytes": state.working_set}
    if state.error is not None:
        todo = f"{shlex.quote(sys.executable)} -m pip install --force-reinstall mlx"
        return Check("mlx", "problem", f"cannot be imported: {state.error}", todo, facts)
    text = f"{state.version}, {'with Metal' if state.metal else 'without Metal, on the CPU'}"
    if machine.is_mac and not state.metal:
        todo = "is this a virtual machine, or Python for another chip? MLX needs the Mac's own GPU"
        return Check("mlx", "problem", text, todo, facts)
    if state.working_set is not None:
        text += f"; {cli.size(state.working_set)} recommended at most"
    return Check("mlx", "ok", text, facts=facts)


def check_memory(machine: Machine, usable: int | None) -> Check:
    """All memory, what is free now, and what a model may use of it, in bytes."""
    facts = {
        "total_bytes": machine.total,
        "available_bytes": machine.available,
        "usable_bytes": usable,
        "wired_limit_bytes": machine.wired_limit,
    }
    if machine.total is None:
        return Check("memory", "warning", "cannot be found out", "nothing depends on it", facts)
    parts = [f"{_gib(machine.total)} GiB"]
    if machine.available is not None:
        parts.append(f"{_gib(machine.available)} GiB free now")
    if usable is not None:
        parts.append(f"a model may use {_gib(usable)} GiB")
    if machine.wired_limit is not None:
        parts.append(f"iogpu.wired_limit_mb is {machine.wired_limit >> 20:,}")
    text = ", ".join(parts)
    if machine.available is not None and machine.available < _LITTLE_MEMORY:
        return Check("memory", "warning", text, "close other programs before loading", facts)
    return Check("memory", "ok", text, facts=facts)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f}".removesuffix(".0")


def check_packages(distribution: str = "qwen3vl-mlx") -> Check:
    """What this package needs, and what its extras would add, by the installed metadata."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        todo = "install it: python -m pip install ."
        return Check("packages", "warning", f"{distribution} is not installed", todo)
    wrong: list[str] = []
    versions: dict[str, str | None] = {}
    extras: dict[str, list[str]] = {}
    for line in lines:
        need = Requirement(line)
        found, wanted = _installed(need.name), f"{need.name}{need.specifier}"
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            versions[need.name] = found
            if found is None or not need.specifier.contains(found, prereleases=True):
                wrong.append(wanted)
            continue
        for extra in EXTRAS:
            if need.marker.evaluate({"extra": extra}) and found is None:
                extras.setdefault(extra, []).append(wanted)
    facts = {"versions": versions, "missing": wrong, "missing_extras": sorted(extras)}
    if wrong:
        text = f"missing, or of another version than needed: {', '.join(wrong)}"
        return Check("packages", "problem", text, _pip(wrong), facts)
    text = f"{distribution} {metadata.version(distribution)} and all that it needs"
    if not extras:
        return Check("packages", "ok", text, facts=facts)
    missing = ", ".join(f"{extra} ({EXTRAS[extra]})" for extra in extras)
    todo = _pip([name for names in extras.values() for name in names])
    status: Status = "warning" if "heif" in extras else "ok"
    return Check("packages", status, f"{text}; without {missing}", todo, facts)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _pip(requirements: Sequence[str]) -> str:
    words = [sys.executable, "-m", "pip", "install", *requirements]
    return shlex.join(words)


def check_checkpoints(found: Sequence[LocalCheckpoint], cache: Path, free: int | None) -> Check:
    """Checkpoints on this machine and the disk they take. free: bytes left on the cache's disk."""
    own = [each for each in found if each.source != "demo"]
    facts = {
        "cache": str(cache),
        "free_bytes": free,
        "bytes": disk_use(own),
        "checkpoints": [each.to_dict() for each in own],
    }
    room = f"; {cli.size(free)} free" if free is not None else ""
    place = f"{short(cache)}{room}"
    parts = [each for each in own if not each.complete]
    count = len(own) - len(parts)
    plural = "" if count == 1 else "s"
    text = f"{count} checkpoint{plural}, {cli.size(disk_use(own))}, in {place}"
    if not own:
        text = f"none yet but the demo, in {place}"
    if parts:
        names = ", ".join(each.name for each in parts)
        todo = f"qwen3vl models download {parts[0].name} goes on (or qwen3vl models remove ...)"
        return Check("checkpoints", "warning", f"{text}; incomplete: {names}", todo, facts)
    if free is not None and free < _LITTLE_DISK:
        todo = "make room, or set HF_HUB_CACHE to a folder on a larger disk"
        return Check("checkpoints", "warning", text, todo, facts)
    return Check("checkpoints", "ok", text, facts=facts)


def check_hub(head: Callable[[], int], *, offline: bool, endpoint: str, token: bool) -> Check:
    """Whether the Hub answers. head: asks it, and returns the status or raises HubError."""
    login = "logged in" if token else "not logged in, which public models do not need"
    facts: dict[str, Any] = {"endpoint": endpoint, "token": token, "reachable": None}
    if offline:
        text = f"not asked: offline ({login})"
        return Check("hub", "ok", text, facts=facts)
    try:
        status = head()
    except Qwen3VLError as error:
        todo = "what is on this machine works without it; to download, connect or check the proxy"
        facts["reachable"] = False
        return Check("hub", "warning", f"{endpoint} cannot be reached: {error}", todo, facts)
    facts["reachable"] = True
    if status >= 500:
        todo = "try again later: what is on this machine works without it"
        return Check("hub", "warning", f"{endpoint} has trouble (status {status})", todo, facts)
    return Check("hub", "ok", f"{endpoint} answers; {login}", facts=facts)


def check_fit(plans: Mapping[str, Plan]) -> Check:
    """Which sizes this machine holds, each at its best quality, and the one to take."""
    chosen = {size: plan.best for size, plan in plans.items() if plan.best is not None}
    sizes = {size: plan.best and _candidate(plan.best) for size, plan in plans.items()}
    facts: dict[str, Any] = {"sizes": sizes, "recommended": None}
    text = ", ".join(f"{size} {best.name}" for size, best in chosen.items())
    good = [size for size in RECOMMENDED if size in chosen and chosen[size].tier in GOOD]
    if not good:
        text = f"{text}, at a loss of quality" if text else "no released model fits"
        return Check("fit", "warning", text, "try the demo, or a machine with more memory", facts)
    size, name = good[-1], chosen[good[-1]].name
    model = f"Qwen/Qwen3-VL-{size}-Instruct"
    words = ["--model", model, *([] if name == "bf16" else ["--quantize", name])]
    command = shlex.join(["qwen3vl", "chat", *words])
    facts["recommended"] = {"model": model, "quantize": name, "command": command}
    return Check("fit", "ok", text, f"best here: {command}", facts)


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "quantize": candidate.name,
        "quality": candidate.tier,
        "needed_bytes": candidate.need,
        "headroom_tokens": candidate.headroom,
    }


def plans(memory: Memory) -> dict[str, Plan]:
    """The planner's word on every released size."""
    from qwen3vl_mlx.quant import policy
    from qwen3vl_mlx.released import RELEASED

    request = policy.Request("auto", memory=memory)
    return {size: policy.make_plan(config, request) for size, config in RELEASED.items()}
