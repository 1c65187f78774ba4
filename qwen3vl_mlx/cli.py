"""`qwen3vl COMMAND`, and the process edge that all commands share: exit codes, one-line errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

COMMANDS = {  # name: (module, what it does)
    "ask": ("ask", "ask one question, of a running server or by loading a model"),
    "chat": ("chat.command", "talk with a model in the terminal"),
    "app": ("app", "open the web page: upload pictures and ask"),
    "caption": ("caption", "describe every picture of a folder"),
    "watch": ("watch", "describe new pictures of a folder as they come"),
    "generate": ("generate", "answer a prompt about pictures, all options"),
    "serve": ("server.command", "serve a model to the clients of OpenAI and Anthropic"),
    "service": ("service", "keep the server running in the background, by launchd"),
    "models": ("models_command", "list, download, inspect and remove checkpoints"),
    "doctor": ("doctor", "tell whether this machine is ready, and what fits it"),
    "convert": ("convert", "convert and quantize a checkpoint"),
    "evaluate": ("evaluate", "compare quantized checkpoints with their source"),
    "bench": ("bench", "measure this machine on a checkpoint"),
}

_USAGE = """usage: qwen3vl COMMAND [options]

commands:
{commands}

`qwen3vl COMMAND --help` explains a command's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qwen3vl`. Returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] in COMMANDS:
        module, _ = COMMANDS[args[0]]
        name = module if module == "app" else f"qwen3vl_mlx.{module}"
        return int(import_module(name).main(args[1:], prog=f"qwen3vl {args[0]}"))
    lines = (f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    usage = _USAGE.format(commands="\n".join(lines))
    if args and args[0] == "--version":
        from qwen3vl_mlx import __version__

        print(__version__)
        return 0
    if args and args[0] in ("-h", "--help"):
        print(usage, end="")
        return 0
    problem = f"error: no command {args[0]!r}\n\n" if args else ""
    sys.stderr.write(problem + usage)
    return 2


def add_quantize(
    parser: argparse.ArgumentParser, title: str = "quantization while loading"
) -> None:
    """The options of every command that loads a model."""
    group = parser.add_argument_group(title)
    group.add_argument(
        "--quantize",
        metavar="NAME",
        help='"4bit", "mxfp4", "mixed_3_6", "q4k", or "auto": the best that fits this machine',
    )
    group.add_argument("--topology", metavar="FILE", help="YAML file of exceptions to --quantize")


def check_model(args: argparse.Namespace, model: str) -> None:
    """Tell of wrong names before anything waits for the model. Raises Qwen3VLError.

    args: with the options of `add_quantize`, and revision.
    """
    from qwen3vl_mlx import hub
    from qwen3vl_mlx.errors import InputError
    from qwen3vl_mlx.quant.recipes import parse_recipe

    hub.local_folder(model, args.revision)
    if args.quantize is not None and args.quantize.strip().lower() != "auto":
        parse_recipe(args.quantize, num_layers=1)
    if args.topology is not None and args.quantize is None:
        raise InputError("--topology holds exceptions: say from what, with --quantize 4bit")
    if args.topology is not None and not os.path.isfile(args.topology):
        raise InputError(f"--topology {args.topology}: no such file")


def size(nbytes: int) -> str:
    """Bytes for people: `5.15 MB`, `1.86 GB`."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def run(action: Callable[[], None], *, debug: bool = False) -> int:
    """Run a command's body and return its exit status; errors become one line on stderr.

    0 done, 1 the machine's or checkpoint's fault, 2 bad input, 130 interrupted, 141 reader gone.
    """
    from qwen3vl_mlx.errors import Qwen3VLError

    try:
        action()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would complain again when it flushes stdout on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Qwen3VLError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"error: {problem} (--debug shows where)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
