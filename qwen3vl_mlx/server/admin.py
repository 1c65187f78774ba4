"""What a server says of itself and its model, and quantizing the model anew."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from qwen3vl_mlx import __version__
from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.admission import weights_bytes
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.quant.policy import AUTO
from qwen3vl_mlx.quant.recipes import parse_recipe, preset_name
from qwen3vl_mlx.saving import live_assignment
from qwen3vl_mlx.server.body import JsonRoute
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.fields import Fields, check_fields
from qwen3vl_mlx.server.host import ModelHost
from qwen3vl_mlx.server.question import while_connected
from qwen3vl_mlx.server.reply import JsonReply
from qwen3vl_mlx.server.serving import Serving, ServingOf

router = APIRouter(route_class=JsonRoute)

_OWNER = "qwen3vl_mlx"
_RETRY_SEC = "5"


class ReIsqFields(Fields):
    """What to quantize the model to: the same under mistral.rs's name or ours."""

    quantize: str | None = Field(None, description='"4bit", "mxfp4", "mixed_3_6", "q4k", "auto"')
    ggml_type: str | None = Field(None, description='The same, as in mistral.rs: "Q4K"')


@router.get("/v1/models", tags=["OpenAI"])
async def list_models(serving: ServingOf) -> Response:
    """Every name of the model. "default" is one more, and always means this model."""
    data = [_model(serving, name) for name in serving.host.names]
    return JsonReply({"object": "list", "data": data})


@router.get("/v1/models/{name:path}", tags=["OpenAI"])
async def retrieve_model(name: str, serving: ServingOf) -> Response:
    """One name of the model."""
    return JsonReply(_model(serving, serving.host.name(name)))


def _model(serving: Serving, name: str) -> dict[str, Any]:
    loaded = serving.host.model
    return {
        "id": name,
        "object": "model",
        "created": int(serving.started),
        "owned_by": _OWNER,
        "root": serving.host.names[0],
        "max_model_len": None if loaded is None else loaded.context_length,
    }


@router.head("/health", include_in_schema=False)
@router.get("/health", tags=["Server"])
async def health(serving: ServingOf) -> Response:
    """What the model is doing, and for how many seconds.

    200 when requests are answered: "ready", or "unloaded" until the next one comes; 503 when it is
    "loading", "failed" or "closing".
    """
    status = serving.host.status()
    body: dict[str, Any] = {
        "status": status.state,
        "model": serving.host.names[0],
        "seconds": round(status.seconds, 1),
    }
    if status.reason is not None:
        body["reason"] = status.reason
    if status.state in ("ready", "unloaded"):
        return JsonReply(body)
    headers = {"Retry-After": _RETRY_SEC} if status.state == "loading" else None
    return JsonReply(body, 503, headers)


@router.get("/", tags=["Server"])
async def root(serving: ServingOf) -> Response:
    """What listens here, and where to read on."""
    links = {"docs": "/docs", "health": "/health", "models": "/v1/models", "metrics": "/metrics"}
    return JsonReply({"name": _OWNER, "version": __version__, **links})


@router.post("/re_isq", tags=["Server"])
async def re_isq(fields: ReIsqFields, request: Request, serving: ServingOf) -> Response:
    """Quantize the model anew, from its source; needs `--enable-re-isq`.

    Answers under way are waited for, for a minute; new ones wait while it is done.
    """
    if not serving.options.enable_re_isq:
        raise ApiError(
            403,
            "this server does not requantize for clients; start it with --enable-re-isq",
            code="re_isq_disabled",
        )
    headers = check_fields(fields, serving.options)
    name = fields.quantize or fields.ggml_type
    if name is None or (fields.quantize and fields.ggml_type):
        raise ApiError(400, 'give one of quantize and ggml_type, such as "4bit"', param="quantize")
    body = await while_connected(request, _requantize(serving, name))
    return JsonReply(body, headers=headers)


async def _requantize(serving: Serving, name: str) -> dict[str, Any]:
    if name.strip().lower() != AUTO:  # a name that nobody knows need not stop others
        try:
            parse_recipe(name, num_layers=1)
        except InputError as error:
            raise ApiError(400, str(error), param="quantize", code="invalid_value") from error
    started = time.perf_counter()
    async with serving.host.exclusive() as model:
        await serving.host.run(partial(_change, serving.host, model, name))
        assignment, nbytes = live_assignment(model.model), weights_bytes(model.model)
    return {
        "model": serving.host.names[0],
        "quantization": "whole" if assignment is None else preset_name(assignment.default),
        "weights_bytes": nbytes,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _change(host: ModelHost, model: Qwen3VL, name: str) -> None:
    """Requantize now, and whenever the model is loaded again, whether or not a client waits."""
    model.requantize(name)
    host.after_load(partial(Qwen3VL.requantize, quantize=name))
