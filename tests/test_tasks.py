"""The tasks asked of a loaded model: where things are, what is written, what follows a schema."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from answers import GOLDEN
from asking import script
from pictures import UPRIGHT, encode, exif
from PIL import Image

import qwen3vl_mlx
from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.demo.questions import iou
from qwen3vl_mlx.demo.scenes import Scene, make_scene
from qwen3vl_mlx.engine.output import Chunk, make_usage
from qwen3vl_mlx.engine.request import Request
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.tasks import Box, PictureTasks, Point, TaskError, Wording

# Scenes of one to four shapes and seven aspect ratios, from 1:3 to 3:1.
KNOWN = (1, 7, 18, 25, 47, 54, 77)


def shapes(seed: int) -> Scene:
    return make_scene(seed, kind="shapes")


def all_there(scene: Scene, found: Sequence[Box]) -> bool:
    """Whether the boxes are those of the scene's shapes, in order, by name and place."""
    if [box.label for box in found] != [shape.name for shape in scene.shapes]:
        return False
    places = [(box.x0, box.y0, box.x1, box.y1) for box in found]
    overlaps = [iou(a.bbox, b) for a, b in zip(scene.shapes, places, strict=True)]
    return min(overlaps) >= 0.5


def mirrored(scene: Scene, box: Box) -> Box:
    """The box that taking x for y would give."""
    width, height = scene.size
    return Box(
        box.y0 / height * width,
        box.x0 / width * height,
        box.y1 / height * width,
        box.x1 / width * height,
        box.label,
    )


@pytest.mark.parametrize("seed", KNOWN)
def test_shapes_are_found_where_they_were_drawn(demo: Qwen3VL, seed: int) -> None:
    scene = shapes(seed)
    found = demo.detect(scene.draw(), [shape.name for shape in scene.shapes])
    assert all_there(scene, found)
    assert not all_there(scene, [mirrored(scene, box) for box in found])  # the check can fail


@pytest.mark.parametrize("seed", [6, 17])
@pytest.mark.parametrize("what", [None, "", " "])
def test_everything_is_found(demo: Qwen3VL, seed: int, what: str | None) -> None:
    scene = shapes(seed)
    assert all_there(scene, demo.detect(scene.draw(), what))


@pytest.mark.parametrize("seed", KNOWN)
def test_points_are_on_the_shapes(demo: Qwen3VL, seed: int) -> None:
    scene = shapes(seed)
    for shape in scene.shapes:
        [point] = demo.point(scene.draw(), shape.name)
        assert point.label == shape.name
        x0, y0, x1, y1 = shape.bbox
        assert x0 < point.x < x1
        assert y0 < point.y < y1


@pytest.mark.parametrize("orientation", [2, 3, 6, 7, 8])
def test_places_are_those_of_the_upright_picture(demo: Qwen3VL, orientation: int) -> None:
    scene = shapes(26)  # 224 x 96
    turned = {2: 2, 3: 3, 6: 8, 7: 7, 8: 6}[orientation]
    stored = UPRIGHT[turned](scene_array(scene))
    source = encode(Image.fromarray(stored), "PNG", exif=exif(orientation))
    assert Image.open(io.BytesIO(source)).size == (scene.size[:: -1 if orientation > 4 else 1])
    found = demo.detect(source, scene.shapes[0].name)
    assert found == demo.detect(scene.draw(), scene.shapes[0].name)
    assert all_there(scene, found)
    assert qwen3vl_mlx.draw(source, found).size == scene.size


def scene_array(scene: Scene) -> Any:
    import numpy as np

    return np.asarray(scene.draw())


def test_a_smaller_budget_leaves_places_in_pixels_of_the_source(demo: Qwen3VL) -> None:
    scene = shapes(6)
    doubled = scene.draw().resize((scene.size[0] * 2, scene.size[1] * 2), Image.Resampling.NEAREST)
    [box] = demo.detect(doubled, scene.shapes[0].name, max_pixels=scene.size[0] * scene.size[1])
    half = Box(box.x0 / 2, box.y0 / 2, box.x1 / 2, box.y1 / 2, box.label)
    assert all_there(scene, [half])


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_text_is_read(demo: Qwen3VL, seed: int) -> None:
    scene = make_scene(seed, kind="text")
    assert demo.read_text(scene.draw()) == scene.text
    assert demo.parse_document(scene.draw()) == scene.text
    assert demo.parse_document(scene.draw(), "html") == scene.text


