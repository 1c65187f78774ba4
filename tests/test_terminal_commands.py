"""What the chat's commands do to a conversation, without a terminal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from asking import QUESTION, SCENES, TRUTH
from PIL import Image

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.chat import prefixes, store
from qwen3vl_mlx.chat.commands import COMMANDS, parse_command
from qwen3vl_mlx.chat.completion import complete
from qwen3vl_mlx.chat.loader import Loader, ModelChoice
from qwen3vl_mlx.chat.loop import handle
from qwen3vl_mlx.chat.pictures import Attached
from qwen3vl_mlx.chat.session import Session
from qwen3vl_mlx.chat.settings import SETTINGS
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.engine.output import Chunk
from qwen3vl_mlx.errors import CheckpointError, InputError, OutputError

SCENE = SCENES / "scene18.png"


class Ear:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.answers: list[str] = []
        self.seen: list[str] = []
        self.stop_after: int | None = None  # pieces of an answer

    def say(self, text: str) -> None:
        self.said.append(text)

    def error(self, message: str) -> None:
        raise AssertionError(message)

    def working(self, text: str) -> None:
        self.said.append(text)

    def loading(self, name: str, seconds: float) -> None:
        pass

    def pictures(self, attached: list[Attached]) -> None:
        self.seen += [each.picture.name for each in attached]

    def answer(self, session: Session, chunks: Iterator[Chunk]) -> bool:
        text = ""
        for number, chunk in enumerate(chunks):
            text += chunk.text
            if number + 1 == self.stop_after:
                chunks.close()
                return True
        self.answers.append(text)
        return False


class Loaded:
    """A loader that has loaded `model`."""

    done, failed, seconds = True, False, 0.0

    def __init__(self, model: Qwen3VL):
        self.choice = ModelChoice("demo")
        self.model = model

    def result(self, meanwhile: Callable[[], None]) -> Qwen3VL:
        return self.model


class Talk:
    """A conversation, driven line by line, with a model that remembers nothing."""

    def __init__(self, loader: Loader | Loaded):
        if isinstance(loader, Loaded):
            loader.model.engine.clear_caches()
        self.session = Session(loader, {"temperature": 0.0}, None)
        self.ear = Ear()

    def __call__(self, line: str) -> str:
        """What is said or answered to a line."""
        before = len(self.ear.said), len(self.ear.answers)
        handle(line, self.session, self.ear)
        return "\n".join([*self.ear.said[before[0] :], *self.ear.answers[before[1] :]]).strip()

    @property
    def cached(self) -> int:
        assert self.session.usage is not None
        return self.session.usage.cached_tokens


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def talk(demo: Qwen3VL, home: Path) -> Talk:
    return Talk(Loaded(demo))


@pytest.fixture
def another(demo: Qwen3VL, talk: Talk) -> Callable[[], Talk]:
    """A new process, as far as the conversation can tell."""
    return lambda: Talk(Loaded(demo))


def test_a_conversation(talk: Talk) -> None:
    assert talk(f"{QUESTION} {SCENE}") == TRUTH
    assert talk.ear.seen == ["scene18.png"]
    assert talk("What shape is purple?") == "star"
    assert talk.cached > 30
    assert [turn.question for turn in talk.session.transcript().turns] == [
        QUESTION,
        "What shape is purple?",
    ]
    assert talk.session.visual_tokens == 0
    assert "2 turns" in talk("/clear")
    assert talk.session.transcript().turns == ()
    assert talk("What is 3 + 4?") == "7"


def test_pictures_wait_for_the_next_question_in_order(talk: Talk) -> None:
    other = SCENES / "scene22.png"
    talk(f"/image '{SCENE}' {other}")
    assert talk("/image").splitlines() == [
        f"{path.name}, {Image.open(path).width} x {Image.open(path).height}"
        for path in (SCENE, other)
    ]
    answer = talk(f"{SCENE}")
    turn = talk.session.transcript().turns[0]
    assert [picture.name for picture in turn.pictures] == [SCENE.name, other.name, SCENE.name]
    assert turn.question == "Describe the images."
    assert talk.session.waiting == []
    model = talk.session.model
    images = [SCENE, other, SCENE]
    assert answer == model.generate("Describe the images.", images=images, temperature=0).text
    talk(f"/image {SCENE}")
    assert talk("/image none") == "dropped 1 picture"
    assert talk.session.waiting == []
    assert "/image PATH" in talk("/image")


def test_a_picture_alone_is_described(talk: Talk) -> None:
    assert talk(f"'{SCENE}'?") == TRUTH
    assert talk.session.visual_tokens == 18
    talk(f"/image {SCENE}")
    assert talk("") == TRUTH


def test_what_fails_changes_nothing(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    talk(f"/image {SCENE}")
    assert talk.session.chat.messages == []  # the model is there
    for line, words in (
        ("what is on nope.png?", "nope.png"),
        (f"what is on {tmp_path}/text.png?", "text.png"),
        (f"/image {tmp_path}/text.png", "text.png"),
        ("/image https://", "https"),
        (f"/image {SCENE} nope.png", "nope.png"),
        ("/sett", "did you mean /set"),
        ("\\clera", "did you mean /clear"),
        ("/set temprature 1", "did you mean temperature"),
        ("/set temperature -1", "temperature"),
        ("/set temperature warm", "warm"),
        ("/set top_p 2", "top_p"),
        ("/topk -3", "top_k"),
        ("/set loop_guard maybe", "maybe"),
        ("/set max_pixels 0", "max_pixels"),
        ("/set min_pixels 99999999999", "min_pixels"),
        ("/set logit_bias 99999999=1", "vocabulary"),
        ("/retry", "ask one first"),
        ("/load nothing", "nothing"),
        ("/load ..", "name"),
        ("/save", "/save garden"),
        ("/clear now", "takes nothing"),
        ("/model ./nowhere", "nowhere"),
        ("/help nothing", "nothing"),
    ):
        with pytest.raises((InputError, CheckpointError), match=words.replace("?", ".")):
            talk(line)
    assert len(talk.session.waiting) == 1
    assert talk.session.changes == {"temperature": 0.0}
    assert talk(QUESTION) == TRUTH


def test_settings(talk: Talk) -> None:
    assert talk("\\temperature 0.5") == "temperature is 0.5"
    assert talk.session.model
    assert talk("/topp") == "top_p is 1, the default"
    assert talk('/set stop ["\\n", "x"]') == 'stop is ["\\n", "x"]'
    assert talk("/set logit_bias 5=1.5, 7=-2") == "logit_bias is 5=1.5 7=-2"
    assert talk("/set max-tokens 3") == "max_tokens is 3"
    assert talk("/set ignore_eos on") == "ignore_eos is on"
    params = talk.session.params
    assert (params.temperature, params.stop, params.max_tokens) == (0.5, ("\n", "x"), 3)
    assert (params.logit_bias, params.ignore_eos) == ({5: 1.5, 7: -2.0}, True)
    for name in list(talk.session.changes):
        assert "the default" in talk(f"/set {name} default")
    assert talk.session.params == talk.session.model.default_params
    listed = talk("/set").splitlines()
    assert [line.split()[0] for line in listed] == list(SETTINGS)
    assert all(len(line) < 80 for line in listed)


def test_settings_reach_the_model(talk: Talk) -> None:
    talk("/set max_tokens 2")
    talk(f"{QUESTION} {SCENE}")
    assert talk.session.usage is not None
    assert talk.session.usage.completion_tokens == 2
    before = talk.session.visual_tokens
    talk("/set max_pixels 9216")
    talk(f"{QUESTION} {SCENE}")
    assert talk.session.visual_tokens < before
    talk("/clear")
    talk("/set number_images on")
    talk(f"{QUESTION} {SCENE}")
    prompt = talk.session.usage.prompt_tokens
    talk("/clear")
    talk("/set number_images off")
    talk(f"{QUESTION} {SCENE}")
    assert talk.session.usage.prompt_tokens < prompt


def test_system(talk: Talk) -> None:
    assert talk("/system") == "no system message"
    talk("What is 3 + 4?")
    talk("/system Be brief.")
    assert talk("/system") == "Be brief."
    assert [m["role"] for m in talk.session.chat.messages] == ["system", "user", "assistant"]
    talk("/system Be long.")
    assert talk.session.chat.messages[0]["content"] == "Be long."
    talk("/clear")
    assert talk("/system") == "Be long."
    talk("/system none")
    assert talk.session.chat.messages == []


def test_retry_asks_the_last_question_again(talk: Talk) -> None:
    first = talk(f"{QUESTION} {SCENE}")
    assert talk("/retry").splitlines()[-1] == first
    assert len(talk.session.chat.messages) == 2
    talk("/set temperature 100")
    talk("/set max_tokens 12")
    talk("/set seed 7")
    again = [talk("/retry") for _ in range(3)]
    assert len(set(again)) == 3  # with a seed too
    assert talk.session.transcript().turns[0].answer == talk.session.chat.messages[1]["content"]
    assert talk.session.transcript().turns[0].answer.strip() == again[-1]
    talk("/set temperature 0")
    talk("/set max_tokens default")
    assert talk("What shape is purple?") == "star" or len(talk.session.asked) == 2


def test_a_stopped_retry_that_said_nothing_keeps_the_answer(talk: Talk) -> None:
    first = talk(f"{QUESTION} {SCENE}")
    answer = talk.session.retry()
    next(answer)  # nothing is said with it yet, or one piece
    answer.close()
    kept = talk.session.transcript().turns[0].answer
    assert kept == first or first.startswith(kept)


def test_a_stopped_answer_is_kept_and_the_next_question_works(talk: Talk) -> None:
    talk.ear.stop_after = 4
    assert handle(f"{QUESTION} {SCENE}", talk.session, talk.ear) == "done"
    talk.ear.stop_after = None
    turn = talk.session.transcript().turns[0]
    assert turn.answer
    assert TRUTH.startswith(turn.answer)
    assert talk.session.totals.stopped == 1
    talk.session.rest()
    assert not talk.session.model.engine.busy
    assert talk("What is 3 + 4?")
    assert len(talk.session.asked) == 2


def test_save_and_load_with_the_cache(talk: Talk, another: Callable[[], Talk]) -> None:
    talk("/system Be brief.")
    talk("/set top_k 3")
    first = talk(f"{QUESTION} {SCENE}")
    said = talk("/save my garden")
    folder = store.folder_of("my garden")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert f"{size / 1e6:.2f} MB" in said
    assert "cache of" in said
    assert folder.stat().st_mode & 0o777 == 0o700
    other = another()
    assert other("/load") == "my garden"
    loaded = other("/load my garden")
    assert "1 turn" in loaded
    assert first in loaded
    assert other.session.transcript() == talk.session.transcript()
    assert other("What shape is purple?") == "star"
    kept = re.search(r"cache of (\d+) tokens", said)
    assert kept is not None
    assert other.cached == int(kept[1]) > 40
    assert "saved 2 turns" in other("/save")  # again, where it came from


def test_saving_without_the_cache(talk: Talk, another: Callable[[], Talk]) -> None:
    talk(f"{QUESTION} {SCENE}")
    assert "the cache of" not in talk("/save --no-cache small")
    other = another()
    other("/load small")
    other("What shape is purple?")
    assert other.cached == 0


def test_a_conversation_of_another_model_is_computed_again(
    talk: Talk, another: Callable[[], Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(f"{QUESTION} {SCENE}")
    talk("/save a")
    other = another()
    monkeypatch.setattr(prefixes, "fingerprint", lambda *_: "another")
    assert "in the cache" not in other("/load a")
    assert other("What shape is purple?") == "star"
    assert other.cached == 0


def test_another_conversation_is_not_overwritten(talk: Talk) -> None:
    talk("What is 3 + 4?")
    talk("/save a")
    talk("What is 1 + 1?")
    talk("/save a")  # its own
    assert len(store.read_conversation(store.folder_of("a")).turns) == 2
    talk("/clear")
    talk("What is 3 + 4?")
    with pytest.raises(InputError, match="-f"):
        talk("/save a")
    assert len(store.read_conversation(store.folder_of("a")).turns) == 2
    talk("/save -f a")
    assert len(store.read_conversation(store.folder_of("a")).turns) == 1


def test_a_path_may_be_given(talk: Talk, tmp_path: Path) -> None:
    talk("What is 3 + 4?")
    talk(f"/save {tmp_path}/deep/er/talk")
    folder = tmp_path / "deep" / "er" / "talk.qwen3vl-chat"
    values = json.loads((folder / "conversation.json").read_text())
    assert [message["role"] for message in values["messages"]] == ["user", "assistant"]
    assert "1 turn" in talk(f"/load {folder}")
    assert "1 turn" in talk(f'/load "{tmp_path}/deep/er/talk"')


def test_pictures_no_turn_names_any_more_are_removed(talk: Talk) -> None:
    talk(f"{QUESTION} {SCENE}")
    talk("/save a")
    folder = store.folder_of("a")
    assert len(list(folder.glob("picture-*"))) == 1
    (folder / "mine.txt").write_text("not ours")
    talk("/clear")
    talk("What is 3 + 4?")
    talk("/save -f a")
    assert list(folder.glob("picture-*")) == []
    assert (folder / "mine.txt").exists()
    assert len(list(folder.glob("prefix-*"))) == 1


def spoil_json(folder: Path) -> None:
    path = folder / "conversation.json"
    path.write_text(path.read_text()[:-30])


def change(folder: Path, key: str, value: object) -> None:
    path = folder / "conversation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (spoil_json, "damaged"),
        (lambda f: change(f, "format", "other"), "other"),
        (lambda f: change(f, "messages", [{"role": "user"}]), "take turns"),
        (lambda f: change(f, "messages", 3), "damaged"),
        (lambda f: change(f, "settings", {"temperature": -1}), "temperature"),
        (lambda f: change(f, "settings", {"warmth": 1}), "warmth"),
        (lambda f: next(f.glob("picture-*")).unlink(), "picture"),
        (lambda f: next(f.glob("picture-*")).write_bytes(b"x"), "picture"),
        (lambda f: shutil.copy(SCENES / "scene22.png", next(f.glob("picture-*"))), "not the"),
    ],
)
def test_damaged_conversations_are_refused(
    talk: Talk, damage: Callable[[Path], None], words: str
) -> None:
    talk(f"{QUESTION} {SCENE}")
    talk("/save a")
    damage(store.folder_of("a"))
    before = talk.session.transcript()
    with pytest.raises(InputError, match=words):
        talk("/load a")
    assert talk.session.transcript() == before
    assert talk("What shape is purple?") == "star"


def test_a_damaged_cache_costs_the_cache_alone(talk: Talk, another: Callable[[], Talk]) -> None:
    talk(f"{QUESTION} {SCENE}")
    talk("/save a")
    path = next(store.folder_of("a").glob("prefix-*"))
    path.write_bytes(path.read_bytes()[:-10])
    other = another()
    assert "in the cache" not in other("/load a")
    assert other("What shape is purple?") == "star"
    assert other.cached == 0


def test_a_full_disk_keeps_the_old_conversation(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(f"{QUESTION} {SCENE}")
    talk("/save a")
    folder = store.folder_of("a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    talk("What shape is purple?")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OutputError, match="No space"):
            talk("/save a")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with monkeypatch.context() as patch:
        patch.setattr(prefixes.prefix_file, "write_file", full)
        said = talk("/save a")
    assert "without its cache" in said
    assert len(store.read_conversation(folder).turns) == 2


def test_another_model_goes_on(home: Path, tmp_path: Path) -> None:
    talk = Talk(Loader(ModelChoice("demo")))
    copy = tmp_path / "a copy"
    shutil.copytree(CHECKPOINT, copy)
    talk(f"{QUESTION} {SCENE}")
    old = talk.session.model
    assert "goes on" in talk(f"/model '{copy}' 8bit")
    assert old.engine.closed
    assert isinstance(talk.session.model, Qwen3VL)
    assert talk.session.choice.absolute == str(copy)
    assert talk("What shape is purple?") == "star"
    assert talk.cached == 0
    assert talk("/model") == str(copy)
    with pytest.raises(InputError):
        talk("/model demo 9bit")
    assert talk("What is 3 + 4?")  # the old one is loaded again, and remembers
    assert len(talk.session.transcript().turns) == 3
    talk.session.model.close()


def test_numbers(talk: Talk) -> None:
    assert "no answer yet" in talk("/stats")
    talk(f"{QUESTION} {SCENE}")
    talk("What shape is purple?")
    lines = {line.split("  ")[0]: line for line in talk("/stats").splitlines()}
    assert "cached" in lines["last answer"]
    assert "2, " in lines["answers"]
    assert "memory" in lines
    assert f"{talk.session.totals.cached_tokens} of them cached" in lines["prompts"]
    tokens = int(talk("/tokens").split()[0])
    assert tokens > 50


def test_help_names_every_command(talk: Talk) -> None:
    shown = talk("\\help")
    assert all(f"/{command.name}" in shown for command in COMMANDS)
    assert "/save NAME" in talk("/help save")
    assert max(map(len, shown.splitlines())) <= 80
    assert handle("/quit", talk.session, talk.ear) == "leave"
    assert handle("\\exit", talk.session, talk.ear) == "leave"


@pytest.mark.parametrize(
    "line", ["hello /help", "/u/a.png is it?", r"\frac{a}{b}", r"\( x \)", "3 / 4", "/", "//x", ""]
)
def test_what_is_no_command(line: str) -> None:
    assert parse_command(line) is None


def test_a_folder_named_like_a_command_is_a_command() -> None:
    parsed = parse_command("  /IMAGE  a.png b.png ")
    assert parsed is not None
    assert (parsed[0].name, parsed[1]) == ("image", "a.png b.png")


# Completion.


@pytest.fixture
def pictures(home: Path) -> Path:
    folder = home / "My Pics"
    folder.mkdir()
    for name in ("a b.HEIC", "a'c.png", "notes.txt", ".hidden.png"):
        (folder / name).touch()
    return folder


def completed(text: str) -> list[str]:
    return [text[: len(text) - c.replaces] + c.text for c in complete(text)]


def test_commands_and_names_are_completed(pictures: Path) -> None:
    assert completed("/re") == ["/retry"]
    assert completed("\\te") == ["\\temperature"]
    assert completed("/set top") == ["/set top_p", "/set top_k"]
    assert "/help save" in completed("/help s")
    assert completed("hello /re") == []
    assert len(completed("/")) >= len(COMMANDS)


def test_paths_are_completed_as_they_are_written(pictures: Path) -> None:
    home = pictures.parent
    assert completed("see ~/My") == [r"see ~/My\ Pics/"]
    assert completed(r"see ~/My\ Pics/a\ ") == [r"see ~/My\ Pics/a\ b.HEIC"]
    assert completed(r"what is ~/My\ Pics/") == [
        rf"what is ~/My\ Pics/{name}" for name in (r"a\ b.HEIC", r"a\'c.png")
    ]
    assert completed(f'see "{home}/My Pics/a b') == [f'see "{home}/My Pics/a b.HEIC"']
    assert completed("see nothing") == []
    assert completed("/image ~/My\\ Pics/a\\'") == ["/image ~/My\\ Pics/a\\'c.png"]
    assert completed(f"{home}/My") == [rf"{home}/My\ Pics/"]
