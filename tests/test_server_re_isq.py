"""Quantizing a server's model anew for a client that does not wait for it."""

from __future__ import annotations

import asyncio
import threading

import pytest
from clients import until

pytest.importorskip("fastapi")

from qwen3vl_mlx import Qwen3VL, load
from qwen3vl_mlx.quant.recipes import preset_name
from qwen3vl_mlx.saving import live_assignment
from qwen3vl_mlx.server.admin import _requantize
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.start import new_serving


def test_what_nobody_waited_for_outlasts_an_unloading(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    requantize = Qwen3VL.requantize

    def slow(model: Qwen3VL, quantize: str) -> None:
        begun.set()
        assert go_on.wait(30)
        requantize(model, quantize)

    monkeypatch.setattr(Qwen3VL, "requantize", slow)
    serving = new_serving(lambda: load("demo"), "demo", ServerOptions(idle_unload_sec=0.2))
    host = serving.host

    async def abandon() -> None:
        asked = asyncio.create_task(_requantize(serving, "4bit"))
        await asyncio.to_thread(begun.wait, 30)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    async def precision() -> str:
        lease = await host.lease()
        try:
            assignment = live_assignment(lease.model.model)
            assert assignment is not None
            return preset_name(assignment.default)
        finally:
            lease.release()

    host.start()
    try:
        until(lambda: host.status().state == "ready")
        asyncio.run(abandon())
        go_on.set()
        until(lambda: host.status().state == "unloaded")
        assert asyncio.run(precision()) == "4bit"
    finally:
        go_on.set()
        host.close()
        serving.pictures.close()
