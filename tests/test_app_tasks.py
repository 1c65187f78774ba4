"""The web page's tasks in a browser: what is found is drawn where it is, and nothing runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import SCENES, TRUTH

pytest.importorskip("gradio")

from browsing import App, Loads, Tab, app_of, chromium, in_browser, say, until

from qwen3vl_mlx import load
from qwen3vl_mlx.demo.scenes import make_scene
from qwen3vl_mlx.media import load_image

pytestmark = [pytest.mark.dev, in_browser]

SCENE = SCENES / "scene18.png"  # 96 x 192 pixels, a purple star at the bottom
TWO_SHAPES = 190  # 160 x 192, an orange square and a purple circle that the demo finds
EVERYTHING = "All"


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    with app_of(Loads(lambda _: load("demo"))) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def shared(browser: Any, app: App) -> Iterator[Tab]:
    tab = Tab.open(browser, app)
    tab.page.get_by_role("tab", name="Tasks").click()
    yield tab
    assert tab.strangers() == []
    assert tab.complaints == []


@pytest.fixture
def tab(shared: Tab) -> Tab:
    """The tab of the tasks, without a picture."""
    clear = shared.page.locator("#picture").get_by_role("button", name="Remove Image")
    if clear.count():
        clear.click()
        shared.page.get_by_text("Click to Upload").first.wait_for()
    return shared


@pytest.fixture(scope="module")
def two_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "two.png"
    make_scene(TWO_SHAPES).draw().save(path)
    return path


def give(tab: Tab, path: Path) -> None:
    with tab.page.expect_file_chooser() as chooser:
        tab.page.locator("#picture").get_by_text("Click to Upload").click()
    chooser.value.set_files(path)


def run(tab: Tab, title: str, path: Path | None = None, *, subject: str | None = None) -> str:
    """Do a task, and return the line of numbers or what was wrong."""
    if path is not None:
        give(tab, path)
        tab.page.locator("#picture img").wait_for()
    choose(tab, title)
    if subject is not None:
        tab.page.get_by_label("What to find").fill(subject)
    begin(tab)
    return ended(tab)


def begin(tab: Tab) -> None:
    """Run, and wait until the line of the last answer has gone."""
    tab.page.evaluate(
        """() => { window.begun = false;
        new MutationObserver((_, self) => {
          if (/at peak|⚠/.test(document.querySelector("#task-status").innerText)) return;
          window.begun = true; self.disconnect();
        }).observe(document.querySelector("#result"),
                   {childList: true, subtree: true, characterData: true, attributes: true}); }"""
    )
    tab.page.locator("#run").click()
    until(lambda: tab.page.evaluate("window.begun"))


def choose(tab: Tab, title: str) -> None:
    tab.page.get_by_label(title, exact=True).check()
    shown = {"Extract to JSON": "#schema", "Find objects": "#subject", "Point": "#subject"}
    tab.page.locator(shown.get(title, "#run")).wait_for()


def ended(tab: Tab) -> str:
    status = tab.page.locator("#task-status")
    until(lambda: any(mark in status.inner_text() for mark in ("at peak", "⚠")))
    tab.page.locator("#run").wait_for()
    return str(status.inner_text())


def purple(path: Path) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is purple in a scene."""
    pixels = np.asarray(load_image(path)).astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 90) & (pixels[..., 1] < 80))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_boxes_are_drawn_where_they_belong(
    tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tab, "Find objects", SCENE, subject="")
    until(lambda: tab.page.locator("#found label").count() == 2)
    [own] = app.model.detect(SCENE)
    assert own.label == "purple star"
    assert overlap((own.x0, own.y0, own.x1, own.y1), purple(SCENE)) > 0.5, "on the star"
    check_outline(tab, (own.x0, own.y0, own.x1, own.y1))
    star, (width, height) = purple(SCENE), load_image(SCENE).size
    places = [round(1000 * at / of) for at, of in zip(star, (width, height) * 2, strict=True)]
    answer = json.dumps([{"bbox_2d": places, "label": "star"}])
    say(monkeypatch, app.model, f"```json\n{answer}\n```")
    run(tab, "Find objects", subject="star")
    until(lambda: "star" in tab.page.locator("#found label").nth(1).inner_text())
    check_outline(tab, star)


