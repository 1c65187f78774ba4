"""The presets: what is asked of a picture, and what is made of the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qwen3vl_mlx.errors import InputError

if TYPE_CHECKING:
    from qwen3vl_mlx.tasks import TaskName, Wording

Shows: TypeAlias = Literal["text", "found", "document", "json"]

SCHEMA = """{
  "type": "object",
  "properties": {
    "title": {"type": "string", "maxLength": 80},
    "colors": {
      "type": "array",
      "items": {"enum": ["red", "green", "blue", "yellow", "black", "white"]},
      "maxItems": 6
    }
  },
  "required": ["title", "colors"],
  "additionalProperties": false
}"""


@dataclass(frozen=True)
class Task:
    """A preset. shows: what becomes of the answer."""

    title: str
    asks: TaskName
    shows: Shows


TASKS = (
    Task("Find objects", "detect", "found"),
    Task("Point", "point", "found"),
    Task("Describe", "describe", "text"),
    Task("Read text", "read", "text"),
    Task("Document to Markdown", "markdown", "document"),
    Task("Document to HTML", "html", "document"),
    Task("Extract to JSON", "extract", "json"),
)


def task_called(title: str) -> Task:
    """Raises InputError for a title that no task has."""
    found = next((task for task in TASKS if task.title == title), None)
    if found is None:
        raise InputError(f"no task {title!r}; there are {', '.join(task.title for task in TASKS)}")
    return found


@dataclass(frozen=True)
class Asked:
    """What the model is asked, one question or several, and the form of the answer."""

    prompts: Sequence[str]
    options: dict[str, Any]


def asked(task: Task, wording: Wording, subject: str, schema: str, question: str) -> Asked:
    """A task's questions in the model's own words. Raises InputError for what cannot be asked."""
    # As the library's own tasks: greedy, and no answer that repeats itself for ever.
    options: dict[str, Any] = {"sampling": {"temperature": 0.0, "loop_guard": True}}
    if task.asks in ("detect", "point"):
        return Asked(wording.prompts(task.asks, subject), options)
    if task.asks == "extract":
        form = read_schema(schema)
        text = json.dumps(form, ensure_ascii=False)
        options["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": form},
        }
        return Asked([question.strip() or wording.prompt("extract", text)], options)
    return Asked([wording.prompt(task.asks)], options)


def read_schema(text: str) -> dict[str, Any]:
    """A JSON schema that was typed. Raises InputError saying where it is wrong."""
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"the schema is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from error
    if not isinstance(schema, dict):
        raise InputError('the schema must be a JSON object, such as {"type": "object", ...}')
    return schema


def pretty(answer: str) -> str:
    """JSON with its lines indented; what is not complete yet as it is."""
    try:
        return json.dumps(json.loads(answer), indent=2, ensure_ascii=False)
    except ValueError:
        return answer
