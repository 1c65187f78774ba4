"""Chunks of an answer to the output items of a response, and to the events that tell of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from qwen3vl_mlx.engine.logprobs import TokenLogprob
from qwen3vl_mlx.engine.output import Chunk, ToolCall
from qwen3vl_mlx.server.chat_reply import finish_fields, logprob_fields
from qwen3vl_mlx.server.response_store import Item
from qwen3vl_mlx.server.responses_items import new_id, sealed

Event: TypeAlias = dict[str, Any]

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class OutputWriter:
    """Writes one item after the other; `items` are those that are complete.

    seals: thoughts are told a second time in the form that clients hand back.
    """

    def __init__(self, *, seals: bool = False):
        self.items: list[Item] = []
        self._seals = seals
        self._kind: str | None = None  # of the item being written
        self._id = ""
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    @property
    def thoughts(self) -> str:
        thoughts = (item["content"] for item in self.items if item["type"] == "reasoning")
        return "".join(part["text"] for content in thoughts for part in content)

    def push(self, chunk: Chunk) -> Iterator[Event]:
        """The events of a chunk, without sequence numbers. The last one completes the items."""
        if chunk.reasoning:
            yield from self._write("reasoning", chunk.reasoning)
        if chunk.text or (chunk.logprobs and self._kind == "message"):
            yield from self._write("message", chunk.text, chunk.logprobs)
        for call in chunk.tool_calls:
            yield from self._close()
            yield from self._call(call)
        if chunk.finish_reason is not None:
            cut = finish_fields(chunk.finish_reason, None)["finish_reason"] == "length"
            if not cut and self._kind != "message" and not self._answered:
                yield from self._close()
                yield from self._open("message")  # an answer of no words is one all the same
            yield from self._close("incomplete" if cut else "completed")

    @property
    def _answered(self) -> bool:
        return any(item["type"] != "reasoning" for item in self.items)

    def _write(
        self, kind: str, text: str, logprobs: Sequence[TokenLogprob] = ()
    ) -> Iterator[Event]:
        if self._kind != kind:
            yield from self._close()
            yield from self._open(kind)
        told = logprob_fields(logprobs)
        entries = told["content"] if told is not None else []
        self._text += text
        self._logprobs += entries
        yield self._part_event(f"{_PARTS[kind]}.delta", delta=text, **self._aside(entries))

    def _open(self, kind: str) -> Iterator[Event]:
        self._kind, self._id, self._text, self._logprobs = kind, new_id(kind), "", []
        yield self._item_event("added", self._item([], "in_progress"))
        yield self._part_event("content_part.added", part=self._part())

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """Complete the item being written, if there is one."""
        if self._kind is None:
            return
        name = f"{_PARTS[self._kind]}.done"
        yield self._part_event(name, text=self._text, **self._aside(self._logprobs))
        yield self._part_event("content_part.done", part=self._part())
        item = self._item([self._part()], status)
        yield self._item_event("done", item)
        self.items.append(item)
        self._kind = None

    def _call(self, call: ToolCall) -> Iterator[Event]:
        self._id = new_id("function_call")
        item = {
            "id": self._id,
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        yield self._item_event("added", item)
        where = {"item_id": self._id, "output_index": len(self.items)}
        name = "response.function_call_arguments"
        yield {"type": f"{name}.delta", **where, "delta": call.arguments}
        yield {"type": f"{name}.done", **where, "name": call.name, "arguments": call.arguments}
        item = {**item, "arguments": call.arguments, "status": "completed"}
        yield self._item_event("done", item)
        self.items.append(item)

    def _item(self, content: list[Item], status: str) -> Item:
        item = {"id": self._id, "type": self._kind, "content": content, "status": status}
        if self._kind == "message":
            return {**item, "role": "assistant"}
        seal = {"encrypted_content": sealed(self._text)} if self._seals else {}
        return {**item, "summary": [], **seal}

    def _part(self) -> Item:
        part: dict[str, Any] = {"type": _PARTS[self._kind or ""], "text": self._text}
        if self._kind == "message":
            part |= {"annotations": [], "logprobs": list(self._logprobs)}
        return part

    def _aside(self, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"logprobs": list(logprobs)} if self._kind == "message" else {}

    def _part_event(self, name: str, **fields: Any) -> Event:
        where = {"item_id": self._id, "output_index": len(self.items), "content_index": 0}
        return {"type": f"response.{name}", **where, **fields}

    def _item_event(self, name: str, item: Item) -> Event:
        place = {"output_index": len(self.items)}
        return {"type": f"response.output_item.{name}", **place, "item": item}
