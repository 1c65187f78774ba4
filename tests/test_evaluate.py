"""Quality of quantized checkpoints: examples, passes layer by layer, and the numbers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import layouts
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import passes
import pytest
import tiny
from PIL import Image

from qwen3vl_mlx import api
from qwen3vl_mlx import evaluate as command
from qwen3vl_mlx.api import Qwen3VL, load
from qwen3vl_mlx.demo import CHECKPOINT, EXAMPLE
from qwen3vl_mlx.demo.questions import Question, is_correct, questions
from qwen3vl_mlx.demo.scenes import Scene, make_scene
from qwen3vl_mlx.errors import InputError, WeightsError
from qwen3vl_mlx.models.positions import rope_index
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.quant import evaluate as measuring
from qwen3vl_mlx.quant.evaluate import Quality, Reference, evaluate, standard_error, stored_weight
from qwen3vl_mlx.quant.examples import (
    CALIBRATION_SEED,
    EVALUATION_SEED,
    PROMPTS,
    TASK_SEED,
    Example,
    about,
    demo_examples,
    folder_examples,
    greedy_answers,
    scene_questions,
    spread,
    with_answer,
)
from qwen3vl_mlx.quant.streamed import StreamedPass

Log = npt.NDArray[np.float64]

MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def affine(bits: int) -> dict[str, Any]:
    return {"group_size": 32, "bits": bits, "mode": "affine"}


COUNT = 40  # examples: enough for three standard errors to tell settings apart


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo with its decoder quantized, by name."""
    root = tmp_path_factory.mktemp("quantized")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config, tensors = layouts.as_mlx(config, mx.load(str(CHECKPOINT / "model.safetensors")))
    chosen = {"2bit": affine(2), "8bit": affine(8), "mxfp4": MXFP4}
    for name, settings in chosen.items():
        packed, _ = layouts.quantize(tensors, layouts.uniform(settings))
        layouts.write(root / name, {**config, "quantization": settings}, packed)
        complete(root / name)
    return {name: root / name for name in chosen}


def complete(folder: Path) -> Path:
    """Add the demo's tokenizer, template and processor files."""
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors" and not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def examples(demo: Qwen3VL) -> list[Example]:
    return demo_examples(demo.processor, COUNT, first_seed=EVALUATION_SEED)


@pytest.fixture(scope="module")
def measured(quantized: dict[str, Path], examples: list[Example]) -> dict[str, Quality]:
    folders = [CHECKPOINT, *quantized.values()]
    return {quality.name: quality for quality in evaluate(CHECKPOINT, folders, examples)}


# -- examples ----------------------------------------------------------------------------------


def test_drawn_examples_hold_the_true_answers(demo: Qwen3VL, examples: list[Example]) -> None:
    asked = list(scene_questions(COUNT, EVALUATION_SEED))
    assert len({question.task for _, question in asked}) >= 10
    for (scene, question), example in zip(asked, examples, strict=True):
        assert question in questions(make_scene(scene.seed))
        text = demo.processor.tokenizer.decode(
            example.prompt.token_ids.tolist(), skip_special_tokens=False
        )
        assert text.endswith(f"<|im_start|>assistant\n{question.truth}<|im_end|>")
        answer = demo.processor.tokenizer.decode(example.answer_ids.tolist())
        assert answer == question.truth
        rows = np.arange(len(example.prompt.token_ids))[example.rows]
        assert np.array_equal(example.prompt.token_ids[rows + 1], example.answer_ids)


def test_no_picture_serves_two_purposes(demo: Qwen3VL) -> None:
    seen: set[str] = set()
    for first in (CALIBRATION_SEED, EVALUATION_SEED, TASK_SEED):
        drawn = demo_examples(demo.processor, 20, first_seed=first)
        pictures = {example.prompt.media[0].identity for example in drawn}
        assert len(pictures) == 20
        assert not pictures & seen
        seen |= pictures
    seeds = sorted((CALIBRATION_SEED, EVALUATION_SEED, TASK_SEED))
    assert min(np.diff(seeds)) >= 100_000


