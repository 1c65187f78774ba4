"""OpenAI chat messages -> the prompt's text, by the checkpoint's own Jinja template.

Text that people or tools typed never turns into control tokens: a literal such as `<|im_end|>` is
cut after its first character, and the pieces of the prompt are tokenized apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3vl_mlx.errors import CheckpointError, PromptError
from qwen3vl_mlx.processing.assistant_media import media_as_text
from qwen3vl_mlx.processing.tokenizer import (
    Tokenizer,
    absent_character,
    cut_literals,
    literal_start,
)

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_KIND_OF_TYPE: Final[Mapping[str, str]] = {
    "text": "text",
    "input_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
# What a template's own arithmetic, lookups and filters can raise, besides Jinja's errors.
_RENDER_ERRORS: Final = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class RenderedPrompt:
    """A rendered conversation. `pieces` joined are `text`; they are tokenized one by one.

    There is a single piece unless somebody typed the literal of a control token.
    """

    text: str
    pieces: tuple[str, ...]


class ChatTemplate:
    """A checkpoint's chat template, compiled once; `render` may be called from any thread.

    `opens_thinking` is true when the generation prompt itself ends with `<think>` and a newline
    (Thinking checkpoints), so that the model's output starts inside its reasoning.
    """

    def __init__(
        self, source: str, *, added_tokens: Collection[str], special_tokens: Collection[str]
    ) -> None:
        """Compile `source`. Literals as in `Tokenizer.added_tokens` and `.special_tokens`.

        CheckpointError when the template does not compile or cannot render a plain message.
        """
        self._source = source
        self._template = _compile(source)
        self._any_literal = literal_start(added_tokens)
        self._special_literal = literal_start(special_tokens)
        user = {"role": "user", "content": "probe"}
        try:
            prompt = self._template.render(messages=[user], add_generation_prompt=True)
        except _RENDER_ERRORS as error:
            raise CheckpointError(
                f"the chat template cannot render a plain user message: {error}. "
                "Take chat_template.jinja from the original Qwen3-VL model"
            ) from error
        self.opens_thinking = prompt.endswith("<think>\n")
        self._drops_later_system = self._drops([user, {"role": "system", "content": "late"}])

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """The template of a checkpoint folder; `tokenizer` is read from there unless given.

        Looked for in chat_template.jinja, chat_template.json and tokenizer_config.json, in this
        order, as transformers does. CheckpointError when there is none, or it is damaged.
        """
        path, source = _find_source(folder)
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
        try:
            return cls(
                source,
                added_tokens=tokenizer.added_tokens,
                special_tokens=tokenizer.special_tokens,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
    ) -> RenderedPrompt:
        """Render OpenAI chat messages; neither they nor `tools` are changed.

        An image or video part becomes the template's placeholder, whatever its payload. With
        `add_vision_id` each is numbered. PromptError when messages or tools are malformed, or
        when the template refuses them.
        """
        try:
            conversation = normalize_messages(messages)
            schemas = _checked_tools(tools)
            mark = absent_character([self._source, *_strings([conversation, schemas])])
            guarded = [media_as_text(self._guard(message, mark)) for message in conversation]
            schemas = _map_strings(schemas, self._special_cutter(mark))
        except RecursionError as error:
            raise PromptError("messages or tools are nested too deeply; flatten them") from error
        self._check_system_place(guarded)
        try:
            rendered = self._template.render(
                messages=guarded,
                tools=schemas or None,
                add_generation_prompt=add_generation_prompt,
                add_vision_id=add_vision_id,
            )
        except _RENDER_ERRORS as error:
            raise PromptError(f"the chat template refused these messages: {error}") from error
        pieces = tuple(filter(None, rendered.split(mark))) or ("",)
        return RenderedPrompt("".join(pieces), pieces)

    def _drops(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the last message leaves no trace. One that is refused is not dropped."""
        try:
            shown, without = (self._template.render(messages=m) for m in (messages, messages[:-1]))
            return shown == without
        except _RENDER_ERRORS:
            return False

    def _check_system_place(self, conversation: Sequence[Mapping[str, Any]]) -> None:
        """Instruct templates leave out every system message but the first: say so instead."""
        for index, message in enumerate(conversation):
            if index and message["role"] == "system" and self._drops_later_system:
                raise PromptError(
                    f"messages[{index}] is a system message, and this checkpoint's template reads "
                    "one only in the first place; move its text to messages[0] or to a user message"
                )

    def _guard(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """A copy with `mark` inside every literal that must not become a token.

        What the model said (and the operator's system text) keeps `<think>`, `<tool_call>` and
        other tokens that are not special: templates look for them there.
        """
        others = {key: value for key, value in message.items() if key != "content"}
        guarded: dict[str, Any] = _map_strings(others, self._special_cutter(mark))
        untrusted = message["role"] in ("user", "tool")
        literal = self._any_literal if untrusted else self._special_literal
        content = message["content"]
        if isinstance(content, str):
            (guarded["content"],) = cut_literals([content], literal, mark)
            return guarded
        # Templates join the parts, so a literal may begin in one and end in another.
        texts = cut_literals([part.get("text", "") for part in content], literal, mark)
        guarded["content"] = [
            {**part, "text": text} if "text" in part else part
            for part, text in zip(content, texts, strict=True)
        ]
        return guarded

    def _special_cutter(self, mark: str) -> Callable[[str], str]:
        return lambda text: cut_literals([text], self._special_literal, mark)[0]


def part_kind(part: Mapping[str, Any]) -> str | None:
    """'text', 'image' or 'video': what a content part is, None when it is none of them.

    By its `type`, or by the key that holds its payload when there is no `type` (Qwen style).
    """
    if "type" in part:
        kind = part["type"]
        return _KIND_OF_TYPE.get(kind) if isinstance(kind, str) else None
    kinds = {kind for key, kind in _KIND_OF_TYPE.items() if part.get(key) is not None}
    return kinds.pop() if len(kinds) == 1 else None


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checked copies of OpenAI chat messages, in the shape that Qwen's templates read.

    Roles are system, user, assistant and tool; `content` is a string or a list of
    {"type": "text", "text": str}, {"type": "image"} and {"type": "video"} in the given order;
    payloads of media and unknown keys are left out. PromptError names the message at fault.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise PromptError(f"messages is {_named(messages)}; expected a list of chat messages")
    if not messages:
        raise PromptError('messages is empty; send at least one, {"role": "user", "content": ...}')
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is {_named(message)}; expected an object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise PromptError(f"{where}.role is {role!r}; expected one of {', '.join(_ROLES)}")
    plain: dict[str, Any] = {"role": "system" if role == "developer" else role}
    key = "reasoning" if message.get("reasoning_content") is None else "reasoning_content"
    if role == "assistant" and message.get(key) is not None:
        plain["reasoning_content"] = _string(message[key], f"{where}.{key}")
    if calls := message.get("tool_calls"):
        if role != "assistant":
            raise PromptError(f"{where} has tool_calls, but its role is {role}, not assistant")
        plain["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    if content is None and not plain.keys().isdisjoint({"tool_calls", "reasoning_content"}):
        content = ""  # OpenAI's null beside tool_calls; templates would fail on it
    plain["content"] = _content(content, f"{where}.content")
    return plain


def _content(content: object, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"{where} is {_named(content)}; expected a string or a list of parts")
    return [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _part(part: object, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise PromptError(
            f'{where} is {_named(part)}; expected a part such as {{"type": "text", "text": ...}}'
        )
    kind = part_kind(part)
    if kind is None:
        raise PromptError(
            f"{where} is of unknown type {part.get('type')!r}; "
            f"expected one of {', '.join(_KIND_OF_TYPE)}"
        )
    if kind != "text":
        return {"type": kind}
    return {"type": "text", "text": _string(part.get("text"), f"{where}.text")}


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise PromptError(f"{where} is {_named(calls)}; expected a list of calls")
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """Accepts OpenAI's {"function": {"name", "arguments"}} and the bare inner object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise PromptError(f'{where} must be an object with "function": {{"name", "arguments"}}')
    arguments = function.get("arguments")
    if not isinstance(arguments, str | Mapping):
        raise PromptError(
            f"{where}: arguments is {_named(arguments)}; expected a JSON string or an object"
        )
    name = _string(function.get("name"), f"{where}: name")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _checked_tools(tools: object) -> list[Mapping[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise PromptError(f"tools is {_named(tools)}; expected a list of tool schemas")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise PromptError(f"tools[{index}] is {_named(tool)}; expected a JSON schema object")
    return list(tools)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{where} is {_named(value)}; expected a string")
    return value


def _named(value: object) -> str:
    return "missing or null" if value is None else f"of type {type(value).__name__}"


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string changed, keys of objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(k, change): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _compile(source: str) -> jinja2.Template:
    """The environment in which transformers renders chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template does not compile, line {error.lineno}: {error.message}. "
            "Take chat_template.jinja from the original Qwen3-VL model"
        ) from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` would escape HTML and sort the keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _find_source(folder: Path) -> tuple[Path, str]:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja, _read(jinja)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and (source := _source_in(path)) is not None:
            return path, source
    raise CheckpointError(
        f"{folder} has no chat template: no chat_template.jinja, and no chat_template in "
        "chat_template.json or tokenizer_config.json. Download the checkpoint again, or copy "
        "chat_template.jinja from the original model"
    )


def _source_in(path: Path) -> str | None:
    """The `chat_template` of a JSON file: a string, or the one named default in a list."""
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); download the checkpoint again"
        ) from error
    value = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(value, list):
        value = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }.get("default", value)
    if value is None or isinstance(value, str):
        return value
    raise CheckpointError(
        f'{path}: chat_template must be a string, or a list with one named "default"'
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 text ({error}); download the checkpoint again"
        ) from error
