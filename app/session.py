"""One browser tab's conversation: its turns, their pictures, and the answer under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image

    from app.finding import Finding
    from qwen3vl_mlx import Stream

Part: TypeAlias = Literal["chat", "task"]

ONE_AT_A_TIME = "One answer at a time: stop this one first."
"""What a click is answered that comes while `Session.begin` refuses."""

_KEEP_SEC = 3600.0  # a laptop that slept, or a network that was gone, finds its conversation again


@dataclass(frozen=True)
class Picture:
    """A picture that was read once.

    source: the uploaded file's path; shown: that of a small copy that any browser can show.
    """

    image: Image
    source: str
    shown: str
    name: str


@dataclass
class Turn:
    """A question and what was answered. `failed` turns are shown, and the model is not told."""

    text: str
    pictures: Sequence[Picture] = ()
    answer: str = ""
    reasoning: str = ""
    thinking_sec: float | None = None  # None: it thinks still, or never did
    note: str = ""
    failed: bool = False

    def again(self, text: str | None = None) -> Turn:
        """The same question, or another about the same pictures, without an answer."""
        return Turn(self.text if text is None else text, self.pictures)

    def messages(self) -> list[dict[str, Any]]:
        """As OpenAI has them."""
        if self.failed:
            return []
        pictures = [{"type": "image", "image": picture.image} for picture in self.pictures]
        text = {"type": "text", "text": self.text}
        told: list[dict[str, Any]] = [{"role": "user", "content": [*pictures, text]}]
        if self.answer or self.reasoning:
            told.append({"role": "assistant", "content": self.answer})
            if self.reasoning:
                told[-1]["reasoning_content"] = self.reasoning
        return told


@dataclass
class Session:
    """What one tab has asked, in the chat and of one picture.

    serial: the model whose defaults its controls show.
    """

    turns: list[Turn] = field(default_factory=list)
    picture: Picture | None = None
    found: Finding | None = None
    serial: int = -1
    left_at: float | None = None
    _running: dict[Part, Running] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def messages(self, system: str) -> list[dict[str, Any]]:
        """The whole conversation, as OpenAI has it."""
        told = [message for turn in self.turns for message in turn.messages()]
        return [{"role": "system", "content": system}, *told] if system.strip() else told

    def begin(self, part: Part) -> Running | None:
        """Claim a part of the page for one answer; None while another is under way there."""
        with self._lock:
            before = self._running.get(part)
            if before is not None and not before.ended:
                return None
            self._running[part] = running = Running()
            return running

    def stop(self, *parts: Part) -> None:
        """End the answers under way, in all parts where none is named. What was said stays."""
        with self._lock:
            stopping = [self._running.get(part) for part in parts or self._running]
        for running in filter(None, stopping):
            running.stop()


class Running:
    """An answer under way, by one stream or several: may be stopped before it has begun."""

    def __init__(self) -> None:
        self.stopped = False
        self.ended = False
        self._streams: list[Stream] = []
        self._lock = threading.Lock()

    def attach(self, stream: Stream) -> None:
        """What `stop` closes. Closed at once where that was asked before."""
        with self._lock:
            self._streams.append(stream)
            stopped = self.stopped
        if stopped:
            stream.close()

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            streams = list(self._streams)
        for stream in streams:
            stream.close()

    def end(self) -> None:
        """Nothing more comes."""
        self.ended = True
        self._streams = []


class Sessions:
    """All tabs by the hash that their browser sends. Forgotten an hour after they are closed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, key: str) -> Session:
        """The tab's session; a new one for a new tab."""
        with self._lock:
            self._forget()
            session = self._sessions.setdefault(key, Session())
            session.left_at = None
            return session

    def leave(self, key: str) -> None:
        """The tab is closed, or cannot be reached: its answer is stopped."""
        with self._lock:
            session = self._sessions.get(key)
            if session is not None:
                session.left_at = self._clock()
        if session is not None:
            session.stop()

    def stop_all(self) -> None:
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.stop()

    def __len__(self) -> int:
        return len(self._sessions)

    def _forget(self) -> None:
        now = self._clock()
        for key, session in list(self._sessions.items()):
            if session.left_at is not None and now - session.left_at > _KEEP_SEC:
                del self._sessions[key]
