"""The body of POST /v1/responses: OpenAI's fields, with this package's sampling beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from qwen3vl_mlx.asking import Form, Look
from qwen3vl_mlx.processing.processor import Messages
from qwen3vl_mlx.server.chat_fields import SamplingFields
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.fields import Fields, Many
from qwen3vl_mlx.server.known_keys import FLAT_TOOLS, ITEMS, TOOL_CHOICE, Shape
from qwen3vl_mlx.server.question import Question, Thinking

_LOGPROBS = "message.output_text.logprobs"
# Names of a question that errors may begin with, and that are called otherwise here
_ELSEWHERE = ("messages", "response_format")
_SEALED = "reasoning.encrypted_content"


class Reasoning(Fields):
    """For Thinking models. Their thoughts are told as they are, not as summaries."""

    effort: str | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto", "current_turn"] | None = None
    mode: Literal["standard"] | None = None


class TextFormat(Fields):
    """What the text must be: anything, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def response_format(self) -> dict[str, Any]:
        """As chat completions have it."""
        if self.type != "json_schema":
            return {"type": self.type}
        if self.schema_ is None:
            raise ApiError(
                400,
                "text.format.schema is missing; give a JSON schema",
                param="text.format.schema",
                code="missing_required_parameter",
            )
        wanted = {"name": self.name, "schema": self.schema_, "strict": self.strict}
        return {"type": "json_schema", "json_schema": wanted}


class Text(Fields):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class StreamOptions(Fields):
    include_obfuscation: Literal[False] | None = None


class ResponseFields(SamplingFields):
    """A request for a response. Only `input` is required."""

    input: str | Many[dict[str, Any]] = Field(
        description="A text, or items: messages (with input_text and input_image parts), "
        "function_call, function_call_output (a text or such parts), reasoning, item_reference"
    )
    model: str | None = Field(None, description='"default", or a name of /v1/models')
    instructions: str | None = Field(None, description="System message of this request alone")
    previous_response_id: str | None = Field(None, description="Go on from a stored response")
    store: bool | None = Field(None, description="Keep the response in memory; unset: true")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: (
        Many[
            Literal[
                "message.output_text.logprobs",
                "message.input_image.image_url",
                "reasoning.encrypted_content",
            ]
        ]
        | None
    ) = None
    max_output_tokens: int | None = Field(None, description="Of thoughts and text together")
    max_tokens: int | None = Field(None, description="Refused: here it is max_output_tokens")
    max_tool_calls: int | None = Field(None, description="Of built-in tools: there are none")
    top_logprobs: int | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    tools: Many[dict[str, Any]] | None = Field(
        None, description='{"type": "function", "name": ..., "parameters": {...}, "strict": true}'
    )
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    thinking_budget: int | None = Field(None, description="Tokens of thought at most")
    enable_thinking: bool | None = None
    min_pixels: int | None = Field(None, description="Of every picture that has none of its own")
    max_pixels: int | Literal["full"] | None = None
    # Labels of the client's own, without influence on the answer
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    impossible: ClassVar[Mapping[str, str]] = {
        "background": "answers are made while the client waits; use stream",
        "background_options": "answers are made while the client waits; use stream",
        "conversation": "go on by previous_response_id",
        "prompt": "no prompt templates are kept here; send instructions and input",
        "context_management": "use truncation",
        "moderation": "nothing is moderated here",
        "access_programs": "there are none here",
        "image": "use the detail of an input_image, min_pixels and max_pixels",
        "prompt_cache_options": "prefixes are kept while there is room, see --cache-folder",
        "prompt_cache_retention": "prefixes are kept while there is room, see --cache-folder",
        "max_tokens": "here it is max_output_tokens",
        "max_completion_tokens": "here it is max_output_tokens",
        "response_format": "here it is text.format",
        "messages": "here they are items of input",
    }
    inner: ClassVar[Mapping[str, Shape]] = {
        "input": ITEMS,
        "tools": FLAT_TOOLS,
        "tool_choice": TOOL_CHOICE,
    }

    @property
    def wants_sealed(self) -> bool:
        return _SEALED in (self.include or ())

    def question(self, messages: Messages) -> Question:
        """What is asked, with these messages for the input. Raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options is for stream true; leave it out", param="stream_options"
            )
        reasoning = self.reasoning or Reasoning()
        text_format = self.text.format if self.text is not None else None
        return Question(
            messages=messages,
            model=self.model,
            sampling={
                **self.sampling(),
                "max_tokens": self.max_output_tokens,
                "logprobs": _LOGPROBS in (self.include or ()) or bool(self.top_logprobs),
                "top_logprobs": self.top_logprobs,
            },
            form=Form(
                self._chat_tools(),
                self.tool_choice,
                self.parallel_tool_calls,
                text_format.response_format() if text_format is not None else None,
            ),
            look=Look(self.min_pixels, self.max_pixels),
            thinking=Thinking(self.enable_thinking, reasoning.effort, self.thinking_budget),
            truncate=None if self.truncation is None else self.truncation == "auto",
            timeout=self.timeout,
            fields=(*ResponseFields.model_fields, *_ELSEWHERE),
        )

    def _chat_tools(self) -> list[dict[str, Any]] | None:
        """Functions in the nested form of chat completions, which the models were taught."""
        if self.tools is None:
            return None
        for at, tool in enumerate(self.tools):
            if tool.get("type") != "function":
                raise ApiError(
                    400,
                    f'tools[{at}].type is {tool.get("type")!r}; expected "function": this server '
                    "runs no tools by itself",
                    param=f"tools[{at}].type",
                    code="unsupported_value",
                )
        return [
            {"type": "function", "function": {k: v for k, v in tool.items() if _told(k, v)}}
            for tool in self.tools
        ]


def _told(name: str, value: object) -> bool:
    """What of a tool the model is shown; `strict` only where it asks for something."""
    return name in ("name", "description", "parameters") or (name == "strict" and value is True)
