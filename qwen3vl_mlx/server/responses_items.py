"""Items of the Responses API: checked and completed, and as OpenAI chat messages."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.response_store import Item

Find: TypeAlias = Callable[[str], "Item | None"]

SYSTEM_ROLES = ("system", "developer")
_ROLES = (*SYSTEM_ROLES, "user", "assistant")
_TEXTS = ("input_text", "output_text", "text")
_IMAGES = ("input_image", "image_url")
_DETAILS = ("auto", "low", "high", "original")
_THOUGHTS = ("content", "encrypted_content", "summary")  # where a reasoning item may hold them
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}


def new_id(kind: str) -> str:
    """An id as OpenAI's look: by its beginning one sees what it names."""
    return f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"


def input_items(given: str | Sequence[Mapping[str, Any]], find: Find) -> list[Item]:
    """A request's input in one form: every item with type and id, every content a list of parts.

    find: an item that a reference names. Raises ApiError naming the place of what is wrong.
    """
    if isinstance(given, str):
        return [_item({"role": "user", "content": given}, "input", find)]
    if not given:
        raise _wrong("input", "is empty; send a text or a list of items")
    return [_item(item, f"input[{index}]", find) for index, item in enumerate(given)]


def _item(item: Mapping[str, Any], where: str, find: Find) -> Item:
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    if kind == "item_reference":
        name = _string(item, "id", where)
        found = find(name)
        if found is None:
            raise _wrong(f"{where}.id", f"names no item that is kept: {name!r}; send it whole")
        return found
    readers = {
        "message": _message,
        "reasoning": _reasoning,
        "function_call": _call,
        "function_call_output": _call_output,
    }
    if not isinstance(kind, str) or kind not in readers:
        raise _wrong(
            f"{where}.type",
            f"is {kind!r}; expected {', '.join(readers)} or item_reference: this server has no "
            "tools of its own",
        )
    own = item.get("id")
    name = new_id(kind) if own is None else _string(item, "id", where)
    if kind == "reasoning" and not any(item.get(key) for key in _THOUGHTS):
        found = find(name)  # clients that stream keep the id of a thought, and not its text
        if found is not None and found["type"] == kind:
            return found
    return {"id": name, "type": kind, **readers[kind](item, where), "status": "completed"}


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        raise _wrong(f"{where}.role", f"is {role!r}; expected one of {', '.join(_ROLES)}")
    parts = _parts(item.get("content"), f"{where}.content", said=role == "assistant")
    if role in SYSTEM_ROLES and any(part["type"] == "input_image" for part in parts):
        raise _wrong(f"{where}.content", f"of a {role} message is text; show pictures as the user")
    return {"role": role, "content": parts}


