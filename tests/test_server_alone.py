"""Being alone with the served model, to requantize it, and the end of a host."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import mlx.core as mx
import pytest

pytest.importorskip("fastapi", reason="the server is an extra")


from hosting import NAMES, SOON_SEC, Loads, hosting, pending, refused, state, until

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.quant.recipes import preset_name
from qwen3vl_mlx.saving import live_assignment
from qwen3vl_mlx.server import host as host_module
from qwen3vl_mlx.server.host import ModelHost

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
