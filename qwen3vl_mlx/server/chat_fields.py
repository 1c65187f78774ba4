"""The body of /v1/chat/completions: OpenAI's fields, and mistral.rs's beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from qwen3vl_mlx.asking import Form, Look
from qwen3vl_mlx.processing.processor import Messages
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.fields import Fields, Many
from qwen3vl_mlx.server.known_keys import (
    GRAMMAR,
    MESSAGES,
    RESPONSE_FORMAT,
    TOOL_CHOICE,
    TOOLS,
    Shape,
)
from qwen3vl_mlx.server.question import Question, Thinking

MOST_ANSWERS = 128

_USE_TOOLS = "functions became tools: use tools and tool_choice"
_NO_AGENT = "this server runs no tools by itself; declare them under tools and run them"

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_sequence_breakers",
    "stop",
    "seed",
    "logprobs",
    "top_logprobs",
    "ignore_eos",
    "loop_guard",
)


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TemplateOptions(Fields):
    """What the checkpoint's chat template can be told."""

    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = None
    add_vision_id: bool | None = None


class SamplingFields(Fields):
    """Which tokens are chosen, and where the answer ends. Unset: generation_config.json's."""

    max_tokens: int | None = Field(None, description="Tokens of the answer; unset: no limit")
    temperature: float | None = Field(None, description="0 always takes the likeliest token")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 is off")
    min_p: float | None = None
    repetition_penalty: float | None = Field(None, description="Over prompt and answer; 1 is off")
    frequency_penalty: float | None = Field(None, description="Over the answer, -2 to 2")
    presence_penalty: float | None = Field(None, description="Over the answer, -2 to 2")
    dry_multiplier: float | None = Field(None, description="DRY against repeated phrases; 0 is off")
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: Many[str] | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Added to logits, by token id")
    stop: str | Many[str] | None = Field(None, description="The answer ends before these")
    seed: int | None = Field(None, description="The same seed gives the same answer")
    ignore_eos: bool | None = None
    loop_guard: bool | None = Field(None, description="End an answer that repeats itself for ever")
    timeout: float | None = Field(None, description="Seconds until the answer is cut off")

    def sampling(self) -> dict[str, Any]:
        """By the names of SamplingParams."""
        wishes = {name: getattr(self, name, None) for name in _SAMPLING}
        return {**wishes, "max_tokens": self.max_tokens, "logit_bias": _bias(self.logit_bias)}


