"""/v1/completions: prompts continued as they stand, in the words of OpenAI's client."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import at_rest, connect, until
from hypothesis import given
from hypothesis import strategies as st
from law import INPUTS

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai
from live import Live, live_server

import qwen3vl_mlx
from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.full_pass import prompt_logprobs
from qwen3vl_mlx.engine.logprobs import TokenLogprob, TopLogprob
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.processing.tokenizer import Tokenizer
from qwen3vl_mlx.server.completion_fields import CompletionFields
from qwen3vl_mlx.server.completion_logprobs import LegacyLogprobs, prompt_lists, token_name
from qwen3vl_mlx.server.completions import _laid_out
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.question import TimeLimit

DEMO = Path(qwen3vl_mlx.__file__).parent / "demo" / "checkpoint"
TOKENIZER = Tokenizer.from_folder(DEMO)

QUESTION = "What is 3 + 4?"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SUM = TURN.format(QUESTION)
GREEDY = {"model": "default", "temperature": 0}
DRAWN = {"model": "default", "temperature": 1.5, "seed": 7}


@pytest.fixture(scope="module")
def live(demo: Qwen3VL) -> Iterator[Live]:
    with live_server(demo) as server:
        yield server


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    """OpenAI's client. At the end nobody holds the model any more."""
    with connect(live) as client:
        yield client
    until(lambda: at_rest(live))


def texts(completion: Any) -> list[str]:
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [choice.text for choice in completion.choices]


# ---- prompts


def test_a_prompt_is_taken_as_it_stands(client: Any, demo: Qwen3VL) -> None:
    chat = demo.generate(QUESTION, max_tokens=8, temperature=0)
    done = client.completions.create(prompt=SUM, max_tokens=8, **GREEDY)
    assert texts(done) == [chat.text] == ["7"]
    assert done.choices[0].finish_reason == "stop"
    assert (done.object, done.model) == ("text_completion", "demo")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


@pytest.mark.parametrize(
    "prompt",
    [
        SUM,
        [SUM],
        TOKENIZER.encode(SUM),
        [TOKENIZER.encode(SUM)],
    ],
    ids=["text", "texts", "tokens", "lists of tokens"],
)
def test_texts_and_tokens_are_the_same_prompt(client: Any, prompt: Any) -> None:
    done = client.completions.create(prompt=prompt, max_tokens=8, echo=True, **GREEDY)
    assert texts(done) == [SUM + "7"]


@pytest.mark.parametrize("nothing", [{}, {"prompt": None}, {"prompt": ""}])
def test_without_a_prompt_a_new_document_begins(client: Any, nothing: dict[str, Any]) -> None:
    asked = {"max_tokens": 4, "echo": True, "temperature": 0, **nothing}
    done = client.post("/completions", body=asked, cast_to=dict)
    expected = client.completions.create(prompt="<|endoftext|>", max_tokens=4, **GREEDY)
    assert done["choices"][0]["text"] == "<|endoftext|>" + texts(expected)[0]


def test_several_prompts_have_n_answers_each_in_order(client: Any) -> None:
    prompts = ["A red", SUM, "The"]
    alone = [
        texts(client.completions.create(prompt=prompt, max_tokens=6, **{**DRAWN, "seed": seed}))[0]
        for prompt in prompts
        for seed in (7, 8)
    ]
    done = client.completions.create(prompt=prompts, n=2, max_tokens=6, **DRAWN)
    assert texts(done) == alone
    assert len(set(alone)) > 3
    assert done.usage.prompt_tokens == sum(len(TOKENIZER.encode(prompt)) for prompt in prompts)


def test_what_was_read_before_is_cached_once_for_all_answers(client: Any, demo: Qwen3VL) -> None:
    demo.engine.clear_caches()
    asked = {"prompt": [SUM, "A red star"], "n": 3, "max_tokens": 2, **DRAWN}
    client.completions.create(**asked)
    again = client.completions.create(**asked).usage
    assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens - 2
    assert again.completion_tokens == 12


def test_an_answer_has_sixteen_tokens_unless_asked_otherwise(client: Any) -> None:
    more = {"extra_body": {"ignore_eos": True}}
    done = client.completions.create(prompt="A red", **GREEDY, **more)
    assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (16, "length")


