"""What a caller may ask of a model and its chats: checked early, alike on every road."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from asking import script
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.engine.engine import EngineOptions
from qwen3vl_mlx.engine.output import Chunk
from qwen3vl_mlx.errors import InputError, OutputError

THINKING = Path(__file__).parent / "data" / "checkpoints" / "Qwen3-VL-2B-Thinking"
STRICT = {
    "type": "function",
    "function": {
        "name": "zoom",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"x": {"enum": [7]}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}
ENDLESS = {"ignore_eos": True}


REFUSED: dict[str, dict[str, Any]] = {
    "n": {"n": 0},
    "timeout": {"timeout": 0},
    "timeout must be a number": {"timeout": "5"},
    "timeout must": {"timeout": True},
    "top_logprobs": {"top_logprobs": 3},
    "thinking_budget is for": {"thinking_budget": 5},
    "tool_choice": {"tool_choice": "required"},
    "response_format": {"response_format": {"type": "nope"}},
    "grammar": {"grammar": {"type": "regex", "value": "("}},
    "sampling must map": {"sampling": ["dry"]},
    "unknown sampling parameter 'dry'": {"sampling": {"dry": 1}},
    "dry_multiplier": {"sampling": {"dry_multiplier": -1}},
    "parallel_tool_calls": {"parallel_tool_calls": "no", "tools": [STRICT]},
    "tools": {"tools": [{"type": "function"}]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(demo: Qwen3VL, name: str) -> None:
    with pytest.raises(InputError, match=name):
        demo.generate("Hello", max_tokens=2, **REFUSED[name])


OPTIONS: dict[str, dict[str, Any]] = {
    "max_batch": {"max_batch": "8"},
    "max_batch must": {"max_batch": 2.5},
    "max_queue": {"max_queue": True},
    "draft_tokens": {"draft_tokens": None},
    "draft": {"draft": "demo"},
    "kv_bits": {"kv_bits": 3},
    "memory_limit": {"memory_limit": "8GB"},
    "cache_folder": {"cache_folder": Path("x"), "prefix_cache_bytes": 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_engine_options_are_checked(name: str) -> None:
    with pytest.raises(InputError, match=name):
        EngineOptions(**OPTIONS[name])


def test_a_strict_tool_binds_a_chat_too(demo: Qwen3VL, scene: Image) -> None:
    chat = demo.chat(tools=[STRICT])
    answer = chat.send("What is this?", images=[scene], tool_choice="required")
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("zoom", '{"x": 7}')]
    with pytest.raises(InputError, match="function"):
        demo.chat(tools=[{"type": "function"}]).send("Hello")
    form = {"type": "json_schema", "json_schema": {"schema": {"const": "so"}}}
    assert demo.chat().send("What is this?", images=[scene], response_format=form).text == '"so"'


def test_a_long_chat_goes_on_with_its_newest_turns(demo: Qwen3VL) -> None:
    chat = demo.chat()
    chat.messages += [
        {"role": role, "content": "word " * 400} for _ in range(4) for role in ("user", "assistant")
    ]
    with pytest.raises(InputError, match="truncate"):
        chat.send("What is 3 + 4?")
    assert chat.send("What is 3 + 4?", truncate=True).usage.prompt_tokens < demo.context_length
    assert len(chat.messages) == 10


def test_a_long_answer_leaves_truncation_room(demo: Qwen3VL) -> None:
    answer = demo.generate("What is 3 + 4?", truncate=True, max_tokens=10 * demo.context_length)
    assert answer.text == "7"


LONG = {"ignore_eos": True, "max_tokens": 40}
GREEDY: dict[str, Callable[[Qwen3VL], str]] = {
    "named": lambda m: m.generate("Hello", temperature=0, sampling=LONG).text,
    "with a guard": lambda m: (
        m.generate("Hello", temperature=0, sampling={**LONG, "loop_guard": True}).text
    ),
    "mapped": lambda m: m.generate("Hello", sampling={**LONG, "temperature": 0}).text,
    "chat": lambda m: (
        m.chat(params=m.default_params.updated({**LONG, "temperature": 0})).send("Hello").text
    ),
}


@pytest.mark.parametrize("road", GREEDY)
def test_greedy_is_greedy(
    tiny_model: Callable[[str], Qwen3VL], road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Instruct cards' presence penalty is for sampling, on whatever road."""
    model = tiny_model("dense64")  # of random weights: a penalty changes every answer
    expected = model.generate("Hello", sampling=LONG).text
    sampled = model.default_params.updated({"temperature": 0.7, "presence_penalty": 2.0})
    monkeypatch.setattr(model, "default_params", sampled)
    assert GREEDY[road](model) == expected
    bent = model.generate("Hello", temperature=0, sampling=LONG, presence_penalty=2.0).text
    assert bent != expected


