"""`qwen3vl service`: keep the server running in the background, by macOS's launchd.

Where there is no launchd, what would be written and run is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import plistlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from qwen3vl_mlx import cli, client
from qwen3vl_mlx.errors import InputError, OutputError, Qwen3VLError
from qwen3vl_mlx.folders import default_socket

LABEL = "io.github.qwen3vl-mlx.server"
SERVE = ("--socket", "--idle-unload", "10m")

_MODULE = "qwen3vl_mlx.server"
_RESTART_SEC = 10
_TRIES, _TRY_SEC = 6, 0.5
# What a shell may have set and launchd does not: where models are, and which one.
_PASSED_ON = ("QWEN3VL_MODEL", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE")
_EPILOG = """examples:
  qwen3vl service install                         on the socket that `qwen3vl ask` looks for
  qwen3vl service install -- --model demo --socket --port 1234
  qwen3vl service install --dry-run               print what it would write
  qwen3vl service status
  qwen3vl service remove

What stands after -- are options of `qwen3vl serve` (default: --socket --idle-unload 10m, which
frees the model's memory when nobody has asked for ten minutes). The server starts when you log in,
and again when it fails. On other systems than macOS, install and remove print what they would do.

Exit status: 0 done (status: it runs), 1 the machine's fault (status: it does not run), 2 bad input.
"""

Run: TypeAlias = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Service:
    """One launchd agent of this user."""

    label: str
    home: Path

    @property
    def plist(self) -> Path:
        return self.home / "Library" / "LaunchAgents" / f"{self.label}.plist"

    @property
    def log(self) -> Path:
        return self.home / "Library" / "Logs" / f"{self.label}.log"

    @property
    def domain(self) -> str:
        return f"gui/{os.getuid()}"

    @property
    def target(self) -> str:
        return f"{self.domain}/{self.label}"


@dataclass(frozen=True)
class Status:
    """What there is of a service: pid and last_exit by launchd, model by its server."""

    label: str
    installed: bool
    running: bool
    pid: int | None
    last_exit: str | None
    address: str
    answers: bool
    model: str | None
    log: str


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Keep `qwen3vl serve` running in the background, by launchd.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True)
    install = commands.add_parser("install", help="start it now and at every login")
    remove = commands.add_parser("remove", help="stop it and start it no more")
    status = commands.add_parser("status", help="tell whether it runs")
    for each in (install, remove, status):
        each.add_argument("--label", default=LABEL, help="its name (default: %(default)s)")
        each.add_argument("--debug", action="store_true", help="show tracebacks")
    for each in (install, remove):
        each.add_argument("--dry-run", action="store_true", help="print what would be done")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    install.add_argument(
        "serve", nargs="*", metavar="OPTION", help="after --: options of `qwen3vl serve`"
    )
    return p


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.service") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    return cli.run(lambda: act(args, Path.home(), sys.platform, run), debug=args.debug)


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of the system's and return what it said."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def act(args: argparse.Namespace, home: Path, platform: str, run: Run) -> None:
    """Do what `args` say. Raises Qwen3VLError."""
    if "/" in args.label or not args.label.strip():
        raise InputError(f"--label {args.label!r} must be a name such as {LABEL}")
    service = Service(args.label, home)
    has_launchd = platform == "darwin"
    if args.command == "install":
        definition = define(service, args.serve or SERVE, sys.executable, os.environ)
        if args.dry_run or not has_launchd:
            print_plan(service, definition, has_launchd)
            tell_not_done(has_launchd, "installed")
        else:
            install(service, definition, run)
    elif args.command == "remove":
        if args.dry_run or not has_launchd:
            print(f"launchctl bootout {service.target}\nrm {shlex.quote(str(service.plist))}")
            tell_not_done(has_launchd, "removed")
        else:
            remove(service, run)
    else:
        tell_status(find_status(service, run if has_launchd else None), as_json=args.json)


def tell_not_done(has_launchd: bool, what: str) -> None:
    """Say on stderr that what was printed was not done."""
    why = "this was a dry run" if has_launchd else "launchd is macOS's, and this is another system"
    print(f"note: nothing was {what}: {why}", file=sys.stderr)


def define(service: Service, serve: Sequence[str], python: str, environment: Any) -> dict[str, Any]:
    """The agent, as launchd.plist(5) has it. Raises InputError for options `serve` would refuse."""
    check_serve_options(serve)
    variables = {name: environment[name] for name in _PASSED_ON if environment.get(name)}
    if Path(model := variables.get("QWEN3VL_MODEL", "demo")).is_dir():
        variables["QWEN3VL_MODEL"] = os.path.abspath(model)
    definition: dict[str, Any] = {
        "Label": service.label,
        "ProgramArguments": [python, "-m", _MODULE, *serve],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": _RESTART_SEC,
        "ProcessType": "Interactive",  # somebody waits for its answers
        "WorkingDirectory": os.getcwd(),  # relative paths among the options mean the same there
        "StandardOutPath": str(service.log),
        "StandardErrorPath": str(service.log),
    }
    if variables:
        definition["EnvironmentVariables"] = variables
    return definition


def check_serve_options(serve: Sequence[str]) -> None:
    """Tell of options that the server would refuse now, and not in a log. Raises InputError."""
    from contextlib import redirect_stderr
    from io import StringIO

    from qwen3vl_mlx.server.arguments import parser as serve_parser
    from qwen3vl_mlx.server.command import server_options

    said = StringIO()
    try:
        with redirect_stderr(said):
            args = serve_parser("qwen3vl serve").parse_args(list(serve))
    except SystemExit as error:
        reason = said.getvalue().strip().splitlines() or ["this only prints its help"]
        raise InputError(f"{shlex.join(serve)}: {reason[-1]}") from error
    server_options(args)


def print_plan(service: Service, definition: dict[str, Any], has_launchd: bool) -> None:
    """What `install` does, for people to read or to do themselves."""
    print(f"write {service.plist}:\n")
    print(plistlib.dumps(definition, sort_keys=False).decode())
    print("run:")
    for command in _start_commands(service):
        print(f"  {shlex.join(command)}")
    if not has_launchd:
        print(f"\nHere, run it yourself:\n  {shlex.join(definition['ProgramArguments'])}")


def _start_commands(service: Service) -> list[list[str]]:
    return [
        ["launchctl", "bootstrap", service.domain, str(service.plist)],
        ["launchctl", "kickstart", service.target],
    ]


def install(service: Service, definition: dict[str, Any], run: Run) -> None:
    """Write the agent and start it; one that runs is replaced. Raises Qwen3VLError."""
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise InputError("the server needs more packages: pip install 'qwen3vl-mlx[server]'")
    check_ours(service)
    write_private(service.plist, plistlib.dumps(definition, sort_keys=False))
    service.log.parent.mkdir(parents=True, exist_ok=True)
    run(["launchctl", "bootout", service.target])  # fails where none runs, as it mostly does
    for command in _start_commands(service):
        done = _patiently(command, run)
        if done.returncode:
            problem = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
            raise Qwen3VLError(
                f"{shlex.join(command)} failed: {problem}; {service.plist} is written, "
                f"`qwen3vl service remove` takes it away"
            )
    print(f"{service.label} runs, and starts at every login.")
    print(f"its log: {service.log}")


def _patiently(command: Sequence[str], run: Run) -> subprocess.CompletedProcess[str]:
    """Run it again while it fails: launchd refuses for a moment after an agent was stopped."""
    for _ in range(_TRIES - 1):
        if (done := run(command)).returncode == 0:
            return done
        time.sleep(_TRY_SEC)
    return run(command)


def remove(service: Service, run: Run) -> None:
    """Stop the agent and delete its file. Raises InputError where there is none."""
    check_ours(service)
    done = run(["launchctl", "bootout", service.target])
    if not service.plist.exists():
        if done.returncode:
            raise InputError(f"no service {service.label} is installed")
    else:
        service.plist.unlink()
    print(f"{service.label} is removed. Its log is kept: {service.log}")


def check_ours(service: Service) -> None:
    """Never touch somebody else's agent. Raises InputError."""
    if not service.plist.exists():
        return
    try:
        arguments = plistlib.loads(service.plist.read_bytes()).get("ProgramArguments", ())
    except (OSError, ValueError, AttributeError, plistlib.InvalidFileException) as error:
        raise InputError(f"{service.plist} cannot be read: {error}; move it away") from error
    if _MODULE not in arguments:
        raise InputError(
            f"{service.plist} starts another program; choose another --label, or move it away"
        )


def write_private(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, for its owner only: options may hold a key."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def find_status(service: Service, run: Run | None) -> Status:
    """What launchd and the socket say. run None: there is no launchd."""
    said = "" if run is None else run(["launchctl", "print", service.target]).stdout
    pairs = (line.partition("=") for line in said.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    pid = fields.get("pid", "")
    server = server_of(service)
    model, answers = None, server.socket is None or client.listens(server.socket)
    if answers:
        try:
            model = client.served_models(server)[0]
        except Qwen3VLError:
            answers = False
    return Status(
        label=service.label,
        installed=service.plist.exists(),
        running=fields.get("state") == "running",
        pid=int(pid) if pid.isdecimal() else None,
        last_exit=fields.get("last exit code"),
        address=server.address,
        answers=answers,
        model=model,
        log=str(service.log),
    )


def server_of(service: Service) -> client.Server:
    """Where the installed agent listens; without one, the socket that `ask` looks for."""
    from qwen3vl_mlx.server.arguments import parser as serve_parser
    from qwen3vl_mlx.server.options import ServerOptions

    key = os.environ.get(client.API_KEY_VARIABLE)
    try:
        arguments = plistlib.loads(service.plist.read_bytes())["ProgramArguments"]
        args = serve_parser("qwen3vl serve").parse_args(arguments[arguments.index(_MODULE) + 1 :])
    except (OSError, ValueError, LookupError, TypeError, plistlib.InvalidFileException):
        return client.Server(str(default_socket()), default_socket(), key)
    if args.socket is None:
        port = ServerOptions.port if args.port is None else args.port
        return client.Server(f"http://localhost:{port}", api_key=key)
    path = Path(args.socket).expanduser()
    return client.Server(str(path), path, key)


def tell_status(status: Status, *, as_json: bool) -> None:
    """Print it. Raises Qwen3VLError where nothing answers, for the exit status."""
    if as_json:
        print(json.dumps(asdict(status)))
    else:
        agent = "installed" if status.installed else "not installed"
        if status.running:
            agent = f"runs, process {status.pid}"
        elif status.installed and status.last_exit is not None:
            agent += f", does not run; its last exit status: {status.last_exit}"
        print(f"service:  {status.label} {agent}")
        print(f"address:  {status.address} {'answers' if status.answers else 'does not answer'}")
        print(f"model:    {status.model or '-'}")
        if status.installed:
            print(f"log:      {status.log}")
    if not (status.running or status.answers):
        sys.stdout.flush()
        raise Qwen3VLError("no server runs")


if __name__ == "__main__":
    sys.exit(main())
