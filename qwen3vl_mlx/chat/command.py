"""`python -m qwen3vl_mlx.chat`: a conversation about pictures in the terminal, or in a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from qwen3vl_mlx import cli, hub
from qwen3vl_mlx.chat.commands import last_words
from qwen3vl_mlx.chat.loader import Loader, ModelChoice
from qwen3vl_mlx.chat.loop import converse, read_lines
from qwen3vl_mlx.chat.pictures import read_picture
from qwen3vl_mlx.chat.places import history_file
from qwen3vl_mlx.chat.screen import Piped, Terminal
from qwen3vl_mlx.chat.session import Session
from qwen3vl_mlx.chat.settings import check
from qwen3vl_mlx.chat.stopping import own_terminal
from qwen3vl_mlx.chat.store import folder_of, read_conversation
from qwen3vl_mlx.question_options import (
    add_bounds,
    add_pixels,
    add_sampling,
    pixels_of,
    sampling_of,
)

_EPILOG = """examples:
  python -m qwen3vl_mlx.chat
  python -m qwen3vl_mlx.chat --image photo.heic --system "Answer in one sentence."
  python -m qwen3vl_mlx.chat --model demo --temperature 0
  python -m qwen3vl_mlx.chat --load garden
  printf 'What is on a.png?\\nAnd its colour?\\n' | python -m qwen3vl_mlx.chat --model demo

then, for instance:
  > What is on "My Pictures/a b.HEIC" and https://example.com/c.jpg?
  > /set temperature 0.2
  > /retry
  > /save garden

/help lists the commands. From a pipe each line is a message or a command; answers go to stdout,
everything else to stderr. Exit status: 0 left, 1 the checkpoint, the Hub or the machine failed,
2 bad input, 130 interrupted while loading, 141 the reader closed stdout.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Talk with a Qwen3-VL model about pictures.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model",
        metavar="NAME",
        help='folder, Hub id or "demo" (default: that of --load, else $QWEN3VL_MODEL, else the '
        "4-bit 4B Instruct model of mlx-community, downloaded once)",
    )
    p.add_argument("--revision", help="branch, tag or commit of a Hub model")
    p.add_argument(
        "-i",
        "--image",
        action="append",
        default=[],
        metavar="IMAGE",
        help="path or URL, for the first question; repeat for several",
    )
    p.add_argument("--system", help="system message")
    p.add_argument("--load", metavar="NAME", help="go on with a conversation of /save")
    out = p.add_argument_group("terminal")
    out.add_argument("--plain", action="store_true", help="no Markdown and no colours")
    out.add_argument("--no-preview", action="store_true", help="do not show pictures")
    out.add_argument("--no-history", action="store_true", help="keep nothing of what is typed")
    out.add_argument("-v", "--verbose", action="store_true", help="in a pipe: statistics, thoughts")
    out.add_argument("--debug", action="store_true", help="show tracebacks")
    cli.add_quantize(p)
    add_pixels(p)
    sampling = p.add_argument_group("sampling (defaults: the checkpoint's; /set changes them)")
    add_sampling(sampling)
    add_bounds(sampling)
    return p


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.chat") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    run = _Run(args)
    status = cli.run(run.chat, debug=args.debug) or run.status
    if run.session is not None and not run.session.loader.done:
        # The interpreter cannot end while a thread computes, nor end that thread.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


class _Run:
    """One run of the command. status: of lines from a pipe that could not be done."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.status = 0
        self.session: Session | None = None

    def chat(self) -> None:
        """From the options to the end of the conversation. Raises Qwen3VLError."""
        args = self.args
        session = self.session = _session(args)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _talk(session, args)
        else:
            screen = Piped(args.verbose)
            screen.pictures(session.waiting)
            self.status = read_lines(sys.stdin, session, screen, debug=args.debug)


def _session(args: argparse.Namespace) -> Session:
    """All that can be wrong with the options is found before the weights are read."""
    changes = changes_of(args)
    attached = [read_picture(source) for source in args.image]
    folder = folder_of(args.load) if args.load is not None else None
    saved = read_conversation(folder) if folder is not None else None
    name = args.model or (hub.default_model() if saved is None else saved.model)
    choice = ModelChoice(name, args.revision, args.quantize, args.topology)
    choice.fetch()
    session = Session(Loader(choice), changes, args.system)
    session.waiting += attached
    if saved is not None and folder is not None:
        session.resume(saved, folder)
    return session


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that options ask for. Raises InputError."""
    wished = {
        **sampling_of(args),
        **pixels_of(args),
        "number_images": args.number_images or None,
    }
    changes = {name: value for name, value in wished.items() if value is not None}
    check(changes)
    return changes


def _talk(session: Session, args: argparse.Namespace) -> None:
    from qwen3vl_mlx.chat.console import Console, is_simple  # prompt_toolkit

    plain = args.plain or is_simple(os.environ)
    screen = Terminal(plain=plain, previews=not args.no_preview)
    session.meanwhile = lambda: screen.loading(session.loader.choice.name, session.loader.seconds)
    history = None if args.no_history else history_file()
    console = Console(session, history, plain)
    if session.saved_at is not None:
        screen.say(last_words(session))
    screen.pictures(session.waiting)
    with own_terminal():
        converse(session, screen, console, debug=args.debug)
