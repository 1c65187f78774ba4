"""An answer in the words of Anthropic's Messages API: content blocks, whole or as events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any, TypeAlias

from qwen3vl_mlx.engine.output import Chunk, ToolCall, Usage
from qwen3vl_mlx.server.errors import ApiError, anthropic_error
from qwen3vl_mlx.server.event_stream import sse
from qwen3vl_mlx.server.question import Answers

Event: TypeAlias = dict[str, Any]


def message(
    answers: Answers, chunks: Iterable[Chunk], *, max_tokens: int, shows_thinking: bool
) -> dict[str, Any]:
    """A `message` object. chunks: of the whole answer."""
    chunks = list(chunks)
    usage = chunks[-1].usage
    assert usage is not None
    return {
        **_head(answers),
        "content": content_blocks(chunks, answers.id, shows_thinking=shows_thinking),
        **stop_fields(chunks[-1], max_tokens),
        "usage": usage_fields(usage),
    }


async def message_events(
    answers: Answers, *, max_tokens: int, shows_thinking: bool
) -> AsyncGenerator[bytes, None]:
    """The same as events, from message_start to message_stop."""
    start = {
        **_head(answers),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "usage": _tokens(answers.prompt_tokens, 0, 0),  # what was cached is known at the end
    }
    yield _sse({"type": "message_start", "message": start})
    yield _sse({"type": "ping"})
    writer = BlockWriter(answers.id, shows_thinking=shows_thinking)
    async with aclosing(answers.chunks()) as chunks:
        async for chunk in chunks:
            for event in writer.push(chunk):
                yield _sse(event)
    for event in writer.close():
        yield _sse(event)
    assert chunk.usage is not None
    yield _sse(
        {
            "type": "message_delta",
            "delta": stop_fields(chunk, max_tokens),
            "usage": usage_fields(chunk.usage),
        }
    )
    yield _sse({"type": "message_stop"})


def error_event(error: ApiError) -> bytes:
    """What a stream says when it fails after its beginning."""
    return _sse(anthropic_error(error))


def content_blocks(
    chunks: Iterable[Chunk], signature: str, *, shows_thinking: bool = True
) -> list[dict[str, Any]]:
    """Thoughts, text and calls in the order in which they were said."""
    blocks: list[dict[str, Any]] = []
    for chunk in chunks:
        for kind, piece in _pieces(chunk, shows_thinking):
            if isinstance(piece, ToolCall):
                blocks.append({**_opened(piece), "input": json.loads(piece.arguments)})
            elif blocks and blocks[-1]["type"] == kind:
                blocks[-1][kind] += piece
            else:
                blocks.append({"type": kind, kind: piece})
                if kind == "thinking":
                    blocks[-1]["signature"] = signature
    return blocks


class BlockWriter:
    """`content_blocks` as events. signature: clients send it back with a thought; none is read."""

    def __init__(self, signature: str, *, shows_thinking: bool = True):
        self.signature = signature
        self.shows_thinking = shows_thinking
        self.index = -1
        self.kind: str | None = None  # of the block that is open

    def push(self, chunk: Chunk) -> Iterator[Event]:
        for kind, piece in _pieces(chunk, self.shows_thinking):
            if isinstance(piece, ToolCall):
                yield from self._open(kind, _opened(piece))
                yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
                continue
            if kind != self.kind:
                signed = {"signature": ""} if kind == "thinking" else {}
                yield from self._open(kind, {"type": kind, kind: "", **signed})
            if piece:
                yield self._delta({"type": f"{kind}_delta", kind: piece})

    def close(self) -> Iterator[Event]:
        """End the block that is open, if one is."""
        if self.kind is None:
            return
        if self.kind == "thinking":
            yield self._delta({"type": "signature_delta", "signature": self.signature})
        yield {"type": "content_block_stop", "index": self.index}
        self.kind = None

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[Event]:
        yield from self.close()
        self.kind = kind
        self.index += 1
        yield {"type": "content_block_start", "index": self.index, "content_block": block}

    def _delta(self, delta: dict[str, str]) -> Event:
        return {"type": "content_block_delta", "index": self.index, "delta": delta}


def stop_fields(last: Chunk, max_tokens: int) -> dict[str, str | None]:
    """Why the answer ended. What Anthropic has no word for is max_tokens, with the word beside."""
    assert last.finish_reason is not None
    fields = {"stop_reason": "max_tokens", "stop_sequence": last.stop, "stop_details": None}
    words = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
    if last.finish_reason not in words:
        return {**fields, "finish_reason": last.finish_reason}
    word = words[last.finish_reason]
    if last.stop is not None:
        word = "stop_sequence"
    elif word == "max_tokens" and last.usage and last.usage.completion_tokens < max_tokens:
        word = "model_context_window_exceeded"
    return {**fields, "stop_reason": word}


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what was read anew and what was cached apart."""
    return _tokens(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)


def _tokens(prompt: int, cached: int, answer: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": answer,
    }


def _pieces(chunk: Chunk, shows_thinking: bool) -> Iterator[tuple[str, str | ToolCall]]:
    """What a chunk adds, with the type of block it goes into."""
    if chunk.reasoning:
        yield "thinking", chunk.reasoning if shows_thinking else ""
    if chunk.text:
        yield "text", chunk.text
    for call in chunk.tool_calls:
        yield "tool_use", call


def _opened(call: ToolCall) -> dict[str, Any]:
    """A call's block before its arguments."""
    return {
        "type": "tool_use",
        "id": "toolu_" + call.id.removeprefix("call_"),
        "name": call.name,
        "input": {},
    }


def _head(answers: Answers) -> dict[str, Any]:
    return {
        "id": f"msg_{answers.id}",
        "type": "message",
        "role": "assistant",
        "model": answers.model,
    }


def _sse(event: Event) -> bytes:
    return sse(event, event["type"])
