"""One request to the bundled checkpoint: asked, streamed, stopped, refused, left."""

from __future__ import annotations

import base64
import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from asking import OTHER_TRUTH, QUESTION, TRUTH, about
from PIL.Image import Image

from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import CheckpointError, ConfigError, InputError, PromptError, Qwen3VLError
from qwen3vl_mlx.processing.video import Video


def test_the_scenes_are_described(demo: Qwen3VL, scene: Image, other_scene: Image) -> None:
    done = demo.generate(QUESTION, images=[scene])
    assert (done.text, done.finish_reason) == (TRUTH, "stop")
    assert (done.reasoning, done.tool_calls, done.reasoning_closed) == ("", (), True)
    assert demo.generate(QUESTION, images=[other_scene]).text == OTHER_TRUTH


def test_chunks_join_to_the_completion(demo: Qwen3VL, scene: Image) -> None:
    chunks = list(demo.stream(QUESTION, images=[scene]))
    assert len(chunks) > 5
    assert "".join(chunk.text for chunk in chunks) == TRUTH
    *pieces, last = chunks
    assert all(piece.finish_reason is None and piece.usage is None for piece in pieces)
    assert last.finish_reason == "stop"
    assert last.usage is not None


def test_usage(demo: Qwen3VL, scene: Image) -> None:
    demo.engine.clear_caches()
    usage = demo.generate(QUESTION, images=[scene]).usage
    prompt = demo.processor.prompt(about(scene))
    assert usage.prompt_tokens == len(prompt.token_ids)
    spoken = len(demo.processor.tokenizer.encode(TRUTH + "<|im_end|>"))
    assert usage.completion_tokens == spoken
    assert usage.total_tokens == usage.prompt_tokens + spoken
    assert usage.cached_tokens == 0
    parts = (usage.total_prompt_time_sec, usage.total_completion_time_sec)
    assert min(parts) > 0
    assert usage.total_time_sec == pytest.approx(sum(parts))
    assert usage.time_to_first_token_sec == pytest.approx(parts[0])
    rates = (
        (usage.avg_prompt_tok_per_sec, usage.prompt_tokens, parts[0]),
        (usage.avg_compl_tok_per_sec, spoken - 1, parts[1]),
        (usage.avg_tok_per_sec, usage.total_tokens, usage.total_time_sec),
    )
    for rate, tokens, seconds in rates:
        assert rate == pytest.approx(tokens / seconds)
    assert usage.peak_memory_bytes > 13_000_000  # the weights alone, in float32
    assert json.loads(json.dumps(asdict(usage)))["prompt_tokens"] == usage.prompt_tokens


@pytest.mark.parametrize(
    ("stop", "text", "found"),
    [
        (" with", "A blue background", " with"),
        (["zebra", " star", "purple"], "A blue background with a ", "purple"),
        ("A", "", "A"),
        (["zebra"], TRUTH, None),
        ("bottom. And more", TRUTH, None),  # held back to the end, then it comes out
        ("bottom.", TRUTH.removesuffix("bottom."), "bottom."),
    ],
)
def test_stop_strings(
    demo: Qwen3VL, scene: Image, stop: str | list[str], text: str, found: str | None
) -> None:
    done = demo.generate(QUESTION, images=[scene], stop=stop)
    assert (done.text, done.finish_reason, done.stop) == (text, "stop", found)
    *pieces, last = demo.stream(QUESTION, images=[scene], stop=stop)
    assert "".join(chunk.text for chunk in (*pieces, last)) == text
    assert last.stop == found
    assert all(chunk.stop is None for chunk in pieces)


def test_max_tokens(demo: Qwen3VL, scene: Image) -> None:
    done = demo.generate(QUESTION, images=[scene], max_tokens=3)
    assert done.finish_reason == "length"
    assert done.usage.completion_tokens == 3
    assert TRUTH.startswith(done.text)
    exact = len(demo.processor.tokenizer.encode(TRUTH)) + 1  # the end token counts
    assert demo.generate(QUESTION, images=[scene], max_tokens=exact).finish_reason == "stop"


def test_seeds(demo: Qwen3VL, scene: Image) -> None:
    def ask(seed: int | None) -> str:
        return demo.generate(
            QUESTION, images=[scene], seed=seed, temperature=3.0, max_tokens=12
        ).text

    assert ask(5) == ask(5)
    assert len({ask(seed) for seed in (5, 6, 7)}) > 1
    assert demo.default_params.temperature == 0  # the checkpoint says so


def test_images_in_any_form(demo: Qwen3VL, scene: Image, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    scene.save(path)
    data = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = (path, str(path), data, io.BytesIO(data).getbuffer(), np.asarray(scene), uri)
    for form in forms:
        assert demo.generate(QUESTION, images=[form]).text == TRUTH
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": uri}},
                {"type": "text", "text": QUESTION},
            ],
        }
    ]
    assert demo.generate(messages).text == TRUTH


def test_logits(demo: Qwen3VL, scene: Image) -> None:
    logits = demo.logits(QUESTION, images=[scene])
    assert logits.shape == (len(demo.processor.prompt(about(scene)).token_ids), 1024)
    assert logits.dtype == np.float32
    first = demo.processor.tokenizer.encode(TRUTH)[0]
    assert logits[-1].argmax() == first