def test_stop_strings_are_named(client: Any) -> None:
    done = client.completions.create(prompt=TURN.format("Hi"), stop=["zz", " "], **GREEDY)
    assert " " not in texts(done)[0]
    assert (done.choices[0].finish_reason, done.choices[0].stop_reason) == ("stop", " ")


def test_a_prompt_that_is_too_long_is_refused(client: Any, demo: Qwen3VL) -> None:
    with pytest.raises(openai.BadRequestError, match="truncate_sequence") as refused:
        client.completions.create(prompt=[50] * demo.context_length, **GREEDY)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(("room", "kept"), [(3, -3), (1, -1), (5000, -512)])
def test_or_it_loses_its_beginning(demo: Qwen3VL, room: int, kept: int) -> None:
    """What is kept leaves room for the answer, but no more than a quarter of the context."""
    ids = [50 + i % 26 for i in range(demo.context_length + 100)]
    fields = CompletionFields(prompt=ids, max_tokens=room, truncate_sequence=True)
    request = _laid_out(demo, ids, fields, ServerOptions(), TimeLimit())
    assert request.prompt.token_ids.tolist() == ids[-(demo.context_length + kept) :]
    assert request.max_tokens == -kept


@pytest.mark.parametrize("asked", [True, False, None])
def test_the_server_may_cut_by_itself(demo: Qwen3VL, asked: bool | None) -> None:
    ids = [50] * 3000
    fields = CompletionFields(prompt=ids, truncate_sequence=asked)
    options = ServerOptions(truncate=True)
    if asked is False:
        with pytest.raises(ApiError):
            _laid_out(demo, ids, fields, options, TimeLimit())
    else:
        _laid_out(demo, ids, fields, options, TimeLimit())


def test_a_form_holds_here_too(client: Any) -> None:
    form = {"grammar": {"type": "regex", "value": "[xyz]{3}"}}
    done = client.completions.create(prompt="A red", **GREEDY, extra_body=form)
    assert set(texts(done)[0]) <= set("xyz")
    assert len(texts(done)[0]) == 3


def test_a_thinking_model_gets_no_thought_opened(
    demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.processor.template, "opens_thinking", True)
    request = _laid_out(demo, "A", CompletionFields(prompt="A"), ServerOptions(), TimeLimit())
    assert not request.thinking


# ---- choosing the best


def test_the_best_are_those_of_the_highest_mean_logprob(client: Any) -> None:
    asked = {"prompt": ["A red", "The"], "max_tokens": 5, **DRAWN}
    every = client.completions.create(n=6, logprobs=0, **asked)
    best = client.completions.create(n=2, best_of=6, **asked)

    def mean(choice: Any) -> float:
        return float(np.mean(choice.logprobs.token_logprobs or [-np.inf]))

    expected = []
    for some in (every.choices[:6], every.choices[6:]):
        expected += [choice.text for choice in sorted(some, key=mean, reverse=True)[:2]]
    assert texts(best) == expected
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage.completion_tokens == every.usage.completion_tokens


# ---- log-probabilities


def check_lists(lists: dict[str, Any], text: str) -> None:
    """One entry a token; the offsets rise and lead to the tokens that are whole."""
    tokens, offsets = lists["tokens"], lists["text_offset"]
    assert {len(entries) for entries in lists.values() if entries is not None} == {len(tokens)}
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_offsets_lead_to_tokens_with_the_prompt_and_without(client: Any) -> None:
    prompt = "A red é🙂 star"
    asked = {"prompt": prompt, "logprobs": 2, "max_tokens": 5, **GREEDY}
    whole = client.completions.create(echo=True, **asked).choices[0]
    answer = client.completions.create(**asked).choices[0]
    assert whole.text == prompt + answer.text
    lists, own = whole.logprobs.model_dump(), answer.logprobs.model_dump()
    check_lists(lists, whole.text)
    assert "bytes:\\xc3" in lists["tokens"]
    assert lists["token_logprobs"][0] is lists["top_logprobs"][0] is None
    begin = len(TOKENIZER.encode(prompt))
    assert own["text_offset"][0] == len(prompt)
    for name, entries in own.items():
        assert entries == lists[name][begin:]
    sizes = set()
    for token, logprob, top in zip(*(lists[name][1:] for name in NAMES), strict=True):
        assert top[token] == logprob
        sizes.add(len(top))
    assert sizes == {2, 3}  # with the one that came, where it is not among the likeliest


