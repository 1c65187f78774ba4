"""The server's options, as the command line has them."""

from __future__ import annotations

import argparse
import re

from qwen3vl_mlx import cli
from qwen3vl_mlx.folders import default_socket
from qwen3vl_mlx.server.options import ServerOptions

API_KEY_VARIABLE = "QWEN3VL_API_KEY"

_DEFAULTS = ServerOptions()
_MAX_BATCH = 32  # strangers wait worse than one's own script: more at once, each a little slower
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

_EXAMPLES = """examples:
  python -m qwen3vl_mlx.server --model demo
  python -m qwen3vl_mlx.server --model mlx-community/Qwen3-VL-8B-Instruct-4bit --idle-unload 10m
  python -m qwen3vl_mlx.server --host 0.0.0.0 --api-key-file ~/.qwen3vl-key
  python -m qwen3vl_mlx.server --alias gpt-4o
  python -m qwen3vl_mlx.server --socket

Point any OpenAI client at http://localhost:1234/v1, any Anthropic client at http://localhost:1234.
Pictures are URLs, data URIs, base64 and, on this machine alone, paths below your home folder.
T is a time (30s, 10m, 2h), SIZE a size (500MB, 2GB).

It listens at once and loads meanwhile. Where the model cannot be loaded it goes on, and says why at
/health and to every request.

exit status: 0 stopped, 1 the machine's fault, 2 bad option, 130 Ctrl-C twice
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog=prog,
        description="Serve a Qwen3-VL model to the clients of OpenAI and Anthropic.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("-m", "--model", help='a folder, a Hub id, or "demo" ($QWEN3VL_MODEL)')
    result.add_argument("--revision", help="the Hub's branch, tag or commit")
    result.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME",
        help="one more name, such as gpt-4o for an app that asks for that; repeat",
    )
    result.add_argument(
        "-p",
        "--port",
        type=int,
        metavar="N",
        help=f"{_DEFAULTS.port}, or none with --socket; 0: any free one",
    )
    result.add_argument(
        "--socket",
        nargs="?",
        const=str(default_socket()),
        metavar="PATH",
        help="listen on a Unix socket that only you can open, at PATH or where `qwen3vl ask` and "
        "its like look for it, and on a port only if --port is given too",
    )
    result.add_argument(
        "--host",
        default=_DEFAULTS.host,
        metavar="ADDRESS",
        help="%(default)s: only this machine can connect",
    )
    result.add_argument("--debug", action="store_true", help="tracebacks, and more in the log")
    cli.add_quantize(result)
    _add_safety(result.add_argument_group("who may ask"))
    _add_pictures(result.add_argument_group("pictures"))
    _add_requests(result.add_argument_group("requests"))
    _add_engine(result.add_argument_group("engine"))
    return result


def _add_safety(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"clients must send it; repeat (${API_KEY_VARIABLE} does the same, unseen by `ps`)",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="keys, one a line")
    group.add_argument(
        "--insecure", action="store_true", help="let others than this machine in without a key"
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page that may ask, such as http://localhost:3000; repeat",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which this server is reached; repeat",
    )


def _add_pictures(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--image-root",
        action="append",
        metavar="DIR",
        help="clients may name files below DIR; repeat (default: your home folder if only this "
        'machine can connect, else none; "none" for none)',
    )
    group.add_argument(
        "--allow-private-urls",
        action="store_true",
        help="also fetch pictures from this machine and its network, from any port, by proxy",
    )
    group.add_argument(
        "--max-images",
        type=int,
        default=_DEFAULTS.max_images,
        metavar="N",
        help="of one request (%(default)s)",
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="of a picture as the model sees it, whatever requests say (the checkpoint's limit)",
    )
    group.add_argument(
        "--max-image-pixels",
        type=int,
        metavar="N",
        help=f"of a picture as it is sent ({_DEFAULTS.max_image_pixels}, more on a socket alone)",
    )
    group.add_argument(
        "--max-download",
        type=size,
        metavar="SIZE",
        help="of a picture by URL or path (32MB, or 512MB on a socket alone)",
    )


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--timeout",
        type=duration,
        default=_DEFAULTS.timeout,
        metavar="T",
        help="of one answer that asks for none (10m)",
    )
    group.add_argument(
        "--max-body",
        type=size,
        metavar="SIZE",
        help="of a request (64MB, or 1GB on a socket alone)",
    )
    group.add_argument(
        "--truncate-sequence",
        action="store_true",
        help="drop the oldest turns of conversations that are too long",
    )
    group.add_argument(
        "--unknown-fields",
        choices=("warn", "refuse"),
        default="warn",
        help="what becomes of a request's fields that nobody knows (warn: log and header)",
    )
    group.add_argument(
        "--idle-unload",
        type=duration,
        metavar="T",
        help="free the model's memory after so long without a request (never)",
    )
    group.add_argument("--enable-re-isq", action="store_true", help="clients may requantize")
    group.add_argument(
        "--shutdown-timeout",
        type=duration,
        default=_DEFAULTS.shutdown_sec,
        metavar="T",
        help="for answers under way when the server is stopped (30s)",
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-batch",
        type=int,
        default=_MAX_BATCH,
        metavar="N",
        help="answers made at once, as memory allows (%(default)s)",
    )
    group.add_argument("--max-queue", type=int, metavar="N", help="requests that may wait (256)")
    group.add_argument("--kv-bits", type=int, choices=(4, 8), help="keys and values in fewer bits")
    group.add_argument(
        "--memory-limit",
        type=size,
        metavar="SIZE",
        help="for weights, caches and work (what the machine has for it)",
    )
    group.add_argument(
        "--prefix-cache", type=size, metavar="SIZE", help="for earlier prompts (2GB)"
    )
    group.add_argument(
        "--feature-cache", type=size, metavar="SIZE", help="for encoded pictures (512MB)"
    )
    group.add_argument("--cache-folder", metavar="DIR", help="keeps the prefix cache over restarts")
    guess = group.add_mutually_exclusive_group()
    guess.add_argument("--lookup", action="store_true", help="guess ahead from what was said")
    guess.add_argument("--draft", metavar="NAME", help="guess ahead with a smaller checkpoint")


def duration(text: str) -> float:
    """Seconds of `90`, `90s`, `10m`, `1.5h`, `2d`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower())
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give one such as 30s, 10m or 2h")
    return float(found[1]) * _UNITS[found[2] or "s"]


def size(text: str) -> int:
    """Bytes of `1000000`, `500M`, `2GB`, `1.5GiB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)I?B?", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 500MB or 2GB")
    return int(float(found[1]) * _SIZES[found[2]])
