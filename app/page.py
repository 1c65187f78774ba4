"""The page: what stands where, and which handler answers what."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import gradio as gr

from app.chat import Chat
from app.models import Models
from app.picker import Picker, build_picker
from app.session import Sessions
from app.settings import Controls, build_controls
from app.show import LATEX
from app.tasks_page import SHAPES, WORD, build_tasks, drawn_scene
from qwen3vl_mlx.demo import EXAMPLE

TITLE = "Qwen3-VL"
STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("page.js")
HEAD = f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"

_SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO_FONTS = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")
_EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_ANSWER: dict[str, Any] = {**_EVENT, "concurrency_limit": None}  # the engine answers many at once
_EXAMPLE_SCENES = ((SHAPES, "How many shapes are there?"), (WORD, "Read the text."))


def theme() -> gr.themes.Base:
    """Quiet, with the system's own fonts: nothing is fetched."""
    return gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="zinc",
        radius_size="lg",
        font=[gr.themes.Font(name) for name in _SYSTEM_FONTS],
        font_mono=[gr.themes.Font(name) for name in _MONO_FONTS],
    ).set(
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_title_padding="0",
        block_title_text_weight="500",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_label_text_weight="500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        # Soft's own are too pale to read.
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def build_page(models: Models, sessions: Sessions, folder: Path) -> gr.Blocks:
    """Build it. `folder` takes copies of pictures."""
    page: gr.Blocks
    chat = Chat(models, sessions, folder, _examples(folder))
    picker = Picker(models, sessions)
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        with gr.Sidebar(label="Settings", width=330, elem_id="settings"):
            gr.Markdown(f"## {TITLE}", elem_id="title")
            parts = build_picker()
            controls = build_controls()
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat", id="chat"):
                _build_chat(chat, controls)
            with gr.Tab("Tasks", id="tasks"):
                build_tasks(models, sessions, folder, controls.all, _EVENT)
        picker.wire(page, parts, controls)

        def leave(request: gr.Request) -> None:
            sessions.leave(str(request.session_hash))

        page.unload(leave)
    return page


def _build_chat(chat: Chat, controls: Controls) -> None:
    shown = gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="conversation",
        height="100%",
        editable="user",
        buttons=["copy"],
        layout="bubble",
        group_consecutive_messages=False,  # in a group, Gradio edits no question with a picture
        latex_delimiters=[dict(each) for each in LATEX],
        sanitize_html=True,
        allow_tags=False,
        placeholder="### What would you like to know?\nDrop in a picture, or try one of these.",
        examples=deepcopy(chat.examples),  # Gradio writes into them
    )
    with gr.Row(elem_id="actions"):
        numbers = gr.Markdown("", elem_id="numbers", container=False)
        camera_button = gr.Button("Camera", size="sm", elem_id="camera-button")
        new_button = gr.Button("New chat", size="sm", elem_id="new-chat")
    camera = gr.Image(
        sources=["webcam"],
        type="filepath",
        label="Camera",
        visible=False,
        height=280,
        elem_id="camera",
    )
    box = gr.MultimodalTextbox(
        label="Your question",
        show_label=False,
        placeholder="Ask about a picture: drop it here, paste it, or use the clip",
        file_count="multiple",
        sources=["upload"],
        max_plain_text_length=1_000_000,
        autofocus=True,
        elem_id="box",
    )
    outputs = [shown, box, numbers]
    box.submit(chat.ask, [box, *controls.all], outputs, **_ANSWER)
    shown.retry(chat.retry, controls.all, outputs, **_ANSWER)
    shown.edit(chat.edit, controls.all, outputs, **_ANSWER)
    shown.example_select(chat.example, controls.all, outputs, **_ANSWER)
    shown.undo(chat.undo, None, outputs, **_EVENT)
    shown.clear(chat.clear, None, outputs, **_EVENT, queue=False)
    new_button.click(chat.clear, None, outputs, **_EVENT, queue=False)
    box.stop(chat.stop, None, None, **_EVENT, queue=False)
    camera_button.click(lambda: gr.Image(visible=True), None, camera, **_EVENT, queue=False)
    camera.input(add_photo, [camera, box], [camera, box], **_EVENT)


def add_photo(photo: str | None, box: dict[str, Any] | None) -> tuple[Any, Any]:
    """What the camera has taken goes into the box, beside what is there."""
    if photo is None:
        return gr.skip(), gr.skip()
    box = box or {}
    files = [*(box.get("files") or []), photo]
    return gr.Image(value=None, visible=False), {"text": box.get("text") or "", "files": files}


def _examples(folder: Path) -> list[Any]:
    """Questions that a click asks, about pictures that every model knows."""
    found = [("Describe the image.", str(shutil.copy(EXAMPLE, folder)))]
    for seed, question in _EXAMPLE_SCENES:
        found.append((question, drawn_scene(seed, folder)))
    return [{"text": text, "files": [path], "icon": path} for text, path in found]
