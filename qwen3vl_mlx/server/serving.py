"""What all routes of one server share."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from fastapi import Depends, Request

from qwen3vl_mlx.server.host import ModelHost
from qwen3vl_mlx.server.layouts import Layouts
from qwen3vl_mlx.server.metrics import Metrics
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.pictures import Pictures
from qwen3vl_mlx.server.response_store import ResponseStore


@dataclass(frozen=True)
class Serving:
    """One server: its model, its limits and what it remembers."""

    options: ServerOptions
    host: ModelHost
    pictures: Pictures
    metrics: Metrics
    responses: ResponseStore
    layouts: Layouts = field(default_factory=Layouts)
    started: float = field(default_factory=time.time)  # seconds since 1970
    scoring: asyncio.Lock = field(default_factory=asyncio.Lock)  # one whole pass at a time


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


ServingOf: TypeAlias = Annotated[Serving, Depends(_serving)]