def prompts_of(model: Qwen3VL) -> list[Prompt]:
    """Two pictures of different sizes, one picture, text alone."""
    big, small = (Image.effect_noise(size, 90).convert("RGB") for size in ((128, 64), (64, 96)))
    contents: list[Any] = [
        [{"image": big}, {"text": "or"}, {"image": small}, {"text": "Which?"}],
        [{"image": small}, {"text": "Is there a star?"}],
        "What is 3 + 4?",
    ]
    processor = model.processor
    return [processor.prompt([{"role": "user", "content": content}]) for content in contents]


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_answers_stand_where_decoding_puts_them(
    tiny_model: Callable[[str], Qwen3VL], variant: str
) -> None:
    model = tiny_model(variant)
    config = model.model.config
    prompts = prompts_of(model)
    answers = list(greedy_answers(model, prompts, 12))
    assert min(map(len, answers)) == 12
    for prompt, answer in zip(prompts, answers, strict=True):
        example = with_answer("x", prompt, answer)
        laid_out = rope_index(
            example.prompt.token_ids,
            [medium.grid_thw for medium in prompt.media],
            [],
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            spatial_merge_size=config.vision.spatial_merge_size,
        )
        assert np.array_equal(laid_out.position_ids, example.prompt.position_ids)
        assert laid_out.rope_delta == example.prompt.rope_delta
        assert laid_out.spans == example.prompt.index.spans
        logits = forward(model, example.prompt)[example.rows]
        assert logits.argmax(axis=-1).tolist() == answer


def test_an_answer_has_a_token(demo: Qwen3VL) -> None:
    with pytest.raises(InputError, match="example x has no answer"):
        with_answer("x", prompts_of(demo)[2], [])


def test_greedy_answers_end_with_their_end_token(demo: Qwen3VL) -> None:
    prompt = demo.processor.prompt(about(EXAMPLE, "How many shapes are there?"))
    text = demo.generate("How many shapes are there?", images=[EXAMPLE], temperature=0).text
    (tokens,) = greedy_answers(demo, [prompt], 50)
    assert tokens == demo.processor.tokenizer.encode(f"{text}<|im_end|>")
    assert list(greedy_answers(demo, [prompt], 1)) == [tokens[:1]]


def test_a_folder_of_pictures(demo: Qwen3VL, tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    draw = lambda seed: make_scene(seed).draw()  # noqa: E731
    draw(0).save(tmp_path / "b.png")
    draw(1).save(tmp_path / "a.jpg")
    (tmp_path / "deeper").mkdir()
    pillow_heif.from_pillow(draw(2)).save(tmp_path / "deeper" / "c.heic")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:200])
    (tmp_path / ".hidden").mkdir()
    draw(3).save(tmp_path / ".hidden" / "d.png")
    draw(3).save(tmp_path / ".d.png")
    notes: list[str] = []
    found = folder_examples(demo, tmp_path, 7, max_answer_tokens=5, note=notes.append)
    assert [example.name.split(": ")[0] for example in found] == [
        "a.jpg", "b.png", "deeper/c.heic", "a.jpg", "b.png", "deeper/c.heic", "a.jpg",
    ]  # fmt: skip
    assert len({example.name for example in found}) == 7
    assert {example.name.split(": ")[1] for example in found} <= {*PROMPTS}
    assert len(notes) == 1
    assert "cut.png" in notes[0]
    for example in found[:2]:
        assert 1 <= len(example.answer_ids) <= 5
        asked = asked_again(demo, tmp_path, example)
        assert list(greedy_answers(demo, [asked], 5)) == [example.answer_ids.tolist()]


def asked_again(model: Qwen3VL, folder: Path, example: Example) -> Prompt:
    """The question of a folder's example, laid out anew."""
    name, _, question = example.name.partition(": ")
    return model.processor.prompt(about(folder / name, question))


def test_pictures_run_out_of_questions(demo: Qwen3VL, tmp_path: Path) -> None:
    make_scene(0).draw().save(tmp_path / "only.png")
    assert len(folder_examples(demo, tmp_path, 50, max_answer_tokens=1)) == len(PROMPTS)