def test_what_has_no_name_goes_through_sampling(demo: Qwen3VL) -> None:
    stream = demo.stream("Hello", sampling={**ENDLESS, "max_tokens": 9}, max_tokens=7)
    list(stream)
    assert len(stream.handle.tokens) == 7  # a named one wins


def test_several_answers(demo: Qwen3VL, scene: Image) -> None:
    wish: Mapping[str, Any] = {"images": [scene], "temperature": 1.5, "max_tokens": 12}
    several = demo.generate("Describe the image.", seed=5, n=3, **wish)
    texts = [several.text, *(other.text for other in several.alternatives)]
    assert texts == [
        demo.generate("Describe the image.", seed=seed, **wish).text for seed in (5, 6, 7)
    ]
    assert len(set(texts)) > 1


def test_a_stream_is_read_in_a_loop_of_asyncio(demo: Qwen3VL) -> None:
    async def read() -> list[Chunk]:
        return [chunk async for chunk in demo.stream("What is 3 + 4?")]

    async def give_up() -> str:
        stream = demo.stream("Hello", max_tokens=1500, sampling=ENDLESS)

        async def follow() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(follow())
        while not stream.handle.tokens:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while stream.handle.phase != "done":
            await asyncio.sleep(0.001)
        return stream.handle.phase

    assert "".join(chunk.text for chunk in asyncio.run(read())) == "7"
    assert asyncio.run(asyncio.wait_for(give_up(), 60)) == "done"


@pytest.mark.parametrize("taken", [1, None])
def test_an_answer_is_read_once(demo: Qwen3VL, taken: int | None) -> None:
    with demo.stream("Hello", max_tokens=5, sampling=ENDLESS) as stream:
        next(stream) if taken else list(stream)
        with pytest.raises(InputError, match="read already"):
            stream.handle.result()


def test_a_turn_that_says_nothing_leaves_no_trace(demo: Qwen3VL) -> None:
    chat = demo.chat()
    assert chat.send("Hello", timeout=1e-9).finish_reason == "timeout"
    assert chat.messages == []


def test_budget_of_a_model_that_thinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "thinker"
    shutil.copytree(CHECKPOINT, folder)
    shutil.copy(THINKING / "chat_template.jinja", folder)
    model = load(folder)
    answer = model.generate("What is 3 + 4?", thinking_budget=3, max_tokens=40, sampling=ENDLESS)
    assert answer.reasoning_closed
    assert len(model.processor.tokenizer.encode(answer.reasoning)) <= 4
    model.close()


# Quantizing anew.


def test_requantizing_ends_nobody_s_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer asked for while the new weights are read is given whole; nothing is swapped."""
    model = load("demo")
    weights, streams = model.model, []

    def read_weights(*_: Any) -> Any:
        streams.append(model.stream("Hello", max_tokens=1500, sampling=ENDLESS))
        return weights

    monkeypatch.setattr("qwen3vl_mlx.api.load_weights", read_weights)
    with pytest.raises(InputError, match="being generated"):
        model.requantize("8bit")
    assert streams[0].handle.phase != "done"
    assert len(list(streams[0])) > 1
    assert len(streams[0].handle.tokens) == 1500
    model.close()


def test_requantizing_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("demo")
    before = model.model

    def broken(*_: Any) -> Any:
        raise OutputError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("qwen3vl_mlx.api.Engine", broken)
        with pytest.raises(OutputError):
            model.requantize("8bit")
    assert model.model is before
    assert model.generate("What is 3 + 4?").text == "7"
    model.close()


def test_logits_leave_the_thread_to_others(demo: Qwen3VL) -> None:
    """A long evaluation is done a chunk at a time, between the steps of a running answer."""
    with demo.stream("Hello", max_tokens=1900, sampling=ENDLESS) as stream:
        next(stream)
        before = demo.engine.stats.load.steps
        rows = threading.Thread(target=demo.logits, args=("word " * 500,))
        rows.start()
        rows.join()
        assert demo.engine.stats.load.steps - before >= 3  # 1,500 tokens, 512 at a time
        assert stream.handle.phase == "running"


def test_a_script_of_words(demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, demo, "So it is.")
    assert demo.generate("Hello", stop="it").text == "So "
