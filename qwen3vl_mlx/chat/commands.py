"""The commands of the chat: what each takes, what it says of itself, and what it does.

A command changes the session and returns what is to be shown; it writes nothing itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from qwen3vl_mlx.chat.attachments import is_file, split_paths
from qwen3vl_mlx.chat.pictures import Attached, pasted_picture, read_picture
from qwen3vl_mlx.chat.session import Session
from qwen3vl_mlx.chat.settings import LOOK, listing, read_value, setting, shown
from qwen3vl_mlx.chat.store import SUFFIX, folder_of, read_conversation, saved_names
from qwen3vl_mlx.errors import InputError

if TYPE_CHECKING:
    from qwen3vl_mlx.engine.output import Chunk


@dataclass(frozen=True)
class Outcome:
    """What a command comes to."""

    text: str = ""
    attached: tuple[Attached, ...] = ()  # to be previewed
    answer: Iterator[Chunk] | None = None  # to be read and shown
    leaves: bool = False


@dataclass(frozen=True)
class Command:
    """One command. run: with the session and the text after the command's name."""

    name: str
    takes: str
    does: str
    run: Callable[[Session, str], Outcome]
    working: str = ""  # said while it works, where that takes long

    @property
    def usage(self) -> str:
        """As one types it."""
        return f"/{self.name} {self.takes}".rstrip()


# Pictures.


def _image(session: Session, argument: str) -> Outcome:
    if argument.lower() == "none":
        count = len(session.waiting)
        session.waiting.clear()
        return Outcome(f"dropped {_count(count, 'picture')}")
    if not argument:
        if not session.waiting:
            return Outcome("no picture waits for the next question: /image PATH adds one")
        return Outcome("\n".join(described(each) for each in session.waiting))
    attached = [read_picture(source) for source in split_paths(argument)]
    session.waiting += attached
    return Outcome(attached=tuple(attached))


def _paste(session: Session, argument: str) -> Outcome:
    from qwen3vl_mlx.media_clipboard import clipboard_image

    _refuse(argument, "/paste")
    attached = pasted_picture(clipboard_image(), len(session.waiting) + 1)
    session.waiting.append(attached)
    return Outcome(attached=(attached,))


def described(attached: Attached) -> str:
    """One line about a picture."""
    picture = attached.picture
    return f"{picture.name}, {picture.size[0]} x {picture.size[1]}"


# The conversation.


def _system(session: Session, argument: str) -> Outcome:
    if not argument:
        return Outcome(session.system if session.system is not None else "no system message")
    if argument.lower() in ("none", '""', "''"):
        session.system = None
        return Outcome("no system message any more")
    session.system = argument
    return Outcome("the model is told so from now on")


def _clear(session: Session, argument: str) -> Outcome:
    _refuse(argument, "/clear")
    count = len(session.asked)
    session.clear()
    return Outcome(f"forgotten: {_count(count, 'turn')}; settings and system message stay")


def _retry(session: Session, argument: str) -> Outcome:
    _refuse(argument, "/retry")
    answer = session.retry()
    same = (
        "temperature is 0: the answer will be the same" if session.params.temperature == 0 else ""
    )
    return Outcome(same, answer=answer)


def _save(session: Session, argument: str) -> Outcome:
    words = argument.split()
    flags = [word for word in words if word in ("-f", "--no-cache")]
    name = " ".join(word for word in words if word not in flags)
    if not name and session.saved_at is not None:
        folder = session.saved_at
    elif not name:
        raise InputError("/save takes a name: /save garden")
    else:
        folder = folder_of(_one(name))
    saved = session.save(folder, cache="--no-cache" not in flags, force="-f" in flags)
    kept = f", the cache of {saved.tokens} tokens included" if saved.tokens else ""
    turns = _count(len(session.asked), "turn")
    text = f"saved {turns} to {saved.folder} ({_size(saved.nbytes)}{kept})"
    return Outcome(text if saved.problem is None else f"{text}\nwithout its cache: {saved.problem}")


def _load(session: Session, argument: str) -> Outcome:
    if not argument:
        names = saved_names()
        return Outcome("\n".join(names) if names else "no conversation is saved: /save NAME")
    folder = folder_of(_one(argument))
    transcript = read_conversation(folder)
    tokens = session.restore(transcript, folder)
    lines = [last_words(session)]
    if tokens:
        lines.append(f"{tokens} tokens are in the cache")
    if transcript.model != session.choice.absolute:
        lines.append(f"saved with {transcript.model}: /model {transcript.model} goes back to it")
    return Outcome("\n".join(lines))


def last_words(session: Session) -> str:
    """Where a conversation that was loaded stands."""
    turns = session.transcript().turns
    name = session.saved_at.name if session.saved_at is not None else "conversation"
    lines = [f"{_count(len(turns), 'turn')} of {name.removesuffix(SUFFIX)}"]
    if turns:
        lines += [f"> {turns[-1].question}", turns[-1].answer]
    return "\n".join(lines)


def _model(session: Session, argument: str) -> Outcome:
    from qwen3vl_mlx.chat.loader import ModelChoice

    if not argument:
        return Outcome(session.choice.name)
    words = split_paths(argument)
    if len(words) > 2:
        raise InputError(f"/model takes a name and perhaps a quantization, got {argument!r}")
    session.switch(ModelChoice(words[0], quantize=words[1] if len(words) > 1 else None))
    return Outcome(f"{words[0]} goes on with the conversation")


# Settings.


