"""A response while it is made: its events, and the object that they end with."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from qwen3vl_mlx.engine.output import Chunk, Usage
from qwen3vl_mlx.server.chat_reply import finish_fields, reasoning_tokens, usage_fields
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.event_stream import sse
from qwen3vl_mlx.server.question import Answers
from qwen3vl_mlx.server.response_store import StoredResponse
from qwen3vl_mlx.server.responses_conversation import Conversation
from qwen3vl_mlx.server.responses_fields import ResponseFields
from qwen3vl_mlx.server.responses_output import Event, OutputWriter
from qwen3vl_mlx.server.serving import Serving

# Fields of the request that the response repeats
_REPEATED = {
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "safety_identifier",
    "top_logprobs",
    "user",
}


class Reply:
    """One response. It is stored when it is complete, unless the request says not to."""

    def __init__(
        self,
        serving: Serving,
        answers: Answers,
        fields: ResponseFields,
        conversation: Conversation,
    ):
        self.answers = answers
        self.conversation = conversation
        self.store = None if fields.store is False else serving.responses
        self.output = OutputWriter(seals=fields.wants_sealed)
        self.body = _begun(answers, fields, truncates=serving.options.truncate)
        self._events = 0

    async def complete(self) -> dict[str, Any]:
        """The finished response object. Raises ApiError."""
        async with aclosing(self._made()) as events:
            async for _ in events:
                pass
        return self.body

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of the response. Raises ApiError."""
        async with aclosing(self._made()) as events:
            async for event in events:
                yield self._sse(event)

    def failed(self, error: ApiError) -> bytes:
        """What the stream ends with when the answer fails."""
        fault = {"code": error.code, "message": error.text, "param": error.param}
        self.body |= {
            "status": "failed",
            "output": list(self.output.items),
            "error": {"code": "server_error", "message": error.text},
        }
        end = {"type": "response.failed", "response": self.body}
        return self._sse({"type": "error", **fault}) + self._sse(end)

    async def _made(self) -> AsyncGenerator[Event, None]:
        yield {"type": "response.created", "response": self.body}
        yield {"type": "response.in_progress", "response": self.body}
        async with aclosing(self.answers.chunks()) as chunks:
            async for chunk in chunks:
                for event in self.output.push(chunk):
                    yield event
                if chunk.finish_reason is not None:
                    self._end(chunk)
        yield {"type": f"response.{self.body['status']}", "response": self.body}

    def _end(self, chunk: Chunk) -> None:
        assert chunk.finish_reason is not None
        assert chunk.usage is not None
        end = finish_fields(chunk.finish_reason, chunk.stop)
        if end["finish_reason"] == "length":
            self.body |= {
                "status": "incomplete",
                "incomplete_details": {"reason": "max_output_tokens"},
            }
        else:
            self.body |= {"status": "completed", "completed_at": int(time.time())}
        self.body |= {
            "output": self.output.items,
            "stop_reason": end["stop_reason"],
            "usage": _usage(chunk.usage, reasoning_tokens(self.answers, self.output.thoughts)),
        }
        if self.store is not None:
            turns = self.conversation.turns(self.answers.messages, self.output.items)
            if not self.store.put(StoredResponse(self.body, turns)):
                self.body["store"] = False  # too large to be kept

    def _sse(self, event: Event) -> bytes:
        number, self._events = self._events, self._events + 1
        return sse({**event, "sequence_number": number}, event["type"])


def _begun(answers: Answers, fields: ResponseFields, *, truncates: bool) -> dict[str, Any]:
    """The response object before anything is said. truncates: where the request does not say."""
    params = answers.streams[0].handle.request.params
    effort = fields.reasoning.effort if fields.reasoning is not None else None
    wanted = fields.text.format if fields.text is not None else None
    told_format = {"type": "text"}
    if wanted is not None:
        told_format = wanted.model_dump(by_alias=True, exclude_unset=True)
    return {
        "id": f"resp_{answers.id}",
        "object": "response",
        "created_at": answers.created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": answers.model,
        "output": [],
        "usage": None,
        "background": False,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": fields.store is not False,
        "temperature": params.temperature,
        "text": {"format": told_format, "verbosity": "medium"},
        "tool_choice": fields.tool_choice or "auto",
        "tools": fields.tools or [],
        "top_p": params.top_p,
        "truncation": fields.truncation or ("auto" if truncates else "disabled"),
        **fields.model_dump(include=_REPEATED),
    }


def _usage(usage: Usage, thoughts: int) -> dict[str, Any]:
    """`chat_reply.usage_fields` by the names of this API."""
    told = usage_fields([usage], thoughts)
    return {
        "input_tokens": told.pop("prompt_tokens"),
        "input_tokens_details": {
            **told.pop("prompt_tokens_details"),
            "cache_write_tokens": 0,
        },
        "output_tokens": told.pop("completion_tokens"),
        "output_tokens_details": told.pop("completion_tokens_details"),
        **told,
    }
