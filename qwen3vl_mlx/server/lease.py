"""A served model in the hands of one request."""

from __future__ import annotations

from collections.abc import Callable

from qwen3vl_mlx.api import Qwen3VL


class Lease:
    """The model, held for one request: it stays loaded, and as it is, until `release`."""

    def __init__(self, model: Qwen3VL, name: str, on_release: Callable[[], None]):
        self.name = name  # the response's `model`
        self._model: Qwen3VL | None = model
        self._on_release = on_release

    @property
    def model(self) -> Qwen3VL:
        if self._model is None:
            raise RuntimeError("this lease was released: take another one")
        return self._model

    def release(self) -> None:
        """Give the model back. Doing it again does nothing."""
        if self._model is not None:
            self._model = None
            self._on_release()

    def __del__(self) -> None:
        self.release()