def test_no_images_at_all(demo: Qwen3VL) -> None:
    plain = demo.generate("Hello", max_tokens=4)
    assert demo.generate("Hello", images=[], videos=[], max_tokens=4).text == plain.text


# name of the argument: the call, and words of the error
REFUSED: dict[str, tuple[dict[str, Any], type[Qwen3VLError], str]] = {
    "images with messages": (
        {"messages": [{"role": "user", "content": "Hi"}], "images": ["a.png"]},
        InputError,
        "images=",
    ),
    "one path": ({"messages": "Hi", "images": "a.png"}, InputError, "must be a list"),
    "one blob": ({"messages": "Hi", "images": b"abc"}, InputError, "must be a list"),
    "no such file": ({"messages": "Hi", "images": ["nowhere.png"]}, InputError, "nowhere.png"),
    "no messages": ({"messages": []}, PromptError, "empty"),
    "temperature": ({"messages": "Hi", "temperature": -1}, InputError, "temperature"),
    "max_tokens": ({"messages": "Hi", "max_tokens": 0}, InputError, "max_tokens"),
    "stop": ({"messages": "Hi", "stop": ""}, InputError, "stop"),
    "logit_bias": ({"messages": "Hi", "logit_bias": {4096: 1}}, InputError, "logit_bias"),
    "max_pixels": ({"messages": "Hi", "max_pixels": 0}, InputError, "max_pixels"),
    "too long": ({"messages": "word " * 2100}, PromptError, "2048"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_stream_begins(demo: Qwen3VL, name: str) -> None:
    arguments, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        demo.stream(**arguments)
    with pytest.raises(error, match=words):
        demo.generate(**arguments)


def test_the_context_ends_the_answer(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "small")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 64
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    model = load(tmp_path / "small")
    endless = dict.fromkeys(model.eos_token_ids, -1000000000.0)
    done = model.generate("Hello", logit_bias=endless)
    assert (done.usage.total_tokens, done.finish_reason) == (64, "length")
    assert model.generate("Hello", logit_bias=endless, max_tokens=999).usage.total_tokens == 64
    with pytest.raises(PromptError, match="64"):
        model.generate("Hello " * 60)


def test_a_stream_may_be_left(demo: Qwen3VL, scene: Image, other_scene: Image) -> None:
    stream = demo.stream(QUESTION, images=[other_scene])
    next(stream)
    stream.close()
    abandoned = demo.stream(QUESTION, images=[other_scene])
    next(abandoned)

    def stop() -> None:
        with demo.stream(QUESTION, images=[other_scene]) as stopped:
            next(stopped)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert demo.generate(QUESTION, images=[scene]).text == TRUTH
    assert "".join(chunk.text for chunk in abandoned) == OTHER_TRUTH[1:]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_one_opened_file_may_stand_for_several_pictures(
    demo: Qwen3VL, scene: Image, form: str, tmp_path: Path
) -> None:
    path = tmp_path / "scene"
    scene.resize((1600, 1280)).save(path, form)  # large enough to be in decoding for a while
    for _ in range(4):
        with PIL.Image.open(path) as lazy:  # Pillow decodes it when it is first used
            prompt = demo.processor.prompt(
                [*about(lazy), {"role": "assistant", "content": "So."}, *about(lazy)]
            )
        assert prompt.media[0].identity == prompt.media[1].identity
        with PIL.Image.open(path) as lazy:
            frames = {"type": "video", "video": [lazy] * 4}
            (video,) = demo.processor.prompt([{"role": "user", "content": [frames]}]).media
        assert video.grid_thw[0] == 2


def test_a_part_may_have_limits_of_its_own(demo: Qwen3VL, scene: Image) -> None:
    def tokens(**limits: int) -> int:
        part = {"type": "image", "image": scene, **limits}
        (medium,) = demo.processor.prompt([{"role": "user", "content": [part]}]).media
        return medium.num_tokens

    assert tokens(max_pixels=9216) <= 9 < tokens()
    with pytest.raises(InputError, match="max_pixels"):
        tokens(max_pixels=0)


def test_limits_of_images_do_not_pass_for_those_of_videos(demo: Qwen3VL, scene: Image) -> None:
    with pytest.raises(InputError, match="Video"):
        demo.generate("x", videos=[[scene] * 4], max_pixels=9216)
    short, full = (
        demo.generate("x", videos=[Video([scene] * 4, max_pixels=limit)], max_tokens=1).usage
        for limit in (20000, None)
    )
    assert short.prompt_tokens < full.prompt_tokens


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": True, "temperature": "0.7"},
        {"eos_token_id": "1000"},
        {"eos_token_id": [None]},
        {"eos_token_id": 1000.0},
    ],
    ids=str,
)
def test_a_bad_generation_config_is_named(values: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"size": 5},
        {"image_mean": None},
        {"image_mean": 0.5},
        {"image_std": ["a", "b", "c"]},
        {"image_std": [0.5, 0.5, 0.0]},
        {"do_resize": False},
    ],
    ids=str,
)
def test_a_bad_preprocessor_config_is_named(values: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ConfigError, match=next(iter(values))):
        load(folder)


def test_an_empty_prompt_is_refused(demo: Qwen3VL) -> None:
    nothing = demo.processor.layout([], ())
    with pytest.raises(PromptError, match="empty"):
        demo.asking.request(nothing, demo.default_params, tools=False, started=0.0)
