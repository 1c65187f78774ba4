"""The web page's chat in a browser, as a person uses it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import OTHER_TRUTH, SCENES, TRUTH

pytest.importorskip("gradio")

from browsing import App, Loads, Tab, app_of, chromium, in_browser, say, seconds, until

from qwen3vl_mlx import CheckpointError, Qwen3VL, load
from qwen3vl_mlx.media import load_image

pytestmark = [pytest.mark.dev, in_browser]

SCENE, OTHER_SCENE = SCENES / "scene18.png", SCENES / "scene22.png"
QUESTION = "Describe the image."
LONG = " ".join(f"word{number}" for number in range(900))


@pytest.fixture(scope="module")
def loads(thinking_demo: Qwen3VL) -> Loads:
    """Each load is a model of its own; one of them thinks."""
    folder = thinking_demo.source.folder
    return Loads(lambda name: load(folder if "thinking" in name else "demo"))


@pytest.fixture(scope="module")
def app(loads: Loads) -> Iterator[App]:
    with app_of(loads) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def shared(browser: Any, app: App) -> Tab:
    return Tab.open(browser, app)


@pytest.fixture
def tab(shared: Tab) -> Iterator[Tab]:
    """The page with a new chat. Nothing may leave this machine, and no script may fail."""
    shared.renew()
    yield shared
    check(shared)


@pytest.fixture
def open_tab(browser: Any, app: App) -> Iterator[Callable[..., Tab]]:
    """`open_tab(**options)`: the page in a window of its own."""
    tabs: list[Tab] = []

    def opened(**options: Any) -> Tab:
        tabs.append(Tab.open(browser, app, **options))
        return tabs[-1]

    yield opened
    for each in tabs:
        check(each)
        each.page.close()


def check(tab: Tab) -> None:
    strangers, complaints = tab.strangers(), tab.complaints
    tab.asked, tab.complaints = [], []
    assert strangers == []
    assert complaints == []


def test_an_answer_streams_and_is_measured(
    tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(f"word{number}" for number in range(60))
    say(monkeypatch, app.model, text)
    tab.page.evaluate(
        """() => { window.seen = [];
        new MutationObserver(() => {
          const said = document.querySelector("#conversation .bot.message")?.innerText.trim();
          if (said && said !== window.seen.at(-1)) window.seen.push(said);
        }).observe(document.body, {childList: true, subtree: true, characterData: true}); }"""
    )
    assert tab.ask(QUESTION, SCENE) == text
    seen = tab.page.evaluate("window.seen")
    assert len(seen) > 3
    assert all(text.startswith(part.rstrip()) for part in seen)
    assert [len(part) for part in seen] == sorted(len(part) for part in seen)
    numbers = tab.page.locator("#numbers").inner_text()
    assert seconds(numbers) > 0
    for told in ("tokens/s", "18 image tokens", "GB at peak"):
        assert told in numbers


def test_follow_ups_keep_pictures_and_take_more(tab: Tab) -> None:
    assert tab.ask(QUESTION, SCENE) == TRUTH
    assert "purple" in tab.ask("What color is the star?")
    assert "cached" in tab.page.locator("#numbers").inner_text()
    tab.ask(QUESTION, OTHER_SCENE)
    assert tab.page.locator("#conversation .user.message img").count() == 2
    turns = one_session(tab).turns
    assert [len(turn.pictures) for turn in turns] == [1, 0, 1]
    assert turns[2].pictures[0].image == load_image(OTHER_SCENE)
    assert len(turns[2].answer) > 0


def test_retry_and_edit_ask_again_with_the_pictures_of_the_turn(tab: Tab) -> None:
    tab.ask("How many shapes are there?", SCENE)
    tab.ask("What color is the star?")
    edit(tab, 0, QUESTION)
    assert tab.answered() == TRUTH
    assert tab.questions() == [QUESTION]
    assert tab.page.locator("#conversation .user.message img").count() == 1
    session = one_session(tab)
    first = session.turns[0]
    tab.page.get_by_role("button", name="Retry").last.click()
    until(lambda: session.turns[0] is not first and session._running["chat"].ended)
    assert tab.answered() == session.turns[0].answer == TRUTH
    tab.page.get_by_role("button", name="Undo").last.click()
    until(lambda: tab.page.locator("#box textarea").input_value() == QUESTION)
    assert tab.page.locator("#box .thumbnail-item").count() == 1
    assert tab.questions() == []


def test_stop_ends_the_work_and_keeps_what_was_said(
    tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, app.model, LONG)
    tab.send(QUESTION, SCENE)
    until(lambda: any("word5" in answer for answer in tab.answers()))
    tab.page.locator("#box .stop-button").click()
    answer = tab.answered()
    assert not app.model.engine.busy
    assert "Stopped." in answer
    assert "word899" not in answer
    assert one_session(tab).turns[0].answer.startswith("word0 word1")


def test_a_closed_tab_ends_its_answer(
    browser: Any, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, app.model, LONG)
    tab = Tab.open(browser, app)
    tab.send(QUESTION, SCENE)
    until(lambda: any("word5" in answer for answer in tab.answers()))
    session = one_session(tab)
    tab.page.close()
    until(lambda: not app.model.engine.busy)
    assert "word899" not in session.turns[0].answer


def test_a_new_chat_ends_the_answer_and_forgets(
    tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, app.model, LONG)
    tab.send(QUESTION, SCENE)
    until(lambda: any("word5" in answer for answer in tab.answers()))
    tab.page.get_by_role("button", name="New chat").click()
    until(lambda: not app.model.engine.busy)
    tab.page.get_by_text("What would you like to know?").wait_for()
    assert tab.questions() == []


def test_a_bad_file_is_named_and_nothing_is_lost(tab: Tab, tmp_path: Path) -> None:
    bad = tmp_path / "holiday.png"
    bad.write_bytes(b"this is no picture")
    tab.send(QUESTION, SCENE, bad)
    assert "holiday.png" in tab.toast()
    until(lambda: tab.page.locator("#box .thumbnail-item").count() == 1)
    assert tab.page.locator("#box textarea").input_value() == QUESTION
    tab.page.keyboard.press("Escape")
    tab.page.locator("#box textarea").press("Enter")
    until(lambda: tab.questions() == [QUESTION])
    assert tab.answered() == TRUTH


def test_two_browsers_never_mix(tab: Tab, open_tab: Callable[..., Tab]) -> None:
    first, second = tab, open_tab()
    first.attach(SCENE)
    second.attach(OTHER_SCENE)
    for turn in (1, 2):
        for each in (first, second):
            each.send(QUESTION)
        for each in (first, second):
            until(lambda n=turn, tab=each: len(tab.answers()) == len(tab.questions()) == n)
            each.answered()  # until then it takes no other question
    assert first.answered() == TRUTH
    assert second.answered() == OTHER_TRUTH
    assert [len(each.questions()) for each in (first, second)] == [2, 2]


def test_a_thought_is_in_a_pane(
    tab: Tab, app: App, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(tab, "tests/thinking")
    tab.page.get_by_role("button", name="Sampling").click()
    tab.page.get_by_label("Most tokens of thought").wait_for()
    tab.page.get_by_role("button", name="Sampling").click()
    say(monkeypatch, app.model, "Let me **look**.</think>\n\nA star.")
    assert tab.ask(QUESTION, SCENE) == "A star."
    pane = tab.page.locator("#conversation .thought-group")
    pane.get_by_role("button", name="Thinking").click()
    assert "Let me look." in pane.inner_text()
    choose(tab, "demo")


def test_switching_lets_answers_end_on_the_old_model(
    tab: Tab, app: App, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = app.model
    say(monkeypatch, old, LONG)
    tab.send(QUESTION, SCENE)
    until(lambda: any("word5" in answer for answer in tab.answers()))
    choose(tab, "demo")
    assert app.model is not old
    assert old.engine.busy
    tab.page.locator("#box .stop-button").click()
    tab.answered()
    until(lambda: old.engine.closed)


def test_a_load_shows_its_progress_and_its_failure(
    tab: Tab, app: App, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads.go_on.clear()
    loads.failure = CheckpointError("nobody/nothing is not there")
    try:
        pick(tab, "nobody/nothing")
        tab.page.locator("#status progress[value='0.250']").wait_for()
        assert "Downloading 1.00 of 4.00 GB" in tab.page.locator("#status").inner_text()
    finally:
        loads.go_on.set()
    tab.page.locator("#status .failed").wait_for()
    assert "nobody/nothing is not there" in tab.page.locator("#status").inner_text()
    assert tab.ask(QUESTION, SCENE) == TRUTH, "the old model still answers"
    loads.failure = None
    choose(tab, "demo")


def test_controls_begin_with_the_checkpoints_own_values(
    open_tab: Callable[..., Tab], app: App
) -> None:
    tab = open_tab()
    tab.page.get_by_role("button", name="Sampling").click()
    own = app.model.default_params
    for label, value in (("Temperature", own.temperature), ("Top p", own.top_p)):
        field = tab.page.get_by_label(f"number input for {label}")
        until(lambda field=field, value=value: float(field.input_value()) == value)
    tab.page.get_by_role("button", name="Picture detail").click()
    most = app.model.processor.image_budget().max_pixels / 1024
    assert float(tab.page.get_by_label("Most visual tokens").input_value()) == most


def test_a_system_prompt_and_a_budget_of_pixels_are_asked_for(
    open_tab: Callable[..., Tab], requests: Any
) -> None:
    tab = open_tab()
    tab.page.get_by_label("System prompt").fill("Answer briefly.")
    tab.page.get_by_role("button", name="Picture detail").click()
    tab.page.get_by_label("Most visual tokens").fill("12")
    tab.page.get_by_label("Most visual tokens").press("Tab")
    tab.ask(QUESTION, SCENE)
    text = tab.app.model.processor.tokenizer.decode(list(requests[-1].prompt.token_ids))
    assert "Answer briefly." in text
    assert "8 image tokens" in tab.page.locator("#numbers").inner_text()


def test_markdown_formulas_and_code_are_rendered_and_markup_is_not(
    tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "**bold** $x^2$ costs $5 and $6\n\n```python\nprint(1)\n```\n\n"
        "<img src=x onerror='window.hit = 1'><script>window.hit = 1</script>"
        "<b onclick='window.hit = 1'>here</b> [link](javascript:alert(1))"
    )
    say(monkeypatch, app.model, text)
    tab.ask(QUESTION)
    answer = tab.page.locator("#conversation .bot.message").last
    assert answer.locator("strong").inner_text() == "bold"
    answer.locator(".katex").first.wait_for()
    assert answer.locator(".katex").count() == 1
    assert answer.locator("pre code").inner_text().strip() == "print(1)"
    assert answer.locator("[onclick], [onerror], script, a[href^=javascript]").count() == 0
    assert tab.page.evaluate("window.hit") is None


def test_pictures_that_a_model_writes_are_not_fetched(
    tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    tab.page.on("response", lambda response: sent.append(response.url))
    say(monkeypatch, app.model, "![secret](http://127.0.0.2:9/leak.png) done")
    assert "done" in tab.ask(QUESTION)
    refused = tab.page.evaluate(
        "document.querySelector('#conversation .bot.message img')?.naturalWidth ?? 0"
    )
    assert refused == 0
    assert not any("leak" in url for url in sent)
    tab.asked = [url for url in tab.asked if "leak" not in url]  # refused before it was sent


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_follows_the_system(
    open_tab: Callable[..., Tab], width: int, scheme: str
) -> None:
    tab = open_tab(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = tab.page.locator(".sidebar.open")
    until(lambda: opened.count() == int(width > 768))
    assert tab.ask(QUESTION, SCENE)
    assert tab.overflow() == 0
    assert tab.page.locator("#box textarea").is_visible()
    shade = tab.page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number)"
    )
    assert (sum(shade[:3]) / 3 < 128) == (scheme == "dark")


def test_the_keyboard_is_enough(tab: Tab, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    tab.attach(SCENE)
    say(monkeypatch, app.model, LONG)
    reach(tab, "Your question")
    tab.page.keyboard.type(QUESTION)
    tab.page.keyboard.press("Enter")
    until(lambda: any("word5" in answer for answer in tab.answers()))
    reach(tab, "Stop")
    tab.page.keyboard.press("Enter")
    assert "Stopped." in tab.answered()


def test_every_control_has_a_name(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.ask(QUESTION, SCENE)
    for name in ("Sampling", "Picture detail"):
        tab.page.get_by_role("button", name=name).click()
    tab.page.get_by_role("button", name="Camera").click()
    assert nameless(tab) == []
    tab.page.get_by_role("tab", name="Tasks").click()
    tab.page.locator("#run").wait_for()
    assert nameless(tab) == []


def test_a_photo_of_the_camera_joins_the_question(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.page.get_by_role("button", name="Camera").click()
    tab.page.locator("#camera").get_by_role("button").first.click()
    tab.page.locator("#camera video").wait_for()
    until(lambda: tab.page.evaluate("document.querySelector('#camera video').videoWidth") > 0)
    tab.page.locator("#camera").get_by_role("button", name="capture").click()
    until(lambda: tab.page.locator("#box .thumbnail-item").count() == 1)
    assert tab.ask(QUESTION)


def test_an_example_is_asked_by_a_click(tab: Tab) -> None:
    tab.page.locator("#conversation .example").first.click()
    until(lambda: tab.questions() == [QUESTION])
    assert "white circle at the top left" in tab.answered()
    tab.page.get_by_role("button", name="Undo").last.click()
    until(lambda: tab.page.locator("#box textarea").input_value() == QUESTION)
    assert tab.page.locator("#box .thumbnail-item").count() == 1


def one_session(tab: Tab) -> Any:
    """The session that has asked what this tab shows."""
    shown = tab.questions()
    found = [
        session
        for session in tab.app.sessions._sessions.values()
        if [turn.text for turn in session.turns] == shown and session.left_at is None
    ]
    return found[-1]


def edit(tab: Tab, number: int, text: str) -> None:
    tab.page.get_by_role("button", name="Edit").nth(number).click()
    tab.page.locator("#conversation textarea").first.fill(text)
    tab.page.get_by_role("button", name="Submit").first.click()
    until(lambda: tab.questions() == [text])


def pick(tab: Tab, name: str) -> None:
    model = tab.page.get_by_label("Model", exact=True)
    model.fill(name)
    model.press("Enter")
    tab.page.locator("#load").click()


def choose(tab: Tab, name: str) -> None:
    """Load a model, and wait until the page says so."""
    before = tab.app.models.status.serial
    pick(tab, name)
    until(lambda: tab.app.models.status.serial > before)
    tab.page.locator("#status .ready", has_text=name).wait_for()


def reach(tab: Tab, name: str) -> None:
    """Press Tab until a control has the focus."""
    for _ in range(60):
        focused = tab.page.evaluate(
            "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
        )
        if (focused or "").strip() == name:
            return
        tab.page.keyboard.press("Tab")
    raise AssertionError(f"{name} is not reached by Tab")


def nameless(tab: Tab) -> list[str]:
    """Controls that a screen reader could not name."""
    found: list[str] = tab.page.evaluate(
        """() => [...document.querySelectorAll(
             "button, input, textarea, select, [role=button], [role=radio], [role=tab]")]
        .filter(e => e.checkVisibility() && e.type !== "hidden")
        .filter(e => !(e.getAttribute("aria-label") || e.labels?.[0]?.innerText || e.title
          || e.innerText || e.getAttribute("aria-labelledby") || e.querySelector("img")?.alt))
        .map(e => e.outerHTML.slice(0, 200))"""
    )
    return found


# Other ways in, by which a browser hands files over.
GIVE = """async ([selector, kind, data, name, type]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type}));
  const target = document.querySelector(selector);
  if (kind === "paste")
    target.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
  else
    for (const each of ["dragenter", "dragover", "drop"])
      target.dispatchEvent(new DragEvent(each, {dataTransfer: transfer, bubbles: true,
        cancelable: true}));
}"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_pictures_are_pasted_and_dragged(tab: Tab, kind: str) -> None:
    target = "#box textarea"
    data = base64.b64encode(SCENE.read_bytes()).decode()
    tab.page.evaluate(GIVE, [target, kind, data, "scene.png", "image/png"])
    until(lambda: tab.page.locator("#box .thumbnail-item").count() == 1)
    assert tab.ask(QUESTION) == TRUTH


def test_a_photo_of_a_phone_is_shown_and_seen(tab: Tab, tmp_path: Path) -> None:
    """HEIC, which this browser does not know."""
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "IMG_1.HEIC"
    heif.from_pillow(load_image(SCENE).resize((384, 768))).save(path, quality=95)
    assert tab.ask("What color is the star?", path) == "purple"
    shown = tab.page.locator("#conversation .user.message img")
    shown.wait_for()
    assert shown.evaluate("image => image.decode().then(() => image.naturalHeight)") == 768
