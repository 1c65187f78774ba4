"""Every field of a chat request, through OpenAI's own client: what is asked is what is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from asking import QUESTION, TRUTH, about, script
from clients import ask, asking, connect, data_uri, image_url, joined, openai, said_by
from live import Live, live_server
from PIL.Image import Image
from serving import ENDLESS

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.processing import processor
from qwen3vl_mlx.server import picture_parts
from qwen3vl_mlx.server.chat_fields import ChatFields
from qwen3vl_mlx.server.options import ServerOptions


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    with live_server(demo) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    return connect(live)


@pytest.fixture(scope="module")
def asked(scene: Image) -> list[dict[str, Any]]:
    return asking(image_url(data_uri(scene)), QUESTION)


# Sampling: each field does what it does in `generate`, and something.

HOT = {"temperature": 4.0, "seed": 3, "max_tokens": 16}
RUN_ON = {"temperature": 0.0, "max_tokens": 40, "logit_bias": ENDLESS["logit_bias"]}
DRY = {"dry_multiplier": 9.0, "dry_allowed_length": 1}
SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (HOT, {"temperature": 0.0}),
    (HOT, {"seed": 4}),
    (HOT, {"max_tokens": 3}),
    (HOT, {"top_p": 0.2}),
    (HOT, {"top_k": 1}),
    (HOT, {"min_p": 0.9}),
    (HOT, {"stop": ["e", "o"]}),
    ({"temperature": 0.0, "max_tokens": 40}, {"ignore_eos": True}),
    (RUN_ON, {"frequency_penalty": 2.0}),
    (RUN_ON, {"presence_penalty": 2.0}),
    (RUN_ON, {"repetition_penalty": 2.0}),
    (RUN_ON, DRY),
    ({**RUN_ON, **DRY}, {"dry_allowed_length": 4}),
    ({**RUN_ON, **DRY}, {"dry_sequence_breakers": ["a", " "]}),
    ({**RUN_ON, **DRY, "dry_multiplier": 0.1}, {"dry_base": 50.0}),
]


@pytest.mark.parametrize(("base", "fields"), SAMPLING, ids=str)
def test_sampling(
    client: Any,
    demo: Qwen3VL,
    scene: Image,
    asked: list[dict[str, Any]],
    base: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    expected = demo.generate(about(scene), sampling={**base, **fields})
    answer = ask(client, asked, extra_body={**base, **fields})
    assert said_by(answer) == expected.text
    assert answer.usage.completion_tokens == expected.usage.completion_tokens
    other = ask(client, asked, extra_body=base)
    found = (said_by(other), other.usage.completion_tokens)
    assert found != (expected.text, expected.usage.completion_tokens)


def test_both_names_of_the_answers_length(client: Any, asked: list[dict[str, Any]]) -> None:
    for fields in (
        {"max_completion_tokens": 3},
        {"max_completion_tokens": 3, "max_tokens": 3},
    ):
        answer = ask(client, asked, **fields)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    with pytest.raises(openai.BadRequestError, match="contradict"):
        ask(client, asked, max_tokens=3, max_completion_tokens=4)


@pytest.mark.parametrize(
    ("stop", "words", "found"),
    [
        (" with", "A blue background", " with"),
        (["zebra", " star", "purple"], "A blue background with a ", "purple"),
        (["zebra"], TRUTH, None),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_stop(
    client: Any, asked: list[dict[str, Any]], stop: Any, words: str, found: Any, streams: bool
) -> None:
    answer = ask(client, asked, stop=stop, stream=streams)
    if streams:
        chunks = list(answer)
        assert joined(chunks) == words
        choice = chunks[-1].choices[0]
    else:
        assert said_by(answer) == words
        choice = answer.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", found)


def test_a_bias_on_a_token(client: Any, demo: Qwen3VL, asked: list[dict[str, Any]]) -> None:
    (token,) = demo.processor.tokenizer.encode("A")
    assert not said_by(ask(client, asked, logit_bias={str(token): -100})).startswith("A ")
    assert said_by(ask(client, asked, max_tokens=3, logit_bias={str(token): 100})) == "AAA"


@pytest.mark.parametrize("streams", [False, True])
def test_several_answers(
    client: Any, demo: Qwen3VL, scene: Image, asked: list[dict[str, Any]], streams: bool
) -> None:
    expected = demo.generate(about(scene), n=3, sampling=HOT)
    texts = [expected.text, *(other.text for other in expected.alternatives)]
    assert len(set(texts)) > 1
    answer = ask(client, asked, n=3, stream=streams, **HOT)
    if streams:
        chunks = list(answer)
        assert [joined(chunks, index) for index in range(3)] == texts
        ends = [c.choices[0] for c in chunks if c.choices[0].finish_reason]
        assert sorted(end.index for end in ends) == [0, 1, 2]
        return
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == texts
    usages = [expected.usage, *(other.usage for other in expected.alternatives)]
    assert answer.usage.completion_tokens == sum(usage.completion_tokens for usage in usages)
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


# Log-probabilities


@pytest.mark.parametrize("words", [None, "Ünï 日本 😀"])
def test_logprobs(
    client: Any,
    demo: Qwen3VL,
    asked: list[dict[str, Any]],
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if words is not None:
        script(monkeypatch, demo, words)
    whole = ask(client, asked, logprobs=True, top_logprobs=3).choices[0]
    entries = whole.logprobs.content
    spoken = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert spoken == whole.message.content == (words or TRUTH)
    for entry in entries:
        assert entry.token == bytes(entry.bytes).decode(errors="replace")
        assert len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] <= 0
        if words is None:
            assert entry.top_logprobs[0].token == entry.token
    chunks = list(ask(client, asked, logprobs=True, top_logprobs=3, stream=True))
    parts = [chunk.choices[0] for chunk in chunks]
    streamed = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert [entry.to_dict() for entry in streamed] == [entry.to_dict() for entry in entries]
    bare = ask(client, asked, logprobs=True).choices[0].logprobs.content
    assert [(entry.token, entry.top_logprobs) for entry in bare] == [(e.token, []) for e in entries]
    assert ask(client, asked, logprobs=False).choices[0].logprobs is None


# How large pictures are seen

AUTO, LOW = 36 * 1024, 16 * 1024  # in place of those of models that see more than the demo's 61440


@pytest.mark.parametrize(
    ("of_part", "of_request", "tokens"),
    [
        ({}, {}, 36),
        ({"detail": "auto"}, {}, 36),
        ({"detail": "high"}, {}, 49),
        ({"detail": "low"}, {}, 16),
        ({"detail": "low"}, {"max_pixels": 9 * 1024}, 9),
        ({"detail": "high"}, {"max_pixels": 25 * 1024}, 25),
        ({"max_pixels": 25 * 1024}, {}, 25),
        ({"max_pixels": 25 * 1024}, {"max_pixels": 9 * 1024}, 25),
        ({}, {"max_pixels": 25 * 1024}, 25),
        ({}, {"max_pixels": "full"}, 49),
    ],
)
def test_how_large_pictures_are_seen(
    client: Any,
    of_part: dict[str, Any],
    of_request: dict[str, Any],
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processor, "DESKTOP_MAX_PIXELS", AUTO)
    monkeypatch.setattr(picture_parts, "LOW_DETAIL_PIXELS", LOW)
    picture = data_uri(np.zeros((320, 320, 3), np.uint8))
    asked = asking(image_url(picture, **of_part), "Hello")
    answer = ask(client, asked, extra_body=of_request, max_tokens=1)
    text_alone = ask(client, asking("Hello"), max_tokens=1)
    marks = 2  # before and after the picture
    seen = answer.usage.prompt_tokens - text_alone.usage.prompt_tokens - marks
    assert seen == tokens


def test_small_pictures_are_seen_larger(client: Any) -> None:
    picture = data_uri(np.zeros((96, 96, 3), np.uint8))
    fields: dict[str, Any]
    for fields in ({}, {"min_pixels": 36 * 1024}):
        answer = ask(client, asking(image_url(picture)), extra_body=fields, max_tokens=1)
        plain = ask(client, asking(""), max_tokens=1)
        seen = answer.usage.prompt_tokens - plain.usage.prompt_tokens - 2
        assert seen == (36 if fields else 9)


# Limits


def test_truncation(client: Any) -> None:
    long = [
        {"role": "user", "content": "Hello there. " * 400},
        {"role": "assistant", "content": "Hi. " * 400},
        *asking("Hello"),
    ]
    with pytest.raises(openai.BadRequestError, match="2048") as caught:
        ask(client, long)
    assert caught.value.code == "context_length_exceeded"
    answer = ask(client, long, max_tokens=8, extra_body={"truncate_sequence": True})
    assert answer.usage.prompt_tokens < 2048


def test_a_timeout_cuts_the_answer_off(client: Any, demo: Qwen3VL) -> None:
    fields = {**ENDLESS, "logit_bias": {str(k): v for k, v in ENDLESS["logit_bias"].items()}}
    answer = ask(client, asking("Hello"), **fields, extra_body={"timeout": 0.2})
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.stop_reason) == ("length", "timeout")
    assert 0 < answer.usage.completion_tokens < 1500
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, asking("Hello"), extra_body={"timeout": 1e-6})
    assert (caught.value.status_code, caught.value.param) == (408, "timeout")


# What cannot be honoured


@pytest.mark.parametrize("name", ChatFields.impossible)
def test_impossible_fields_are_refused(client: Any, name: str) -> None:
    declared = name in ChatFields.model_fields  # and has a type
    for value in (True,) if declared else (True, "x", [1], {"a": 1}):
        with pytest.raises(openai.BadRequestError, match=name) as caught:
            ask(client, asking("Hello"), extra_body={name: value})
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)


def test_impossible_fields_that_ask_for_nothing(client: Any) -> None:
    for value in (None, False, [], {}, ""):
        nothing = {name: value for name in ChatFields.impossible if name != "store"}
        assert ask(client, asking("Hello"), extra_body=nothing, max_tokens=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"]},
        {"service_tier": "auto"},
        {"store": False},
        {"verbosity": "medium"},
        {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
    ],
    ids=str,
)
def test_fields_that_change_nothing(client: Any, fields: dict[str, Any]) -> None:
    raw = client.chat.completions.with_raw_response
    response = ask_raw(raw, fields)
    assert "x-qwen3vl-warning" not in response.headers


def ask_raw(raw: Any, fields: dict[str, Any]) -> Any:
    return raw.create(model="default", messages=asking("Hello"), max_tokens=1, extra_body=fields)


UNKNOWN = [
    ({"colour": 1}, "colour"),
    ({"max_token": None}, "max_token"),
    ({"stream": True, "stream_options": {"speed": 1}}, "stream_options.speed"),
    ({"chat_template_kwargs": {"tone": "kind"}}, "chat_template_kwargs.tone"),
    ({'x\n"é': 1}, "x"),
]


@pytest.mark.parametrize(("fields", "name"), UNKNOWN)
def test_unknown_fields_are_told_of(
    client: Any, demo: Qwen3VL, fields: dict[str, Any], name: str
) -> None:
    response = ask_raw(client.chat.completions.with_raw_response, fields)
    assert name in response.headers["x-qwen3vl-warning"]


@pytest.mark.parametrize(("fields", "name"), UNKNOWN)
def test_unknown_fields_may_be_refused(demo: Qwen3VL, fields: dict[str, Any], name: str) -> None:
    with live_server(demo, ServerOptions(unknown_fields="refuse")) as strict:
        with pytest.raises(openai.BadRequestError, match="unknown fields") as caught:
            ask_raw(connect(strict).chat.completions.with_raw_response, fields)
        assert caught.value.code == "unknown_parameter"
        assert caught.value.param.startswith(name)