# ---- extraction

COLOURS = {"type": "string", "enum": ["red", "black", "purple"]}


@pytest.mark.parametrize(
    ("seed", "schema", "prompt", "expected"),
    [
        (6, {"type": "integer"}, "How many shapes are there?", 1),
        (1, COLOURS, "What color is the square?", "red"),
        (19, COLOURS, "What color is the triangle?", "purple"),
        (6, {"type": "object", "properties": {"found": {"const": True}}, "required": ["found"],
             "additionalProperties": False}, None, {"found": True}),
    ],
)  # fmt: skip
def test_extraction_follows_the_schema(
    demo: Qwen3VL, seed: int, schema: dict[str, Any], prompt: str | None, expected: Any
) -> None:
    assert demo.extract(shapes(seed).draw(), schema, prompt) == expected


def test_extraction_that_is_cut_off(demo: Qwen3VL) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    with pytest.raises(TaskError, match="cut off before the JSON was whole: raise max_tokens"):
        demo.extract(shapes(6).draw(), schema, max_tokens=2)
    with pytest.raises(TaskError, match="cut off before the JSON was whole: raise timeout"):
        demo.extract(shapes(6).draw(), schema, timeout=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, image: model.extract(image, "a text"), "schema must be a JSON schema"),
        (lambda model, image: model.extract(image, {"type": "colour"}), "^schema cannot be used"),
        (lambda model, image: model.detect(image, []), "has no entry or an empty one"),
        (lambda model, image: model.detect(image, ["cat", " "]), "has no entry or an empty one"),
        (lambda model, image: model.point(image, 5), "a text or a list of texts, got 5"),
        (lambda model, image: model.parse_document(image, "pdf"), "form 'pdf' is unknown"),
        (lambda model, image: model.detect("nowhere.png"), "no such file"),
        (lambda model, image: model.detect(image, max_tokens=0), "max_tokens"),
        (lambda model, image: model.read_text(image, timeout=-1), "timeout"),
    ],
)
def test_what_cannot_be_asked(demo: Qwen3VL, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(demo, shapes(6).draw())


# ---- how models are asked


def test_answers_are_greedy_and_guarded_unless_told_otherwise(
    demo: Qwen3VL, requests: list[Request]
) -> None:
    picture = shapes(6).draw()
    demo.detect(picture)
    demo.read_text(picture, temperature=0.5, max_tokens=7, timeout=60, min_pixels=80_000)
    demo.point(picture, temperature=None)
    greedy, sampled, own = requests
    assert (greedy.params.temperature, greedy.params.loop_guard) == (0, True)
    assert (sampled.params.temperature, sampled.max_tokens, sampled.timeout) == (0.5, 7, 60)
    seen, before = (len(request.prompt.visual_rows) for request in (sampled, greedy))
    assert seen > before  # min_pixels enlarges
    assert own.params.temperature == demo.default_params.temperature


class Scripted(PictureTasks):
    """A model that gives the same answer to every question, and remembers what it was asked."""

    def __init__(self, *chunks: Chunk, wording: Wording | None = None):
        usage = make_usage(prompt=1, completion=1, cached=0, started=0, first=1, ended=2, peak=0)
        self.chunks = [*chunks[:-1], replace(chunks[-1], usage=usage)]
        self.wording = wording or Wording()
        self.asked: list[tuple[str, Any]] = []

    def stream(self, messages: str, **options: Any) -> Any:
        self.asked.append((messages, options["response_format"]))
        return Answer(self.chunks)


class Answer(list[Chunk]):
    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def saying(text: str, **values: Any) -> Chunk:
    return Chunk(text=text, finish_reason="stop", **values)


PAGE = Image.new("RGB", (2000, 500))


def test_the_released_models_are_asked_in_their_own_words() -> None:
    model = Scripted(saying(GOLDEN))
    found = model.detect(PAGE, ["cat", "big  dog"])
    assert found == [Box(200, 100, 600, 200, "cat"), Box(1000, 250, 1200, 300, "dog")]
    assert model.point(PAGE, "cat") == [Point(400, 150, "cat"), Point(1100, 275, "dog")]
    assert model.read_text(PAGE) == GOLDEN
    assert model.parse_document(PAGE, "html") == GOLDEN  # a fence of another kind is content
    detect, point, read, html = [question for question, _ in model.asked]
    assert detect == (
        'Locate every instance that belongs to the following categories: "cat, big dog". '
        "Report bbox coordinates in JSON format."
    )
    assert '"cat"' in point
    assert '{"point_2d": [x, y], "label"' in point
    assert read == "Read all the text in the image."
    assert html == "qwenvl html"


def test_a_schema_is_shown_unless_there_is_a_prompt() -> None:
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    model = Scripted(saying('{"größe": 3}'))
    assert model.extract(PAGE, schema) == {"größe": 3}
    assert model.extract(PAGE, schema, "How tall?") == {"größe": 3}
    (shown, form), (own, _) = model.asked
    assert json.dumps(schema, ensure_ascii=False) in shown
    assert own == "How tall?"
    assert form == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def test_one_question_a_thing_where_the_checkpoint_takes_no_more() -> None:
    model = Scripted(saying(GOLDEN), wording=Wording(detect="Find the {}.", several=False))
    assert len(model.detect(PAGE, "cat, dog,")) == 2  # each found twice, and kept once
    assert [question for question, _ in model.asked] == ["Find the cat.", "Find the dog."]


def test_a_place_without_a_label_has_that_of_the_thing_asked_for() -> None:
    model = Scripted(saying("[[100, 200, 300, 400]]"))
    assert model.detect(PAGE, "cat") == [Box(200, 100, 600, 200, "cat")]
    assert model.detect(PAGE, "cat, dog") == [Box(200, 100, 600, 200, "")]
    model.wording = Wording(several=False)  # a question for each
    labels = [box.label for box in model.detect(PAGE, "cat, dog")]
    assert labels == ["cat", "dog"]


def test_thoughts_are_no_answers() -> None:
    thought = Chunk(reasoning='[{"bbox_2d": [1, 2, 3, 4], "label": "thought"}]')
    model = Scripted(thought, saying(GOLDEN))
    assert [box.label for box in model.detect(PAGE)] == ["cat", "dog"]


def test_a_thinking_checkpoint(thinking_demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch) -> None:
    thought = '[{"bbox_2d": [1, 2, 3, 4], "label": "thought"}]'
    script(monkeypatch, thinking_demo, f"{thought}\n</think>\n\n{GOLDEN}")
    assert [box.label for box in thinking_demo.detect(PAGE)] == ["cat", "dog"]
    with pytest.raises(TaskError, match="before the model had finished thinking: raise max_tokens"):
        thinking_demo.detect(PAGE, max_tokens=3)


def test_an_answer_cut_off_gives_what_there_is(
    demo: Qwen3VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, demo, GOLDEN)
    whole = len(demo.processor.tokenizer.encode(GOLDEN))
    counts = [len(demo.detect(PAGE, max_tokens=n)) for n in (1, whole // 2 + 8, whole)]
    assert counts == [0, 1, 2]


def test_results_are_plain_and_exported() -> None:
    assert qwen3vl_mlx.Box is Box
    box, point = Box(1, 2, 3, 4, "cat"), Point(1, 2, "cat")
    assert box.to_dict() == {"x0": 1, "y0": 2, "x1": 3, "y1": 4, "label": "cat"}
    assert point.to_dict() == {"x": 1, "y": 2, "label": "cat"}
    assert Box(**json.loads(json.dumps(box.to_dict()))) == box
