"""The page on a port: started, and stopped with nothing left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.models import Models
from app.session import Sessions

if TYPE_CHECKING:
    import gradio as gr

_MAX_UPLOAD = "100mb"  # of one file; above any camera


@dataclass(frozen=True)
class Place:
    """Where the page is served, and to whom.

    names: what others call this machine: see `Guard`.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    names: tuple[str, ...] | None = ()
    auth: tuple[str, str] | None = None
    share: bool = False


@dataclass(frozen=True)
class Served:
    """A page that is served. `url` has no slash at its end."""

    url: str
    sessions: Sessions
    page: gr.Blocks


@contextmanager
def served(models: Models, place: Place) -> Iterator[Served]:
    """Serve until the block ends. Uploads lie in a private folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="qwen3vl-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read whenever a component is made
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # its import would look for new versions
        # Gradio asks for matplotlib's backend, which takes a second to find unless it is named.
        os.environ.setdefault("MPLBACKEND", "agg")
        sessions = Sessions()
        page = _launch(models, sessions, place, Path(folder))
        try:
            yield Served(str(page.local_url).rstrip("/"), sessions, page)
        finally:
            sessions.stop_all()
            page.close(verbose=False)


def _launch(models: Models, sessions: Sessions, place: Place, folder: Path) -> gr.Blocks:
    from starlette.middleware import Middleware

    from app.guard import Guard
    from app.page import HEAD, STYLE, build_page, theme

    page = build_page(models, sessions, folder)
    page.launch(
        server_name=place.host,
        server_port=place.port,
        share=place.share,
        auth=place.auth,
        theme=theme(),
        css_paths=STYLE,
        head=HEAD,
        app_kwargs={"middleware": [Middleware(Guard, names=place.names)]},
        allowed_paths=[],
        max_file_size=_MAX_UPLOAD,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return page


def own_names() -> Sequence[str]:
    """What others on the network call this machine."""
    import socket

    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return list(dict.fromkeys([name, short, f"{short}.local"]))
