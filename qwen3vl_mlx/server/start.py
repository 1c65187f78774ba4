"""From a model and options to all that a server's routes share."""

from __future__ import annotations

from collections.abc import Callable

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.server.host import ModelHost
from qwen3vl_mlx.server.metrics import Metrics
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.pictures import Pictures
from qwen3vl_mlx.server.response_store import ResponseStore
from qwen3vl_mlx.server.serving import Serving


def new_serving(load: Callable[[], Qwen3VL], name: str, options: ServerOptions) -> Serving:
    """What `create_app` takes. Nothing is loaded before `serving.host.start()`."""
    host = ModelHost(load, [model_name(name), *options.aliases], options.idle_unload_sec)
    return Serving(
        options,
        host,
        Pictures(options),
        Metrics(host),
        ResponseStore(options.max_stored_responses, options.max_stored_bytes),
    )


def model_name(name: str) -> str:
    """What clients call the model: a Hub id as it is, a folder by its own name."""
    return (
        name if name.count("/") == 1 and name[0] not in "./~" else name.rstrip("/").split("/")[-1]
    )
