"""Generated text to what a caller reads: answer, reasoning, tool calls, and why it ended.

Streams: text is held back only while it may still turn out to be a marker or a stop string.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from qwen3vl_mlx.engine.logprobs import TokenLogprob

FinishReason: TypeAlias = Literal[
    "stop", "length", "tool_calls", "repetition", "constraint", "cancelled", "timeout"
]

THINK_END = "</think>"
TOOL_START = "<tool_call>"
TOOL_END = "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """One call the model asks for. `arguments` is a JSON object as text, as OpenAI has it."""

    id: str
    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """Plain strings, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Usage:
    """Tokens, times in seconds and memory of one request.

    Prompt time runs from the request to the first token, image decoding and encoding included;
    completion time runs from there to the last. Rates count the tokens computed in their time:
    cached ones not for the prompt, the first not for the completion.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    total_prompt_time_sec: float
    total_completion_time_sec: float
    total_time_sec: float
    avg_prompt_tok_per_sec: float
    avg_compl_tok_per_sec: float
    avg_tok_per_sec: float
    time_to_first_token_sec: float
    peak_memory_bytes: int
    drafted_tokens: int = 0  # proposed by speculation
    accepted_tokens: int = 0  # of those, the ones that were right
    decode_steps: int = 0  # passes of the decoder after the prompt's

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def make_usage(
    *,
    prompt: int,
    completion: int,
    cached: int,
    started: float,
    first: float,
    ended: float,
    peak: int,
    drafted: int = 0,
    accepted: int = 0,
    steps: int = 0,
) -> Usage:
    """`Usage` from counts and clock readings (seconds)."""
    prompt_time, completion_time = first - started, ended - first
    total_time = ended - started

    def rate(tokens: int, seconds: float) -> float:
        return tokens / seconds if seconds > 0 else 0.0

    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        cached_tokens=cached,
        total_prompt_time_sec=prompt_time,
        total_completion_time_sec=completion_time,
        total_time_sec=total_time,
        avg_prompt_tok_per_sec=rate(prompt - cached, prompt_time),
        avg_compl_tok_per_sec=rate(completion - 1, completion_time),
        avg_tok_per_sec=rate(prompt + completion, total_time),
        time_to_first_token_sec=prompt_time,
        peak_memory_bytes=peak,
        drafted_tokens=drafted,
        accepted_tokens=accepted,
        decode_steps=steps,
    )


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer; the last one has `finish_reason` and `usage`.

    There `stop` is the stop string that ended the answer, if one did, and `reasoning_closed` is
    False where it was cut off while still thinking.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stop: str | None = None
    reasoning_closed: bool = True
    logprobs: tuple[TokenLogprob, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Completion:
    """A whole answer: see `Chunk`. `reasoning` is empty for models that do not think."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    stop: str | None = None
    reasoning_closed: bool = True
    logprobs: tuple[TokenLogprob, ...] = ()
    alternatives: tuple[Completion, ...] = ()  # the other answers, where several were asked for

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return asdict(self)


def collect(chunks: Iterable[Chunk]) -> Completion:
    """Join a stream into one `Completion`."""
    parts = list(chunks)
    last = parts[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Completion(
        text="".join(chunk.text for chunk in parts),
        reasoning="".join(chunk.reasoning for chunk in parts),
        tool_calls=tuple(call for chunk in parts for call in chunk.tool_calls),
        finish_reason=last.finish_reason,
        usage=last.usage,
        stop=last.stop,
        reasoning_closed=last.reasoning_closed,
        logprobs=tuple(entry for chunk in parts for entry in chunk.logprobs),
    )


class Scanner:
    """Finds the first of some literals in text that arrives in pieces."""

    def __init__(self, literals: Sequence[str]):
        self.literals = tuple(literals)
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """(text before, literal found or None, text after); with None, a possible beginning of a
        literal is held back and comes out with later text.
        """
        text = self.held + text
        self.held = ""
        found = [(at + len(lit), at, lit) for lit in self.literals if (at := text.find(lit)) >= 0]
        if found:
            _, at, literal = min(found)  # the first complete one, however the text was cut
            return text[:at], literal, text[at + len(literal) :]
        keep = max((_overlap(text, literal) for literal in self.literals), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None, ""

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


def _overlap(text: str, literal: str) -> int:
    """Length of the longest end of `text` that begins `literal`."""
    longest = min(len(text), len(literal) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(literal[:n])), 0)


class OutputParser:
    """Splits one answer's text into reasoning, content and tool calls."""

    def __init__(self, *, thinking: bool, tools: bool):
        self.tools = tools
        self.state = "content"
        self.newlines = ""  # trailing ones wait: markers swallow them
        self.calls = 0
        self.call_text = ""
        self.strip_next = False
        self.scanner = Scanner(())
        self._enter("reasoning" if thinking else "content")

    def _enter(self, state: str) -> None:
        literals = {"reasoning": (THINK_END,), "tool": (TOOL_END,), "content": ()}[state]
        self.state = state
        self.scanner = Scanner((TOOL_START,) if state == "content" and self.tools else literals)

    def push(self, text: str) -> list[Chunk]:
        """Chunks that are certain now, without finish reason."""
        chunks: list[Chunk] = []
        marker: str | None = ""
        while marker is not None:
            before, marker, text = self.scanner.push(text)
            chunks += self._emit(before)
            if marker == THINK_END:
                self.newlines, self.strip_next = "", True
                self._enter("content")
            elif marker == TOOL_START:
                self.call_text = ""
                self._enter("tool")
            elif marker == TOOL_END:
                chunks.append(self._close_call())
                self._enter("content")
        return chunks

    def flush(self) -> list[Chunk]:
        """What remains at the end of the answer. An unfinished tool call comes out as text."""
        chunks = self._emit(self.scanner.flush())
        if self.state == "tool":
            chunks.append(Chunk(text=self.newlines + TOOL_START + self.call_text))
        elif self.newlines and not (self.calls and self.state == "content"):
            chunks.append(self._chunk(self.newlines))
        self.newlines = ""
        return chunks

    @property
    def reasoning_closed(self) -> bool:
        return self.state != "reasoning"

    def _emit(self, text: str) -> list[Chunk]:
        if self.state == "tool":
            self.call_text += text
            return []
        if self.strip_next:
            text = text.lstrip("\n")
        if not text:
            return []
        self.strip_next = False
        if self.state == "content" and not self.tools:
            return [self._chunk(text)]
        body = text.rstrip("\n")
        if not body:
            self.newlines += text
            return []
        ready, self.newlines = self.newlines + body, text[len(body) :]
        return [self._chunk(ready)]

    def _chunk(self, text: str) -> Chunk:
        return Chunk(reasoning=text) if self.state == "reasoning" else Chunk(text=text)

    def _close_call(self) -> Chunk:
        call = parse_tool_call(self.call_text)
        newlines, self.newlines = self.newlines, ""
        self.strip_next = call is not None
        if call is None:  # not what was agreed: show it rather than lose it
            return Chunk(text=newlines + TOOL_START + self.call_text + TOOL_END)
        self.calls += 1
        return Chunk(tool_calls=(call,))


def parse_tool_call(text: str) -> ToolCall | None:
    """The call in `{"name": ..., "arguments": {...}}`, or None where it is not one."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, dict):
        return None
    return ToolCall(
        id=f"call_{uuid.uuid4().hex[:24]}",
        name=call["name"],
        arguments=json.dumps(arguments, ensure_ascii=False),
    )