NAMES = ("tokens", "token_logprobs", "top_logprobs")


def test_without_likely_tokens_there_is_no_list_of_them(client: Any) -> None:
    done = client.completions.create(prompt="A red", logprobs=0, echo=True, max_tokens=2, **GREEDY)
    assert done.choices[0].logprobs.top_logprobs is None
    assert len(done.choices[0].logprobs.tokens) == 4


def test_a_prompt_alone_can_be_scored(client: Any, demo: Qwen3VL) -> None:
    ids = TOKENIZER.encode(SUM + "7<|im_end|>")
    done = client.completions.create(
        prompt=[ids, ids[:9]], max_tokens=0, logprobs=1, echo=True, **GREEDY
    )
    logits = demo.logits(QUESTION)  # of all but the answer
    assert len(logits) == len(ids) - 2
    expected = log_softmax(logits)[np.arange(len(ids) - 2), ids[1:-1]]
    for choice, count in zip(done.choices, (len(ids), 9), strict=True):
        found = choice.logprobs.token_logprobs
        assert (len(found), choice.finish_reason) == (count, "length")
        np.testing.assert_allclose(found[1 : len(ids) - 1], expected[: count - 1], atol=1e-4)
    assert done.choices[0].text == SUM + "7<|im_end|>"
    assert done.usage.completion_tokens == 0
    assert done.usage.total_tokens == done.usage.prompt_tokens == len(ids) + 9


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    result: np.ndarray[Any, Any] = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    return result


@pytest.mark.parametrize("interleave", [1, 7, 512])
@pytest.mark.parametrize("name", ["text", "image and video"])
def test_scores_are_those_of_the_whole_pass_however_it_is_cut(
    serve: Callable[..., Qwen3VL], name: str, interleave: int
) -> None:
    model = serve(interleave=interleave)
    prompt = model.processor.prompt(INPUTS[name])
    parts = list(prompt_logprobs(model.engine, model.model, prompt, TOKENIZER, 3))
    assert max(map(len, parts)) <= interleave
    scores = [score for part in parts for score in part]
    expected = log_softmax(model.logits(INPUTS[name]))[:-1]
    ids = prompt.token_ids[1:]
    assert [score.token_id for score in scores] == ids.tolist()
    chosen = [score.logprob for score in scores]
    np.testing.assert_allclose(chosen, expected[np.arange(len(ids)), ids], atol=1e-4)
    tops = [[top.logprob for top in score.top] for score in scores]
    np.testing.assert_allclose(tops, np.sort(expected)[:, :-4:-1], atol=1e-4)


def test_a_prompt_that_can_never_fit_is_not_scored(
    demo: Qwen3VL, serve: Callable[..., Qwen3VL]
) -> None:
    short, long = (demo.processor.layout([50] * length, ()) for length in (20, 2000))
    admission = demo.engine.scheduler.admission
    enough = admission.weights + admission.reserved + admission.cost(short, 1).total
    tight = serve(memory_limit=enough)
    assert list(prompt_logprobs(tight.engine, tight.model, short, TOKENIZER, 0))
    with pytest.raises(InputError, match="GiB"):
        list(prompt_logprobs(tight.engine, tight.model, long, TOKENIZER, 0))


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"), min_size=1))
def test_offsets_are_where_the_decoded_text_has_the_token(before: str, text: str) -> None:
    ids = TOKENIZER.encode(text)
    entries = [entry(token) for token in ids]
    lists = LegacyLogprobs(TOKENIZER, len(before), 0).lists(entries)
    check_lists(lists, before + TOKENIZER.decode(ids))


def entry(token: int, *top: int) -> TokenLogprob:
    raw = tuple(TOKENIZER.token_bytes(token, skip_special_tokens=False))
    others = (TopLogprob("", t, -1.0, tuple(TOKENIZER.token_bytes(t, False))) for t in top)
    return TokenLogprob("", token, -0.5, raw, tuple(others))


