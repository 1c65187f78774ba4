"""The command line of the server: `python -m qwen3vl_mlx.server`, `qwen3vl serve`."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx import cli
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.server.options import ServerOptions

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL
    from qwen3vl_mlx.engine.engine import EngineOptions

API_KEY_VARIABLE = "QWEN3VL_API_KEY"

_DEFAULTS = ServerOptions()
_MAX_BATCH = 32  # strangers wait worse than one's own script: more at once, each a little slower
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

_EXAMPLES = """examples:
  python -m qwen3vl_mlx.server --model demo
  python -m qwen3vl_mlx.server --model mlx-community/Qwen3-VL-8B-Instruct-4bit --idle-unload 10m
  python -m qwen3vl_mlx.server --host 0.0.0.0 --api-key-file ~/.qwen3vl-key

Point any OpenAI client at http://localhost:1234/v1, any Anthropic client at http://localhost:1234.
Pictures are URLs, data URIs, base64 and, on this machine alone, paths below your home folder.

exit status: 0 stopped, 1 the checkpoint's or machine's fault, 2 bad option
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
        "--alias", action="append", default=[], metavar="NAME", help="one more name; repeat"
    )
    result.add_argument("-p", "--port", type=int, default=_DEFAULTS.port, help="0: any free one")
    result.add_argument("--host", default=_DEFAULTS.host, help=f"default {_DEFAULTS.host}")
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
    group.add_argument("--max-images", type=int, default=_DEFAULTS.max_images, metavar="N")
    group.add_argument(
        "--max-pixels", type=int, metavar="N", help="of a picture as the model sees it, at most"
    )
    group.add_argument(
        "--max-image-pixels",
        type=int,
        default=_DEFAULTS.max_image_pixels,
        metavar="N",
        help="of a picture as it is sent, at most",
    )
    group.add_argument(
        "--max-download", type=size, default=_DEFAULTS.max_download_bytes, metavar="SIZE"
    )


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--timeout", type=duration, default=_DEFAULTS.timeout, metavar="T", help="of one answer"
    )
    group.add_argument("--max-body", type=size, default=_DEFAULTS.max_body_bytes, metavar="SIZE")
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
        help="free the model's memory after so long without a request, such as 10m",
    )
    group.add_argument("--enable-re-isq", action="store_true", help="clients may requantize")
    group.add_argument(
        "--shutdown-timeout",
        type=duration,
        default=_DEFAULTS.shutdown_sec,
        metavar="T",
        help="for answers under way when the server is stopped",
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-batch",
        type=int,
        default=_MAX_BATCH,
        metavar="N",
        help=f"answers made at once, as memory allows (default {_MAX_BATCH})",
    )
    group.add_argument("--max-queue", type=int, metavar="N", help="requests that may wait")
    group.add_argument("--kv-bits", type=int, choices=(4, 8), help="keys and values in fewer bits")
    group.add_argument("--memory-limit", type=size, metavar="SIZE", help="for all of it")
    group.add_argument("--prefix-cache", type=size, metavar="SIZE", help="for earlier prompts")
    group.add_argument("--feature-cache", type=size, metavar="SIZE", help="for encoded pictures")
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


def server_options(args: argparse.Namespace) -> ServerOptions:
    """Checked. Raises InputError, also for a server that would be open to everybody."""
    keys = api_keys(args)
    local = is_loopback(args.host)
    if not (local or keys or args.insecure):
        raise InputError(
            f"--host {args.host} lets other machines in: give --api-key (or ${API_KEY_VARIABLE}), "
            "or --insecure if everybody there may ask"
        )
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port must be 0 to 65535, got {args.port}")
    for name in ("max_images", "max_image_pixels", "max_pixels", "max_body", "max_download"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for origin in args.cors_origin:
        if not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise InputError(f"--cors-origin {origin!r}: expected scheme://host[:port]")
    return ServerOptions(
        host=args.host,
        port=args.port,
        api_keys=keys,
        insecure=args.insecure,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=tuple(args.allowed_host),
        image_roots=image_roots(args.image_root, local),
        allow_private_urls=args.allow_private_urls,
        max_images=args.max_images,
        max_image_pixels=args.max_image_pixels,
        max_pixels=args.max_pixels,
        max_download_bytes=args.max_download,
        max_body_bytes=args.max_body,
        timeout=args.timeout,
        truncate=args.truncate_sequence,
        unknown_fields=args.unknown_fields,
        aliases=tuple(args.alias),
        idle_unload_sec=args.idle_unload,
        enable_re_isq=args.enable_re_isq,
        shutdown_sec=args.shutdown_timeout,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the options, the file and the environment. Raises InputError."""
    keys = [*args.api_key, *filter(None, [os.environ.get(API_KEY_VARIABLE)])]
    if args.api_key_file is not None:
        path = Path(args.api_key_file).expanduser()
        try:
            keys += filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))
        except (OSError, ValueError) as error:
            raise InputError(f"--api-key-file {path}: {error}") from error
        if not keys:
            raise InputError(f"--api-key-file {path} holds no key; write one a line")
    if any(not key.isascii() or not key.strip() for key in keys):
        raise InputError("an API key must be ASCII text and not empty")
    return tuple(keys)


def image_roots(given: Sequence[str] | None, local: bool) -> tuple[Path, ...]:
    """The folders whose files clients may name. Raises InputError."""
    if given is None:
        return (Path.home(),) if local else ()
    if given == ["none"]:
        return ()
    roots = [Path(name).expanduser().absolute() for name in given]
    for root in roots:
        if not root.is_dir():
            raise InputError(f"--image-root {root} is not a folder")
    return tuple(roots)


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """Raises InputError."""
    from qwen3vl_mlx.engine.engine import EngineOptions

    given = {
        "max_batch": args.max_batch,
        "max_queue": args.max_queue,
        "kv_bits": args.kv_bits,
        "memory_limit": args.memory_limit,
        "prefix_cache_bytes": args.prefix_cache,
        "feature_cache_bytes": args.feature_cache,
        "cache_folder": Path(args.cache_folder).expanduser() if args.cache_folder else None,
        "speculative": "lookup" if args.lookup else None,
    }
    return EngineOptions(**{name: value for name, value in given.items() if value is not None})


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.server") -> int:
    """Run the server until it is stopped. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    return cli.run(lambda: serve(args), debug=args.debug)


def serve(args: argparse.Namespace) -> None:
    """Serve as `args` say. Raises Qwen3VLError."""
    options = server_options(args)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the server needs {error.name}: pip install 'qwen3vl-mlx[server]'"
        ) from error

    from qwen3vl_mlx import hub
    from qwen3vl_mlx.server.run import run
    from qwen3vl_mlx.server.start import new_serving

    model = args.model or hub.default_model()
    # Pillow has one for every bad tag of a TIFF file.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    hub.local_folder(model, args.revision)  # a wrong name is told now, not by every request
    engine = engine_options(args)

    def load() -> Qwen3VL:
        from qwen3vl_mlx.api import load

        return load(
            model,
            revision=args.revision,
            quantize=args.quantize,
            topology=args.topology,
            draft=args.draft,
            engine=engine,
            progress=True,
        )

    run(new_serving(load, model, options), debug=args.debug)
