"""The web page without a browser: sessions, models that are exchanged, what is shown, who asks."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("gradio")

import httpx
from hosting import Fake
from PIL import Image

from app.chat import Chat
from app.command import engine_options, free_port, parser, place_of, wish_of
from app.finding import Finding, parse, told
from app.guard import Guard
from app.models import Models, Wish
from app.pictures import read_pictures
from app.sanitize import framed, sanitize
from app.session import Picture, Sessions, Turn
from app.settings import Controls, Settings
from app.show import messages_of, turn_of, with_formulas
from app.tasks import TASKS, asked, pretty, read_schema, task_called
from qwen3vl_mlx.demo import EXAMPLE
from qwen3vl_mlx.errors import CheckpointError, InputError, Qwen3VLError
from qwen3vl_mlx.tasks import Box, Point, Wording

SOON_SEC = 20.0
IMAGE = Image.new("RGB", (4, 2))
PICTURE = Picture(IMAGE, "a.heic", "a.webp", "a.heic")


def until(condition: Any) -> None:
    deadline = time.monotonic() + SOON_SEC
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


# ---- sessions


def test_sessions_are_their_own_and_are_forgotten_an_hour_after_they_are_left() -> None:
    now = [0.0]
    sessions = Sessions(lambda: now[0])
    sessions.of("one").turns.append(Turn("hello"))
    assert sessions.of("two").turns == []
    sessions.leave("one")
    now[0] = 3000
    assert len(sessions.of("one").turns) == 1, "a laptop that slept finds its conversation"
    sessions.leave("one")
    sessions.leave("never seen")
    now[0] = 7000
    sessions.of("two")
    assert len(sessions) == 1


def test_one_answer_at_a_time_in_each_part() -> None:
    session = Sessions().of("one")
    first = session.begin("chat")
    assert first is not None
    assert session.begin("chat") is None
    assert session.begin("task") is not None
    first.end()
    assert session.begin("chat") is not None


@pytest.mark.parametrize("early", [False, True])
def test_leaving_closes_all_streams_even_those_that_come_later(early: bool) -> None:
    closed: list[str] = []

    def stream(name: str) -> Any:
        return SimpleNamespace(close=lambda: closed.append(name))

    sessions = Sessions()
    running = sessions.of("one").begin("task")
    assert running is not None
    running.attach(stream("a"))
    if not early:
        running.attach(stream("b"))
    sessions.leave("one")
    if early:
        running.attach(stream("b"))
    assert closed == ["a", "b"]


def test_the_model_is_told_all_but_failed_turns_with_their_pictures() -> None:
    session = Sessions().of("one")
    session.turns = [
        Turn("What?", [PICTURE], answer="A dog.", reasoning="Hm."),
        Turn("Too long", failed=True, note="too long"),
        Turn("Stopped before it began", [PICTURE]),
        Turn("And now?"),
    ]
    messages = session.messages("Be brief.")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "user"]
    assert messages[1]["content"][0] == {"type": "image", "image": IMAGE}
    assert messages[2] == {"role": "assistant", "content": "A dog.", "reasoning_content": "Hm."}
    assert messages[3]["content"][0]["image"] is IMAGE
    assert session.messages("  ")[0]["role"] == "user"
    again = session.turns[0].again("Which dog?")
    assert (again.text, again.pictures, again.answer) == ("Which dog?", [PICTURE], "")


# ---- what is shown


def test_messages_lead_back_to_their_turns() -> None:
    turns = [
        Turn("one", [PICTURE], answer="1", reasoning="hm", thinking_sec=1.25),
        Turn("two"),
        Turn("three", note="Stopped."),
    ]
    shown = messages_of(turns)
    assert [m["role"] for m in shown] == ["user", *["assistant"] * 2, *["user", "assistant"] * 2]
    assert shown[1]["metadata"] == {"title": "Thinking", "status": "done", "duration": 1.2}
    assert [turn_of(turns, n) for n in range(len(shown) + 1)] == [0, 0, 0, 1, 1, 2, 2, None]
    assert "*Stopped.*" in shown[-1]["content"][0]["text"]
    assert [m["role"] for m in messages_of([Turn("new")], waiting=True)] == ["user"]
    assert messages_of([]) == []


def test_notes_are_plain_text() -> None:
    [_, message] = messages_of([Turn("q", note="a *b* <img src=x> [c](d)", failed=True)])
    assert message["content"][0]["text"] == r"*a \*b\* \<img src=x\> \[c\]\(d\)*"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("so $x^2 + 1$ is", r"so \(x^2 + 1\) is"),
        ("$5 and $6", "$5 and $6"),
        ("$5 and 6 $", "$5 and 6 $"),
        ("from US$5 to $x$.", r"from US$5 to \(x\)."),
        ("`$x$` and\n```\n$y$\n```", "`$x$` and\n```\n$y$\n```"),
        ("$$x$$ and \\$x$", "$$x$$ and \\$x$"),
        ("```\n$x$ not closed", "```\n$x$ not closed"),
    ],
)
def test_dollars_are_formulas_where_they_are_no_money(text: str, shown: str) -> None:
    assert with_formulas(text) == shown


# ---- documents


@pytest.mark.parametrize(
    ("html", "safe"),
    [
        ("<h1>a</h1><script>x</script>b", "<h1>a</h1>b"),
        ("<p onclick='x' class='y'>a</p>", '<p class="y">a</p>'),
        ("<a href='javascript:x'>a</a>", "<a>a</a>"),
        ("<img src='http://x/y' alt='a \"b\"'>", '<span class="picture">a &quot;b&quot;</span>'),
        ("<img src=x>", '<span class="picture">picture</span>'),
        ("<svg onload=x><p>a</p></svg>b", "b"),
        ("<iframe src=x></iframe><object data=x></object>a", "a"),
        ("<table><tr><td colspan=2>1", '<table><tr><td colspan="2">1</td></tr></table>'),
        ("<b><i>a</b>c", "<b><i>a</i></b>c"),
        ("</p>a &lt;script&gt; &amp;", "a &lt;script&gt; &amp;"),
        ("<p style='color: red; background: url(http://x)'>a", '<p style="color: red">a</p>'),
        ("<p style='position: fixed; width: 10px'>a", '<p style="width: 10px">a</p>'),
        ("<meta http-equiv=refresh content='0;url=http://x'>a", "a"),
        ("<link rel=stylesheet href=http://x><base href=http://x>a", "a"),
        ("<form action=x><input name=y><button>z</button></form>", "z"),
        ("<!-- <script> -->a<!doctype html><?x ?>", "a"),
        ("a<script>never closed", "a"),
    ],
)  # fmt: skip
def test_only_the_layout_of_a_document_is_left(html: str, safe: str) -> None:
    assert sanitize(html) == safe
    assert sanitize(safe) == safe or "picture" in safe


def test_a_document_stays_in_its_frame() -> None:
    frame = framed('</iframe><img src=x onerror="y">"', 'a "title"')
    assert frame.count("<iframe") == frame.count("</iframe>") == 1
    assert 'sandbox=""' in frame
    assert 'title="a &quot;title&quot;"' in frame


# ---- tasks


@pytest.mark.parametrize("size", [(96, 192), (4000, 1000), (1000, 1000)])
def test_a_click_finds_what_is_under_it(size: tuple[int, int]) -> None:
    width, height = size
    whole = Box(0, 0, width, height, "all")
    part = Box(width / 2, height / 2, width * 0.75, height * 0.75, "part")
    finding = Finding.of(Image.new("RGB", size), [whole, part])
    shown_width, shown_height = finding.picture.size
    assert 1000 <= max(finding.picture.size) <= 2000
    assert finding.at(shown_width * 0.6, shown_height * 0.6) == 1, "the smaller one"
    assert finding.at(shown_width * 0.2, shown_height * 0.2) == 0
    points = Finding.of(Image.new("RGB", size), [Point(width / 2, height / 2, "p")])
    assert points.at(shown_width / 2 + 3, shown_height / 2) == 0
    assert points.at(0, 0) is None
    assert finding.drawn(1).size == finding.picture.size
    assert len(set(finding.names())) == 2


def test_answers_are_parsed_while_they_come() -> None:
    answer = '[{"bbox_2d": [0, 0, 500, 500], "label": "a"}, {"bbox_2d": [500, 500, 1000, 1000], "la'
    boxes = parse([answer[:50], answer], (200, 100), points=False)
    assert boxes[0] == Box(0, 0, 100, 50, "a")
    assert told(boxes[0]) == "a (0, 0) to (100, 50)"
    assert parse(["[", "none"], (200, 100), points=True) == []


def test_each_task_asks_in_the_words_of_its_model() -> None:
    wording = Wording()
    for task in TASKS:
        assert task_called(task.title) is task
        questions = asked(task, wording, "cup", '{"type": "object"}', "")
        assert questions.prompts
        assert questions.options["sampling"]["temperature"] == 0
    separately = Wording(several=False)
    assert len(asked(TASKS[0], separately, "cup, dog", "", "").prompts) == 2
    extract = task_called("Extract to JSON")
    questions = asked(extract, wording, "", '{"type": "integer"}', "How many?")
    assert questions.prompts == ["How many?"]
    assert questions.options["response_format"]["json_schema"]["schema"] == {"type": "integer"}
    with pytest.raises(InputError, match="no task"):
        task_called("Dance")


@pytest.mark.parametrize(("text", "problem"), [("{", "line 1"), ("[]", "object"), ("", "line 1")])
def test_a_wrong_schema_is_told_of(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read_schema(text)


def test_json_is_shown_in_lines_once_it_is_whole() -> None:
    assert pretty('{"a": 1}') == '{\n  "a": 1\n}'
    assert pretty('{"a": ') == '{"a": '


def test_empty_controls_ask_for_nothing() -> None:
    names = list(Controls.__dataclass_fields__)
    values: dict[str, Any] = dict.fromkeys(names)
    assert Settings.of(list(values.values())) == Settings("", {}, None, None)
    values.update(system="Brief.", top_k=20.0, temperature=0, max_visual=2.5, seed=7.0)
    assert Settings.of(list(values.values())) == Settings(
        "Brief.", {"top_k": 20, "temperature": 0.0, "seed": 7}, None, 2560
    )


def test_files_are_read_once_and_the_bad_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(rotated, exif=exif)
    shown = tmp_path / "shown"
    shown.mkdir()
    read = read_pictures([str(EXAMPLE), str(bad), str(rotated), "/gone.png"], shown)
    assert [p.name for p in read.pictures] == ["example.png", "rotated.jpg"]
    assert read.pictures[1].image.size == (20, 40)
    assert Image.open(read.pictures[1].shown).size == (20, 40), "shown upright"
    assert read.good == (str(EXAMPLE), str(rotated))
    assert len(read.problems) == 2
    assert "bad.png" in read.problems[0]
    assert "gone.png" in read.problems[1]
    assert len(list(shown.iterdir())) == 2, "nothing half-made is left"


# ---- the model


def test_the_old_model_answers_until_its_last_answer_has_ended() -> None:
    made: dict[str, Fake] = {}

    def load(wish: Wish, tell: Any) -> Any:
        made[wish.model] = Fake()
        return made[wish.model]

    models = Models(load, Wish("one"))
    with models.lease(SOON_SEC) as first:
        models.start(Wish("two"))
        until(lambda: models.status.answers == Wish("two"))
        assert not made["one"].closed
        with models.lease() as second:
            assert second is made["two"]
        assert first is made["one"]
    assert made["one"].closed
    assert not made["two"].closed
    assert models.close(SOON_SEC)
    assert made["two"].closed
    with pytest.raises(Qwen3VLError, match="stopped"), models.lease():
        pass


def test_a_load_that_fails_changes_nothing() -> None:
    go_on = threading.Event()

    def load(wish: Wish, tell: Any) -> Any:
        tell("Downloading", 0.5)
        if wish.model == "bad":
            assert go_on.wait(SOON_SEC)
            raise CheckpointError("it is damaged")
        return Fake()

    models = Models(load, Wish("good"))
    until(lambda: models.status.state == "ready")
    models.start(Wish("bad"))
    until(lambda: models.status.fraction == 0.5)
    with pytest.raises(InputError, match="bad is being loaded"):
        models.start(Wish("third"))
    go_on.set()
    until(lambda: models.status.state == "failed")
    assert models.status.note == "it is damaged"
    assert models.status.answers == Wish("good")
    assert models.status.serial == 1
    with models.lease() as model:
        assert not model.closed
    assert models.close(SOON_SEC)


def test_without_a_model_the_reason_is_told() -> None:
    def load(wish: Wish, tell: Any) -> Any:
        raise OSError("the disk is gone")

    models = Models(load, Wish("any"))
    with pytest.raises(Qwen3VLError, match="OSError: the disk is gone"), models.lease(SOON_SEC):
        pass
    assert models.close(SOON_SEC)


# ---- who may ask


@pytest.mark.parametrize(
    ("names", "host", "origin", "status"),
    [
        ((), "127.0.0.1:7860", None, 200),
        ((), "localhost:7860", "http://localhost:7860", 200),
        ((), "[::1]:7860", None, 200),
        ((), "evil.example:7860", None, 403),
        ((), "192.168.1.5:7860", None, 403),
        ((), "localhost:7860", "http://evil.example", 403),
        ((), "localhost:7860", "null", 403),
        ((), "localhost:7860", "http://localhost:3000", 403),
        (("mac.local",), "mac.local:7860", None, 200),
        (("mac.local",), "MAC.local", None, 200),
        (("mac.local",), "192.168.1.5:7860", None, 200),
        (("mac.local",), "evil.example", None, 403),
        (None, "some.gradio.live", "https://some.gradio.live", 200),
    ],
)
def test_names_and_pages_of_others_get_nothing(
    names: tuple[str, ...] | None, host: str, origin: str | None, status: int
) -> None:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("hello"))])
    client = TestClient(Guard(app, names))
    headers = {"host": host} | ({"origin": origin} if origin else {})
    response = client.get("/", headers=headers)
    assert response.status_code == status
    if status == 200:
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--host", "0.0.0.0"], "lets other machines in"),
        (["--share"], "everybody"),
        (["--auth", "me"], "NAME:PASSWORD"),
        (["--auth", ":secret"], "NAME:PASSWORD"),
        (["--port", "70000"], "0 to 65535"),
        (["--host", "no.such.host.invalid", "--insecure"], "no address of this machine"),
    ],
)
def test_a_page_that_would_be_open_or_nowhere_is_refused(options: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        place_of(parser("app").parse_args(["--port", "0", *options]))


def test_places_and_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    def args(*options: str) -> Any:
        return parser("app").parse_args(["--port", "0", *options])

    place = place_of(args())
    assert (place.host, place.names, place.auth, place.share) == ("127.0.0.1", (), None, False)
    assert place.port > 0
    assert place_of(args("--host", "0.0.0.0", "--insecure")).names
    assert place_of(args("--share", "--insecure")).names is None
    monkeypatch.setenv("QWEN3VL_APP_AUTH", "me:a:b")
    assert place_of(args("--host", "0.0.0.0")).auth == ("me", "a:b")
    assert wish_of(args("--model", "demo", "--quantize", "4bit")) == Wish("demo", None, "4bit")
    with pytest.raises(InputError, match="--topology"):
        wish_of(args("--model", "demo", "--topology", "x.yaml"))
    with pytest.raises(CheckpointError, match="no folder"):
        wish_of(args("--model", "./nothing here"))
    assert engine_options(args("--max-batch", "3", "--lookup")).max_batch == 3


def test_a_port_that_is_taken_is_told_of() -> None:
    import socket

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(Qwen3VLError, match="choose another"),
    ):
        free_port("127.0.0.1", taken.getsockname()[1])


# ---- the command


def test_help_is_quick_and_importing_is_light() -> None:
    code = (
        "import sys, app\n"
        "try: app.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'gradio', 'mlx', 'numpy', 'PIL', 'starlette'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("set()"), done.stdout[-200:] + done.stderr
    assert "--share" in done.stdout


def test_without_gradio_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "import app; sys.exit(app.main(['--model', 'demo', '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: the page needs gradio: pip install 'qwen3vl-mlx[app]'\n"


def test_it_serves_what_it_must_and_ctrl_c_ends_it() -> None:
    options = [sys.executable, "-m", "app", "--model", "demo", "--port", "0", "--auth", "me:secret"]
    process = subprocess.Popen(
        options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "GRADIO_ALLOWED_PATHS": ""},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.match(r"http://127\.0\.0\.1:\d+", line)[0]  # type: ignore[index]
        with httpx.Client(base_url=url, timeout=30) as client:
            assert client.get("/gradio_api/info").status_code == 401
            assert client.get("/", headers={"host": "evil.example"}).status_code == 403
            login = {"username": "me", "password": "secret"}
            assert client.post("/login", data=login).status_code == 200
            config = client.get("/config").json()
            assert "http" not in json.dumps(config.get("stylesheets"))
            assert client.get("/gradio_api/info").json()["named_endpoints"] == {}
            for path in ("/etc/passwd", str(Path(__file__)), "pyproject.toml"):
                assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
            with client.stream("GET", "/gradio_api/heartbeat/abc") as beating:
                next(beating.iter_raw())
                process.send_signal(signal.SIGINT)
                code = process.wait(30)
        errors = process.stderr.read() if process.stderr else ""
        assert (code, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()


# ---- the chat's handlers


def chat_of(folder: Path) -> tuple[Chat, Any, Any]:
    """A chat without a model, a tab's request, and its session."""
    chat = Chat(
        cast(Models, None), Sessions(), folder, [{"text": "What is it?", "files": [str(EXAMPLE)]}]
    )
    request = SimpleNamespace(session_hash="one")
    return chat, request, chat.sessions.of("one")


def test_the_next_question_is_taken_as_soon_as_a_bad_file_is_named(tmp_path: Path) -> None:
    chat, request, session = chat_of(tmp_path)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"this is no picture")

    async def first() -> Any:
        answers = chat.ask(request, {"text": "What?", "files": [str(bad)]})
        shown = await anext(answers)
        assert session.begin("chat") is not None, "before the handler has ended"
        return shown

    assert asyncio.run(first())[1] == {"text": "What?", "files": []}


def test_an_example_is_known_by_its_number_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, request, _ = chat_of(tmp_path)
    boxes: list[Any] = []

    async def ask(_: Any, request: Any, box: Any, *values: Any) -> Any:
        boxes.append(box)
        yield None

    monkeypatch.setattr(Chat, "ask", ask)
    event = SimpleNamespace(index=0, value={"text": "x", "files": [{"path": "/etc/passwd"}]})

    async def whole() -> list[Any]:
        return [each async for each in chat.example(request, cast(Any, event))]

    asyncio.run(whole())
    assert boxes == [chat.examples[0]]
