"""How a checkpoint is asked for a task: in the words it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from qwen3vl_mlx.errors import ConfigError, InputError
from qwen3vl_mlx.jsonfiles import read_config_values

TaskName: TypeAlias = Literal["describe", "read", "detect", "point", "markdown", "html", "extract"]

_CONFIG_KEY = "task_prompts"
_WITH_SUBJECT = ("detect", "point")  # "{}" is what to find
_PERHAPS_SUBJECT = ("extract",)  # "{}" is the JSON schema


@dataclass(frozen=True)
class Wording:
    """One template a task. The defaults are what the Qwen3-VL models were trained on.

    "{}" stands for what to find; the templates in `_all` ask for everything. several: whether one
    question may name several things, between commas. A checkpoint trained on other words has them
    in its config.json, under "task_prompts", by the names of these fields.
    """

    describe: str = "Describe this image."
    read: str = "Read all the text in the image."
    detect: str = (
        "Locate every instance that belongs to the following categories: "
        '"{}". Report bbox coordinates in JSON format.'
    )
    detect_all: str = (
        "Locate every object in the image. Report bbox coordinates in JSON format like this: "
        '{"bbox_2d": [x1, y1, x2, y2], "label": "object"}'
    )
    point: str = (
        'Locate every instance that belongs to the following categories with points: "{}". Report '
        'point coordinates in JSON format like this: {"point_2d": [x, y], "label": "category"}'
    )
    point_all: str = (
        "Locate every object in the image with a point. Report point coordinates in JSON format "
        'like this: {"point_2d": [x, y], "label": "object"}'
    )
    markdown: str = "qwenvl markdown"
    html: str = "qwenvl html"
    extract: str = (
        "Extract the information in the image. Answer in JSON that follows this schema:\n{}"
    )
    several: bool = True

    def prompt(self, task: TaskName, subject: str = "") -> str:
        """The question for a task.

        subject: what to find, "" for everything; for "extract", the JSON schema. The other tasks
        have none. Raises InputError for an unknown task.
        """
        if task not in get_args(TaskName):
            raise InputError(
                f"task {task!r} is unknown; use one of {', '.join(get_args(TaskName))}"
            )
        everything = task in _WITH_SUBJECT and not subject.strip()
        template: str = getattr(self, f"{task}_all" if everything else task)
        if everything or task not in (*_WITH_SUBJECT, *_PERHAPS_SUBJECT):
            return template
        return template.replace("{}", subject.strip())

    def prompts(self, task: TaskName, subject: str | Sequence[str] = "") -> list[str]:
        """`prompt` for several subjects: one question, or as many as the checkpoint needs.

        subject: a list, or a text with commas between. Raises InputError for an empty list.
        """
        listed = subjects(subject)
        if self.several or not listed:
            return [self.prompt(task, ", ".join(listed))]
        return [self.prompt(task, each) for each in listed]


def subjects(subject: str | Sequence[str]) -> list[str]:
    """What to find, one by one; empty for everything. Raises InputError for what names nothing."""
    if isinstance(subject, str):
        return [part for each in subject.split(",") if (part := " ".join(each.split()))]
    if not isinstance(subject, Sequence) or not all(isinstance(each, str) for each in subject):
        raise InputError(f"what to find is a text or a list of texts, got {subject!r}")
    listed = [" ".join(each.split()) for each in subject]
    if not all(listed) or not listed:
        raise InputError("a list of what to find has no entry or an empty one; None is everything")
    return listed


def read_wording(folder: Path) -> Wording:
    """A checkpoint's wording: the defaults, but for what its config.json says otherwise.

    Raises ConfigError naming the key.
    """
    values = read_config_values(folder)
    return parse_wording(values.get(_CONFIG_KEY) if isinstance(values, dict) else None)


def parse_wording(values: Any) -> Wording:
    """`Wording` from what config.json has under "task_prompts"; None is the default."""
    if values is None:
        return Wording()
    if not isinstance(values, dict):
        raise ConfigError(
            f"config.json: {_CONFIG_KEY} must be an object of texts, got {type(values).__name__}"
        )
    known = [each.name for each in fields(Wording)]
    for key, value in values.items():
        name = f"config.json: {_CONFIG_KEY}.{key}"
        if key not in known:
            raise ConfigError(f"{name} is no task; known are {', '.join(known)}")
        if key == "several":
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false, got {value!r}")
        elif not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{name} must be a text that says something, got {value!r}")
        elif key in _WITH_SUBJECT and "{}" not in value:
            raise ConfigError(
                f'{name} must have "{{}}" where the thing to find goes, got {value!r}'
            )
        elif key not in (*_WITH_SUBJECT, *_PERHAPS_SUBJECT) and "{}" in value:
            raise ConfigError(f'{name} has a "{{}}", but nothing goes there: {value!r}')
    return Wording(**values)
