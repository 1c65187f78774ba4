"""Tokens of texts, conversations and pictures: vLLM's /tokenize and /detokenize, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.asking import Look
from qwen3vl_mlx.errors import Qwen3VLError
from qwen3vl_mlx.media_decode import check_size
from qwen3vl_mlx.models.positions import Grid
from qwen3vl_mlx.processing.image import VisionSettings, smart_resize
from qwen3vl_mlx.processing.processor import Messages, Processor
from qwen3vl_mlx.server.body import JsonRoute
from qwen3vl_mlx.server.chat_fields import TemplateOptions
from qwen3vl_mlx.server.completion_logprobs import token_name
from qwen3vl_mlx.server.errors import ApiError, as_api_error
from qwen3vl_mlx.server.fields import Fields, Long, Many, check_fields
from qwen3vl_mlx.server.known_keys import IMAGE_URL, MESSAGES, TOOLS, Shape
from qwen3vl_mlx.server.layouts import check_countable
from qwen3vl_mlx.server.picture_parts import Wanted, find_wanted
from qwen3vl_mlx.server.question import while_connected
from qwen3vl_mlx.server.reply import JsonReply
from qwen3vl_mlx.server.serving import Serving, ServingOf

router = APIRouter(route_class=JsonRoute, tags=["Tokens"])

_TOKENS_AROUND = 2  # <|vision_start|> and <|vision_end|>


def check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise ApiError for a token that the model does not have."""
    if wrong := [token for token in token_ids if not 0 <= token < vocab_size]:
        raise ApiError(
            400,
            f"{name} holds {wrong[0]}; token ids go from 0 to {vocab_size - 1}",
            param=name,
            code="invalid_value",
        )


class TokenizeFields(Fields):
    """A text, or a conversation with pictures as /v1/chat/completions takes it."""

    model: str | None = None
    prompt: str | None = Field(None, description="A text, without a chat template")
    messages: Many[dict[str, Any]] | None = Field(None, description="Chat messages")
    tools: Many[dict[str, Any]] | None = None
    add_generation_prompt: bool = Field(True, description="Open the assistant's turn")
    return_token_strs: bool | None = Field(None, description="Name the tokens too")
    add_special_tokens: bool | None = Field(None, description="Qwen adds none to a text")
    min_pixels: int | None = None
    max_pixels: int | Literal["full"] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    impossible: ClassVar[Mapping[str, str]] = {
        "continue_final_message": "end with a user message",
        "chat_template": "the checkpoint's own template is used",
        "mm_processor_kwargs": "give min_pixels and max_pixels",
    }
    inner: ClassVar[Mapping[str, Shape]] = {"messages": MESSAGES, "tools": TOOLS}


class DetokenizeFields(Fields):
    """Tokens to be read."""

    model: str | None = None
    tokens: Long[int]


class ImageFields(Fields):
    """A picture, or no more than its size."""

    image_url: str | dict[str, Any] | None = Field(None, description="As in a chat message")
    width: int | None = Field(None, description="In pixels, of the upright picture")
    height: int | None = None
    detail: str | None = Field(None, description='"low", "high" or "auto"')
    min_pixels: int | None = None
    max_pixels: int | None = None

    inner: ClassVar[Mapping[str, Shape]] = {"image_url": IMAGE_URL}

    def part(self) -> dict[str, Any]:
        """The part of a message that would show it."""
        source = self.image_url if self.sized is None else "a picture of this size"
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return {"type": "image_url", "image_url": source, "detail": self.detail, **limits}

    @property
    def sized(self) -> tuple[int, int] | None:
        """Width and height, where that is all there is."""
        if self.image_url is None and self.width is not None and self.height is not None:
            return self.width, self.height
        return None


class ImageTokensFields(Fields):
    """Pictures whose cost is asked for."""

    model: str | None = None
    images: Many[ImageFields] = Field(min_length=1, description="Pictures or sizes")
    min_pixels: int | None = Field(None, description="Of every picture that has none of its own")
    max_pixels: int | Literal["full"] | None = None


@router.post("/tokenize")
async def tokenize(fields: TokenizeFields, request: Request, serving: ServingOf) -> Response:
    """The tokens of a text or conversation, as /v1/completions and /v1/chat/completions see it.

    Every token that a picture takes is counted.
    """
    headers = check_fields(fields, serving.options)
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(400, "give one of prompt and messages", param="prompt")
    body = await while_connected(request, _tokenize(serving, fields))
    return JsonReply(body, headers=headers)


async def _tokenize(serving: Serving, fields: TokenizeFields) -> dict[str, Any]:
    lease = await serving.host.lease(fields.model)
    try:
        messages = fields.messages
        if messages is None:
            check_countable("prompt", fields.prompt)
        else:
            check_countable("messages", messages, fields.tools)
            look = Look(fields.min_pixels, fields.max_pixels)
            messages = await serving.pictures.read(messages, lease.model.processor, look)
        return await serving.layouts.run(partial(_tokenized, lease.model, messages, fields))
    except Qwen3VLError as error:
        raise as_api_error(error, TokenizeFields.model_fields) from error
    finally:
        lease.release()


