"""Reads messages and commands, one after another, and does what they say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeAlias

from qwen3vl_mlx.chat.attachments import find_pictures, says_something
from qwen3vl_mlx.chat.commands import Command, parse_command
from qwen3vl_mlx.chat.pictures import read_picture
from qwen3vl_mlx.chat.screen import Screen
from qwen3vl_mlx.chat.session import Session
from qwen3vl_mlx.chat.stopping import interruptible
from qwen3vl_mlx.errors import EngineClosedError, InputError, Qwen3VLError

if TYPE_CHECKING:
    from qwen3vl_mlx.chat.console import Console

Result: TypeAlias = Literal["done", "unanswered", "leave"]

_NO_PICTURE = "; where no picture is meant, write it with a space before the dot"


def handle(line: str, session: Session, screen: Screen) -> Result:
    """Do what one line says; "unanswered" is a question that was stopped before a word.

    Raises Qwen3VLError for what cannot be done; nothing has changed then.
    """
    command = parse_command(line)
    if command is not None:
        return "leave" if _command(*command, session, screen) else "done"
    found = find_pictures(line)
    if found.missing:
        raise InputError(f"no such file: {found.missing[0]}{_NO_PICTURE}")
    attached = [read_picture(source) for source in found.sources]
    text = found.text if says_something(found.text) or not found.sources else ""
    if not text and not attached and not session.waiting:
        return "done"
    screen.pictures(attached)
    asked = len(session.asked)
    stopped = screen.answer(session, session.ask(text, attached))
    return "unanswered" if stopped and len(session.asked) == asked else "done"


def _command(command: Command, argument: str, session: Session, screen: Screen) -> bool:
    if command.working and argument:
        screen.working(f"{command.working} {argument}")
    outcome = command.run(session, argument)
    screen.say(outcome.text)
    screen.pictures(outcome.attached)
    if outcome.answer is not None:
        screen.answer(session, outcome.answer)
    return outcome.leaves


def converse(session: Session, screen: Screen, console: Console, *, debug: bool) -> None:
    """Talk with a person until they leave. What could not be done stands there to be mended.

    Raises what the model failed to load with, and KeyboardInterrupt while it is loading.
    """
    from qwen3vl_mlx.chat.console import ModelFailedError

    kept = ""
    while True:
        try:
            line = console.read(kept)
        except ModelFailedError:
            session.loader.result()
            raise
        if line is None:
            return
        result = _attempt(line, session, screen, debug)
        if result == "leave":
            return
        kept = line if result == "unanswered" else ""


def _attempt(line: str, session: Session, screen: Screen, debug: bool) -> Result:
    """`handle`, whose errors are shown where the conversation can go on."""
    asked, loader = len(session.asked), session.loader
    try:
        with interruptible():
            return handle(line, session, screen)
    except KeyboardInterrupt:
        if not loader.done:  # there is no conversation yet
            raise
        screen.error("stopped")
    except Qwen3VLError as error:
        if debug or session.loader.failed or isinstance(error, EngineClosedError):
            raise
        screen.error(" ".join(str(error).split()))
    except Exception as error:
        if debug:
            raise
        screen.error(f"{type(error).__name__}: {error} (--debug shows where)")
    return "unanswered" if len(session.asked) == asked else "done"


def read_lines(lines: Iterable[str], session: Session, screen: Screen, *, debug: bool) -> int:
    """Take each line as a message or a command; those that fail are told of and passed over.

    Returns the exit status: that of the first failure, else 0.
    """
    status = 0
    for line in lines:
        try:
            if handle(line.rstrip("\n"), session, screen) == "leave":
                break
        except Qwen3VLError as error:
            if debug or session.loader.failed or isinstance(error, EngineClosedError):
                raise
            screen.error(" ".join(str(error).split()))
            status = status or error.exit_code
    return status
