"""The model that answers everybody, and the next one on its way: switching harms no answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from qwen3vl_mlx import hub
from qwen3vl_mlx.errors import EngineClosedError, InputError, Qwen3VLError

if TYPE_CHECKING:
    from qwen3vl_mlx import EngineOptions, Qwen3VL

# What is being done, and which part of it is done, 0 to 1, where that is known.
Tell: TypeAlias = "Callable[[str, float | None], None]"


@dataclass(frozen=True)
class Wish:
    """What to load, by the names that `load` takes."""

    model: str
    revision: str | None = None
    quantize: str | None = None
    topology: str | None = None

    @property
    def title(self) -> str:
        parts = [self.model, f"at {self.revision}" if self.revision else "", self.quantize or ""]
        return " ".join(filter(None, parts))


@dataclass(frozen=True)
class Status:
    """How things are. `answers` is what answers now; `wish` is what was wanted last.

    serial rises with every model that has been loaded.
    """

    state: Literal["loading", "ready", "failed"]
    wish: Wish
    answers: Wish | None
    note: str = ""
    fraction: float | None = None
    serial: int = 0


@dataclass
class _Loaded:
    model: Qwen3VL
    wish: Wish
    users: int = 0


class Models:
    """One model for all sessions. Any thread may ask."""

    def __init__(self, load: Callable[[Wish, Tell], Qwen3VL], first: Wish):
        self._load = load
        self._changed = threading.Condition()
        self._current: _Loaded | None = None
        self._retired: list[_Loaded] = []  # closed when their last answer has ended
        self._status = Status("loading", first, None, "Starting")
        self._thread: threading.Thread | None = None
        self._closed = False
        self.start(first)

    @property
    def status(self) -> Status:
        return self._status

    def start(self, wish: Wish) -> None:
        """Begin to load. The present model answers until the new one is complete.

        Raises InputError while another is being loaded.
        """
        with self._changed:
            if self._thread is not None:
                raise InputError(f"{self._status.wish.title} is being loaded: wait for it")
            self._set(state="loading", wish=wish, note="Starting")
            self._thread = threading.Thread(target=self._run, args=(wish,), daemon=True)
            self._thread.start()

    @contextmanager
    def lease(self, wait_sec: float = 0.0) -> Iterator[Qwen3VL]:
        """The model, which stays open as long as this does.

        wait_sec: how long to wait for the first one. Raises Qwen3VLError where there is none.
        """
        with self._changed:
            self._changed.wait_for(self._settled, wait_sec)
            loaded = self._current
            if loaded is None:
                raise self._why_none()
            loaded.users += 1
        try:
            yield loaded.model
        finally:
            with self._changed:
                loaded.users -= 1
            self._close_unused()

    def close(self, wait_sec: float = 0.0) -> bool:
        """End all answers. Returns whether no thread loads any more."""
        with self._changed:
            self._closed = True
            if self._current is not None:
                self._retired.append(self._current)
                self._current = None
            ending, self._retired = self._retired, []
            thread = self._thread
            self._changed.notify_all()
        for each in ending:
            each.model.close()
        if thread is not None:
            thread.join(wait_sec)
        return thread is None or not thread.is_alive()

    def _settled(self) -> bool:
        return self._current is not None or self._status.state != "loading" or self._closed

    def _why_none(self) -> Qwen3VLError:
        if self._closed:
            return EngineClosedError("the app is being stopped")
        if self._status.state == "failed":
            return Qwen3VLError(f"there is no model to ask: {self._status.note}")
        return Qwen3VLError(f"{self._status.wish.title} is still being loaded: {self._status.note}")

    def _set(
        self,
        *,
        state: Literal["loading", "ready", "failed"],
        wish: Wish,
        note: str = "",
        fraction: float | None = None,
    ) -> None:
        answers = None if self._current is None else self._current.wish
        more = int(state == "ready")
        self._status = Status(state, wish, answers, note, fraction, self._status.serial + more)
        self._changed.notify_all()

    def _run(self, wish: Wish) -> None:
        def tell(note: str, fraction: float | None) -> None:
            with self._changed:
                self._set(state="loading", wish=wish, note=note, fraction=fraction)

        try:
            model = self._load(wish, tell)
        except Exception as error:  # noqa: BLE001 - a thread's edge: whatever it is, it is shown
            known = isinstance(error, Qwen3VLError)
            note = str(error) if known else f"{type(error).__name__}: {error}"
            with self._changed:
                self._thread = None
                self._set(state="failed", wish=wish, note=note)
            return
        with self._changed:
            self._thread = None
            old, self._current = self._current, _Loaded(model, wish)
            if self._closed:
                old, self._current = self._current, None
            if old is not None:
                self._retired.append(old)
            self._set(state="ready", wish=wish)
        self._close_unused()

    def _close_unused(self) -> None:
        with self._changed:
            unused = [each for each in self._retired if not each.users]
            self._retired = [each for each in self._retired if each.users]
        for each in unused:
            each.model.close()


def loader(engine: EngineOptions) -> Callable[[Wish, Tell], Qwen3VL]:
    """`load`, telling of the download."""

    def load_one(wish: Wish, tell: Tell) -> Qwen3VL:
        from qwen3vl_mlx import load

        def downloaded(done: int, total: int) -> None:
            part = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB" if total else "…"
            tell(f"Downloading {part}", done / total if total else None)

        hub.snapshot(wish.model, wish.revision, progress=downloaded)
        tell("Reading the weights" + (", quantizing" if wish.quantize else ""), None)
        return load(
            wish.model,
            revision=wish.revision,
            quantize=wish.quantize,
            topology=wish.topology,
            engine=engine,
        )

    return load_one
