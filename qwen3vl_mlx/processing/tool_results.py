"""Tool results in the order of the calls that they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def results_in_order(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """`messages`, each run of tool results in the order of the calls that they answer.

    Templates show no ids: the model takes the first result for that of its first call. A run whose
    ids are not just those of the calls before it is left as it is.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        return messages  # what is wrong with them is told when they are checked
    ordered, place = list(messages), 0
    while place < len(ordered):
        end = place + 1
        ids = _ids(ordered[place], "tool_calls")
        while end < len(ordered) and _ids(ordered[end], "tool_call_id"):
            end += 1
        run = {_ids(result, "tool_call_id")[0]: result for result in ordered[place + 1 : end]}
        if len(ids) > 1 and sorted(run) == sorted(ids) and len(run) == end - place - 1:
            ordered[place + 1 : end] = [run[id_] for id_ in ids]
        place = end
    return ordered


def _ids(message: object, key: str) -> list[str]:
    """Ids of the calls that a message makes, or of the one that it answers."""
    value = message.get(key) if isinstance(message, Mapping) else None
    calls = value if isinstance(value, list | tuple) else [{"id": value}]
    ids = [call.get("id") if isinstance(call, Mapping) else None for call in calls]
    return [id_ for id_ in ids if isinstance(id_, str)]
