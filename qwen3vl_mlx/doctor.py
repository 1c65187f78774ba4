"""`qwen3vl doctor`: is this machine ready, what is missing, and which model fits it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qwen3vl_mlx import cli, doctor_checks
from qwen3vl_mlx.doctor_checks import Check, MlxState

_HUB_SEC = 3.0
_STYLES = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}
_EPILOG = """\
exit status: 0 ready, with warnings perhaps; 1 something is broken
"""


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.doctor") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    found: list[Check] = []
    status = cli.run(lambda: report(args, found), debug=args.debug)
    return status or int(any(check.status == "problem" for check in found))


def parser(prog: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=prog,
        description="Tell whether this machine is ready, what is missing, and what model fits it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--offline", action="store_true", help="do not ask the Hub")
    made.add_argument("--no-self-test", action="store_true", help="do not run the demo checkpoint")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def report(args: argparse.Namespace, found: list[Check]) -> None:
    """Print each check as it is made, and add it to `found`."""
    show = None if args.json else _printer()
    for check in checks(offline=args.offline, self_test=not args.no_self_test):
        found.append(check)
        if show is not None:
            show(check)
    if args.json:
        print(json.dumps(to_dict(found), indent=2, ensure_ascii=False))
    else:
        print(f"\n{_summary(found)}")


def checks(*, offline: bool = False, self_test: bool = True) -> Iterator[Check]:
    """All checks of this machine, the quick ones first."""
    from qwen3vl_mlx import machine
    from qwen3vl_mlx.checkpoints import local_checkpoints
    from qwen3vl_mlx.hub_cache import cache_folder

    here = machine.look(machine.this_host(), machine.run_command, machine.read_file)
    yield doctor_checks.check_system(here)
    yield doctor_checks.check_python(here)
    state = mlx_state()
    yield doctor_checks.check_mlx(here, state)
    if state.error is None:
        from qwen3vl_mlx.quant.plan import this_memory

        memory = this_memory()
        yield doctor_checks.check_memory(here, memory.usable)
        yield doctor_checks.check_fit(doctor_checks.plans(memory))
    else:
        yield doctor_checks.check_memory(here, None)
    yield doctor_checks.check_packages()
    cache = cache_folder()
    yield doctor_checks.check_checkpoints(local_checkpoints(), cache, free_bytes(cache))
    yield hub(offline)
    yield server()
    if self_test:
        from qwen3vl_mlx.doctor_self_test import check_self_test

        yield check_self_test()


def mlx_state() -> MlxState:
    """MLX, as it is found by importing it."""
    try:
        import mlx.core as mx

        version = metadata.version("mlx")
    except (ImportError, OSError) as error:  # a wheel for another system fails to be linked
        return MlxState(None, error=" ".join(str(error).split())[:300])
    if not mx.metal.is_available():
        return MlxState(version)
    size = mx.device_info().get("max_recommended_working_set_size")
    return MlxState(version, metal=True, working_set=int(size) if size else None)


def free_bytes(folder: Path) -> int | None:
    """What is left on the disk of a folder, which need not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def hub(offline: bool) -> Check:
    """The Hub, asked for a few bytes; $HF_HUB_OFFLINE and $HF_ENDPOINT are honoured."""
    from huggingface_hub import constants, get_token

    return doctor_checks.check_hub(
        _ask_hub,
        offline=offline or constants.HF_HUB_OFFLINE,
        endpoint=constants.ENDPOINT,
        token=get_token() is not None,
    )


def _ask_hub() -> int:
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    from qwen3vl_mlx.errors import HubError
    from qwen3vl_mlx.hub import DEFAULT_MODEL, first_line

    url = f"{constants.ENDPOINT}/api/models/{DEFAULT_MODEL}"
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HubError("HF_ENDPOINT is no address: give https://HOST")
        return int(get_session().head(url, timeout=_HUB_SEC).status_code)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(first_line(error)) from error


def server() -> Check:
    """Whether commands would find a server that holds a model already."""
    from qwen3vl_mlx import client
    from qwen3vl_mlx.errors import Qwen3VLError

    try:
        found = client.find_server()
        if found is None:
            text = "none runs: commands load the model themselves (`qwen3vl serve --socket`)"
            return Check("server", "ok", text, facts={"address": None, "models": []})
        models = client.served_models(found)
    except client.ServerLoadingError as error:
        return Check("server", "ok", str(error))
    except Qwen3VLError as error:
        todo = f"start it, or correct ${client.SERVER_VARIABLE}"
        return Check("server", "warning", str(error), todo)
    facts = {"address": found.address, "models": models}
    return Check("server", "ok", f"runs at {found.address} with {models[0]}", facts=facts)


def to_dict(found: Sequence[Check]) -> dict[str, Any]:
    """All checks as one JSON object: the worst status, and each check by its name."""
    statuses = [check.status for check in found]
    worst = next((s for s in ("problem", "warning") if s in statuses), "ok")
    by_name = {
        check.name: {
            "status": check.status,
            "text": check.text,
            "todo": check.todo,
            **check.facts,
        }
        for check in found
    }
    return {"status": worst, "checks": by_name}


def _printer() -> Any:
    """What shows a check: in colours in a terminal, as plain lines in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def show(check: Check) -> None:
        if not console.is_terminal:
            print(f"{check.status:<9}{check.name:<13}{check.text}")
            if check.todo:
                print(f"{'':<22}-> {check.todo}")
            return
        sign, colour = _STYLES[check.status]
        row = Table.grid(padding=(0, 1))
        row.add_column(width=1)
        row.add_column(width=11)
        row.add_column(overflow="fold")
        row.add_row(Text(sign, colour), Text(check.name, "bold"), Text(check.text))
        if check.todo:
            row.add_row("", "", Text(f"→ {check.todo}", "cyan" if check.status == "ok" else colour))
        console.print(row)

    return show


def _summary(found: Sequence[Check]) -> str:
    problems = [check.name for check in found if check.status == "problem"]
    warnings = [check.name for check in found if check.status == "warning"]
    if problems:
        return f"Not ready: {', '.join(problems)}. Do what the arrows say and run this again."
    if warnings:
        return f"Ready, with a warning about: {', '.join(warnings)}."
    return "Ready."


if __name__ == "__main__":
    sys.exit(main())
