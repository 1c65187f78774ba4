"""`qwen3vl doctor`: what it finds on machines of all kinds, described by what they would say."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cached import CHECKPOINTS, Cache, qwen

from qwen3vl_mlx import doctor_checks
from qwen3vl_mlx.checkpoints import local_checkpoints
from qwen3vl_mlx.doctor_checks import Check, MlxState
from qwen3vl_mlx.errors import HubError
from qwen3vl_mlx.machine import Host, Machine, look, read_file, run_command, this_host
from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.quant.plan import parse_memory
from qwen3vl_mlx.released import RELEASED, size_of

GIB = 2**30
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               65536.
Pages active:                            400000.
Pages inactive:                          131072.
Pages speculative:                            0.
Pages wired down:                        200000.
"""
MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n"
CPUINFO = "processor\t: 0\nmodel name\t: A Processor 9000\nmodel name\t: A Processor 9000\n"


def mac_says(**changes: str | None) -> Callable[[Sequence[str]], str | None]:
    """The commands of a Mac with an M3 and 16 GiB, with changes by the last word."""
    said = {
        "machdep.cpu.brand_string": "Apple M3 Pro",
        "hw.memsize": str(16 * GIB),
        "iogpu.wired_limit_mb": "0",
        "vm_stat": VM_STAT,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return lambda words: said.get(words[-1])


def host(system: str = "Darwin", version: str = "26.2", machine: str = "arm64") -> Host:
    return Host(system, version, machine, (3, 12, 1))


def nothing(_: object) -> None:
    return None


def machine(where: Host | None = None, **changes: str | None) -> Machine:
    return look(where or host(), mac_says(**changes), nothing)


def files(path: str) -> str | None:
    return {"/proc/meminfo": MEMINFO, "/proc/cpuinfo": CPUINFO}.get(path)


# The machine


def test_a_mac_is_described() -> None:
    found = machine()
    assert (found.chip, found.total, found.available) == ("Apple M3 Pro", 16 * GIB, 3 * GIB)
    assert (found.translated, found.wired_limit) == (False, None)
    assert found.is_apple_silicon
    limited = machine(iogpu__wired_limit_mb="12288", sysctl__proc_translated="1")
    assert (limited.wired_limit, limited.translated) == (12 * GIB, True)


def test_a_linux_machine_is_described() -> None:
    found = look(host("Linux", "6.1", "x86_64"), nothing, files)
    assert (found.chip, found.total, found.available) == ("A Processor 9000", 16 * GIB, 8 * GIB)
    assert not found.is_mac


@pytest.mark.parametrize("system", ["Darwin", "Linux", "Windows"])
def test_what_cannot_be_asked_is_unknown(system: str) -> None:
    found = look(host(system, "", ""), nothing, nothing)
    assert (found.chip, found.total, found.available, found.wired_limit) == (None,) * 4
    for check in (doctor_checks.check_system(found), doctor_checks.check_memory(found, None)):
        assert check.status in ("warning", "problem")
        assert check.todo


def test_this_machine_is_described() -> None:
    found = look(this_host(), run_command, read_file)
    assert found.host.python == sys.version_info[:3]
    assert found.total is not None
    assert found.available is not None
    assert GIB // 4 < found.available < found.total
    assert run_command(["no-such-command-here"]) is None
    assert run_command([sys.executable, "-c", "raise SystemExit(3)"]) is None
    assert run_command([sys.executable, "-c", "print(7)"]) == "7"
    assert read_file("/no/such/file") is None


# Checks


@pytest.mark.parametrize(
    ("where", "chip", "status", "words"),
    [
        (host(), "Apple M3 Pro", "ok", "macOS 26.2, Apple M3 Pro"),
        (host(version="14.0"), "Apple M1", "ok", "macOS 14.0"),
        (host(version="13.6.9"), "Apple M1", "problem", "too old for MLX"),
        (host(version="26.1"), "Apple M5 Max", "warning", "macOS 26.1, Apple M5 Max"),
        (host(version="26.2"), "Apple M5", "ok", "Apple M5"),
        (host(version="26.10"), "Apple M5", "ok", "Apple M5"),
        (host(version="15.7"), "Apple M4", "ok", "Apple M4"),
        (host(machine="x86_64"), "Intel(R) Core(TM) i7", "problem", "needs Apple silicon"),
        (host("Linux", "6.1", "x86_64"), None, "warning", "without Metal, MLX is slow"),
        (host("Windows", "11", "AMD64"), None, "problem", "MLX does not run here"),
    ],
)
def test_systems(where: Host, chip: str | None, status: str, words: str) -> None:
    check = doctor_checks.check_system(machine(where, machdep__cpu__brand_string=chip))
    assert check.status == status
    assert words in check.text
    assert (check.todo is None) == (status == "ok")


@pytest.mark.parametrize(
    ("python", "arch", "translated", "status", "words"),
    [
        ((3, 12, 1), "arm64", "0", "ok", "3.12.1 for arm64"),
        ((3, 10, 0), "arm64", None, "ok", "3.10.0"),
        ((3, 13, 9), "arm64", "0", "ok", "3.13.9"),
        ((3, 9, 18), "arm64", "0", "problem", "Python 3.10 to 3.13"),
        ((3, 14, 0), "arm64", "0", "problem", "Python 3.10 to 3.13"),
        ((3, 12, 1), "x86_64", "1", "problem", "Rosetta"),
    ],
)
def test_pythons(
    python: tuple[int, int, int], arch: str, translated: str | None, status: str, words: str
) -> None:
    where = Host("Darwin", "26.2", arch, python)
    check = doctor_checks.check_python(machine(where, sysctl__proc_translated=translated))
    assert check.status == status
    assert words in f"{check.text} {check.todo}"


@pytest.mark.parametrize(
    ("where", "state", "status", "words"),
    [
        (host(), MlxState("0.32.4", True, 12_000_000_000), "ok", "with Metal; 12.00 GB"),
        (host(), MlxState("0.32.4", True), "ok", "0.32.4, with Metal"),
        (host(), MlxState("0.32.4"), "problem", "virtual machine"),
        (host("Linux", "6.1", "x86_64"), MlxState("0.32.4"), "ok", "on the CPU"),
        (host(), MlxState(None, error="no libmlx.dylib"), "problem", "no libmlx.dylib"),
    ],
)
def test_states_of_mlx(where: Host, state: MlxState, status: str, words: str) -> None:
    check = doctor_checks.check_mlx(machine(where), state)
    assert check.status == status
    assert words in f"{check.text} {check.todo}"


def test_memory() -> None:
    check = doctor_checks.check_memory(machine(iogpu__wired_limit_mb="12288"), 12 * GIB)
    assert check.status == "ok"
    assert check.text == (
        "16 GiB, 3 GiB free now, a model may use 12 GiB, iogpu.wired_limit_mb is 12,288"
    )
    little = VM_STAT.replace("131072", "1")
    assert doctor_checks.check_memory(machine(vm_stat=little), None).status == "warning"


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`distribution(*requirements)`: the name of an installed package that needs them."""

    def installed(*requirements: str) -> str:
        folder = tmp_path / "site" / "needy-1.0.dist-info"
        folder.mkdir(parents=True)
        needs = "".join(f"Requires-Dist: {line}\n" for line in requirements)
        extras = "".join(f"Provides-Extra: {extra}\n" for extra in doctor_checks.EXTRAS)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: needy\nVersion: 1.0\n{extras}{needs}"
        )
        monkeypatch.syspath_prepend(tmp_path / "site")
        return "needy"

    return installed


@pytest.mark.parametrize(
    ("needs", "status", "words"),
    [
        (["numpy>=1"], "ok", "needy 1.0 and all that it needs"),
        (["numpy>=1", "not-there>=2 ; sys_platform == 'no such system'"], "ok", "all that it"),
        (["numpy>=99"], "problem", "install 'numpy>=99'"),
        (["not-there>=2"], "problem", "install 'not-there>=2'"),
        (["not-there>=2 ; extra == 'heif'"], "warning", "without heif (HEIC photos)"),
        (["not-there>=2 ; extra == 'app'"], "ok", "install 'not-there>=2'"),
        (["not-there>=2 ; extra == 'test'"], "ok", "needy 1.0 and all that it needs"),
        (["numpy>=1 ; extra == 'app'"], "ok", "needy 1.0 and all that it needs"),
    ],
)
def test_packages(
    needs: list[str], status: str, words: str, distribution: Callable[..., str]
) -> None:
    check = doctor_checks.check_packages(distribution(*needs))
    assert check.status == status
    assert words in f"{check.text} {check.todo}"


def test_a_clone_that_was_never_installed() -> None:
    check = doctor_checks.check_packages("no-such-distribution")
    assert check.status == "warning"
    assert "pip install ." in str(check.todo)


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.root))

    def check(free: int | None = 10**12) -> Check:
        return doctor_checks.check_checkpoints(local_checkpoints(), cache.root, free)

    assert (check().status, check().text[:22]) == ("ok", "none yet but the demo,")
    assert check(free=10**9).status == "warning"
    cache.add("someone/Qwen3-VL-4B-Instruct", qwen(weights=3 * 10**9))
    assert check().status == "ok"
    assert check().text.startswith("1 checkpoint, 3.00 GB, in ")
    assert "1000.00 GB free" in check().text
    assert "free" not in check(free=None).text
    assert json.loads(json.dumps(check().facts))["bytes"] >= 3 * 10**9
    name = "someone/Qwen3-VL-8B-Thinking"
    cache.add(name, qwen("Qwen3-VL-8B-Thinking"), missing=("model.safetensors",), parts={"a": 9})
    assert check().status == "warning"
    assert f"incomplete: {name}" in check().text
    assert f"qwen3vl models download {name}" in str(check().todo)


def answering(status: int | str) -> Callable[[], int]:
    def head() -> int:
        if isinstance(status, str):
            raise HubError(status)
        return status

    return head


@pytest.mark.parametrize(
    ("answer", "status", "reachable"),
    [
        (200, "ok", True),
        (307, "ok", True),
        (404, "ok", True),
        (401, "ok", True),
        (503, "warning", True),
        ("no route to host", "warning", False),
    ],
)
@pytest.mark.parametrize("token", [False, True])
def test_answers_of_the_hub(answer: int | str, status: str, reachable: bool, token: bool) -> None:
    check = doctor_checks.check_hub(
        answering(answer), offline=False, endpoint="https://hub", token=token
    )
    assert (check.status, check.facts["reachable"], check.facts["token"]) == (
        status,
        reachable,
        token,
    )
    assert "https://hub" in check.text


def test_offline_nobody_is_asked() -> None:
    def head() -> int:
        raise AssertionError("asked")

    check = doctor_checks.check_hub(head, offline=True, endpoint="https://hub", token=False)
    assert (check.status, check.facts["reachable"]) == ("ok", None)


# What fits


@pytest.mark.parametrize("size", RELEASED)
@pytest.mark.parametrize("kind", ["Instruct", "Thinking"])
def test_released_sizes_are_as_their_files_say(size: str, kind: str) -> None:
    config = read_config(CHECKPOINTS / f"Qwen3-VL-{size}-{kind}")
    assert RELEASED[size] == config
    assert size_of(config) == size


@pytest.mark.parametrize(
    ("memory", "recommended"),
    [
        ("4GB", None),
        ("16GB", "8B"),
        ("32GB", "30B-A3B"),
        ("256GB", "235B-A22B"),
    ],
)
def test_what_fits(memory: str, recommended: str | None) -> None:
    size = parse_memory(memory)
    plans = doctor_checks.plans(size)
    check = doctor_checks.check_fit(plans)
    for name, best in check.facts["sizes"].items():
        assert best is None or best["needed_bytes"] <= size.usable
        assert (best is None) == (plans[name].best is None)
        assert (best is None) == (f"{name} " not in f" {check.text} ")
    found = check.facts["recommended"]
    if recommended is None:
        assert (check.status, found) == ("warning", None)
        return
    assert check.status == "ok"
    assert found["model"] == f"Qwen/Qwen3-VL-{recommended}-Instruct"
    words = shlex.split(found["command"])
    assert words[:2] == ["qwen3vl", "chat"]
    assert ("--quantize" in words) == (found["quantize"] != "bf16")