def test_special_tokens_are_text_in_a_prompt_only() -> None:
    end, letter = TOKENIZER.added_tokens["<|im_end|>"], TOKENIZER.encode("A")[0]
    entries = [entry(end), entry(letter)]
    assert LegacyLogprobs(TOKENIZER, 3, 0).lists(entries)["text_offset"] == [3, 3]
    lists = prompt_lists(TOKENIZER, letter, entries, 1)
    assert lists["text_offset"] == [0, 1, 1 + len("<|im_end|>")]
    assert lists["token_logprobs"] == [None, -0.5, -0.5]


def test_no_two_tokens_share_a_name() -> None:
    known = range(TOKENIZER.vocab_size)
    names = {token_name(TOKENIZER.token_bytes(token, False)) for token in known}
    assert len(names) == TOKENIZER.vocab_size


# ---- streams


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"echo": True},
        {"echo": True, "logprobs": 2},
        {"logprobs": 0, "n": 3},
        {"prompt": ["A red", "é"], "n": 2, "echo": True, "logprobs": 1},
        {"stop": "e"},
        {"logprobs": 1, "logit_bias": {"1000": 100}, "extra_body": {"ignore_eos": True}},  # no text
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(client: Any, asked: dict[str, Any]) -> None:
    asked = {"prompt": "The", "max_tokens": 12, **DRAWN, **asked}
    whole = client.completions.create(**asked)
    events = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *pieces, last = events
    assert {event.id for event in events} == {last.id}
    assert last.choices == []
    assert all(piece.usage is None for piece in pieces)
    assert counts(last.usage) == counts(whole.usage)
    for choice in whole.choices:
        own = [p.choices[0] for p in pieces if p.choices[0].index == choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        assert [piece.finish_reason for piece in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        if choice.logprobs is None:
            assert all(piece.logprobs is None for piece in own)
            continue
        lists = [piece.logprobs.model_dump() for piece in own if piece.logprobs is not None]
        for name, entries in choice.logprobs.model_dump().items():
            joined = [part[name] for part in lists]
            assert entries is None or list(itertools.chain(*joined)) == entries


def counts(usage: Any) -> list[int]:
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]


def test_a_stream_has_no_usage_unless_asked_and_ends_in_done(live: Live, client: Any) -> None:
    asked = {"prompt": "A", "max_tokens": 2, "stream": True}
    with client.completions.with_streaming_response.create(**asked, **GREEDY) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in line for line in lines)


def test_a_reader_who_leaves_frees_the_model(client: Any, live: Live) -> None:
    endless = {"extra_body": {"ignore_eos": True}, "max_tokens": 1900}
    with client.completions.create(prompt=["A", "The"], n=2, stream=True, **endless, **DRAWN) as s:
        next(iter(s))
        assert live.serving.host.status().users == 1
    # `client` waits until all is at rest


# ---- refusals


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[50], []]}, "prompt", "empty"),
        ({"prompt": [50, 5000]}, "prompt", "5000"),
        ({"prompt": [[50], [-1]]}, "prompt", "-1"),
        ({"prompt": "<|vision_start|><|image_pad|><|vision_end|>"}, "prompt", "chat/completions"),
        ({"prompt": ["A"] * 60, "n": 3}, "prompt", "128"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "max_tokens", "echo"),
        ({"n": 3, "best_of": 2}, "best_of", "at least n"),
        ({"best_of": 2, "stream": True}, "best_of", "streamed"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "5000"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: Any, asked: dict[str, Any], param: str, words: str
) -> None:
    asked = {"prompt": "A", "model": "default", **asked}
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.post("/completions", body=asked, cast_to=dict)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": ["A", 5]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"echo": "yes"}, "echo"),
    ],
)
def test_what_has_another_shape_is_refused_by_name(
    client: Any, asked: dict[str, Any], param: str
) -> None:
    asked = {"prompt": "A", "model": "default", **asked}
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.post("/completions", body=asked, cast_to=dict)
    assert refused.value.param == param


def test_an_unknown_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="default"):
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="A")


def test_scoring_a_prompt_ends_in_time(client: Any) -> None:
    asked = {
        "prompt": "A red " * 300,
        "max_tokens": 0,
        "echo": True,
        "logprobs": 1,
        "timeout": 1e-3,
    }
    with pytest.raises(openai.APIStatusError, match="timeout") as late:
        client.post("/completions", body=asked, cast_to=dict)
    assert late.value.status_code == 408
