"""The served model's life, and a server's: loading, lending, unloading, listening, ending."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("fastapi", reason="the server is an extra")

from asking import SCENES

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.errors import CheckpointError, HubError
from qwen3vl_mlx.quant.recipes import preset_name
from qwen3vl_mlx.saving import live_assignment
from qwen3vl_mlx.server import host as host_module
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.host import ModelHost
from qwen3vl_mlx.server.lease import Lease

NAMES = ("owner/Qwen3-VL-2B", "gpt-4o", "vision")
SOON_SEC = 10.0  # for what should happen at once, on a machine that is busy


@dataclass
class Fake:
    """A model as far as the host knows one."""

    closed: bool = False
    engine: Any = field(default_factory=lambda: SimpleNamespace(closed=False))

    def close(self) -> None:
        self.closed = True


class Loads:
    """A loader that may be held up or fail, and what it has made."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.failure: Exception | None = None
        self.made: list[Fake] = []
        self.count = 0

    def __call__(self) -> Any:
        self.count += 1
        self.begun.set()
        assert self.go_on.wait(SOON_SEC)
        if self.failure is not None:
            raise self.failure
        self.made.append(Fake())
        return self.made[-1]


@asynccontextmanager
async def hosting(loads: Callable[[], Any], **options: Any) -> AsyncIterator[ModelHost]:
    host = ModelHost(loads, NAMES, **options)
    try:
        yield host
    finally:
        if isinstance(loads, Loads):
            loads.go_on.set()
        assert host.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    for _ in range(int(SOON_SEC / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came about")


async def state(host: ModelHost, wanted: str) -> None:
    await until(lambda: host.status().state == wanted)


async def refused(asking: Coroutine[Any, Any, object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await asking
    return caught.value


async def pending(task: asyncio.Task[Any]) -> bool:
    """Whether a task still waits after it had time to end."""
    await asyncio.sleep(0.05)
    return not task.done()


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


# Alone with the model.


def test_exclusive_waits_for_users_and_holds_new_ones_back() -> None:
    loads = Loads()

    async def main() -> None:
        async with hosting(loads) as host:
            user = await host.lease()
            entered, go_on = asyncio.Event(), asyncio.Event()

            async def change() -> None:
                async with host.exclusive() as model:
                    assert model is loads.made[0]
                    assert host.status().users == 0
                    entered.set()
                    await go_on.wait()

            changing = asyncio.create_task(change())
            assert await pending(changing)
            assert not entered.is_set()
            newcomer = asyncio.create_task(host.lease())
            second = asyncio.create_task(refused(host.exclusive(patience=0.1).__aenter__()))
            assert await pending(newcomer)
            user.release()
            await asyncio.wait_for(entered.wait(), SOON_SEC)
            assert await pending(newcomer)
            error = await second
            assert (error.status, error.code) == (409, "model_busy")
            go_on.set()
            await changing
            (await newcomer).release()

    asyncio.run(main())


def test_new_ones_do_not_wait_long_for_one_slow_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_HOLD_SEC", 0.1)

    async def main() -> None:
        async with hosting(Loads()) as host:
            slow = await host.lease()
            entered, go_on = asyncio.Event(), asyncio.Event()

            async def change() -> None:
                async with host.exclusive():
                    entered.set()
                    await go_on.wait()

            changing = asyncio.create_task(change())
            newcomer = asyncio.create_task(host.lease())
            assert await pending(newcomer)
            lease = await asyncio.wait_for(newcomer, SOON_SEC)
            assert not entered.is_set()
            slow.release()
            assert await pending(changing)
            assert not entered.is_set()
            lease.release()
            await asyncio.wait_for(entered.wait(), SOON_SEC)
            late = asyncio.create_task(host.lease())
            assert await pending(late)
            go_on.set()
            await changing
            (await asyncio.wait_for(late, SOON_SEC)).release()

    asyncio.run(main())


def test_exclusive_gives_up_and_lets_others_go_on() -> None:
    async def main() -> None:
        async with hosting(Loads()) as host:
            user = await host.lease()
            assert (await refused(host.exclusive(patience=0.05).__aenter__())).status == 409
            (await asyncio.wait_for(host.lease(), SOON_SEC)).release()
            waiting = asyncio.create_task(host.exclusive().__aenter__())
            assert await pending(waiting)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            (await asyncio.wait_for(host.lease(), SOON_SEC)).release()
            user.release()

    asyncio.run(main())


def test_what_has_begun_is_finished_before_others_go_on() -> None:
    loads = Loads()
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:  # as requantizing, which changes the engine for another
        loads.made[0].engine.closed = True
        begun.set()
        assert go_on.wait(SOON_SEC)
        loads.made[0].engine.closed = False

    async def main() -> None:
        async with hosting(loads) as host:

            async def change() -> None:
                async with host.exclusive():
                    await host.run(slow)

            changing = asyncio.create_task(change())
            await until(begun.is_set)
            changing.cancel()
            await asyncio.gather(changing, return_exceptions=True)
            user = asyncio.create_task(host.lease())
            assert await pending(user)
            go_on.set()
            lease = await user
            assert lease.model is loads.made[0]
            assert not loads.made[0].engine.closed
            lease.release()
            with pytest.raises(ZeroDivisionError):
                await host.run(lambda: 1 // 0)
            assert await host.run(lambda: "as before") == "as before"

    asyncio.run(main())


def test_the_live_model_is_requantized_and_stays_so() -> None:
    def requantize(model: Qwen3VL) -> None:
        model.requantize("4bit")

    async def main() -> None:
        async with hosting(partial(load, "demo"), idle_unload_sec=0.2) as host:
            async with host.exclusive() as model:
                before = mx.get_active_memory()
                await host.run(partial(requantize, model))
                assert mx.get_active_memory() < before - 1_000_000
            del model
            host.after_load(requantize)
            for _ in range(2):
                lease = await host.lease()
                assignment = live_assignment(lease.model.model)
                assert assignment is not None
                assert preset_name(assignment.default) == "4bit"
                answer = await asyncio.to_thread(lease.model.generate, "Hello", max_tokens=3)
                assert answer.usage.completion_tokens > 0
                lease.release()
                await state(host, "unloaded")

    asyncio.run(main())


# The end.


class Answers:
    """Open answers that end when told to, if `willing`."""

    def __init__(self, host: ModelHost, willing: bool = True):
        self.host, self.willing, self.ended = host, willing, False
        host.open(self)

    def end(self) -> None:
        self.ended = True
        if self.willing:
            asyncio.get_running_loop().call_later(0.02, self.host.shut, self)


def test_all_open_answers_are_ended_and_nothing_new_begins() -> None:
    async def main() -> None:
        async with hosting(Loads()) as host:
            shut, *others = [Answers(host) for _ in range(3)]
            host.shut(shut)
            host.shut(shut)
            lease = await host.lease()
            assert host.status().state == "ready"
            told = asyncio.create_task(host.ended())
            assert await pending(told)
            assert await host.end_all()
            await told
            assert [each.ended for each in (shut, *others)] == [False, True, True]
            assert host.status().state == "closing"
            error = await refused(host.lease())
            assert (error.status, error.code) == (503, "shutting_down")
            late = Answers(host, willing=False)
            assert late.ended
            assert not await host.end_all(patience=0.05)
            lease.release()

    asyncio.run(main())


def test_who_waits_for_the_end_is_not_woken_before() -> None:
    """As every request does: else each of them would cost all others something."""

    async def main() -> None:
        async with hosting(Loads()) as host:
            (await host.lease()).release()
            tasks = [asyncio.create_task(host.ended()) for _ in range(50)]
            assert await pending(tasks[0])
            loop = asyncio.get_running_loop()
            woken = []
            call = loop.call_soon_threadsafe
            loop.call_soon_threadsafe = lambda *a, **k: (woken.append(a), call(*a, **k))[1]  # type: ignore[method-assign]
            for _ in range(20):
                (await host.lease()).release()
            assert len(woken) <= 20
            assert await host.end_all()
            await asyncio.wait_for(asyncio.gather(*tasks), SOON_SEC)

    asyncio.run(main())


def test_the_end_is_told_to_who_waits_for_a_reload() -> None:
    loads = Loads()
    loads.go_on.clear()

    async def main() -> None:
        async with hosting(loads) as host:
            waiting = asyncio.create_task(refused(host.lease()))
            assert await pending(waiting)
            assert await host.end_all()
            assert (await waiting).code == "shutting_down"

    asyncio.run(main())


def test_closing_waits_for_a_load_as_long_as_it_is_told() -> None:
    loads = Loads()
    loads.go_on.clear()
    host = ModelHost(loads, NAMES)
    host.start()
    assert loads.begun.wait(SOON_SEC)
    started = time.monotonic()
    assert not host.close(patience=0.1)
    assert time.monotonic() - started < SOON_SEC / 2
    assert host.status().state == "closing"
    loads.go_on.set()
    assert host.close()
    assert host.close(patience=0.0)
    assert loads.made[0].closed
    assert host.model is None
    assert host._thread is not None
    assert not host._thread.is_alive()


def test_a_host_that_never_ran_closes() -> None:
    host = ModelHost(Loads(), NAMES)
    assert host.close()
    host.start()
    assert host.status().state == "closing"


def test_loops_that_are_gone_are_not_waited_for() -> None:
    """One host, and event loops that come and go, as tests have them."""
    loads = Loads()
    loads.go_on.clear()
    host = ModelHost(loads, NAMES)

    async def use() -> None:
        (await host.lease()).release()

    try:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda loop, context: None)  # it minds the task left behind
        task = loop.create_task(use())
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        loads.go_on.set()
        for _ in range(3):
            asyncio.run(use())
        assert loads.count == 1
        assert not task.done()
    finally:
        assert host.close()
