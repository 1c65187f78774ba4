"""Anthropic's messages in the words of OpenAI's, which the templates and the engine speak."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from qwen3vl_mlx.asking import Form, Look
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.messages_fields import (
    AnyTool,
    Base64Source,
    Block,
    CountBody,
    ImageBlock,
    Other,
    Seen,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolUseBlock,
    UrlSource,
)
from qwen3vl_mlx.server.question import Question, Thinking

_TAKES: Final[Mapping[str, tuple[str, ...]]] = {
    "system": ("text",),
    "user": ("text", "image", "tool_result"),
    "assistant": ("thinking", "text", "image", "tool_use"),
    "tool_result": ("text", "image"),
}
_ADVICE: Final[Mapping[str, str]] = {
    "document": "send its text, or pictures of its pages",
    "redacted_thinking": "only Anthropic can read it; leave it out",
    "search_result": "send its text",
}
# A chat message holds a thought, then its content, then calls; a result is a message of its own.
_ORDER: Final[Mapping[str, int]] = {
    "thinking": 0,
    "text": 1,
    "image": 1,
    "tool_use": 2,
    "tool_result": 3,
}
_CHOICES: Final[Mapping[str, str]] = {"auto": "auto", "any": "required", "none": "none"}
_PLACE: Final = re.compile(r"messages\[\d+\](?:\.content\[\d+\](?:\.image_url(?:\.url)?)?)?")
_THEIR_NAMES: Final[Mapping[str, str]] = {
    "enable_thinking": "thinking",
    "thinking_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
}


def question(body: CountBody, messages: Sequence[Mapping[str, Any]]) -> Question:
    """What is asked, but for sampling. messages: of `chat_messages`. Raises ApiError."""
    tools = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or [])]
    choice, output = body.tool_choice, body.output_config
    answer = output.format if output is not None else None
    return Question(
        messages=messages,
        model=body.model,
        form=Form(
            tools=tools or None,
            tool_choice=_choice(choice),
            parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
            response_format=(
                {"type": "json_schema", "json_schema": {"schema": answer.schema_}}
                if answer is not None
                else None
            ),
        ),
        look=Look(body.min_pixels, body.max_pixels),
        thinking=_thinking(body),
        fields=type(body).model_fields,
    )


def chat_messages(body: CountBody) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """OpenAI messages, and what their parts are called in the request. Raises ApiError.

    Neighbours of the same role are one turn. A block that cannot follow its neighbour inside one
    chat message, such as text behind a call, begins another, so that the order stays.
    """
    if body.messages[-1].role == "assistant":
        raise ApiError(
            400,
            "messages ends with the assistant's turn, and this server begins every answer anew "
            "(no prefill); end with a user message",
            param="messages",
            code="unsupported_value",
        )
    chat: list[dict[str, Any]] = []
    places: dict[str, str] = {}
    turn, order = "", 0
    for role, where, block in _blocks(body):
        _check_place(role, where, block)
        begins = role != turn or _ORDER[block.type] < order or block.type == "tool_result"
        if begins:
            places[f"messages[{len(chat)}]"] = where.partition(".")[0]
            chat.append({"role": role, "content": []})
        turn, order = role, _ORDER[block.type]
        for inner, part in _add(chat[-1], block, where):
            content = chat[-1]["content"]
            places[f"messages[{len(chat) - 1}].content[{len(content)}]"] = inner
            content.append(part)
    return chat, places


def in_their_words(error: ApiError, places: Mapping[str, str]) -> ApiError:
    """The same failure, naming what the client sent. places: of `chat_messages`."""

    def place(found: re.Match[str]) -> str:
        return places.get(found[0].partition(".image_url")[0], found[0])

    message = _PLACE.sub(place, error.message)
    for ours, theirs in _THEIR_NAMES.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return replace(error, message=message)


def _blocks(body: CountBody) -> Iterator[tuple[str, str, Block]]:
    """Role, name and block, one by one."""
    for at, block in enumerate(body.system):
        yield "system", f"system[{at}]", block
    for number, message in enumerate(body.messages):
        for at, inner in enumerate(message.content):
            yield message.role, f"messages[{number}].content[{at}]", inner


def _check_place(role: str, where: str, block: Block) -> None:
    if block.type not in _TAKES[role]:
        advice = _ADVICE.get(block.type, "leave it out")
        raise ApiError(
            400,
            f"{where}: a block of type {block.type[:40]!r} is not supported in {role} content, "
            f"which holds {', '.join(_TAKES[role])}; {advice}",
            param=where,
            code="unsupported_value",
        )


def _add(message: dict[str, Any], block: Block, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Put a block into a message; what belongs into its content is left to do, with its name."""
    if isinstance(block, ThinkingBlock):
        message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
    elif isinstance(block, ToolUseBlock):
        call = {"name": block.name, "arguments": block.input}
        message.setdefault("tool_calls", []).append(
            {"id": block.id, "type": "function", "function": call}
        )
    elif isinstance(block, (TextBlock, ImageBlock, Other)):
        yield where, _part(block, where)
    else:
        message.update(role="tool", tool_call_id=block.tool_use_id)
        if block.is_error:  # chat messages have no other word for it
            yield where, {"type": "text", "text": "Error: "}
        for at, inner in enumerate(block.content):
            place = f"{where}.content[{at}]"
            _check_place("tool_result", place, inner)
            yield place, _part(inner, place)


def _part(block: Seen, where: str) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    source = block.source if isinstance(block, ImageBlock) else block
    if isinstance(source, Base64Source):
        url = f"data:{source.media_type};base64,{source.data}"
    elif isinstance(source, UrlSource):
        url = source.url
    else:
        raise ApiError(
            400,
            f"{where}.source: type {source.type[:40]!r} is not supported; expected base64 or url",
            param=where,
            code="unsupported_value",
        )
    return {"type": "image_url", "image_url": {"url": url}}


def _tool(tool: AnyTool, where: str) -> dict[str, Any]:
    if isinstance(tool, Other):
        raise ApiError(
            400,
            f"{where}: type {tool.type[:40]!r} is a tool that Anthropic runs or defines; declare "
            "one of your own, with name, description and input_schema",
            param=where,
            code="unsupported_value",
        )
    schema = dict(tool.input_schema)
    if tool.input_examples:
        schema["examples"] = tool.input_examples  # JSON Schema's own place for them
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": schema,
        "strict": tool.strict,
    }
    given = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": given}


def _choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return _CHOICES[choice.type]


def _thinking(body: CountBody) -> Thinking:
    """An explicit budget says more than an effort; "high" and "adaptive" are what models do."""
    config = body.thinking
    effort = body.output_config.effort if body.output_config is not None else None
    if effort == "high":
        effort = None
    if config is None or config.type == "adaptive":
        return Thinking(effort=effort)
    if config.type == "disabled":
        return Thinking(enabled=False)
    budget = config.budget_tokens
    return Thinking(True, effort if budget is None else None, budget)