def test_folders_without_pictures(demo: Qwen3VL, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*gone"):
        folder_examples(demo, tmp_path / "gone", 2)
    with pytest.raises(InputError, match=r"no picture that can be read$"):
        folder_examples(demo, tmp_path, 2)
    (tmp_path / "a.png").write_bytes(EXAMPLE.read_bytes()[:100])
    with pytest.raises(InputError, match=r"no picture that can be read; the first of 1: .*a\.png"):
        folder_examples(demo, tmp_path, 2)
    with pytest.raises(InputError, match="at least 1"):
        folder_examples(demo, tmp_path, 0)


@pytest.mark.parametrize(
    ("length", "count", "first"),
    [(3, 5, [0, 1, 2]), (4, 2, [0, 2]), (10, 3, [0, 3, 6]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_pictures_are_spread_evenly(length: int, count: int, first: list[int]) -> None:
    items = [Path(str(i)) for i in range(length)]
    got = [int(str(path)) for path in spread(items, count)]
    assert got[: len(first)] == first
    assert sorted(got) == list(range(length))


# -- layer by layer ----------------------------------------------------------------------------


def forward(model: Qwen3VL, prompt: Prompt) -> npt.NDArray[np.float32]:
    (hidden,) = passes.forward(model.model, prompt)
    return np.array(model.model.language_model.logits(hidden)[0])


@pytest.fixture(
    scope="module", params=[*tiny.VARIANTS, "dense72 4bit", "dense64 mxfp4", "moe mixed"]
)
def checkpoint(
    request: pytest.FixtureRequest,
    tiny_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Dense and MoE, tied and untied, whole and quantized."""
    variant, _, settings = request.param.partition(" ")
    if not settings:
        return tiny_folder(variant)
    config, tensors = layouts.as_mlx(*layouts.wide(variant))
    base = MXFP4 if settings == "mxfp4" else affine(4)
    router = affine(8)
    packed, _ = layouts.quantize(
        tensors, lambda path: router if path.endswith(".gate") else layouts.uniform(base)(path)
    )
    names = [name.removesuffix(".scales") for name in packed if name.endswith(".gate.scales")]
    config = {**config, "quantization": base | dict.fromkeys(names, router)}
    folder = tmp_path_factory.mktemp("layered") / variant
    return complete(layouts.write(folder, config, *layouts.split(packed, 2)))


def test_layers_one_by_one_are_the_forward_pass(checkpoint: Path) -> None:
    model = load(checkpoint)
    prompts = prompts_of(model)
    rows = [slice(None), slice(3, 7), slice(0, -1)]
    passing = StreamedPass(checkpoint, prompts)
    for _ in range(2):  # a pass may be made again
        for prompt, part, got in zip(prompts, rows, passing.logits(rows), strict=True):
            expected = forward(model, prompt)[part]
            assert got.shape == expected.shape
            assert np.abs(np.array(got) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_layers_keep_the_type_asked_for(checkpoint: Path) -> None:
    if "moe" in checkpoint.name and mx.default_device() == mx.Device(mx.cpu):
        pytest.skip("MLX's CPU backend has no bfloat16 experts")
    model = load(checkpoint, dtype=mx.bfloat16)
    prompts = prompts_of(model)[1:]
    passing = StreamedPass(checkpoint, prompts, dtype=mx.bfloat16)
    for _, _, inputs in passing.layers():
        assert {item.hidden.dtype for item in inputs} == {mx.bfloat16}
    for prompt, got in zip(prompts, passing.logits([slice(None)] * 2), strict=True):
        (hidden,) = passes.forward(model.model, prompt)
        assert got.dtype == mx.bfloat16
        assert mx.array_equal(got, model.model.language_model.logits(hidden)[0])


def test_what_a_caller_does_to_a_layer_counts(checkpoint: Path) -> None:
    prompts = prompts_of(load(checkpoint))
    rows = [slice(None)] * len(prompts)
    passing = StreamedPass(checkpoint, prompts)
    before = [np.array(logits) for logits in passing.logits(rows)]
    outputs: list[mx.array] = []
    for index, layer, inputs in passing.layers():
        assert len(inputs) == len(prompts)
        for item, prompt in zip(inputs, prompts, strict=True):
            assert item.hidden.shape[:2] == (1, len(prompt.token_ids))
        if outputs:  # text alone: nothing is added between two layers
            assert mx.array_equal(inputs[2].hidden, outputs[-1])
        if index == 2:
            layer.input_layernorm.weight = 2 * layer.input_layernorm.weight
        outputs.append(inputs[2].through(layer))
        mx.eval(outputs[-1])
    assert len(outputs) == passing.num_layers
    for got, was in zip(passing.logits(rows), before, strict=True):
        assert np.abs(np.array(got) - was).max() > 1e-3
    for got, was in zip(passing.logits(rows), before, strict=True):  # read anew
        assert np.array_equal(np.array(got), was)


LAYER_BYTES = 4 * (3 * 512 * 1792 + 2 * 512 * (128 + 64))


def big_checkpoint(folder: Path, layers: int, vocabulary: int) -> Path:
    """A checkpoint of which layers and embeddings are nearly everything."""
    config = tiny.tiny_config("dense64")
    config["text_config"] |= {
        "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }  # fmt: skip
    config["vision_config"]["out_hidden_size"] = 512
    tensors = {
        name: np.full(shape, 0.01, np.float32) for name, shape in tiny.hub_shapes(config).items()
    }
    return complete(layouts.write(folder, config, tensors))


def peak_of(folder: Path, prompts: Sequence[Prompt]) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    for logits in StreamedPass(folder, prompts).logits([slice(-2, None)] * len(prompts)):
        mx.eval(logits)
    return mx.get_peak_memory() - start


def test_memory_does_not_grow_with_depth(demo: Qwen3VL, tmp_path: Path) -> None:
    shallow, deep = (big_checkpoint(tmp_path / str(n), n, 1024) for n in (4, 12))
    peaks = [peak_of(folder, prompts_of(demo)) for folder in (shallow, deep)]
    assert (deep / "model.safetensors").stat().st_size > 12 * LAYER_BYTES
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 2 * LAYER_BYTES


def test_embeddings_and_layers_are_not_there_together(demo: Qwen3VL, tmp_path: Path) -> None:
    folder = big_checkpoint(tmp_path / "x", 4, 32768)
    embeddings = 4 * 512 * 32768
    assert embeddings < peak_of(folder, prompts_of(demo)) < embeddings + LAYER_BYTES


def test_a_damaged_checkpoint_is_known_before_work(
    tiny_model: Callable[[str], Qwen3VL], tmp_path: Path
) -> None:
    config, tensors = layouts.wide("dense64")
    lacking = {name: x for name, x in tensors.items() if "layers.3.mlp.up_proj" not in name}
    folder = layouts.write(tmp_path / "x", config, lacking)
    with pytest.raises(WeightsError, match=r"layers\.3\.mlp\.up_proj\.weight is missing"):
        StreamedPass(folder, prompts_of(tiny_model("dense64")))
    with pytest.raises(InputError, match="at least one prompt"):
        StreamedPass(folder, [])


# -- the numbers -------------------------------------------------------------------------------


def test_a_checkpoint_is_equal_to_itself(measured: dict[str, Quality]) -> None:
    same = measured["checkpoint"]
    assert (same.kl, same.kl_error, same.agreement) == (0, 0, 1)
    assert same.perplexity == same.source_perplexity
    assert same.bits_per_weight == 16
    assert same.size_bytes == (CHECKPOINT / "model.safetensors").stat().st_size


def spoken(model: Qwen3VL) -> list[tuple[Log, list[int]]]:
    """Of each finished conversation log-probabilities at every position, and the tokens."""
    found = []
    for scene, question in scene_questions(COUNT, EVALUATION_SEED):
        said = {"role": "assistant", "content": question.truth}
        messages = [*about(scene.draw(), question.question), said]
        logits = model.logits(messages).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        ids = model.processor.prompt(messages).token_ids.tolist()
        found.append((logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)), ids))
    return found


def test_numbers_are_those_of_whole_logits(
    demo: Qwen3VL, quantized: dict[str, Path], measured: dict[str, Quality]
) -> None:
    ours, theirs = spoken(demo), spoken(load(quantized["2bit"]))
    start, end = (demo.processor.tokenizer.added_tokens[t] for t in ("<|im_start|>", "<|im_end|>"))

    def by_hand(shift: int) -> tuple[float, float, float]:
        kl, same, loss = [], [], []
        for (p, ids), (q, _) in zip(ours, theirs, strict=True):
            turns = [i for i, token in enumerate(ids) if token == start]
            first = turns[-2] + 3  # behind <|im_start|>assistant and a line break
            for i in range(first, ids.index(end, first) + 1):
                row = i - 1 + shift
                kl.append((np.exp(p[row]) * (p[row] - q[row])).sum())
                same.append(p[row].argmax() == q[row].argmax())
                loss.append(-q[row, ids[i]])
        return float(np.mean(kl)), float(np.mean(same)), float(np.exp(np.mean(loss)))

    got = measured["2bit"]
    numbers = (got.kl, got.agreement, got.perplexity)
    assert numbers == pytest.approx(by_hand(0), rel=1e-4)
    shifted = by_hand(1)
    assert shifted[0] != pytest.approx(got.kl, rel=0.01)
    assert shifted[2] > 5 * got.perplexity


def test_positions_one_off_are_seen(
    monkeypatch: pytest.MonkeyPatch, examples: list[Example]
) -> None:
    right = Reference(CHECKPOINT, examples[:4]).loss
    monkeypatch.setattr(
        Example, "rows", property(lambda e: slice(e.answer_start, len(e.prompt.token_ids)))
    )
    wrong = Reference(CHECKPOINT, examples[:4]).loss
    assert measuring.perplexity(wrong) > 5 * measuring.perplexity(right)


def test_fewer_bits_are_worse(measured: dict[str, Quality], examples: list[Example]) -> None:
    two, four, eight = (measured[name] for name in ("2bit", "mxfp4", "8bit"))
    assert two.kl - 3 * two.kl_error > four.kl
    assert four.kl - 3 * four.kl_error > eight.kl > 0
    assert two.bits_per_weight < four.bits_per_weight < eight.bits_per_weight < 16
    assert two.size_bytes < four.size_bytes < eight.size_bytes
    assert two.agreement < eight.agreement
    assert eight.kl < 1e-3
    assert {q.examples for q in measured.values()} == {COUNT}
    assert {q.tokens for q in measured.values()} == {sum(len(e.answer_ids) for e in examples)}


def test_bits_per_weight_count_the_whole_model(quantized: dict[str, Path]) -> None:
    weight = stored_weight(quantized["mxfp4"])
    assert weight.parameters == 3_405_376  # as the demo's card says
    decoder = 5 * (2 * 128 * 192 + 2 * 128 * 64 + 3 * 128 * 384) + 1024 * 128
    assert weight.nbytes == 2 * (3_405_376 - decoder) + decoder * (4 + 8 / 32) / 8


def test_rows_are_compared_in_pieces(
    monkeypatch: pytest.MonkeyPatch, quantized: dict[str, Path], examples: list[Example]
) -> None:
    whole = evaluate(CHECKPOINT, [quantized["2bit"]], examples[:3])
    monkeypatch.setattr(measuring, "_ROWS", 3)
    cut = evaluate(CHECKPOINT, [quantized["2bit"]], examples[:3])
    assert cut[0].kl == pytest.approx(whole[0].kl, rel=1e-6)
    assert cut[0].tokens == whole[0].tokens
    assert cut[0].perplexity == pytest.approx(whole[0].perplexity, rel=1e-6)


def test_standard_error_takes_examples_as_the_sample() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(3, 1, 400)
    groups = [np.full(5, m) for m in means]  # five tokens that say the same are one
    assert standard_error(groups) == pytest.approx(np.std(means, ddof=1) / math.sqrt(400))
    lone = [np.array([m]) for m in means]
    assert standard_error(lone) == pytest.approx(standard_error(groups))


def some_questions(count: int, first_seed: int) -> list[tuple[Scene, Question]]:
    """A box, which two bits seldom find again, and a count of each scene."""
    scenes = [make_scene(first_seed + i, kind="shapes") for i in range(count)]
    return [
        (scene, next(question for question in questions(scene) if question.task == task))
        for scene in scenes
        for task in ("where", "count")
    ]


def test_held_out_questions(
    monkeypatch: pytest.MonkeyPatch,
    demo: Qwen3VL,
    quantized: dict[str, Path],
    examples: list[Example],
) -> None:
    monkeypatch.setattr(measuring, "scene_questions", some_questions)
    folders = [CHECKPOINT, quantized["2bit"]]
    same, two = evaluate(CHECKPOINT, folders, examples[:2], questions=4)
    models = (demo, load(quantized["2bit"]))
    right, said = [], []
    for scene, question in some_questions(4, TASK_SEED):
        asked = {"images": [scene.draw()], "temperature": 0, "max_tokens": 256}
        said.append([m.generate(question.question, **asked).text for m in models])
        right.append([is_correct(question, answer) for answer in said[-1]])
    assert (same.accuracy, two.accuracy) == pytest.approx(tuple(np.mean(right, axis=0)))
    assert same.source_accuracy == two.source_accuracy == same.accuracy
    assert same.accuracy > 0.5
    assert same.same_answers == 1
    assert two.same_answers == pytest.approx(np.mean([a == b for a, b in said]))
    assert two.same_answers < 1


def other_vocabulary(folder: Path) -> Path:
    return tiny.write_tiny(folder, "dense64", vocab_size=1056)


def other_tokenizer(folder: Path) -> Path:
    tiny.write_tiny(folder, "dense64")
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second = list(vocabulary)[500:502]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokens))
    return folder


def other_image_token(folder: Path) -> Path:
    tiny.write_tiny(folder, "dense64")
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = 1009
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (other_vocabulary, "its vocabulary is 1056 tokens, not 1024"),
        (other_tokenizer, "its tokenizer is another"),
        (other_image_token, "its visual tokens are .*1009.* not .*1010"),
    ],
)
def test_checkpoints_of_another_model(
    make: Callable[[Path], Path], problem: str, examples: list[Example], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"other was not made from .*{problem}"):
        evaluate(CHECKPOINT, [make(tmp_path / "other")], examples)


def test_limits_of_a_comparison(monkeypatch: pytest.MonkeyPatch, examples: list[Example]) -> None:
    with pytest.raises(InputError, match="at least 2 examples"):
        evaluate(CHECKPOINT, [CHECKPOINT], examples[:1])
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(InputError, match=r"0\.0 GB free; use fewer examples, or set TMPDIR"):
        Reference(CHECKPOINT, examples)


def test_infinite_numbers_stay_out_of_json() -> None:
    broken = Quality("x", 1, 2.0, math.nan, math.inf, 0.0, math.inf, 1.0, 2, 3)
    values = broken.to_dict()
    assert (values["kl"], values["kl_error"], values["perplexity"]) == (None, None, None)
    assert (values["agreement"], values["tokens"], values["accuracy"]) == (0.0, 3, None)
    json.dumps(values, allow_nan=False)


# -- the command -------------------------------------------------------------------------------

KEYS = {
    "method", "name", "size_bytes", "bits_per_weight", "kl", "kl_error", "agreement", "perplexity",
    "source_perplexity", "examples", "tokens", "accuracy", "source_accuracy", "same_answers",
}  # fmt: skip


def test_the_command_prints_json(
    quantized: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"ours={quantized['8bit']}", str(quantized["2bit"]), "--source", "demo"]
    assert command.main([*given, "--examples", "3", "--json"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    report = json.loads(out.out)
    assert report.keys() == {"source", "device", "examples", "tokens", "checkpoints"}
    assert report["source"].keys() == {
        "name", "size_bytes", "bits_per_weight", "perplexity", "accuracy",
    }  # fmt: skip
    assert (report["source"]["name"], report["examples"]) == ("demo", 3)
    eight, two = report["checkpoints"]
    assert eight.keys() == two.keys() == KEYS
    assert (eight["method"], eight["name"]) == ("ours", "8bit")
    assert (two["method"], two["name"]) == ("", "2bit")
    assert two["kl"] > eight["kl"] > 0
    assert report["source"]["perplexity"] == two["source_perplexity"]


@pytest.mark.parametrize("tasks", [0, 2])
def test_the_command_prints_a_table(
    quantized: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], tasks: int
) -> None:
    make_scene(5).draw().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(EXAMPLE.read_bytes()[:100])
    given = [str(quantized["2bit"]), "demo", "--source", "demo", "--tasks", str(tasks)]
    options = ["--images", str(tmp_path), "--examples", "2", "--answers", str(quantized["8bit"])]
    assert command.main([*given, *options]) == 0
    out = capsys.readouterr()
    assert out.err.startswith("skipped: ")
    lines = out.out.splitlines()
    assert lines[0].startswith("source demo: 6.83 MB, 16.00 bits, perplexity ")
    assert lines[0].endswith(" right") == (tasks > 0)
    assert lines[1].endswith("answer tokens of 2 examples, on " + str(mx.default_device()))
    heading, first, second = lines[3:]
    columns = ["checkpoint", "size", "bits", "KL", "agreement", "perplexity"]
    assert heading.split() == columns + ["right", "same"] * (tasks > 0)
    assert first.startswith("2bit ")
    assert second.split()[:6] == ["demo", "6.83", "MB", "16.00", "0.000000", "±"]
    assert second.split()[7] == "100.0%"
    assert second.endswith("100.0%") == (tasks > 0)
    assert len(heading) == len(first) == len(second)


@pytest.mark.parametrize(
    ("options", "status", "problem"),
    [
        (["demo", "--examples", "1"], 2, "--examples must be at least 2, got 1"),
        (["demo", "--tasks", "-1"], 2, "--tasks must be at least 0"),
        (["demo", "--answers", "demo"], 2, "--answers says who answers about --images"),
        (["demo", "--plot", "x.jpg"], 2, "the plot must be a .png file"),
        (["demo", "--plot", "no/such/x.png"], 2, "in a folder that is there"),
        (["demo", "--images", "no/such"], 2, "no folder no/such"),
        (["no/such/folder"], 1, "no folder 'no/such/folder'"),
    ],
)
def test_the_command_refuses_before_it_works(
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    status: int,
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module, name in ((measuring, "evaluate"), (api, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("too late"))
    assert command.main([*options, "--source", "demo"]) == status
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.count("\n") == 1
    assert problem in out.err


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, "eval", stopped)
    assert command.main(["demo", "--source", "demo", "--examples", "2"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("text", "label", "name"),
    [
        ("a/b", "", "a/b"),
        ("ours=a/b", "ours", "a/b"),
        ("round to nearest=Qwen/x", "round to nearest", "Qwen/x"),
        ("a/b=c", "", "a/b=c"),
        ("=x", "", "=x"),
    ],
)
def test_labels(text: str, label: str, name: str) -> None:
    assert command.split_label(text) == (label, name)


def test_a_folder_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bits=4").mkdir()
    assert command.split_label("bits=4") == ("", "bits=4")


# -- the plot ----------------------------------------------------------------------------------


def points(*pairs: tuple[float, float]) -> list[Quality]:
    base = Quality("x", 1, 0, 0, 0, 1, 1, 1, 2, 3)
    return [replace(base, bits_per_weight=b, kl=kl, kl_error=kl / 9) for b, kl in pairs]


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = {"": points((16, 0)), "rtn": points((4.5, 0.1), (2.5, 1.0)), "awq": points((4.5, 0.01))}
    measuring.plot(lines, tmp_path / "a.png")
    measuring.plot({**lines, "awq": points((4.5, 0.09))}, tmp_path / "b.png")
    pictures = [Image.open(tmp_path / name).convert("RGB") for name in ("a.png", "b.png")]
    assert pictures[0].size == (1200, 750)
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert len(pictures[0].getcolors(2**24) or []) > 20


def test_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "find_spec", lambda _: None)
    monkeypatch.setattr(measuring, "evaluate", lambda *_, **__: pytest.fail("too late"))
    file = str(tmp_path / "x.png")
    assert command.main(["demo", "--source", "demo", "--plot", file]) == 2
    assert 'pip install "qwen3vl-mlx[plot]"' in capsys.readouterr().err
