"""A chat whose history is changed between turns: system message, retries, another model's turns."""

from __future__ import annotations

from typing import Any

import pytest
from asking import QUESTION, TRUTH, about, anew, user
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.conversation import Chat
from qwen3vl_mlx.engine.output import collect
from qwen3vl_mlx.engine.sampling import SamplingParams
from qwen3vl_mlx.errors import InputError


def roles(chat: Chat) -> list[str]:
    return [message["role"] for message in chat.messages]


def test_the_system_message_may_be_replaced(demo: Qwen3VL, scene: Image) -> None:
    chat = demo.chat()
    assert chat.system is None
    chat.send(QUESTION, images=[scene])
    for text in ("Be brief.", "Be long."):
        chat.system = text
        assert (chat.system, roles(chat)) == (text, ["system", "user", "assistant"])
    messages: list[Any] = [*chat.messages, *user("What shape is purple?")]
    assert chat.send("What shape is purple?").text == anew(demo, messages).text
    chat.system = None
    chat.system = None
    assert roles(chat) == ["user", "assistant"] * 2


def test_a_retry_is_asked_with_the_params_of_now(demo: Qwen3VL, scene: Image) -> None:
    chat = demo.chat(params=SamplingParams(temperature=0, max_tokens=2))
    first = chat.send(QUESTION, images=[scene])
    chat.params = SamplingParams(temperature=0)
    again = collect(chat.retry())
    assert again.text == TRUTH
    assert TRUTH.startswith(first.text)
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 1  # nothing is read anew
    assert roles(chat) == ["user", "assistant"]
    assert chat.messages[1]["content"] == TRUTH
    chat.send("What shape is purple?")
    assert collect(chat.retry()).text == "star"
    assert roles(chat) == ["user", "assistant"] * 2


def test_a_retry_that_says_nothing_changes_nothing(demo: Qwen3VL, scene: Image) -> None:
    chat = demo.chat()
    with pytest.raises(InputError, match="ask one first"):
        chat.retry()
    chat.send(QUESTION, images=[scene])
    before = list(chat.messages)
    chat.retry().close()
    assert chat.messages == before
    assert chat.send("What shape is purple?").text == "star"


def test_a_chat_goes_on_from_messages(demo: Qwen3VL, scene: Image) -> None:
    told = [*about(scene), {"role": "assistant", "content": TRUTH}]
    chat = demo.chat()
    chat.restore(told)
    assert chat.send("What shape is purple?").text == "star"
    whole = [*told, *user("What shape is purple?")]
    assert anew(demo, whole).text == "star"
    kept = list(chat.messages)
    with pytest.raises(InputError, match="nowhere"):
        chat.restore([{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}])
    assert chat.messages == kept


def test_pictures_may_be_numbered(demo: Qwen3VL, scene: Image) -> None:
    chat = demo.chat()
    chat.number_images = True
    numbered = chat.send(QUESTION, images=[scene]).usage.prompt_tokens
    expected = demo.generate(QUESTION, images=[scene], add_vision_id=True, max_tokens=1)
    assert numbered == expected.usage.prompt_tokens
    assert numbered > demo.generate(QUESTION, images=[scene], max_tokens=1).usage.prompt_tokens