def _tokenized(model: Qwen3VL, messages: Messages | None, fields: TokenizeFields) -> dict[str, Any]:
    """messages: the request's, their pictures cut."""
    tokenizer = model.processor.tokenizer
    if messages is None:
        ids = tokenizer.encode(fields.prompt or "")
    else:
        template = fields.chat_template_kwargs or TemplateOptions()
        prompt = model.processor.prompt(
            messages,
            tools=fields.tools,
            add_vision_id=bool(template.add_vision_id),
            add_generation_prompt=fields.add_generation_prompt,
        )
        ids = prompt.token_ids.tolist()
    names = None
    if fields.return_token_strs:
        names = [token_name(tokenizer.token_bytes(token, False)) for token in ids]
    return {
        "count": len(ids),
        "max_model_len": model.context_length,
        "tokens": ids,
        "token_strs": names,
    }


@router.post("/detokenize")
async def detokenize(fields: DetokenizeFields, serving: ServingOf) -> Response:
    """The text of tokens, special ones included."""
    headers = check_fields(fields, serving.options)
    lease = await serving.host.lease(fields.model)
    try:
        check_token_ids("tokens", fields.tokens, lease.model.asking.vocab_size)
        tokenizer = lease.model.processor.tokenizer
        text = await serving.layouts.run(partial(tokenizer.decode, fields.tokens, False))
        return JsonReply({"prompt": text}, headers=headers)
    finally:
        lease.release()


@router.post("/v1/images/tokens")
async def image_tokens(fields: ImageTokensFields, request: Request, serving: ServingOf) -> Response:
    """What pictures would cost: the size at which the model sees each, and its tokens.

    `total_tokens` is what all add to a prompt, with the two tokens around each.
    """
    headers = check_fields(fields, serving.options)
    for at, image in enumerate(fields.images):
        given = [value is not None for value in (image.image_url, image.width, image.height)]
        if given not in ([True, False, False], [False, True, True]):
            message = f"images[{at}] needs either image_url, or width and height"
            raise ApiError(400, message, param=f"images[{at}]", code="invalid_value")
    body = await while_connected(request, _image_tokens(serving, fields))
    return JsonReply(body, headers=headers)


async def _image_tokens(serving: Serving, fields: ImageTokensFields) -> dict[str, Any]:
    lease = await serving.host.lease(fields.model)
    try:
        processor = lease.model.processor
        grids = await serving.layouts.run(partial(_grids_of_sizes, serving, fields, processor))
        look = Look(fields.min_pixels, fields.max_pixels)
        (seen,) = await serving.pictures.read([_message(fields, sized=False)], processor, look)
        pictures = {at: part["image"] for at, part in enumerate(seen["content"]) if "image" in part}
        grids |= {at: picture.grid_thw for at, picture in pictures.items()}
    except Qwen3VLError as error:
        raise _placed(error) from error
    finally:
        lease.release()
    data = [_cost(grids[at], processor.settings) for at in range(len(grids))]
    total = sum(entry["tokens"] + _TOKENS_AROUND for entry in data)
    return {"object": "list", "data": data, "total_tokens": total}


def _grids_of_sizes(
    serving: Serving, fields: ImageTokensFields, processor: Processor
) -> dict[int, Grid]:
    """By their numbers, the grids of the pictures of which only the size is known."""
    options, settings, grids = serving.options, processor.settings, {}
    look = Look(fields.min_pixels, fields.max_pixels)
    message = _message(fields, sized=True)
    for _, at, wanted in find_wanted([message], processor, look, options.max_pixels):
        size = fields.images[at].sized
        assert isinstance(wanted, Wanted)
        assert size is not None
        check_size(size, f"images[{at}]", options.max_image_pixels)
        rows, cols = smart_resize(size[1], size[0], settings.factor, wanted.budget)
        grids[at] = (1, rows // settings.patch_size, cols // settings.patch_size)
    return grids


def _message(fields: ImageTokensFields, *, sized: bool) -> dict[str, Any]:
    """Shows the pictures that are `sized`, or those that are not; texts keep the others' places."""
    parts = [
        image.part() if (image.sized is not None) is sized else {"type": "text", "text": ""}
        for image in fields.images
    ]
    return {"role": "user", "content": parts}


def _placed(error: Qwen3VLError) -> ApiError:
    """The error of a message's picture as one of the request's."""
    failure = as_api_error(error, ("messages", *ImageTokensFields.model_fields))
    failure.message = failure.message.replace("messages[0].content", "images")
    if failure.param is not None:
        failure.param = failure.param.replace("messages[0].content", "images")
    return failure


def _cost(grid: Grid, settings: VisionSettings) -> dict[str, Any]:
    _, rows, cols = grid
    return {
        "tokens": rows * cols // settings.merge_size**2,
        "width": cols * settings.patch_size,
        "height": rows * settings.patch_size,
        "grid_thw": list(grid),
    }
