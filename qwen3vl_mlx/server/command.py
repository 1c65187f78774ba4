"""The command line of the server: `python -m qwen3vl_mlx.server`, `qwen3vl serve`."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx import cli
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.media import MAX_SOURCE_PIXELS
from qwen3vl_mlx.server.arguments import API_KEY_VARIABLE, parser
from qwen3vl_mlx.server.options import ServerOptions

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL
    from qwen3vl_mlx.engine.engine import EngineOptions

# Of a socket alone, where only the owner's own commands ask: what they take without a server.
_OWNERS = ServerOptions(
    max_image_pixels=MAX_SOURCE_PIXELS,
    max_download_bytes=512 * 2**20,
    max_body_bytes=2**30,
)


def server_options(args: argparse.Namespace) -> ServerOptions:
    """Checked. Raises InputError, also for a server that would be open to everybody."""
    keys = api_keys(args)
    local = is_loopback(args.host)
    if not (local or keys or args.insecure):
        raise InputError(
            f"--host {args.host} lets other machines in: give a key by ${API_KEY_VARIABLE} or "
            "--api-key-file, or --insecure if everybody there may ask"
        )
    port = args.port
    if port is None and args.socket is None:
        port = ServerOptions.port
    if port is not None and not 0 <= port < 2**16:
        raise InputError(f"--port must be 0 to 65535, got {args.port}")
    defaults = ServerOptions() if port is not None else _OWNERS
    for name in ("max_images", "max_image_pixels", "max_pixels", "max_body", "max_download"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for origin in args.cors_origin:
        if not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise InputError(f"--cors-origin {origin!r}: expected scheme://host[:port]")
    return ServerOptions(
        host=args.host,
        port=port,
        socket=None if args.socket is None else Path(args.socket).expanduser().absolute(),
        api_keys=keys,
        insecure=args.insecure,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=(*args.allowed_host, *([] if local else own_names())),
        image_roots=image_roots(args.image_root, local),
        allow_private_urls=args.allow_private_urls,
        max_images=args.max_images,
        max_image_pixels=args.max_image_pixels or defaults.max_image_pixels,
        max_pixels=args.max_pixels,
        max_download_bytes=args.max_download or defaults.max_download_bytes,
        max_body_bytes=args.max_body or defaults.max_body_bytes,
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


def own_names() -> list[str]:
    """What others on the network call this machine."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return list(dict.fromkeys([name, short, f"{short}.local"]))


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the options, the file and the environment. Raises InputError."""
    keys = [*args.api_key, *filter(None, [os.environ.get(API_KEY_VARIABLE)])]
    if args.api_key_file is not None:
        path = Path(args.api_key_file).expanduser()
        try:
            keys += filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))
        except (OSError, ValueError) as error:
            problem = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"--api-key-file {path} cannot be read: {problem}") from error
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
    cli.check_model(args, model)
    if args.draft is not None:
        hub.local_folder(args.draft)
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
