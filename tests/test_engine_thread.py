"""The engine's thread, on the bundled checkpoint: any thread asks, and it ends with its model."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asking import QUESTION, TRUTH
from driving import assert_nothing_held
from PIL.Image import Image
from serving import ENDLESS

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.errors import EngineClosedError


def test_any_thread_may_ask(demo: Qwen3VL, scene: Image) -> None:
    sums = [(a, b) for a in range(2, 5) for b in range(2, 6)]

    def ask(pair: tuple[int, int]) -> str:
        return demo.generate(f"What is {pair[0]} + {pair[1]}?").text

    alone = [ask(pair) for pair in sums]
    with ThreadPoolExecutor(12) as pool:
        picture = pool.submit(lambda: demo.generate(QUESTION, images=[scene]).text)
        assert list(pool.map(ask, sums)) == alone
        assert picture.result() == TRUTH


def test_answers_are_awaited(demo: Qwen3VL, scene: Image) -> None:
    async def ask(text: str, **media: Any) -> str:
        handle = demo.stream(text, **media)
        return "".join([chunk.text async for chunk in handle.handle])

    async def both() -> list[str]:
        return await asyncio.gather(ask("What is 3 + 4?"), ask(QUESTION, images=[scene]))

    assert asyncio.run(both()) == ["7", TRUTH]


def test_a_loop_that_is_gone_harms_nobody(demo: Qwen3VL) -> None:
    async def leave() -> Any:
        stream = demo.stream("Hello", **ENDLESS)
        async for _ in stream.handle:
            return stream

    left = asyncio.run(leave())
    assert demo.generate("What is 3 + 4?").text == "7"
    left.close()


def test_closing_ends_everything(serve: Callable[..., Qwen3VL]) -> None:
    model = serve(max_batch=2)
    streams = [model.stream("Hello", **ENDLESS) for _ in range(4)]
    next(streams[0])
    model.close()
    model.close()
    assert [list(stream)[-1].finish_reason for stream in streams] == ["cancelled"] * 4
    assert_nothing_held(model.engine.scheduler)
    for ask in (model.generate, model.stream, model.logits):
        with pytest.raises(EngineClosedError, match="closed"):
            ask("Hello")
    streams[0].close()


def test_a_model_that_is_dropped_takes_its_thread_and_weights_along() -> None:
    model = load("demo")
    model.generate("Hello", max_tokens=2)
    thread = model.engine._thread
    assert thread is not None
    assert thread.is_alive()
    gone = [weakref.ref(model), weakref.ref(model.engine), weakref.ref(model.model)]
    del model
    gc.collect()
    thread.join(timeout=20)
    assert not thread.is_alive()
    del thread
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_quantizing_anew_lets_the_old_weights_go() -> None:
    model = load("demo")
    model.generate("Hello", max_tokens=2)
    old = weakref.ref(model.model)
    model.requantize("8bit")
    gc.collect()
    assert old() is None
    assert model.generate("What is 3 + 4?").text == "7"
    model.close()


PROGRAM = """
import sys, threading
from qwen3vl_mlx import load
model = load("demo")
endless = {"logit_bias": {1000: -1e9, 998: -1e9}, "max_tokens": 1900}
streams = [model.stream("Hello", **endless) for _ in range(3)]
for stream in streams:
    next(stream)
print("running", flush=True)
if sys.argv[1] == "wait":
    list(streams[0])
elif sys.argv[1] == "thread":
    threading.Thread(target=list, args=(streams[0],), daemon=True).start()
elif sys.argv[1] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("how", "code"), [("leave", 0), ("thread", 0), ("raise", 3), ("wait", -signal.SIGINT)]
)
def test_a_program_that_ends_while_it_answers_ends_cleanly(how: str, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        if how == "wait":
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.rstrip().endswith(b"KeyboardInterrupt") if how == "wait" else errors == b""