def _set(session: Session, argument: str) -> Outcome:
    name, _, text = argument.partition(" ")
    text = text.strip()
    if not name:
        return Outcome(_settings(session))
    chosen = setting(name)
    if text:
        default = text.lower() in ("default", "none")
        session.change(chosen.name, None if default else read_value(chosen, text))
    return Outcome(_one_setting(session, chosen.name))


def _settings(session: Session) -> str:
    rows = listing(session.params, session.model.default_params, session.changes)
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        f"{name:<{width}}  {value:<8}  " + (f"({default}) {hint}" if value != default else hint)
        for name, value, default, hint in rows
    )


def _one_setting(session: Session, name: str) -> str:
    """Without waiting for a model that is being loaded, whose defaults are not known yet."""
    if name in session.changes:
        return f"{name} is {shown(_as_set(session, name))}"
    if not session.loader.done and name not in LOOK:
        return f"{name} is the model's default"
    rows = listing(session.params, session.model.default_params, session.changes)
    return next(f"{name} is {value}, the default" for each, value, *_ in rows if each == name)


def _as_set(session: Session, name: str) -> object:
    value = session.changes[name]
    return float(value) if isinstance(value, int) and name == "temperature" else value


def _shortcut(name: str) -> Callable[[Session, str], Outcome]:
    return lambda session, argument: _set(session, f"{name} {argument}")


# Numbers.


def _stats(session: Session, argument: str) -> Outcome:
    from qwen3vl_mlx.chat.statistics import statistics

    _refuse(argument, "/stats")
    return Outcome(statistics(session))


def _tokens(session: Session, argument: str) -> Outcome:
    _refuse(argument, "/tokens")
    messages = session.chat.messages
    count = len(session.model.processor.prompt(messages).token_ids) if messages else 0
    return Outcome(f"{count:,} tokens of {session.model.context_length:,} the model can hold")


# Help and leaving.


_KEYS = """\
Pictures are named in the question: paths, typed or dragged, and pictures' URLs.
  what is on photo.png?    compare "my trip/a.HEIC" and https://e.org/b.jpg
/set NAME default undoes a setting. \\help is /help, and so for all commands.
New line: Esc Enter, Alt-Enter, or a backslash before Enter. Tab completes and
arrows recall. Ctrl-C stops an answer; twice at the prompt, or Ctrl-D, leaves."""


def _help(session: Session, argument: str) -> Outcome:
    if argument:
        command = command_named(argument.lstrip("/\\"))
        return Outcome(f"{command.usage}\n{command.does}")
    width = max(len(command.usage) for command in COMMANDS)
    lines = [f"{command.usage:<{width}}  {command.does}" for command in COMMANDS]
    return Outcome("\n".join([*lines, "", _KEYS]))


def _exit(session: Session, argument: str) -> Outcome:
    return Outcome(leaves=True)


COMMANDS = (
    Command("image", "PATH...", "add pictures to the next question; none drops them", _image),
    Command("paste", "", "add the clipboard's picture", _paste),
    Command("system", "TEXT", "tell the model how to answer; none takes it back", _system),
    Command("clear", "", "begin anew", _clear),
    Command("retry", "", "ask the last question again", _retry),
    Command(
        "save",
        "NAME",
        "keep it with its cache; -f replaces, --no-cache is smaller",
        _save,
    ),
    Command("load", "NAME", "go on with a saved one; alone lists them", _load),
    Command("set", "NAME VALUE", "change a setting; alone lists them with their defaults", _set),
    Command("temperature", "T", "short for /set temperature", _shortcut("temperature")),
    Command("topk", "K", "short for /set top_k", _shortcut("top_k")),
    Command("topp", "P", "short for /set top_p", _shortcut("top_p")),
    Command(
        "model",
        "NAME [BITS]",
        "go on with another model, quantized to 4bit, say",
        _model,
        working="loading",
    ),
    Command("stats", "", "tokens, speeds, cache and memory", _stats),
    Command("tokens", "", "how much of the model's context is full", _tokens),
    Command("help", "[COMMAND]", "this", _help),
    Command("exit", "", "leave; so do /quit and Ctrl-D", _exit),
)
_OTHER_NAMES = {"quit": "exit", "top_k": "topk", "top_p": "topp", "images": "image"}
_FORM = re.compile(r"[/\\]([A-Za-z_?]+)(?:[ \t\n]+(.*))?", re.S)


def parse_command(line: str) -> tuple[Command, str] | None:
    """The command in a line and what follows its name; None for a question.

    Raises InputError for a command that is not there. A path that is there is no command.
    """
    match = _FORM.fullmatch(line.strip())
    if match is None or is_file(match[0]):
        return None
    return command_named(match[1]), (match[2] or "").strip()


def command_named(name: str) -> Command:
    """The command of a name. Raises InputError with the nearest one."""
    plain = _OTHER_NAMES.get(name.lower(), name.lower())
    known = {command.name: command for command in COMMANDS}
    if plain in known:
        return known[plain]
    near = get_close_matches(plain, [*known, *_OTHER_NAMES], n=1)
    hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
    raise InputError(f"there is no command /{name}; {hint}")


def _one(argument: str) -> str:
    """A single name, which may be quoted and may hold spaces."""
    words = split_paths(argument)
    return words[0] if len(words) == 1 else argument


def _refuse(argument: str, name: str) -> None:
    if argument:
        raise InputError(f"{name} takes nothing, got {argument!r}")


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _size(nbytes: int) -> str:
    from qwen3vl_mlx.cli import size

    return size(nbytes)
