"""What users of other libraries of this model met, each under the name of what they saw.

On pictures whose descriptions are known from how they were drawn, through the public API.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from asking import QUESTION, about
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.demo.questions import questions
from qwen3vl_mlx.demo.scenes import Scene, make_scene

SAME_SIZE = (40051, 40060, 40092, 40107)  # 192 x 128
SIZES = (40116, 40013, 40027, 40031)  # 96 x 320, 160 x 96, 96 x 96, 128 x 224
Seen = tuple[Image, str]  # a picture and what it shows


def show(seed: int) -> Seen:
    drawn: Scene = make_scene(seed, kind="shapes")
    (truth,) = [asked.truth for asked in questions(drawn) if asked.task == "describe"]
    return drawn.draw(), truth


@pytest.fixture(scope="module")
def same_size() -> list[Seen]:
    seen = [show(seed) for seed in SAME_SIZE]
    assert {picture.size for picture, _ in seen} == {(192, 128)}
    return seen


@pytest.fixture(scope="module")
def sizes() -> list[Seen]:
    return [show(seed) for seed in SIZES]


def together(model: Qwen3VL, asked: Sequence[tuple[str, Image]]) -> list[str]:
    streams = [model.stream(text, images=[picture]) for text, picture in asked]
    return ["".join(chunk.text for chunk in stream) for stream in streams]


# A: deep visual features given to the wrong part of a picture that is read in pieces.


@pytest.mark.parametrize("piece", [1, 7, 16])
def test_a_picture_too_large_to_be_read_at_once_is_described_as_well(
    serve: Callable[..., Qwen3VL], sizes: list[Seen], piece: int
) -> None:
    model = serve(prefill_chunk=piece, interleave=piece)
    picture, truth = sizes[0]
    assert model.processor.prompt(about(picture)).media[0].num_tokens > 16
    assert model.generate(QUESTION, images=[picture]).text == truth
    asked = [(QUESTION, picture) for picture, _ in sizes]
    assert together(model, asked) == [truth for _, truth in sizes]


# B: of pictures asked about at once, only the first was seen in full.


def test_pictures_asked_about_at_once_are_each_seen_in_full(
    serve: Callable[..., Qwen3VL], same_size: list[Seen], sizes: list[Seen]
) -> None:
    model = serve()
    for seen in (same_size, sizes):
        asked = [(QUESTION, picture) for picture, _ in seen]
        assert together(model, asked) == [truth for _, truth in seen]


# C: with prompts of several lengths, pictures went to each other's rows.


def test_long_and_short_conversations_at_once_keep_their_own_pictures(
    demo: Qwen3VL, serve: Callable[..., Qwen3VL], same_size: list[Seen]
) -> None:
    lengths = (3, 0, 2, 1)  # earlier turns
    asked = [
        [*small_talk(turns), *about(seen[0])]
        for turns, seen in zip(lengths, same_size, strict=True)
    ]
    alone = [demo.generate(messages, max_tokens=80).text for messages in asked]
    assert len(set(alone)) == len(alone)
    grounds = [(told.split(" with ")[0], seen[1].split(" with ")[0])
               for told, seen in zip(alone, same_size, strict=True)]  # fmt: skip
    assert all(told == true for told, true in grounds), "each is about its own picture"
    for order in list(permutations(range(4)))[::5]:
        model = serve(prefix_cache_bytes=0, feature_cache_bytes=0)
        streams = [model.stream(asked[i], max_tokens=80) for i in order]
        answers = ["".join(chunk.text for chunk in stream) for stream in streams]
        assert answers == [alone[i] for i in order]


def small_talk(turns: int) -> list[dict[str, Any]]:
    sums = (("What is 3 + 4?", "7"), ("What is 5 + 2?", "7"), ("What is 1 + 1?", "2"))
    return [
        {"role": role, "content": text}
        for pair in sums[:turns]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


# D: the cache knew a picture by its tokens, which are alike for all pictures of one size.


def test_a_new_picture_of_the_same_size_is_not_answered_from_the_old_one(
    demo: Qwen3VL, same_size: list[Seen]
) -> None:
    for _ in range(2):
        for picture, truth in same_size:
            assert demo.generate(QUESTION, images=[picture]).text == truth
    for first, second in permutations(same_size, 2):
        chat = demo.chat()
        assert chat.send(QUESTION, images=[first[0]]).text == first[1]
        chat = demo.chat()
        assert chat.send(QUESTION, images=[second[0]]).text == second[1]


def test_a_file_that_was_overwritten_is_seen_anew(
    demo: Qwen3VL, same_size: list[Seen], tmp_path: Path
) -> None:
    path = tmp_path / "camera.png"
    for picture, truth in same_size:
        picture.save(path)
        assert demo.generate(QUESTION, images=[path]).text == truth


def test_two_pictures_of_one_size_that_change_places_are_told_apart(
    demo: Qwen3VL, same_size: list[Seen]
) -> None:
    fresh = load("demo")
    (one, _), (two, _) = same_size[:2]
    for pictures in ([one, two], [two, one], [one, one], [two, two]):
        answers = [
            model.generate(QUESTION, images=pictures, max_tokens=60).text for model in (demo, fresh)
        ]
        fresh.engine.clear_caches()
        assert answers[0] == answers[1]


# E: positions after a picture were kept on the model, one for all who asked.


def test_answers_that_run_at_once_do_not_disturb_each_other(
    serve: Callable[..., Qwen3VL], sizes: list[Seen]
) -> None:
    model = serve()
    streams = [model.stream(QUESTION, images=[picture]) for picture, _ in sizes]
    streams.append(model.stream("What is 3 + 4?"))
    said = [""] * len(streams)
    for _ in range(200):  # a chunk of each in turn
        for i, stream in enumerate(streams):
            chunk = next(stream, None)
            said[i] += chunk.text if chunk is not None else ""
    assert said == [*(truth for _, truth in sizes), "7"]


def test_one_chat_does_not_move_what_another_has_seen(
    serve: Callable[..., Qwen3VL], sizes: list[Seen]
) -> None:
    model = serve()
    chats = [model.chat() for _ in sizes]
    for chat, (picture, _) in zip(chats, sizes, strict=True):
        chat.send("How many shapes are there?", images=[picture])
    for chat, (_, truth) in zip(chats, sizes, strict=True):
        assert chat.send(QUESTION).text == truth


# F: positions of a follow-up question began at zero behind a remembered picture.


def test_a_follow_up_question_is_asked_about_the_remembered_picture(
    serve: Callable[..., Qwen3VL], sizes: list[Seen]
) -> None:
    model = serve()
    for picture, truth in sizes:
        chat = model.chat()
        first = chat.send("How many shapes are there?", images=[picture])
        second = chat.send(QUESTION)
        assert second.text == truth
        assert second.usage.cached_tokens >= first.usage.prompt_tokens
        assert serve(prefix_cache_bytes=0).generate(chat.messages[:-1]).text == truth


# The answer was about the picture before, also after a restart.


def test_a_cache_kept_on_disk_does_not_answer_about_an_older_picture(
    serve: Callable[..., Qwen3VL], same_size: list[Seen], tmp_path: Path
) -> None:
    for first, second in ((0, 1), (2, 3)):
        model = serve(cache_folder=tmp_path)
        assert model.generate(QUESTION, images=[same_size[first][0]]).text == same_size[first][1]
        model.close()
        again = serve(cache_folder=tmp_path)
        new = again.generate(QUESTION, images=[same_size[second][0]])
        old = again.generate(QUESTION, images=[same_size[first][0]])
        assert (new.text, old.text) == (same_size[second][1], same_size[first][1])
        assert new.usage.cached_tokens < 5 < old.usage.cached_tokens
        again.close()
