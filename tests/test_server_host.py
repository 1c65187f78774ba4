"""The served model's life, and a server's: loading, lending, unloading, listening, ending."""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("fastapi", reason="the server is an extra")

from asking import SCENES
from hosting import NAMES, Loads, hosting, pending, refused, state, until

from qwen3vl_mlx.api import load
from qwen3vl_mlx.errors import CheckpointError, HubError
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.host import ModelHost
from qwen3vl_mlx.server.lease import Lease

# Names.


@pytest.mark.parametrize(
    ("asked", "reported"),
    [
        (None, "owner/Qwen3-VL-2B"),
        ("default", "owner/Qwen3-VL-2B"),
        *((name, name) for name in NAMES),
    ],
)
def test_names(asked: str | None, reported: str) -> None:
    assert ModelHost(Loads(), NAMES).name(asked) == reported


@pytest.mark.parametrize("asked", ["", "gpt-5", "GPT-4O", "Default", "x" * 10_000])
def test_unknown_names(asked: str) -> None:
    with pytest.raises(ApiError) as caught:
        ModelHost(Loads(), NAMES).name(asked)
    error = caught.value
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert all(name in error.message for name in (*NAMES, "default"))
    assert len(error.message) < 300


# Loading.


def test_while_it_first_loads_clients_are_told_to_come_again() -> None:
    loads = Loads()
    loads.go_on.clear()

    async def main() -> None:
        async with hosting(loads) as host:
            assert host.status().state == "unloaded"
            host.start()
            host.start()
            error = await refused(host.lease())
            assert (error.status, error.code) == (503, "model_loading")
            assert int(error.headers["Retry-After"]) > 0
            assert (await refused(host.exclusive().__aenter__())).status == 503
            assert (await refused(host.lease("gpt-5"))).status == 404
            assert host.model is None
            before = host.status()
            assert before.state == "loading"
            await asyncio.sleep(0.02)
            assert host.status().seconds >= before.seconds + 0.02
            loads.go_on.set()
            await state(host, "ready")
            lease = await host.lease("vision")
            assert lease.name == "vision"
            assert lease.model is loads.made[0] is host.model
            assert host.status().users == 1
            lease.release()
            lease.release()
            assert host.status().users == 0
            with pytest.raises(RuntimeError, match="released"):
                _ = lease.model
        assert loads.count == 1
        assert loads.made[0].closed

    asyncio.run(main())


HOME = "/Users/Ann Lee"


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (CheckpointError("no folder '/Users/ann/models/x'; give one"), "no folder 'x'; give one"),
        (CheckpointError("no folder '~/models/x'"), "no folder 'x'"),
        (OSError(2, "No such file", "/srv/a b/c.json"), "c.json"),
        (HubError(f"not complete ({HOME}/.cache/hub/x); connect"), "not complete (x); connect"),
        (HubError("see https://huggingface.co/a/b and/or try again"), "https://huggingface.co/a/b"),
        (ValueError("two\n  lines"), "two lines"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_load_that_fails_says_why_and_nothing_of_this_machine(
    failure: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path(HOME))
    loads = Loads()
    loads.failure = failure

    async def main() -> None:
        async with hosting(loads) as host:
            host.start()
            await state(host, "failed")
            error = await refused(host.lease())
            assert (error.status, error.code) == (503, "model_failed")
            assert error.headers["x-should-retry"] == "false"
            for told in (error.message, host.status().reason or ""):
                assert reason in told
                assert "\n" not in told
                assert not any(part in told for part in ("/Users", "Ann", "/srv", ".cache"))
            assert host.model is None
            assert loads.count == 1

    asyncio.run(main())


def test_without_a_start_the_first_request_loads_once_for_all() -> None:
    loads = Loads()

    async def main() -> None:
        async with hosting(loads) as host:
            leases = await asyncio.gather(*(host.lease() for _ in range(20)))
            assert host.status().users == 20
            assert {id(lease.model) for lease in leases} == {id(loads.made[0])}
            for lease in leases:
                lease.release()
        assert loads.count == 1

    asyncio.run(main())


def test_who_stops_waiting_or_drops_a_lease_holds_nothing() -> None:
    loads = Loads()
    loads.go_on.clear()

    async def main() -> None:
        async with hosting(loads) as host:
            tasks = [asyncio.create_task(host.lease()) for _ in range(5)]
            assert await pending(tasks[0])
            for task in tasks[1:]:
                task.cancel()
            loads.go_on.set()
            lease: Lease | None = await tasks[0]
            await asyncio.gather(*tasks, return_exceptions=True)
            assert host.status().users == 1
            assert not host._changes._wakers
            tasks.clear()
            del task, lease
            await asyncio.sleep(0)  # the step under way holds the task that woke it
            gc.collect()
            assert host.status().users == 0

    asyncio.run(main())


# Unloading.


def test_an_idle_model_is_unloaded_and_comes_back_when_asked() -> None:
    loads = Loads()

    async def main() -> None:
        async with hosting(loads, idle_unload_sec=0.4) as host:
            lease = await host.lease()
            model = loads.made[-1]
            await asyncio.sleep(0.6)
            assert host.model is lease.model is model
            lease.release()
            await asyncio.sleep(0.05)
            assert host.status().state == "ready"
            await until(lambda: model.closed)
            assert host.status().state == "unloaded"
            assert host.model is None
            again = await host.lease()
            assert again.model is not model
            again.release()

    asyncio.run(main())


def test_a_reload_that_fails_is_told_to_all_who_wait_and_tried_again_by_the_next() -> None:
    loads = Loads()

    async def main() -> None:
        async with hosting(loads, idle_unload_sec=0.05) as host:
            host.start()
            await state(host, "unloaded")
            loads.failure = CheckpointError("model.safetensors is gone")
            loads.go_on.clear()
            waiting = [asyncio.create_task(refused(host.lease())) for _ in range(3)]
            assert await pending(waiting[0])
            loads.go_on.set()
            for error in await asyncio.gather(*waiting):
                assert error.status == 503
                assert "model.safetensors is gone" in error.message
            assert host.status().state == "failed"
            assert loads.count == 2
            loads.failure = None
            (await host.lease()).release()
            assert loads.count == 3

    asyncio.run(main())


def test_unloading_frees_the_memory_and_the_model_comes_back_the_same() -> None:
    def answer(lease: Lease) -> str:
        return lease.model.generate(
            "What is this?", images=[SCENES / "scene18.png"], max_tokens=12, temperature=0
        ).text

    async def main() -> None:
        answers = []
        gc.collect()
        before = mx.get_active_memory()
        async with hosting(partial(load, "demo"), idle_unload_sec=0.2) as host:
            for _ in range(2):
                lease = await host.lease()
                answers.append(await asyncio.to_thread(answer, lease))
                assert mx.get_active_memory() - before > 5_000_000
                lease.release()
                await until(lambda: mx.get_active_memory() - before < 10_000)
                await until(lambda: mx.get_cache_memory() < 10_000)
                assert host.status().state == "unloaded"
        assert answers[0] == answers[1] != ""

    asyncio.run(main())


def test_a_model_whose_engine_failed_is_loaded_anew() -> None:
    loads = Loads()

    async def main() -> None:
        async with hosting(loads) as host:
            user = await host.lease()
            loads.made[0].engine.closed = True
            others = await asyncio.gather(host.lease(), host.lease())
            assert all(other.model is loads.made[1] for other in others)
            assert loads.made[0].closed
            assert host.status().users == 3
            for lease in (user, *others):
                lease.release()
        assert loads.count == 2

    asyncio.run(main())
