"""A model that is loaded while people type."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen3vl_mlx import hub

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL

_LOOK_SEC = 0.1


@dataclass(frozen=True)
class ModelChoice:
    """Which model, as `load` takes it."""

    name: str
    revision: str | None = None
    quantize: str | None = None
    topology: str | None = None

    @property
    def absolute(self) -> str:
        """The name, as it is understood in any folder."""
        folder = hub.local_folder(self.name)
        return self.name if folder is None or self.name == "demo" else str(folder.absolute())

    def fetch(self) -> None:
        """Download what is not on this machine, with a bar. Raises CheckpointError, HubError."""
        hub.snapshot(self.name, self.revision)

    def load(self, *, progress: bool) -> Qwen3VL:
        """Load it here and now."""
        from qwen3vl_mlx.api import load

        return load(
            self.name,
            revision=self.revision,
            quantize=self.quantize,
            topology=self.topology,
            progress=progress,
        )


class Loader:
    """Loads on a thread of its own, which starts at once."""

    def __init__(self, choice: ModelChoice, on_failure: Callable[[], None] = lambda: None):
        self.choice = choice
        self.started = time.monotonic()
        self.on_failure = on_failure
        self._model: Qwen3VL | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()  # Ctrl-C while a thread is joined makes it look ended
        threading.Thread(target=self._load, name="chat-loader", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    @property
    def failed(self) -> bool:
        """Whether `result` raises."""
        return self._error is not None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def result(self, meanwhile: Callable[[], None] = lambda: None) -> Qwen3VL:
        """Wait for the model, calling `meanwhile` about ten times a second. Raises what failed."""
        while not self._ended.wait(_LOOK_SEC):
            meanwhile()
        if self._error is not None:
            raise self._error
        assert self._model is not None
        return self._model

    def forget(self) -> None:
        """Keep the model no longer alive."""
        self._model = None

    def _load(self) -> None:
        import mlx.core as mx

        try:
            self._model = self.choice.load(progress=False)
        except BaseException as error:  # noqa: BLE001
            self._error = error
        finally:
            mx.synchronize()
            mx.clear_streams()  # left to the interpreter's end, this thread's would abort it
            self._ended.set()
        if self._error is not None:
            self.on_failure()
