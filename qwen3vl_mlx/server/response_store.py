"""Responses that clients may read again or go on from, in memory: the longest unused go first."""

from __future__ import annotations

import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from qwen3vl_mlx.processing.image import VisualInput

Item: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Turn:
    """What one request said and what was answered, as items and as chat messages.

    Pictures in the messages are cut: a later turn sees what this one saw, whatever has become of
    the files and URLs they came from.
    """

    items: Sequence[Item]
    output: Sequence[Item]
    messages: Sequence[Mapping[str, Any]]

    @cached_property
    def num_bytes(self) -> int:
        return sum(map(_num_bytes, (*self.items, *self.output, *self.messages)))


@dataclass(frozen=True)
class StoredResponse:
    """A response as it was sent, and the conversation that ends with it."""

    body: Mapping[str, Any]
    turns: tuple[Turn, ...]  # shared with the responses it goes on from

    @cached_property
    def num_bytes(self) -> int:
        """Of the body alone."""
        return _num_bytes(self.body)

    @property
    def input_items(self) -> list[Item]:
        """All that the model was given, oldest first."""
        *earlier, last = self.turns
        said = [item for turn in earlier for item in (*turn.items, *turn.output)]
        return [*said, *last.items]


class ResponseStore:
    """At most `max_responses`, and about `max_bytes`. For any thread.

    A turn is counted once, however many responses go on from it, and lives as long as one does.
    """

    def __init__(self, max_responses: int, max_bytes: int):
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()  # longest unused first
        self._uses: Counter[Turn] = Counter()
        self._answered: dict[str, Item] = {}  # output of the turns in use, by id
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, response: StoredResponse) -> bool:
        """Keep a response under its id; whether it is kept. Too large a one makes no room."""
        least = response.num_bytes + sum(turn.num_bytes for turn in response.turns)
        with self._lock:
            self.remove(response.body["id"])
            if least > self.max_bytes or not self.max_responses:
                return False
            self._kept[response.body["id"]] = response
            self.num_bytes += response.num_bytes
            for turn in response.turns:
                self._uses[turn] += 1
                if self._uses[turn] == 1:
                    self.num_bytes += turn.num_bytes
                    self._answered |= {item["id"]: item for item in turn.output}
            while len(self._kept) > self.max_responses or self.num_bytes > self.max_bytes:
                self.remove(next(iter(self._kept)))
        return True

    def get(self, response_id: str) -> StoredResponse | None:
        with self._lock:
            if response_id in self._kept:
                self._kept.move_to_end(response_id)
            return self._kept.get(response_id)

    def remove(self, response_id: str) -> bool:
        """Whether it was there."""
        with self._lock:
            response = self._kept.pop(response_id, None)
            if response is None:
                return False
            self.num_bytes -= response.num_bytes
            for turn in response.turns:
                self._uses[turn] -= 1
                if not self._uses[turn]:
                    del self._uses[turn]
                    self.num_bytes -= turn.num_bytes
                    for item in turn.output:
                        self._answered.pop(item["id"], None)
        return True

    def item(self, item_id: str) -> Item | None:
        """An item that was answered. Ids of input may be clients' own, which others could guess."""
        return self._answered.get(item_id)


def _num_bytes(value: object) -> int:
    """What a JSON value with pictures in it takes in memory."""
    if isinstance(value, VisualInput):
        return value.patches.nbytes
    size = sys.getsizeof(value)
    if isinstance(value, Mapping):
        return size + sum(map(_num_bytes, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple)):
        return size + sum(map(_num_bytes, value))
    return size
