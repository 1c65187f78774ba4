"""GET /docs: every route with examples that run as they are, on a page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from qwen3vl_mlx.server.examples import PICTURE

_PAGE = "/docs"
_FILES = "/docs/files"
_OPENAPI = "/openapi.json"
_OPENAPI_OF_MISTRAL_RS = "/api-doc/openapi.json"
# By path, method and name, answers of the demo. An object is JSON, a list the events of a stream
# and a string plain text. Written by `python tests/test_server_docs.py`.
ANSWERS: Final = Path(__file__).with_name("answers.json")
_SETTINGS: Final = {
    "tryItOutEnabled": True,
    "displayRequestDuration": True,
    "persistAuthorization": True,
    "defaultModelsExpandDepth": -1,
}


def add_docs(app: FastAPI) -> None:
    """Add the page, and describe all routes when they are first asked for."""
    # Starlette finds the package's files without importing it.
    app.mount(_FILES, StaticFiles(packages=[("fastapi_offline", "static")]))

    @app.get(_PAGE, include_in_schema=False)
    def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=_OPENAPI,
            title=app.title,
            swagger_js_url=f"{_FILES}/swagger-ui-bundle.js",
            swagger_css_url=f"{_FILES}/swagger-ui.css",
            swagger_favicon_url=f"{_FILES}/favicon.png",
            swagger_ui_parameters=dict(_SETTINGS),
        )

    @app.get(_OPENAPI_OF_MISTRAL_RS, include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    generate = app.openapi

    def described() -> dict[str, Any]:
        known = app.openapi_schema
        schema = generate()
        if schema is not known:
            _describe(schema, with_key=bool(app.state.serving.options.api_keys))
        return schema

    app.openapi = described  # type: ignore[method-assign]


def _describe(schema: dict[str, Any], with_key: bool) -> None:
    """Add to FastAPI's description what it cannot know: examples, streams, failures and keys."""
    components = schema["components"]
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own shape of failures
        components["schemas"].pop(unused, None)
    components["schemas"].update(_FAILURES)
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    answers = json.loads(ANSWERS.read_text(encoding="utf-8"))
    for path, operations in schema["paths"].items():
        examples = EXAMPLES.get(path, {})
        for method, operation in operations.items():
            said = operation.get("description", operation["summary"])
            operation["summary"] = said.partition("\n")[0]
            responses = operation["responses"]
            responses.pop("422", None)
            responses["default"] = _failure(path)
            if "requestBody" in operation:
                body = operation["requestBody"]["content"]["application/json"]
                body["examples"] = {name: {"value": value} for name, value in examples.items()}
            if path in _REFUSED:
                del responses["200"]
            elif told := answers.get(path, {}).get(method):
                responses["200"] = _success(told)
            if path == "/health":
                shape = responses["200"]["content"]["application/json"]["schema"]
                content = {"application/json": {"schema": shape}}
                responses["503"] = {"description": "Not ready", "content": content}


_REFUSED: Final = ("/v1/responses/{response_id}/cancel",)  # always


def _success(answers: Mapping[str, Any]) -> dict[str, Any]:
    """The description of status 200. answers: by name, as in the file."""
    content: dict[str, dict[str, Any]] = {}
    for name, answer in answers.items():
        kind, shown = "application/json", answer
        if isinstance(answer, list):
            kind, shown = "text/event-stream", "\n\n".join(answer) + "\n\n"
        elif isinstance(answer, str):
            kind = "text/plain"
        content.setdefault(kind, {"examples": {}})["examples"][name] = {"value": shown}
    whole = [answer for answer in answers.values() if isinstance(answer, dict)]
    if whole:
        content["application/json"]["schema"] = _shape_of(whole)
    return {"description": "Answered", "content": content}


