"""The choice of a model: what is on this machine, a Hub id, and how the loading goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.models import Models, Status, Wish
from app.session import Sessions
from app.settings import Controls, defaults
from qwen3vl_mlx import hub
from qwen3vl_mlx.checkpoints import LocalCheckpoint, local_checkpoints
from qwen3vl_mlx.errors import InputError, Qwen3VLError

AS_IT_IS = "as it is"
_QUANTIZE = (
    AS_IT_IS, "auto", "8bit", "6bit", "5bit", "4bit", "3bit", "2bit", "mxfp8", "mxfp4", "nvfp4",
    "mixed_3_6",
)  # fmt: skip
_LOADING_SEC, _READY_SEC = 0.5, 4.0  # between two looks at what the model does
_EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}


@dataclass(frozen=True)
class PickerParts:
    """The components of the choice."""

    model: gr.Dropdown
    quantize: gr.Dropdown
    load: gr.Button
    status: gr.HTML
    timer: gr.Timer


def build_picker() -> PickerParts:
    """Lay it out, in the sidebar."""
    return PickerParts(
        model=gr.Dropdown(
            choices=[],
            label="Model",
            info="On this machine, or any Hub id",
            allow_custom_value=True,
            elem_id="model",
        ),
        quantize=gr.Dropdown(
            choices=list(_QUANTIZE),
            value=AS_IT_IS,
            label="Quantize while loading",
            allow_custom_value=True,
            elem_id="quantize",
        ),
        load=gr.Button("Load", variant="secondary", size="sm", elem_id="load"),
        status=gr.HTML("", elem_id="status"),
        timer=gr.Timer(_LOADING_SEC),
    )


@dataclass(frozen=True)
class Picker:
    """The handlers of the choice."""

    models: Models
    sessions: Sessions

    def wire(self, page: gr.Blocks, parts: PickerParts, controls: Controls) -> None:
        shown = [parts.status, parts.load, parts.timer, parts.model, *controls.of_the_model]
        page.load(self.chosen, None, [parts.model, parts.quantize], **_EVENT)
        page.load(self.look, None, shown, **_EVENT)
        parts.timer.tick(self.look, None, shown, **_EVENT)
        parts.load.click(self.load, [parts.model, parts.quantize], shown, **_EVENT)

    def chosen(self) -> tuple[Any, Any]:
        """The model in use, or on its way, chosen from those that there are."""
        wish = self.models.status.wish
        return (
            gr.update(choices=self.choices(), value=wish.model),
            gr.update(value=wish.quantize or AS_IT_IS),
        )

    def choices(self) -> list[tuple[str, str]]:
        """What is on this machine, and what was wanted last."""
        wish = self.models.status.wish
        found = [(label(each), each.name) for each in usable()]
        if wish.model not in [name for _, name in found]:
            found.insert(0, (wish.model, wish.model))
        return found

    def look(self, request: gr.Request) -> list[Any]:
        """How the model is; its defaults into the controls where they show another's."""
        return self._shown(str(request.session_hash))

    def load(self, request: gr.Request, model: str | None, quantize: str | None) -> list[Any]:
        """Begin to load what was chosen."""
        try:
            self.models.start(wished(model, quantize))
        except Qwen3VLError as error:
            gr.Warning(str(error), title="This model cannot be loaded", duration=None)
        return self._shown(str(request.session_hash))

    def _shown(self, key: str) -> list[Any]:
        status, session = self.models.status, self.sessions.of(key)
        updates = [gr.skip() for _ in Controls.__dataclass_fields__]  # of the model, and these
        if session.serial != status.serial and status.answers is not None:
            try:
                with self.models.lease() as model:
                    updates = [gr.update(choices=self.choices()), *defaults(model)]
                session.serial = status.serial
            except Qwen3VLError:  # it is being exchanged: the next look will tell
                pass
        loading = status.state == "loading"
        return [
            status_html(status),
            gr.update(interactive=not loading),
            gr.Timer(_LOADING_SEC if loading else _READY_SEC),
            *updates,
        ]


def wished(model: str | None, quantize: str | None) -> Wish:
    """What the controls say. Raises InputError for names that nothing has."""
    name = (model or "").strip()
    if not name:
        raise InputError("choose a model, or type a Hub id such as Qwen/Qwen3-VL-4B-Instruct")
    found = next((each for each in usable() if each.name == name), None)
    revision = found.revision if found is not None else None
    how = (quantize or "").strip()
    hub.local_folder(name, revision)
    return Wish(name, revision, None if how in ("", AS_IT_IS) else how)


def usable() -> list[LocalCheckpoint]:
    """What `load` can be expected to take without the network."""
    return [each for each in local_checkpoints() if each.usable]


def label(checkpoint: LocalCheckpoint) -> str:
    """A checkpoint's name, bits and size."""
    size = checkpoint.nbytes
    told = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
    return f"{checkpoint.name} ({checkpoint.quantization}, {told})"


def status_html(status: Status) -> str:
    """How the model is, for the eye and for screen readers."""
    from html import escape

    bar = ""
    if status.state == "loading":
        value = "" if status.fraction is None else f' value="{status.fraction:.3f}"'
        bar = f'<progress aria-label="Loading"{value}></progress>'
    told = {
        "ready": f"<b>{escape(status.wish.title)}</b> is ready",
        "loading": f"<b>{escape(status.wish.title)}</b>: {escape(status.note)}",
        "failed": f"<b>{escape(status.wish.title)}</b> was not loaded: {escape(status.note)}",
    }[status.state]
    if status.state != "ready" and status.answers is not None:
        told += f"<br>{escape(status.answers.title)} answers meanwhile"
    return f'<div class="status {status.state}" role="status">{told}{bar}</div>'
