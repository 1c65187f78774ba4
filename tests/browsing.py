"""The web page in a browser: one server and one Chromium for a test module, a tab for a test."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from asking import script
from PIL import Image

pytest.importorskip("gradio")

from app.models import Models, Tell, Wish
from app.serving import Place, served
from app.session import Sessions
from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.engine import batch

CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
QUIET = "quic", "background-networking", "component-update", "sync", "gpu"
SOON_MS = 20_000  # for what should happen at once, on a machine that is busy


@dataclass(frozen=True)
class App:
    """A page that is served, and what answers behind it."""

    url: str
    models: Models
    sessions: Sessions

    @property
    def model(self) -> Qwen3VL:
        with self.models.lease(30) as model:
            return model


@contextmanager
def app_of(load: Callable[[Wish, Tell], Qwen3VL], first: str = "demo") -> Iterator[App]:
    """Serve the page on a free port of the loopback address."""
    from app.command import free_port

    models = Models(load, Wish(first))
    try:
        with served(models, Place(port=free_port("127.0.0.1", 0))) as page:
            yield App(page.url, models, page.sessions)
    finally:
        models.close(30)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser for which names of other machines lead nowhere."""
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--no-first-run",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                *(f"--disable-{what}" for what in QUIET),
            ],
        )
        yield browser
        browser.close()


@dataclass
class Tab:
    """One browser tab of the page, as a person uses it."""

    page: Any
    app: App
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, browser: Any, app: App, **options: Any) -> Tab:
        """Open the page in a window of its own and wait for the model."""
        options.setdefault("viewport", {"width": 1280, "height": 900})
        page = browser.new_page(**options)
        page.set_default_timeout(SOON_MS)
        tab = cls(page, app)
        page.on("request", lambda request: tab.asked.append(request.url))
        page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        page.goto(app.url)
        page.locator("#status .ready").wait_for()
        return tab

    def attach(self, *files: Path | str | dict[str, Any]) -> None:
        """Add pictures to the box."""
        before = self.page.locator("#box .thumbnail-item").count()
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#box").get_by_role("button", name="Upload a file").click()
        chooser.value.set_files(list(files))
        until(lambda: self.page.locator("#box .thumbnail-item").count() >= before + len(files))

    def type(self, text: str) -> None:
        self.page.locator("#box textarea").fill(text)

    def send(self, text: str, *files: Path | str | dict[str, Any]) -> None:
        """Ask by the keyboard."""
        if files:
            self.attach(*files)
        self.type(text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str, *files: Path | str | dict[str, Any]) -> str:
        """Ask, wait, and return the answer."""
        count = len(self.questions())
        self.send(text, *files)
        until(lambda: len(self.questions()) > count)
        return self.answered()

    def answered(self) -> str:
        """Wait for the end of the answer under way, and return it."""
        self.page.locator("#box .submit-button").wait_for()
        until(lambda: not self.app.model.engine.busy)
        return self.answers()[-1]

    def answers(self) -> list[str]:
        return [text.strip() for text in self.page.locator(BOT).all_inner_texts()]

    def questions(self) -> list[str]:
        """The texts of all turns; a picture has a bubble of its own."""
        found = self.page.locator("#conversation .user.message").all_inner_texts()
        return [text.strip() for text in found if text.strip()]

    def renew(self) -> None:
        """Begin a new chat in the same tab, as quick as a person does."""
        if self.page.locator("#box .submit-button").count() == 0:
            self.page.reload()
            self.page.locator("#status .ready").wait_for()
            return
        self.page.get_by_role("tab", name="Chat").click()
        self.page.get_by_role("button", name="New chat").click()
        self.page.get_by_text("What would you like to know?").wait_for()
        for _ in range(self.page.locator("#box .thumbnail-item").count()):
            self.page.locator("#box .delete-button").first.click()
        self.type("")

    def toast(self) -> str:
        return str(self.page.get_by_test_id("toast-body").first.inner_text())

    def overflow(self) -> int:
        """Pixels that stand out at the right."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def strangers(self) -> list[str]:
        """Requests that would leave this machine."""
        own = (self.app.url, "data:", "blob:")
        return [url for url in self.asked if not url.startswith(own)]

    def picture(self, selector: str) -> Image.Image:
        """The picture that an element shows, in its own pixels."""
        self.page.locator(selector).first.wait_for()
        source = self.page.locator(selector).first.get_attribute("src")
        data = self.page.request.get(source).body()
        return Image.open(BytesIO(data)).convert("RGB")


BOT = "#conversation .bot.message"
"""The answers, without the panes of thoughts."""


def until(condition: Callable[[], bool], seconds: float = SOON_MS / 1000) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


class Loads:
    """A loader of greedy models that may be held up, and may fail."""

    def __init__(self, load: Callable[[str], Qwen3VL]) -> None:
        self.load = load
        self.failure: Exception | None = None
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, wish: Wish, tell: Tell) -> Qwen3VL:
        tell("Downloading 1.00 of 4.00 GB", 0.25)
        assert self.go_on.wait(60)
        if self.failure is not None:
            raise self.failure
        model = self.load(wish.model)
        model.default_params = replace(model.default_params, temperature=0.0)
        return model


def say(monkeypatch: pytest.MonkeyPatch, model: Qwen3VL, text: str) -> None:
    """Make the model say `text`, a token at a time, each as long in coming as any."""
    script(monkeypatch, model, text)
    scripted = batch.draw

    def computed(logits: mx.array, rows: Any) -> Any:
        mx.eval(logits)  # nothing else asks for them, and the work would be put off to the end
        return scripted(logits, rows)

    monkeypatch.setattr(batch, "draw", computed)


def colour_near(picture: Image.Image, x: float, y: float, reach: int = 3) -> set[Any]:
    """All colours in a square around a place."""
    box = (int(x) - reach, int(y) - reach, int(x) + reach + 1, int(y) + reach + 1)
    return {picture.getpixel((i, j)) for i in range(box[0], box[2]) for j in range(box[1], box[3])}


def seconds(text: str) -> float:
    """Of the line of numbers: time to the first token."""
    found = re.search(r"first token ([\d.]+) s", text)
    assert found, text
    return float(found[1])