def _shape_of(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of objects like these: what all of them have, and the types it has in all."""
    common = [name for name in answers[0] if all(name in answer for answer in answers)]
    return _object(
        **{
            name: _type_of([answer[name] for answer in answers], _VARIES.get(name, ()))
            for name in common
            if name not in _SOMETIMES
        }
    )


def _type_of(values: list[Any], others: tuple[str, ...]) -> dict[str, Any]:
    if None in values:
        return {}  # what it is when it is there, the examples do not show
    types = dict.fromkeys([*(_TYPES[type(value)] for value in values), *others])
    return {"type": [*types]} if len(types) > 1 else {"type": next(iter(types))}


_TYPES: Final = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
# Fields of answers that may be of another type than in the examples, or not there
_VARIES: Final[Mapping[str, tuple[str, ...]]] = {
    "first_id": ("null",),
    "last_id": ("null",),
    "max_model_len": ("null",),
    "max_output_tokens": ("null",),
    "tool_choice": ("object",),
}
_SOMETIMES: Final = ("completed_at",)


_TEXT: Final = {"type": "string"}
_MAYBE_TEXT: Final = {"type": ["string", "null"]}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_FAILURES: Final = {
    "OpenAIError": _object(
        error=_object(message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT)
    ),
    "AnthropicError": _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT)),
}


def _failure(path: str) -> dict[str, Any]:
    name = "AnthropicError" if path.startswith("/v1/messages") else "OpenAIError"
    shape = {"$ref": f"#/components/schemas/{name}"}
    return {"description": "Refused or failed", "content": {"application/json": {"schema": shape}}}


_QUESTION: Final = "Describe the image."
_SHORT: Final = {"max_tokens": 32, "temperature": 0}
_PROMPT: Final = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
_SCHEMA: Final = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"enum": [1, 2, 3]}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
_CHAT: Final = {
    "model": "default",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": PICTURE}},
                {"type": "text", "text": _QUESTION},
            ],
        }
    ],
}
_TOOL: Final = {
    "name": "report",
    "description": "Report what is in the picture.",
    "parameters": _SCHEMA,
}
_RESPONSE: Final = {
    "model": "default",
    "input": [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": PICTURE},
                {"type": "input_text", "text": _QUESTION},
            ],
        }
    ],
    "max_output_tokens": 32,
    "temperature": 0,
}
_MESSAGE: Final = {
    "model": "default",
    "messages": [
        {
            "role": "user",
            "content": [
                {
                    "type": "image",
                    "source": {
                        "type": "base64",
                        "media_type": "image/png",
                        "data": PICTURE.partition(",")[2],
                    },
                },
                {"type": "text", "text": _QUESTION},
            ],
        }
    ],
}

# By path and by what they show: bodies that any checkpoint can answer.
EXAMPLES: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "/v1/chat/completions": {
        "a picture": {**_CHAT, **_SHORT},
        "a stream": {
            **_CHAT,
            **_SHORT,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "JSON of a schema": {
            **_CHAT,
            **_SHORT,
            "max_tokens": 128,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "disc", "schema": _SCHEMA, "strict": True},
            },
        },
        "a tool": {
            **_CHAT,
            **_SHORT,
            "max_tokens": 64,
            "tools": [{"type": "function", "function": _TOOL}],
            "tool_choice": "required",
        },
    },
    "/v1/completions": {
        "a text": {"model": "default", "prompt": _PROMPT, **_SHORT},
        "a stream": {"model": "default", "prompt": _PROMPT, **_SHORT, "stream": True},
    },
    "/v1/responses": {
        "a picture": _RESPONSE,
        "a stream": {**_RESPONSE, "stream": True},
        "JSON of a schema": {
            **_RESPONSE,
            "max_output_tokens": 128,
            "text": {"format": {"type": "json_schema", "name": "disc", "schema": _SCHEMA}},
        },
    },
    "/v1/messages": {
        "a picture": {**_MESSAGE, **_SHORT},
        "a stream": {**_MESSAGE, **_SHORT, "stream": True},
    },
    "/v1/messages/count_tokens": {"a picture": _MESSAGE},
    "/tokenize": {
        "a text": {"prompt": "What is 3 + 4?", "return_token_strs": True},
        "a picture": {"messages": _CHAT["messages"]},
    },
    "/detokenize": {"tokens": {"tokens": [50, 51, 52]}},
    "/v1/images/tokens": {
        "a size": {"images": [{"width": 4032, "height": 3024}]},
        "a picture": {"images": [{"image_url": PICTURE, "detail": "low"}]},
    },
    "/re_isq": {"our name": {"quantize": "8bit"}, "mistral.rs's name": {"ggml_type": "Q8_0"}},
}