def check_outline(tab: Tab, box: Sequence[float]) -> None:
    """Lines stand on the sides of a box (pixels of SCENE), and nowhere else but for a label."""
    [finding] = [each.found for each in tab.app.sessions._sessions.values() if each.found]
    until(lambda: tab.picture("#drawn img") == finding.drawn())
    drawn, plain = tab.picture("#drawn img"), load_image(SCENE)
    scale = drawn.height / plain.height
    assert drawn.width == round(plain.width * scale), "the shape of the picture stays"
    same = np.asarray(plain.resize(drawn.size)).astype(int)
    changed = np.abs(np.asarray(drawn).astype(int) - same).max(axis=2)
    left, top, right, bottom = (round(side * scale) for side in box)
    middle_x, middle_y, near = (left + right) // 2, (top + bottom) // 2, round(2 * scale)
    for x, y in ((left, middle_y), (right, middle_y), (middle_x, top), (middle_x, bottom)):
        assert changed[y - near : y + near, x - near : x + near].max() > 60, (x, y)
    label = round(30 * scale)
    assert changed[top + near : bottom - near, left + near : right - near].max() < 30
    assert changed[: top - label].max() < 30
    assert changed[bottom + near :].max() < 30
    assert changed[middle_y:, : left - near].max() < 30
    assert changed[middle_y:, right + near :].max() < 30


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return width * height / (sum(areas) - width * height)


def test_a_click_and_the_keyboard_highlight(tab: Tab, two_shapes: Path) -> None:
    run(tab, "Find objects", two_shapes, subject="")
    until(lambda: tab.page.locator("#found label").count() == 3)
    [finding] = [each.found for each in tab.app.sessions._sessions.values() if each.found]
    everything = finding.drawn()
    until(lambda: tab.picture("#drawn img") == everything)
    scene, image = make_scene(TWO_SHAPES), tab.page.locator("#drawn img")
    box = image.bounding_box()
    x0, y0, x1, y1 = scene.shapes[1].bbox
    width, height = scene.size
    shown = min(box["width"] / width, box["height"] / height)
    at_x = box["x"] + box["width"] / 2 + ((x0 + x1) / 2 - width / 2) * shown
    at_y = box["y"] + box["height"] / 2 + ((y0 + y1) / 2 - height / 2) * shown
    tab.page.mouse.click(at_x, at_y)
    chosen = tab.page.locator("#found label.selected")
    until(lambda: scene.shapes[1].name in chosen.inner_text())
    until(lambda: tab.picture("#drawn img") != everything)
    tab.page.locator("#found input").nth(2).focus()
    tab.page.keyboard.press("Shift+Tab")
    tab.page.keyboard.press("Space")
    until(lambda: scene.shapes[0].name in chosen.inner_text())
    tab.page.keyboard.press("Shift+Tab")
    tab.page.keyboard.press("Space")
    until(lambda: chosen.inner_text() == EVERYTHING)
    until(lambda: tab.picture("#drawn img") == everything)


def test_points_and_subjects(tab: Tab, two_shapes: Path) -> None:
    run(tab, "Point", two_shapes, subject="purple circle")
    names = tab.page.locator("#found label")
    until(lambda: names.count() == 2)
    assert "purple circle" in names.nth(1).inner_text()
    run(tab, "Find objects", subject="orange square, purple circle")
    until(lambda: names.count() == 3)


def test_describe_and_read(tab: Tab) -> None:
    run(tab, "Describe", SCENE)
    assert tab.page.locator("#text").inner_text().strip() == TRUTH
    tab.page.locator("#picture").get_by_role("button", name="Remove Image").click()
    choose(tab, "Read text")
    tab.page.get_by_role("button", name="Example picture").click()
    tab.page.locator("#picture img").wait_for()
    run(tab, "Read text")
    assert "TEN" in tab.page.locator("#text").inner_text()


