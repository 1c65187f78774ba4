"""The base of all request bodies: strict types, and unknown fields that are told of."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.known_keys import Shape, unread
from qwen3vl_mlx.server.options import ServerOptions

_log = logging.getLogger(__name__)

_MOST_NAMED = 8  # unknown fields in one warning

MOST_ENTRIES = 4096

Entry = TypeVar("Entry")

# A fault in each of many entries would take seconds to tell: one is enough.
Long: TypeAlias = Annotated[list[Entry], Field(fail_fast=True)]
Many: TypeAlias = Annotated[list[Entry], Field(fail_fast=True, max_length=MOST_ENTRIES)]


class Fields(BaseModel):
    """A JSON object of a request. Numbers are numbers, and strings strings.

    `impossible` maps fields that the API knows, and no Qwen3-VL can honour, to what to do instead;
    `inner` fields that hold plain objects to the keys that these may have.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    impossible: ClassVar[Mapping[str, str]] = {}
    inner: ClassVar[Mapping[str, Shape]] = {}


def check_fields(fields: Fields, options: ServerOptions) -> dict[str, str]:
    """Refuse what cannot be honoured; headers that tell of fields nobody knows.

    Raises ApiError, with options.unknown_fields "refuse" for unknown fields too.
    """
    for name, advice in fields.impossible.items():
        if _given(fields, name):
            raise _impossible(name, advice)
    names = list(_ignored(fields))
    if not names:
        return {}
    shown = ", ".join(json.dumps(name[:80]) for name in names[:_MOST_NAMED])
    if len(names) > _MOST_NAMED:
        shown += f" and {len(names) - _MOST_NAMED} more"
    if options.unknown_fields == "refuse":
        raise ApiError(
            400,
            f"unknown fields: {shown}; correct or leave them out",
            param=names[0][:80],
            code="unknown_parameter",
        )
    _log.warning("unknown fields ignored: %s", shown)
    return {"x-qwen3vl-warning": f"unknown fields ignored: {shown}"}


def _given(fields: Fields, name: str) -> bool:
    """Whether a field asks for anything: null, false and what is empty do not."""
    extra = fields.model_extra or {}
    value = extra[name] if name in extra else getattr(fields, name, None)
    return value is not None and value is not False and value not in ([], {}, "")


def _impossible(name: str, advice: str) -> ApiError:
    return ApiError(
        400, f"{name} is not supported: {advice}", param=name, code="unsupported_parameter"
    )


def _ignored(fields: Fields) -> Iterator[str]:
    """Names of fields that nobody reads. Raises ApiError for one that must not be passed over."""
    for name, advice in unknown(fields):
        if advice is not None:
            raise _impossible(name, advice)
        if name.split(".")[0] not in fields.impossible:
            yield name


def unknown(fields: Fields, where: str = "") -> Iterator[tuple[str, str | None]]:
    """Names of fields that nobody declared, inner ones as `outer.inner`, with `unread`'s advice."""
    for name in fields.model_extra or {}:
        yield where + name, None
    for name in type(fields).model_fields:
        value: Any = getattr(fields, name)
        if name in fields.inner:
            yield from unread(value, fields.inner[name], where + name)
        elif isinstance(value, Fields):
            yield from unknown(value, f"{where}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Fields):
            for at, entry in enumerate(value):
                yield from unknown(entry, f"{where}{name}[{at}].")
