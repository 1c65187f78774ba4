"""Conversations with the bundled checkpoint: pictures, interruptions, tools, thinking."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from asking import QUESTION, about, anew, script, user
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.engine.sampling import SamplingParams
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.text import DecoderLayer

THINKING = Path(__file__).parent / "data" / "checkpoints" / "Qwen3-VL-2B-Thinking"
TOOL = {
    "type": "function",
    "function": {"name": "zoom", "parameters": {"type": "object", "properties": {"x": {}}}},
}
CALL = '<tool_call>\n{"name": "zoom", "arguments": {"x": 5}}\n</tool_call>'


# Conversations.


def test_the_second_turn_remembers_the_picture(
    demo: Qwen3VL, scene: Image, other_scene: Image
) -> None:
    demo.engine.clear_caches()
    chat = demo.chat(system="Be brief.")
    first = chat.send("What color is the background?", images=[scene])
    second = chat.send("What shape is purple?")
    third = chat.send("What color is the background?", images=[other_scene])
    assert first.text == "blue"
    assert (first.usage.cached_tokens, second.usage.cached_tokens > 30) == (0, True)
    assert third.usage.cached_tokens > second.usage.cached_tokens
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for asked, given in (
        (about(scene, "What color is the background?"), first),
        (user("What shape is purple?"), second),
        (about(other_scene, "What color is the background?"), third),
    ):
        messages += asked
        whole = anew(demo, messages)
        assert (whole.text, whole.usage.prompt_tokens) == (given.text, given.usage.prompt_tokens)
        messages.append({"role": "assistant", "content": given.text})
    assert [m["role"] for m in chat.messages] == [m["role"] for m in messages]


def test_chat_settings(demo: Qwen3VL, scene: Image) -> None:
    chat = demo.chat(params=SamplingParams(temperature=0, max_tokens=2), max_pixels=9216)
    small = chat.send(QUESTION, images=[scene])
    assert small.usage.completion_tokens == 2
    assert small.usage.prompt_tokens < demo.generate(QUESTION, images=[scene]).usage.prompt_tokens
    with pytest.raises(InputError, match="text"):
        chat.send(images=[scene])
    with pytest.raises(InputError, match="nowhere"):
        chat.send("And?", images=["nowhere.png"])
    assert len(chat.messages) == 2


def test_tools_are_shown_to_the_model(demo: Qwen3VL) -> None:
    prompt = demo.processor.prompt(user("Hi"), tools=[TOOL])
    text = demo.processor.tokenizer.decode(prompt.token_ids.tolist(), skip_special_tokens=False)
    assert "<tools>" in text
    assert '"name": "zoom"' in text
    done = demo.generate("Hi", tools=[TOOL], max_tokens=2)
    assert done.usage.prompt_tokens == len(prompt.token_ids)


def test_a_tool_is_called_and_answers(
    demo: Qwen3VL, scene: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = demo.chat(tools=[TOOL])
    with monkeypatch.context() as patch:
        script(patch, demo, "I look.\n" + CALL)
        asked = chat.send(QUESTION, images=[scene])
    (call,) = asked.tool_calls
    assert (asked.text, asked.finish_reason) == ("I look.", "tool_calls")
    assert (call.name, json.loads(call.arguments)) == ("zoom", {"x": 5})
    chat.add_tool_result(call.id, "Nothing there.")
    with monkeypatch.context() as patch:
        script(patch, demo, "So be it.")
        told = chat.send()
    assert (told.text, told.finish_reason) == ("So be it.", "stop")
    assert told.usage.cached_tokens > 40
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    prompt = demo.processor.prompt(chat.messages, tools=[TOOL])
    text = demo.processor.tokenizer.decode(prompt.token_ids.tolist(), skip_special_tokens=False)
    assert f"I look.\n{CALL}<|im_end|>" in text
    assert "<tool_response>\nNothing there.\n</tool_response>" in text


def test_without_tools_a_call_is_text(demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, demo, CALL)
    done = demo.generate("Hi")
    assert (done.text, done.tool_calls, done.finish_reason) == (CALL, (), "stop")


# Interrupted.


def interrupt(
    model: Qwen3VL, monkeypatch: pytest.MonkeyPatch, layer: int, after: int
) -> Callable[[], None]:
    """Ctrl-C while a layer does its forward pass number `after`; returns what lets it go on.

    All chunks that were ready by then are read.
    """
    forward = DecoderLayer.__call__
    seen: list[int] = []
    go_on = threading.Event()
    main = threading.get_ident()

    def pressed(self: DecoderLayer, *args: Any) -> mx.array:
        seen.append(len(seen))
        if len(seen) == 5 * after + layer + 1:
            while any(job.handle._items for job in model.engine.scheduler._jobs()):
                time.sleep(0.001)
            signal.pthread_kill(main, signal.SIGINT)
            go_on.wait(30)  # a test that fails before it says so must not hold up the others
        return forward(self, *args)

    monkeypatch.setattr(DecoderLayer, "__call__", pressed)
    return go_on.set


@pytest.mark.parametrize("after", [0, 1, 4], ids=["prefill", "first token", "later"])
@pytest.mark.parametrize("layer", [0, 2])
def test_interrupted_chat_goes_on(
    demo: Qwen3VL,
    scene: Image,
    other_scene: Image,
    monkeypatch: pytest.MonkeyPatch,
    layer: int,
    after: int,
) -> None:
    """Ctrl-C anywhere, also between two layers: the next turn is as if nothing had happened."""
    chat = demo.chat()
    chat.send(QUESTION, images=[scene])
    go_on = interrupt(demo, monkeypatch, layer, after)
    with pytest.raises(KeyboardInterrupt):
        chat.send("And this?", images=[other_scene])
    assert demo.engine.busy
    go_on()
    # Prompt tokens alone leave no trace; once something was said, the turn stays.
    assert len(chat.messages) == (4 if after > 1 else 2)
    messages = [*chat.messages, *user("What color is the background?")]
    again = chat.send("What color is the background?")
    assert again.usage.cached_tokens > 40
    assert again.text == anew(demo, messages).text


def test_closed_chat_stream_keeps_the_turn(demo: Qwen3VL, scene: Image) -> None:
    chat = demo.chat()
    stream = chat.stream(QUESTION, images=[scene])
    said = next(stream).text + next(stream).text
    stream.close()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == said
    messages = [*chat.messages, *user("What color is the background?")]
    again = chat.send("What color is the background?")
    assert again.text == anew(demo, messages).text


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Qwen3VL:
    """The demo checkpoint behind the template of the Thinking models."""
    folder = tmp_path_factory.mktemp("thinking") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    shutil.copy(THINKING / "chat_template.jinja", folder)
    return load(folder)


# Thinking.


def test_thinking(thinker: Qwen3VL, scene: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, thinker, "I see a shape.\n</think>\n\nA triangle.")
    done = thinker.generate(QUESTION, images=[scene])
    assert (done.reasoning, done.text) == ("I see a shape.", "A triangle.")
    assert (done.reasoning_closed, done.finish_reason) == (True, "stop")
    chat = thinker.chat()
    first = chat.send(QUESTION, images=[scene])
    assert chat.messages[1]["reasoning_content"] == "I see a shape."
    assert chat.messages[1]["content"] == "A triangle."
    again = chat.send("And?")
    assert again.text == "A triangle."
    opened = len(thinker.processor.tokenizer.encode("<think>\n"))  # left out of past turns
    assert again.usage.cached_tokens == first.usage.prompt_tokens - opened


def test_a_thought_without_end_is_reported(thinker: Qwen3VL, scene: Image) -> None:
    done = thinker.generate(QUESTION, images=[scene], max_tokens=5)
    assert done.reasoning
    assert (done.text, done.reasoning_closed, done.finish_reason) == ("", False, "length")
    chunks = list(thinker.stream(QUESTION, images=[scene], max_tokens=5))
    assert [chunk.reasoning_closed for chunk in chunks][-1] is False


def test_asking_again_closes_an_answer_that_is_still_open(demo: Qwen3VL, scene: Image) -> None:
    chat = demo.chat()
    open_answer = chat.stream(QUESTION, images=[scene])
    began = "".join(next(open_answer).text for _ in range(3))
    second = chat.send("How many shapes are there?")
    assert list(open_answer) == []
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == began
    messages = [*about(scene), {"role": "assistant", "content": began}]
    messages += user("How many shapes are there?")
    assert anew(demo, messages).text == second.text


def test_an_answer_that_never_began_leaves_no_turn(demo: Qwen3VL) -> None:
    chat = demo.chat()
    chat.stream("Hello")
    assert chat.send("What is 3 + 4?").text == "7"
    assert len(chat.messages) == 2


@pytest.mark.parametrize("content", [5, b"x", ["x"], {"text": "x"}])
def test_chat_takes_texts(demo: Qwen3VL, content: Any) -> None:
    chat = demo.chat()
    with pytest.raises(InputError):
        chat.send(content)
    with pytest.raises(InputError):
        chat.add_tool_result("call_1", content)
    assert chat.messages == []
