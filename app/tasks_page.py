"""The tab of the presets: a picture on the left, what the model found in it on the right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from app.chat import ask_model, follow, loading
from app.finding import EVERYTHING, Finding, parse
from app.models import Models
from app.pictures import read_pictures
from app.sanitize import framed
from app.session import ONE_AT_A_TIME, Running, Session, Sessions, Turn
from app.settings import Settings
from app.show import LATEX
from app.tasks import SCHEMA, TASKS, Task, asked, pretty, task_called
from qwen3vl_mlx.demo.scenes import make_scene
from qwen3vl_mlx.errors import EngineClosedError, InputError, Qwen3VLError
from qwen3vl_mlx.tasks import parse_document

_RENDER_SEC = 0.4  # between two pictures of a document that grows
SHAPES, WORD = 355, 57  # seeds of scenes that every model knows
_NO_PICTURE = "Give a picture first: drop one here, or take an example."


@dataclass(frozen=True)
class Parts:
    """The components of the tab that change."""

    picture: gr.Image
    subject: gr.Textbox
    question: gr.Textbox
    schema: gr.Code
    run: gr.Button
    stop: gr.Button
    status: gr.Markdown
    text_area: gr.Column
    text: gr.Markdown
    found_area: gr.Column
    drawn: gr.Image
    found: gr.Radio
    document_area: gr.Column
    markdown: gr.Markdown
    html: gr.HTML
    source: gr.Code
    json_area: gr.Column
    json: gr.Code

    @property
    def all(self) -> list[Any]:
        return [getattr(self, each.name) for each in fields(self)]


@dataclass(frozen=True)
class TaskHandlers:
    """What happens in the tab. `folder` takes copies of pictures to show."""

    models: Models
    sessions: Sessions
    folder: Path
    parts: Parts

    async def pick(self, request: gr.Request, raw: dict[str, Any] | None) -> dict[Any, Any]:
        """A picture was dropped, pasted, taken, or taken away."""
        return await self._use(request, raw["path"] if raw else None)

    async def example(self, request: gr.Request, title: str) -> dict[Any, Any]:
        """A picture that suits the task."""
        reads = task_called(title).shows in ("text", "document")
        return await self._use(request, drawn_scene(WORD if reads else SHAPES, self.folder))

    def choose(self, title: str) -> dict[Any, Any]:
        """Show what a task needs, and where its answer will stand."""
        task, parts = task_called(title), self.parts
        return {
            parts.subject: gr.update(visible=task.shows == "found"),
            parts.question: gr.update(visible=task.shows == "json"),
            parts.schema: gr.update(visible=task.shows == "json"),
            parts.text_area: gr.update(visible=task.shows == "text"),
            parts.found_area: gr.update(visible=task.shows == "found"),
            parts.document_area: gr.update(visible=task.shows == "document"),
            parts.json_area: gr.update(visible=task.shows == "json"),
            parts.markdown: gr.update(visible=task.asks == "markdown"),
            parts.html: gr.update(visible=task.asks == "html"),
            parts.status: "",
        }

    async def run(
        self,
        request: gr.Request,
        title: str,
        subject: str,
        question: str,
        schema: str,
        *values: Any,
    ) -> AsyncIterator[dict[Any, Any]]:
        """Ask, and show the answer as it grows."""
        parts, session = self.parts, self.sessions.of(str(request.session_hash))
        running = session.begin("task")
        if running is None:
            gr.Info(ONE_AT_A_TIME)
            return
        told = ""
        last: dict[Any, Any] = {}
        yield {
            parts.run: gr.update(visible=False),
            parts.stop: gr.update(visible=True),
            parts.status: "Reading the picture …",
        }
        try:
            if session.picture is None:
                raise InputError(_NO_PICTURE)
            task = task_called(title)
            async for note in loading(self.models, running):
                yield {parts.status: note}
            with self.models.lease() as model:
                questions = asked(task, model.wording, subject, schema, question)
                settings = Settings.of(values)
                async for note, shown in self._answers(
                    model, session, running, task, questions, settings
                ):
                    told = note or told
                    last.update(shown)
                    yield {parts.status: told, **shown}
        except EngineClosedError:
            told = "Stopped: the app is being closed."
        except Qwen3VLError as error:
            told = f"⚠ {error}"
        finally:
            running.end()
        # All of it once more: a page that was still being laid out may have missed some.
        yield {
            **last,
            parts.status: told,
            parts.run: gr.update(visible=True),
            parts.stop: gr.update(visible=False),
        }

    def stop(self, request: gr.Request) -> None:
        self.sessions.of(str(request.session_hash)).stop("task")

    def highlight(self, request: gr.Request, name: str | None) -> Any:
        """One of the things found was chosen in the list."""
        found = self.sessions.of(str(request.session_hash)).found
        if found is None:
            return gr.skip()
        names = found.names()
        return found.drawn(names.index(name) if name in names else None)

    def click(self, request: gr.Request, event: gr.SelectData) -> tuple[Any, Any]:
        """A place in the drawn picture was clicked; beside all of them, nothing stands out."""
        found = self.sessions.of(str(request.session_hash)).found
        if found is None:
            return gr.skip(), gr.skip()
        number = found.at(*event.index)
        name = EVERYTHING if number is None else found.names()[number]
        return found.drawn(number), name

    async def _use(self, request: gr.Request, path: str | None) -> dict[Any, Any]:
        parts, session = self.parts, self.sessions.of(str(request.session_hash))
        session.picture, session.found = None, None
        emptied = {
            parts.text: "",
            parts.drawn: None,
            parts.found: gr.update(choices=[], value=None, visible=False),
            parts.markdown: "",
            parts.html: "",
            parts.source: "",
            parts.json: "",
            parts.status: "",
        }
        if path is None:
            return emptied
        read = await asyncio.to_thread(read_pictures, [path], self.folder)
        if read.problems:
            gr.Warning(read.problems[0], title="This file cannot be used", duration=None)
            return {**emptied, parts.picture: None, parts.status: f"⚠ {read.problems[0]}"}
        session.picture = read.pictures[0]
        return {**emptied, parts.picture: read.pictures[0].shown}

    async def _answers(
        self,
        model: Any,
        session: Session,
        running: Running,
        task: Task,
        questions: Any,
        settings: Settings,
    ) -> AsyncIterator[tuple[str, dict[Any, Any]]]:
        """Ask all the questions at once, and show what their answers say so far."""
        assert session.picture is not None
        image = session.picture.image
        finding = await asyncio.to_thread(Finding.of, image)
        # Greedy as the library's tasks are; of the sidebar only what bounds an answer.
        bounds = {n: settings.sampling.get(n) for n in ("max_tokens", "thinking_budget")}
        settings = replace(settings, sampling=bounds)
        with ExitStack() as stack:
            begun = []
            for prompt in questions.prompts:
                parts = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
                messages = [{"role": "user", "content": parts}]
                begin = partial(ask_model, model, messages, settings, **questions.options)
                stream = stack.enter_context(await asyncio.to_thread(begin))
                running.attach(stream)
                begun.append((stream, Turn(prompt)))
            turns, rendered = [turn for _, turn in begun], 0.0
            for stream, turn in begun:
                async for numbers in follow(stream, turn):
                    render = bool(numbers) or time.monotonic() - rendered > _RENDER_SEC
                    rendered = time.monotonic() if render else rendered
                    note = numbers or ("Thinking …" if turn.reasoning and not turn.answer else "")
                    finding, shown = self._shown(task, turns, finding, image.size, render)
                    session.found = finding
                    yield " ".join(filter(None, (turn.note, note))), shown

    def _shown(
        self,
        task: Task,
        turns: list[Turn],
        before: Finding,
        size: tuple[int, int],
        render: bool,
    ) -> tuple[Finding, dict[Any, Any]]:
        """What the answers say so far."""
        parts = self.parts
        answer = "\n".join(turn.answer for turn in turns)
        if task.shows == "text":
            return before, {parts.text: answer}
        if task.shows == "json":
            return before, {parts.json: pretty(answer)}
        if task.shows == "document":
            form = "html" if task.asks == "html" else "markdown"
            document = parse_document(answer, form)  # type: ignore[arg-type]
            code = gr.update(value=document, language=form)
            if form == "html":
                page = framed(document, "The document") if render else gr.skip()
                return before, {parts.html: page, parts.source: code}
            return before, {
                parts.markdown: document if render else gr.skip(),
                parts.source: code,
            }
        places = parse([turn.answer for turn in turns], size, points=task.asks == "point")
        finding = replace(before, places=tuple(places))
        if finding.places == before.places and not turns[-1].note:
            return finding, {}
        names = finding.names()
        return finding, {
            parts.drawn: finding.drawn(),
            parts.found: gr.update(
                choices=[EVERYTHING, *names], value=EVERYTHING, visible=bool(names)
            ),
        }


def drawn_scene(seed: int, folder: Path) -> str:
    """The path of a scene, drawn into `folder`."""
    path = folder / f"scene{seed}.png"
    if not path.exists():
        make_scene(seed).draw().save(path)
    return str(path)


def build_tasks(
    models: Models, sessions: Sessions, folder: Path, controls: list[Any], event: dict[str, Any]
) -> None:
    """Lay the tab out and wire it."""
    with gr.Row(elem_id="task-row"):
        with gr.Column(scale=2, min_width=300):
            task = gr.Radio(
                [each.title for each in TASKS],
                value=TASKS[0].title,
                label="Task",
                elem_id="task",
            )
            asked_parts = _build_question()
        with gr.Column(scale=3, min_width=300, elem_id="result"):
            answer_parts = _build_answer()
    picture, example, subject, question, schema, run, stop = asked_parts
    parts = Parts(picture, subject, question, schema, run, stop, *answer_parts)
    handlers = TaskHandlers(models, sessions, folder, parts)
    answer: dict[str, Any] = {**event, "concurrency_limit": None}
    # Without Gradio's own reading of the file: it knows fewer formats, and tells less.
    picture.input(handlers.pick, picture, parts.all, **event, preprocess=False)
    example.click(handlers.example, task, parts.all, **event)
    task.change(handlers.choose, task, parts.all, **event, queue=False)
    asks = [task, subject, question, schema, *controls]
    for trigger in (run.click, subject.submit, question.submit):
        trigger(handlers.run, asks, parts.all, **answer)
    stop.click(handlers.stop, None, None, **event, queue=False)
    last: dict[str, Any] = {**event, "trigger_mode": "always_last"}  # else quick keys are lost
    parts.found.input(handlers.highlight, parts.found, parts.drawn, **last)
    parts.drawn.select(handlers.click, None, [parts.drawn, parts.found], **last)


def _build_question() -> tuple[Any, ...]:
    picture = gr.Image(
        label="Picture",
        sources=["upload", "clipboard", "webcam"],
        type="filepath",
        image_mode=None,
        height=300,
        elem_id="picture",
        buttons=["fullscreen"],
    )
    example = gr.Button("Example picture", size="sm", elem_id="task-example")
    subject = gr.Textbox(
        label="What to find",
        placeholder="everything, or for example: cup, red chair",
        elem_id="subject",
    )
    question = gr.Textbox(
        label="Question", placeholder="what the schema describes", visible=False, elem_id="question"
    )
    schema = gr.Code(
        SCHEMA,
        language="json",
        label="JSON schema",
        visible=False,
        elem_id="schema",
        lines=8,
        wrap_lines=True,
    )
    run = gr.Button("Run", variant="primary", elem_id="run")
    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="task-stop")
    return picture, example, subject, question, schema, run, stop


def _build_answer() -> tuple[Any, ...]:
    latex = [dict(each) for each in LATEX]
    status = gr.Markdown("", elem_id="task-status", container=False)
    with gr.Column(visible=False) as text_area:
        text = gr.Markdown(
            label="Answer", show_label=True, container=True, buttons=["copy"], elem_id="text",
            latex_delimiters=latex, min_height=120,
        )  # fmt: skip
    with gr.Column() as found_area:
        drawn = gr.Image(
            label="Found", show_label=False, interactive=False, format="png", type="pil",
            elem_id="drawn", buttons=["download", "fullscreen"],
        )  # fmt: skip
        found = gr.Radio(
            [], label="Highlight: choose one, or click in the picture", visible=False,
            elem_id="found",
        )  # fmt: skip
    with gr.Column(visible=False) as document_area:
        with gr.Tab("Rendered"):
            markdown = gr.Markdown(
                label="Document", container=True, elem_id="document", latex_delimiters=latex,
                min_height=300,
            )  # fmt: skip
            html = gr.HTML(visible=False, elem_id="document-html")
        with gr.Tab("Source"):
            source = gr.Code(
                language="markdown", label="Source", interactive=False, lines=14, wrap_lines=True
            )
    with gr.Column(visible=False) as json_area:
        as_json = gr.Code(
            language="json", label="Answer", interactive=False, lines=14, wrap_lines=True,
            elem_id="json",
        )  # fmt: skip
    return (
        status, text_area, text, found_area, drawn, found, document_area, markdown, html, source,
        json_area, as_json,
    )  # fmt: skip