class ChatFields(SamplingFields):
    """A chat request. Only `messages` is required."""

    messages: str | Many[dict[str, Any]] = Field(
        description="Chat messages; content is a text or a list of parts, in any order: "
        '{"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": ..., '
        '"detail": "low" | "high" | "auto"}}. A plain string is one user message.'
    )
    model: str | None = Field(None, description='"default", or a name of /v1/models')
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: int | None = Field(None, description=f"Answers wanted, at most {MOST_ANSWERS}")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    grammar: dict[str, Any] | None = Field(
        None, description='{"type": "regex" | "json_schema" | "lark" | "llguidance", "value": ...}'
    )
    tools: Many[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = Field(None, description="Tokens of thought at most")
    chat_template_kwargs: TemplateOptions | None = None
    min_pixels: int | None = Field(None, description="Of every picture that has none of its own")
    max_pixels: int | Literal["full"] | None = None
    truncate_sequence: bool | None = Field(None, description="Drop the oldest turns of too many")
    # Labels of the client's own, without influence on the answer
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    # What OpenAI's server has, in the only form in which it is true here
    modalities: Many[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["medium"] | None = None
    store: bool | None = None

    impossible: ClassVar[Mapping[str, str]] = {
        "functions": _USE_TOOLS,
        "function_call": _USE_TOOLS,
        "audio": "the models make text only",
        "prediction": "start the server with --lookup: it guesses from the prompt by itself",
        "prompt_cache_options": "prefixes are kept while there is room, see --cache-folder",
        "prompt_cache_retention": "prefixes are kept while there is room, see --cache-folder",
        "store": "these answers are not kept; those of /v1/responses are",
        "moderation": "nothing is moderated here",
        "web_search_options": _NO_AGENT,
        "session_id": _NO_AGENT,
        "files": "send pictures as image_url parts",
        "max_tool_rounds": _NO_AGENT,
        "agent_permission": _NO_AGENT,
        "code_execution_permission": _NO_AGENT,
        "enable_shell": _NO_AGENT,
        "adapter": "LoRA adapters are not loaded; merge them into the checkpoint",
    }
    inner: ClassVar[Mapping[str, Shape]] = {
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": TOOL_CHOICE,
        "response_format": RESPONSE_FORMAT,
        "grammar": GRAMMAR,
    }

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def question(self) -> Question:
        """What is asked. Raises ApiError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options is for stream true; leave it out", param="stream_options"
            )
        if self.n is not None and not 1 <= self.n <= MOST_ANSWERS:
            raise ApiError(
                400,
                f"n must be 1 to {MOST_ANSWERS}, got {self.n}",
                param="n",
                code="invalid_value",
            )
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            raise ApiError(
                400,
                f"max_completion_tokens must be at least 1, got {self.max_completion_tokens}",
                param="max_completion_tokens",
                code="invalid_value",
            )
        messages = as_messages(self.messages)
        _check_results(messages)
        template = self.chat_template_kwargs or TemplateOptions()
        most = _one_of(max_tokens=self.max_tokens, max_completion_tokens=self.max_completion_tokens)
        return Question(
            messages=messages,
            model=self.model,
            sampling={**self.sampling(), "max_tokens": most},
            form=Form(
                self.tools,
                self.tool_choice,
                self.parallel_tool_calls,
                self.response_format,
                self.grammar,
            ),
            look=Look(self.min_pixels, self.max_pixels, bool(template.add_vision_id)),
            thinking=Thinking(
                _one_of(
                    enable_thinking=self.enable_thinking,
                    chat_template_kwargs=template.enable_thinking,
                ),
                _one_of(
                    reasoning_effort=self.reasoning_effort,
                    chat_template_kwargs=template.reasoning_effort,
                ),
                _one_of(
                    thinking_budget=self.thinking_budget,
                    chat_template_kwargs=template.thinking_budget,
                ),
            ),
            truncate=self.truncate_sequence,
            timeout=self.timeout,
            n=self.n or 1,
            fields=ChatFields.model_fields,
        )


def as_messages(messages: str | list[dict[str, Any]]) -> Messages:
    """A plain string is one user message."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def _check_results(messages: Messages) -> None:
    """Refuse a tool's result for a call that nobody made. One without an id follows its call."""
    made: set[str] = set()
    for at, message in enumerate(messages):
        if message.get("role") == "tool":
            answered = message.get("tool_call_id")
            if answered is not None and not (isinstance(answered, str) and answered in made):
                raise ApiError(
                    400,
                    f"messages[{at}].tool_call_id is {str(answered)[:100]!r}, which no tool call "
                    "before it has; send the assistant's message with the call too",
                    param=f"messages[{at}].tool_call_id",
                    code="invalid_value",
                )
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            ids = (call.get("id") for call in calls if isinstance(call, dict))
            made.update(each for each in ids if isinstance(each, str))


def _one_of(**values: Any) -> Any:
    """The value of two fields that mean the same; ApiError where they differ."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        first, second = given
        raise ApiError(400, f"{first} and {second} contradict each other; give one", param=first)
    return next(iter(given.values()), None)


def _bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    if wrong := [key for key in given if not key.isascii() or not key.isdecimal() or len(key) > 9]:
        raise ApiError(
            400,
            f'logit_bias has the key {wrong[0][:40]!r}; expected token ids such as "151645"',
            param="logit_bias",
            code="invalid_value",
        )
    return {int(key): value for key, value in given.items()}
