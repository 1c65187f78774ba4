"""The conversation that a response answers: what is stored of it, and what its request adds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3vl_mlx.processing.processor import Messages
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.response_store import Item, ResponseStore, Turn
from qwen3vl_mlx.server.responses_fields import ResponseFields
from qwen3vl_mlx.server.responses_items import SYSTEM_ROLES, chat_messages, input_items

# Fields of a question, as this API calls them
_NAMES = {
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}


@dataclass(frozen=True)
class Conversation:
    """Stored turns, and the items of a new one with the chat messages that they make.

    places: for each message the index of its first item.
    """

    earlier: tuple[Turn, ...]
    items: Sequence[Item]
    messages: Sequence[Mapping[str, Any]]
    places: Sequence[int]
    instructions: str | None = None

    def asked(self) -> Messages:
        """All messages. Those of the system at their head are one: more the models do not read."""
        said = [*(message for turn in self.earlier for message in turn.messages), *self.messages]
        if self.instructions is not None:
            said.insert(0, {"role": "system", "content": self.instructions})
        head = next((at for at, m in enumerate(said) if m["role"] not in SYSTEM_ROLES), len(said))
        if head < 2:
            return said
        text = "\n\n".join(_text(message) for message in said[:head])
        return [{"role": "system", "content": text}, *said[head:]]

    def turns(self, seen: Messages, output: Sequence[Item]) -> tuple[Turn, ...]:
        """The turns of a response. seen: the messages of `asked`, their pictures cut."""
        ahead = len(seen) - len(self.messages)
        said = [
            message if message["role"] in SYSTEM_ROLES else seen[ahead + at]
            for at, message in enumerate(self.messages)
        ]
        answered, _ = chat_messages(output)
        return (*self.earlier, Turn(self.items, output, [*said, *answered]))

    def told(self, error: ApiError) -> ApiError:
        """An error about the messages of `asked` in the words of this request."""
        ahead = len(self.asked()) - len(self.messages)

        def place(found: re.Match[str]) -> str:
            at = int(found[1]) - ahead
            if not 0 <= at < len(self.messages):
                return found[0]
            content = found[2] or ""
            if content and self.messages[at]["role"] == "tool":
                content = ".output"
            return f"input[{self.places[at]}]{content}"

        def renamed(text: str) -> str:
            text = re.sub(r"\bmessages\[(\d+)\](\.content)?", place, text)
            return re.sub(r"^\w+", lambda found: _NAMES.get(found[0], found[0]), text)

        error.message = renamed(error.message)
        if error.param is not None:
            error.param = "input" if error.param == "messages" else renamed(error.param)
        return error


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def begin(fields: ResponseFields, store: ResponseStore) -> Conversation:
    """The conversation that a request asks to go on. Raises ApiError."""
    earlier: tuple[Turn, ...] = ()
    if fields.previous_response_id is not None:
        found = store.get(fields.previous_response_id)
        if found is None:
            raise ApiError(
                400,
                f"no response {fields.previous_response_id[:100]!r} is kept here: it was not "
                "stored, was deleted, or made room for others; send the conversation as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        earlier = found.turns
    items = input_items(fields.input, store.item)
    messages, places = chat_messages(items)
    _check_calls(earlier, items)
    return Conversation(earlier, items, messages, places, fields.instructions)


def _check_calls(earlier: Sequence[Turn], items: Sequence[Item]) -> None:
    """Refuse a tool's answer to a call that nobody made."""
    calls = {item.get("call_id") for turn in earlier for item in (*turn.items, *turn.output)}
    for at, item in enumerate(items):
        if item["type"] == "function_call_output" and item["call_id"] not in calls:
            raise ApiError(
                400,
                f"input[{at}].call_id is {item['call_id']!r}, which no function_call before it "
                "has; send the call too, or previous_response_id",
                param=f"input[{at}].call_id",
                code="invalid_value",
            )
        calls.add(item.get("call_id"))
