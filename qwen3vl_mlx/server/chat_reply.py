"""Answers in the words of OpenAI's chat completions, whole or piece by piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any

from qwen3vl_mlx.engine.logprobs import TokenLogprob
from qwen3vl_mlx.engine.output import Chunk, Completion, FinishReason, ToolCall, Usage
from qwen3vl_mlx.server.errors import ApiError, openai_error
from qwen3vl_mlx.server.event_stream import DONE, sse
from qwen3vl_mlx.server.question import Answers

_TIMES = (
    "total_prompt_time_sec",
    "total_completion_time_sec",
    "total_time_sec",
    "avg_prompt_tok_per_sec",
    "avg_compl_tok_per_sec",
    "avg_tok_per_sec",
    "time_to_first_token_sec",
    "peak_memory_bytes",
)


def finish_fields(reason: FinishReason, stop: str | None) -> dict[str, str | None]:
    """finish_reason as OpenAI has it. An answer cut off for a reason of its own is "length" there.

    stop_reason says which: the engine's word, or the stop string that was met.
    """
    if reason in ("stop", "length", "tool_calls"):
        return {"finish_reason": reason, "stop_reason": stop}
    return {"finish_reason": "length", "stop_reason": reason}


def usage_fields(usages: Sequence[Usage], reasoning_tokens: int) -> dict[str, Any]:
    """One prompt's usage over all of its answers, with the times of the slowest."""
    first = usages[0]
    completion = sum(usage.completion_tokens for usage in usages)
    slowest = asdict(max(usages, key=lambda usage: usage.total_time_sec))
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "accepted_prediction_tokens": sum(usage.accepted_tokens for usage in usages),
            "rejected_prediction_tokens": sum(
                usage.drafted_tokens - usage.accepted_tokens for usage in usages
            ),
        },
        **{name: slowest[name] for name in _TIMES},
    }


def reasoning_tokens(answers: Answers, reasoning: str) -> int:
    """Tokens of thought, counted anew from its text."""
    return len(answers.tokenizer.encode(reasoning)) if reasoning else 0


def call_fields(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def logprob_fields(entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not entries:
        return None
    content = [
        {
            "token": entry.token,
            "logprob": entry.logprob,
            "bytes": list(entry.bytes),
            "top_logprobs": [
                {"token": top.token, "logprob": top.logprob, "bytes": list(top.bytes)}
                for top in entry.top
            ],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_body(answers: Answers, completions: Sequence[Completion]) -> dict[str, Any]:
    """A `chat.completion` object."""
    thoughts = sum(reasoning_tokens(answers, answer.reasoning) for answer in completions)
    return {
        "id": f"chatcmpl-{answers.id}",
        "object": "chat.completion",
        "created": answers.created,
        "model": answers.model,
        "choices": [_choice(index, answer) for index, answer in enumerate(completions)],
        "usage": usage_fields([answer.usage for answer in completions], thoughts),
        "service_tier": "default",
        "system_fingerprint": answers.fingerprint,
    }


def _choice(index: int, answer: Completion) -> dict[str, Any]:
    silent = answer.tool_calls and not answer.text
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if silent else answer.text,
        "refusal": None,
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [call_fields(call) for call in answer.tool_calls]
    return {
        "index": index,
        "message": message,
        "logprobs": logprob_fields(answer.logprobs),
        **finish_fields(answer.finish_reason, answer.stop),
    }


async def completion_events(answers: Answers, *, wants_usage: bool) -> AsyncGenerator[bytes, None]:
    """`chat.completion.chunk` events, one by one, up to `[DONE]`."""
    head: dict[str, Any] = {
        "id": f"chatcmpl-{answers.id}",
        "object": "chat.completion.chunk",
        "created": answers.created,
        "model": answers.model,
        "service_tier": "default",
        "system_fingerprint": answers.fingerprint,
    }

    def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        told = {"usage": usage} if wants_usage else {}
        return sse({**head, "choices": choices, **told})

    usages: list[Usage | None] = [None] * len(answers.streams)
    calls, thoughts = [0] * len(usages), [""] * len(usages)
    for index in range(len(usages)):
        yield event([_delta(index, {"role": "assistant", "content": "", "refusal": None})])
    async for index, chunk in answers.merged():
        if delta := _delta_fields(chunk, calls[index]):
            yield event([_delta(index, delta, chunk)])
        calls[index] += len(chunk.tool_calls)
        thoughts[index] += chunk.reasoning
        if chunk.finish_reason is not None:
            usages[index] = chunk.usage
            end = finish_fields(chunk.finish_reason, chunk.stop)
            yield event([{**_delta(index, {}, None if delta else chunk), **end}])
    if wants_usage:
        ended = [usage for usage in usages if usage is not None]
        thought = sum(reasoning_tokens(answers, text) for text in thoughts)
        yield event([], usage_fields(ended, thought))
    yield DONE


def _delta(index: int, delta: dict[str, Any], chunk: Chunk | None = None) -> dict[str, Any]:
    logprobs = logprob_fields(chunk.logprobs) if chunk is not None else None
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _delta_fields(chunk: Chunk, calls: int) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if chunk.text:
        delta["content"] = chunk.text
    if chunk.reasoning:
        delta["reasoning_content"] = chunk.reasoning
    if chunk.tool_calls:
        delta["tool_calls"] = [
            {"index": calls + at, **call_fields(call)} for at, call in enumerate(chunk.tool_calls)
        ]
    return delta


def error_event(error: ApiError) -> bytes:
    """What a stream says when it fails after its beginning."""
    return sse(openai_error(error)) + DONE
