"""How a server is run. Every limit has a default that is safe on a desktop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ServerOptions:
    """What `python -m qwen3vl_mlx.server --help` explains; sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    port: int | None = 1234  # None: no port at all, only the socket
    socket: Path | None = None  # of the file system; only this user can connect
    # Who may ask
    api_keys: tuple[str, ...] = ()
    insecure: bool = False  # no key although others than this machine can connect
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()  # names this server is reached by, beside its own
    # Pictures
    image_roots: tuple[Path, ...] = ()  # folders whose files may be named
    allow_private_urls: bool = False
    max_images: int = 64  # of one request
    max_image_pixels: int = 100_000_000  # of one picture as it is sent
    max_download_bytes: int = 32 * 2**20
    download_timeout: float = 20.0
    max_redirects: int = 3
    max_pixels: int | None = None  # of one picture as the model sees it; None: the model's limit
    # Requests
    max_body_bytes: int = 64 * 2**20
    max_json_depth: int = 64
    timeout: float | None = 600.0  # of one answer
    truncate: bool = False  # drop the oldest turns of what is too long, unless a request says not
    unknown_fields: Literal["warn", "refuse"] = "warn"
    max_stored_responses: int = 256
    max_stored_bytes: int = 256 * 2**20
    # The model
    aliases: tuple[str, ...] = ()
    idle_unload_sec: float | None = None
    enable_re_isq: bool = False
    # The connection
    keep_alive_sec: float = 10.0  # between comments in a silent stream
    shutdown_sec: float = 30.0  # for answers under way when the server is told to stop
