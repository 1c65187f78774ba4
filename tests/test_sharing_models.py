"""One process, many parts of it: a shared model, asyncio, forks, results for other programs."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import subprocess
import sys
import threading
import weakref

import pytest

from qwen3vl_mlx import Chunk, Completion, Qwen3VL, ToolCall, Usage, load
from qwen3vl_mlx.demo import EXAMPLE
from qwen3vl_mlx.shared_models import SharedModels

FORK = """
import os
from qwen3vl_mlx import ForkedProcessError, load
model = load("demo")
stream = model.stream("Hello", temperature=0, max_tokens=64, sampling={"ignore_eos": True})
next(stream)
child = os.fork()
if child == 0:
    actions = [
        lambda: model.generate("Hello"), lambda: load("demo"), lambda: model.logits("Hello"),
        lambda: model.requantize("4bit"), lambda: model.chat().send("Hello"),
        lambda: model.save("nowhere"), lambda: model.detect("qwen3vl_mlx/demo/example.png", "star"),
    ]
    for action in actions:
        try:
            action()
            os._exit(1)
        except ForkedProcessError as error:
            assert "spawn" in str(error)
    model.close()
    stream.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(sum(1 for _ in stream), model.generate("What is 3 + 4?").text)
"""


def at_once(count: int, *names: str, **options: object) -> list[Qwen3VL]:
    """`count` threads load each name, shared, at the same moment."""
    found: list[Qwen3VL] = []
    barrier = threading.Barrier(count * len(names))

    def ask(name: str) -> None:
        barrier.wait()
        found.append(load(name, shared=True, **options))  # type: ignore[arg-type]

    threads = [threading.Thread(target=ask, args=(name,)) for name in names for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_who_ask_for_a_checkpoint_get_one_model() -> None:
    from qwen3vl_mlx.demo import CHECKPOINT

    models = at_once(4, "demo", str(CHECKPOINT))  # two names of one folder
    assert len(models) == 8
    assert len({id(model) for model in models}) == 1
    assert load("demo") is not models[0]
    assert load("demo", quantize="8bit", shared=True) is not models[0]
    answers = [model.generate("What is 3 + 4?").text for model in models[:2]]
    assert answers == ["7", "7"]


def test_a_shared_model_goes_with_its_last_holder() -> None:
    model = load("demo", quantize="6bit", shared=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_closed_model_is_loaded_anew() -> None:
    model = load("demo", quantize="5bit", shared=True)
    model.close()
    again = load("demo", quantize="5bit", shared=True)
    assert again is not model
    assert again.generate("What is 3 + 4?", max_tokens=4).usage.completion_tokens > 0


def test_one_that_cannot_be_loaded_can_be_asked_for_again(demo: Qwen3VL) -> None:
    shared = SharedModels()

    def fail() -> Qwen3VL:
        raise OSError("full")

    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            shared.get("a", fail)
    assert shared.get("a", lambda: demo) is demo


def test_a_forked_child_is_told_and_its_parent_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, answer = done.stdout.split()
    assert (int(count) > 0, answer) == (True, "7")


def test_asyncio_reads_streams_and_whole_answers_together(demo: Qwen3VL) -> None:
    async def streamed(question: str) -> str:
        chunks = demo.stream(question, images=[EXAMPLE], temperature=0)
        return "".join([chunk.text async for chunk in chunks])

    async def whole(question: str) -> str:
        answer = await asyncio.to_thread(demo.generate, question, images=[EXAMPLE], temperature=0)
        return answer.text

    async def both() -> list[str]:
        questions = ["What is at the bottom?", "Describe the image."]
        roads = [road(question) for question in questions for road in (streamed, whole)]
        return await asyncio.gather(*roads)

    first, same_first, second, same_second = asyncio.run(both())
    assert first == same_first == "a red triangle"
    assert second == same_second
    assert second.startswith("A blue background")


def test_results_are_plain_data(demo: Qwen3VL) -> None:
    stream = demo.stream("What is 3 + 4?", temperature=0, logprobs=True, top_logprobs=2)
    chunks = list(stream)
    answer = demo.generate("What is 3 + 4?", temperature=0)
    call = ToolCall("call_1", "zoom", "{}")
    for value in (answer, answer.usage, *chunks, call):
        assert isinstance(value, (Completion, Usage, Chunk, ToolCall))
        assert json.loads(json.dumps(value.to_dict())) is not None
        assert pickle.loads(pickle.dumps(value)) == value
    assert answer.to_dict()["usage"]["total_tokens"] == answer.usage.total_tokens


def test_the_package_says_that_it_is_typed() -> None:
    from importlib.resources import files

    assert files("qwen3vl_mlx").joinpath("py.typed").is_file()