def _reasoning(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A thought of an earlier turn: as this server told it, or what others made known of it."""
    thoughts = item.get("content") or _opened(item.get("encrypted_content"))
    told = thoughts or item.get("summary") or []
    if not isinstance(told, list) or not all(isinstance(part, Mapping) for part in told):
        raise _wrong(f"{where}.content", "must be a list of reasoning_text parts")
    texts = [_string(part, "text", f"{where}.content[{at}]") for at, part in enumerate(told)]
    return {
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text} for text in texts],
    }


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {name: _string(item, name, where) for name in ("call_id", "name", "arguments")}


def _call_output(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    output = item.get("output")
    if not isinstance(output, str):
        output = _parts(output, f"{where}.output", said=False)
    return {"call_id": _string(item, "call_id", where), "output": output}


def _parts(content: object, where: str, *, said: bool) -> list[dict[str, Any]]:
    """said: by the model."""
    if isinstance(content, str):
        return [_text_part(content, said)]
    if not isinstance(content, list):
        raise _wrong(where, f"is {_named(content)}; expected a text or a list of parts")
    return [_part(part, f"{where}[{at}]", said) for at, part in enumerate(content)]


def _part(part: object, where: str, said: bool) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise _wrong(where, 'must be a part such as {"type": "input_text", "text": ...}')
    if kind in _TEXTS:
        return _text_part(_string(part, "text", where), said)
    if kind == "refusal":
        return {"type": "refusal", "refusal": _string(part, "refusal", where)}
    if kind in _IMAGES:
        return _image_part(part, where)
    raise _wrong(
        f"{where}.type", f"is {kind!r}; expected input_text, input_image, output_text or refusal"
    )


def _text_part(text: str, said: bool) -> dict[str, Any]:
    if said:
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}


def _image_part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    if part.get("file_id") is not None:
        raise _wrong(
            f"{where}.file_id", "names a file, and this server keeps none; send an image_url"
        )
    url = part.get("image_url")
    if isinstance(url, Mapping):  # as chat completions have it
        part, url = {**part, **url}, url.get("url")
    if not isinstance(url, str):
        raise _wrong(f"{where}.image_url", f"is {_named(url)}; expected a string")
    detail = part.get("detail") or "auto"
    if not isinstance(detail, str) or detail not in _DETAILS:
        raise _wrong(f"{where}.detail", f"is {detail!r}; expected one of {', '.join(_DETAILS)}")
    return {"type": "input_image", "image_url": url, "detail": detail, **_pixels(part)}


def chat_messages(items: Sequence[Item]) -> tuple[list[dict[str, Any]], list[int]]:
    """Items as chat messages, and for each message the index of the item it began with.

    What the model did in one turn, thoughts, text and calls, becomes one message.
    """
    messages: list[dict[str, Any]] = []
    places: list[int] = []
    for index, item in enumerate(items):
        if item["type"] == "reasoning" and not item["content"]:
            continue  # a thought that another server has encrypted
        message = _chat_message(item)
        if messages and _goes_on(messages[-1], message):
            _join(messages[-1], message)
        else:
            messages.append(message)
            places.append(index)
    return [_plain(message) for message in messages], places


def _chat_message(item: Item) -> dict[str, Any]:
    kind = item["type"]
    if kind == "function_call_output":
        output = item["output"]
        content = output if isinstance(output, str) else [_chat_part(part) for part in output]
        return {"role": "tool", "tool_call_id": item["call_id"], "content": content}
    if kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        return {"role": "assistant", "content": [], "tool_calls": [call]}
    if kind == "reasoning":
        thought = "".join(part["text"] for part in item["content"])
        return {"role": "assistant", "content": [], "reasoning_content": [thought]}
    return {"role": item["role"], "content": [_chat_part(part) for part in item["content"]]}


def _goes_on(message: Mapping[str, Any], following: Mapping[str, Any]) -> bool:
    """Whether `following` belongs to the model's turn that `message` holds so far."""
    if message["role"] != "assistant" or following["role"] != "assistant":
        return False
    if "tool_calls" in following:
        return True
    if "reasoning_content" in following:
        return not message["content"] and "tool_calls" not in message
    return not message["content"] or "tool_calls" in message


def _join(message: dict[str, Any], following: Mapping[str, Any]) -> None:
    for name in ("content", "reasoning_content", "tool_calls"):
        if name in following:
            message.setdefault(name, []).extend(following[name])


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """The model's thought and text as one string each, as chat clients hand them back."""
    if "reasoning_content" in message:
        message["reasoning_content"] = "".join(message["reasoning_content"])
    content = message["content"]
    if message["role"] == "assistant" and all(part["type"] == "text" for part in content):
        message["content"] = "".join(part["text"] for part in content)
    return message


def _chat_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] != "input_image":
        return {"type": "text", "text": part["refusal" if part["type"] == "refusal" else "text"]}
    image = {"url": part["image_url"], "detail": part["detail"]}
    return {"type": "image_url", "image_url": image, **_pixels(part)}


def _pixels(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part[name] for name in ("min_pixels", "max_pixels") if name in part}


def sealed(thought: str) -> str:
    """A thought as clients without a store of ours hand it back. It is no secret: they see it."""
    return base64.b64encode(thought.encode(errors="surrogatepass")).decode()


def _opened(content: object) -> list[dict[str, str]]:
    """`sealed` undone; nothing for what another server has encrypted."""
    if not isinstance(content, str):
        return []
    try:
        thought = base64.b64decode(content, validate=True)
        return [{"text": thought.decode(errors="surrogatepass")}]
    except ValueError:  # base64 and Unicode
        return []


def _string(holder: Mapping[str, Any], name: str, where: str) -> str:
    value = holder.get(name)
    if not isinstance(value, str):
        raise _wrong(f"{where}.{name}", f"is {_named(value)}; expected a string")
    return value


def _named(value: object) -> str:
    return "missing or null" if value is None else f"of type {type(value).__name__}"


def _wrong(where: str, fault: str) -> ApiError:
    return ApiError(400, f"{where} {fault}", param=where, code="invalid_value")
