"""The command line of the page: `python -m app`, `qwen3vl app`."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx import cli
from qwen3vl_mlx.errors import InputError, Qwen3VLError

if TYPE_CHECKING:
    from app.models import Models, Wish
    from app.serving import Place
    from qwen3vl_mlx import EngineOptions

PASSWORD_VARIABLE = "QWEN3VL_APP_AUTH"
_LAST_SEC = 5.0  # for a model that is being loaded when the app is stopped

_EPILOG = """examples:
  python -m app --model demo --open
  python -m app --model mlx-community/Qwen3-VL-8B-Instruct-4bit
  QWEN3VL_APP_AUTH=me:secret python -m app --host 0.0.0.0

It listens at once and loads the model meanwhile. Nothing leaves this machine but the download of a
model that you choose, unless you ask for --share.

exit status: 0 stopped, 1 the machine's fault, 2 bad option
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog=prog,
        description="Open a web page that talks with a Qwen3-VL model about your pictures.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("-m", "--model", help='a folder, a Hub id, or "demo" ($QWEN3VL_MODEL)')
    result.add_argument("--revision", help="the Hub's branch, tag or commit")
    result.add_argument(
        "-p", "--port", type=int, default=7860, metavar="N", help="%(default)s; 0: any free one"
    )
    result.add_argument("--open", action="store_true", help="open the page in your browser")
    result.add_argument("--debug", action="store_true", help="show tracebacks")
    cli.add_quantize(result)
    who = result.add_argument_group("who may use it")
    who.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="%(default)s: only this machine can connect",
    )
    who.add_argument(
        "--auth",
        metavar="NAME:PASSWORD",
        help=f"ask for them first (${PASSWORD_VARIABLE} does the same, unseen by `ps`)",
    )
    who.add_argument(
        "--insecure", action="store_true", help="let others than this machine in without --auth"
    )
    who.add_argument(
        "--share", action="store_true", help="make a public link, by Gradio's servers, for a week"
    )
    engine = result.add_argument_group("engine")
    engine.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="answers made at once (%(default)s)"
    )
    engine.add_argument("--kv-bits", type=int, choices=(4, 8), help="keys and values in fewer bits")
    engine.add_argument(
        "--cache-folder", metavar="DIR", help="keeps what was read of pictures over restarts"
    )
    engine.add_argument("--lookup", action="store_true", help="guess ahead from what was said")
    return result


def main(argv: Sequence[str] | None = None, prog: str = "python -m app") -> int:
    """Run the page until it is stopped. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    return cli.run(lambda: serve(args), debug=args.debug)


def serve(args: argparse.Namespace) -> None:
    """Serve as `args` say. Raises Qwen3VLError."""
    place = place_of(args)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError("the page needs gradio: pip install 'qwen3vl-mlx[app]'") from error

    from app.models import Models, loader

    wish, engine = wish_of(args), engine_options(args)
    models = Models(loader(engine), wish)
    finished = False
    try:
        _run(models, place, browser=args.open)
    finally:
        finished = models.close(_LAST_SEC)
    if not finished:
        sys.stdout.flush()
        os._exit(0)  # the interpreter's own end, under a thread that computes, would abort


def _run(models: Models, place: Place, *, browser: bool) -> None:
    import signal
    import threading

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    from app.serving import served

    with served(models, place) as page:
        print(f"{page.url} (Ctrl-C stops)", flush=True)
        if page.page.share_url:
            print(f"{page.page.share_url} (for everybody who has this link)", flush=True)
        if browser:
            import webbrowser

            webbrowser.open(page.url)
        reported = None
        while not stop.wait(0.2):
            status = models.status
            if status.state == "failed" and status is not reported:
                reported = status
                print(f"error: {' '.join(status.note.split())}", file=sys.stderr, flush=True)


def place_of(args: argparse.Namespace) -> Place:
    """Checked. Raises InputError, also for a page that would be open to everybody."""
    from app.guard import is_loopback
    from app.serving import Place, own_names

    given = args.auth or os.environ.get(PASSWORD_VARIABLE)
    name, _, password = (given or "").partition(":")
    if given and not (name and password):
        raise InputError("--auth takes NAME:PASSWORD, both not empty")
    local = is_loopback(args.host)
    if not (local or given or args.insecure):
        raise InputError(
            f"--host {args.host} lets other machines in: give --auth NAME:PASSWORD, or "
            "--insecure if everybody there may ask"
        )
    if args.share and not (given or args.insecure):
        raise InputError(
            "--share lets everybody in who has the link: give --auth NAME:PASSWORD, or --insecure "
            "if everybody may ask"
        )
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port must be 0 to 65535, got {args.port}")
    return Place(
        host=args.host,
        port=free_port(args.host, args.port),
        names=None if args.share else () if local else tuple(own_names()),
        auth=(name, password) if given else None,
        share=args.share,
    )


def free_port(host: str, port: int) -> int:
    """The port itself, or any that is free for 0. Raises Qwen3VLError where it is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"host {host!r} is no address of this machine: {error}") from error
    try:
        with socket.create_server((str(address[0]), port), family=family) as listening:
            return int(listening.getsockname()[1])
    except OSError as error:
        raise Qwen3VLError(
            f"cannot listen on port {port} of {host} ({error.strerror or error}): choose another "
            "port (0 is any that is free)"
        ) from error


def wish_of(args: argparse.Namespace) -> Wish:
    """What to load first. Raises Qwen3VLError for a name that nothing has."""
    from app.models import Wish
    from qwen3vl_mlx import hub

    model = args.model or hub.default_model()
    cli.check_model(args, model)
    return Wish(model, args.revision, args.quantize, args.topology)


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """Raises InputError."""
    from qwen3vl_mlx import EngineOptions

    return EngineOptions(
        max_batch=args.max_batch,
        kv_bits=args.kv_bits,
        cache_folder=Path(args.cache_folder).expanduser() if args.cache_folder else None,
        speculative="lookup" if args.lookup else None,
    )