HTML = (
    "```html\n<h1>Bill</h1><table><tr><td>7 apples</td></tr></table>"
    "<img src='http://127.0.0.2:9/x.png' alt='a logo'><script>parent.hit = 1</script>"
    "<p onclick='parent.hit = 1' style='color: red; background: url(http://127.0.0.2:9/y)'>end</p>"
    "\n```"
)


def test_a_html_document_is_shown_and_can_do_nothing(
    tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, app.model, HTML)
    run(tab, "Document to HTML", SCENE)
    frame = tab.page.frame_locator("iframe.page")
    frame.locator("h1", has_text="Bill").wait_for()
    assert frame.locator("td").inner_text() == "7 apples"
    assert frame.get_by_text("a logo").is_visible()
    assert frame.locator("img, script, [onclick]").count() == 0
    assert "url" not in (frame.locator("p").get_attribute("style") or "")
    assert tab.page.evaluate("window.hit") is None
    assert tab.page.locator("#picture img").is_visible(), "beside its page"
    tab.page.get_by_role("tab", name="Source").click()
    assert "<h1>Bill</h1>" in tab.page.locator(".cm-content:visible").first.inner_text()
    tab.page.get_by_role("tab", name="Rendered").click()


def test_a_markdown_document_is_shown_and_can_do_nothing(
    tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, app.model, "# Bill\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n<script>x</script>")
    run(tab, "Document to Markdown", SCENE)
    document = tab.page.locator("#document")
    assert document.locator("h1").inner_text() == "Bill"
    assert document.locator("td").count() == 2
    assert document.locator("script").count() == 0


def test_json_follows_the_schema_that_was_typed(tab: Tab) -> None:
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["count"],
        "additionalProperties": False,
    }
    choose(tab, "Extract to JSON")
    type_schema(tab, json.dumps(schema))
    run(tab, "Extract to JSON", SCENE)
    answer = json.loads(tab.page.locator("#json .cm-content").inner_text())
    assert 0 <= answer["count"] <= 9
    assert answer.keys() == {"count"}


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ('{"type": ', "the schema is not JSON: Expecting value in line 1"),
        ("[1]", "the schema must be a JSON object"),
        ('{"type": "strange"}', "strange"),
    ],
)
def test_a_schema_that_is_wrong_is_told_of(tab: Tab, schema: str, told: str) -> None:
    choose(tab, "Extract to JSON")
    type_schema(tab, schema)
    assert told in run(tab, "Extract to JSON", SCENE)


def test_without_a_picture_and_with_a_bad_one(tab: Tab, tmp_path: Path) -> None:
    assert "Give a picture first" in run(tab, "Describe")
    bad = tmp_path / "broken.png"
    bad.write_bytes(b"no picture")
    give(tab, bad)
    until(lambda: "broken.png" in tab.page.locator("#task-status").inner_text())


def test_stop_ends_all_the_questions(tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, app.model, " ".join(f"word{number}" for number in range(900)))
    give(tab, SCENE)
    tab.page.locator("#picture img").wait_for()
    choose(tab, "Find objects")
    tab.page.get_by_label("What to find").fill("cup, dog, cat")
    begin(tab)
    until(lambda: app.model.engine.busy)
    tab.page.locator("#task-stop").click()
    assert "Stopped." in ended(tab)
    until(lambda: not app.model.engine.busy)


def test_the_tasks_fit_a_narrow_screen(browser: Any, app: App) -> None:
    tab = Tab.open(browser, app, viewport={"width": 390, "height": 800})
    tab.page.get_by_role("tab", name="Tasks").click()
    run(tab, "Find objects", SCENE)
    tab.page.locator("#drawn img").wait_for()
    assert tab.overflow() == 0
    tab.page.close()


def type_schema(tab: Tab, text: str) -> None:
    editor = tab.page.locator("#schema .cm-content")
    editor.click()
    tab.page.keyboard.press("ControlOrMeta+a")
    tab.page.keyboard.insert_text(text)
