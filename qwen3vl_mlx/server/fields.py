"""The base of all request bodies: strict types, and unknown fields that are told of."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.options import ServerOptions

_log = logging.getLogger(__name__)

_MOST_NAMED = 8  # unknown fields in one warning


class Fields(BaseModel):
    """A JSON object of a request. Numbers are numbers, and strings strings.

    `impossible` maps fields that the API knows, and no Qwen3-VL can honour, to what to do instead.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    impossible: ClassVar[Mapping[str, str]] = {}


def check_fields(fields: Fields, options: ServerOptions) -> dict[str, str]:
    """Refuse what cannot be honoured; headers that tell of fields nobody knows.

    Raises ApiError, with options.unknown_fields "refuse" for unknown fields too.
    """
    for name, advice in fields.impossible.items():
        if _given(fields, name):
            raise ApiError(
                400,
                f"{name} is not supported: {advice}",
                param=name,
                code="unsupported_parameter",
            )
    names = [name for name in unknown(fields) if name.split(".")[0] not in fields.impossible]
    if not names:
        return {}
    shown = ", ".join(json.dumps(name[:60]) for name in names[:_MOST_NAMED])
    if len(names) > _MOST_NAMED:
        shown += f" and {len(names) - _MOST_NAMED} more"
    if options.unknown_fields == "refuse":
        raise ApiError(
            400,
            f"unknown fields: {shown}; correct or leave them out",
            param=names[0],
            code="unknown_parameter",
        )
    _log.warning("unknown fields ignored: %s", shown)
    return {"x-qwen3vl-warning": f"unknown fields ignored: {shown}"}


def _given(fields: Fields, name: str) -> bool:
    """Whether a field asks for anything: null, false and what is empty do not."""
    extra = fields.model_extra or {}
    value = extra[name] if name in extra else getattr(fields, name, None)
    return value is not None and value is not False and value not in ([], {}, "")


def unknown(fields: Fields, where: str = "") -> Iterator[str]:
    """Names of fields that nobody declared, inner ones as `outer.inner`."""
    for name in fields.model_extra or {}:
        yield where + name
    for name in type(fields).model_fields:
        value: Any = getattr(fields, name)
        entries = (
            {name: value}
            if not isinstance(value, list)
            else {f"{name}[{at}]": entry for at, entry in enumerate(value)}
        )
        for place, entry in entries.items():
            if isinstance(entry, Fields):
                yield from unknown(entry, f"{where}{place}.")
