"""POST /v1/completions: prompts continued as they stand, in OpenAI's legacy form."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3vl_mlx.api import Qwen3VL
from qwen3vl_mlx.engine.full_pass import prompt_logprobs
from qwen3vl_mlx.engine.grammar import parse_grammar
from qwen3vl_mlx.engine.logprobs import TokenLogprob
from qwen3vl_mlx.engine.request import Request as EngineRequest
from qwen3vl_mlx.engine.sampling import asked_params
from qwen3vl_mlx.errors import Qwen3VLError
from qwen3vl_mlx.processing.lengths import CHARACTERS_PER_TOKEN, least_tokens
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.server.body import JsonRoute
from qwen3vl_mlx.server.chat_reply import error_event
from qwen3vl_mlx.server.completion_fields import CompletionFields
from qwen3vl_mlx.server.completion_logprobs import prompt_lists
from qwen3vl_mlx.server.completion_reply import Opening, completion_body, completion_events
from qwen3vl_mlx.server.errors import ApiError, as_api_error
from qwen3vl_mlx.server.event_stream import reply
from qwen3vl_mlx.server.fields import check_fields
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.question import Answers, TimeLimit, submit, while_connected
from qwen3vl_mlx.server.serving import Serving, ServingOf
from qwen3vl_mlx.server.tokens import check_token_ids

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

_NEW_DOCUMENT = "<|endoftext|>"  # what OpenAI's models see where a prompt is missing


@router.post("/v1/completions")
async def completions(fields: CompletionFields, request: Request, serving: ServingOf) -> Response:
    """Continue one prompt or several, without a chat template."""
    headers = check_fields(fields, serving.options)
    limit = TimeLimit.of(serving.options, fields.timeout)
    work = _begin(serving, fields, limit)
    answers, openings = await while_connected(request, work, limit, lambda made: made[0].close())

    async def whole() -> dict[str, Any]:
        return completion_body(answers, fields, openings, await answers.collect())

    events = completion_events(answers, fields, openings) if fields.stream else None
    return await reply(request, answers, events, error_event, whole, headers)


async def _begin(
    serving: Serving, fields: CompletionFields, limit: TimeLimit
) -> tuple[Answers, list[Opening]]:
    """Lay out the prompts, score them where they are echoed so, and hand them to the engine."""
    prompts = fields.prompts()
    lease = await serving.host.lease(fields.model)
    try:
        model = lease.model
        requests = await serving.layouts.run(
            lambda: [_laid_out(model, each, fields, serving.options, limit) for each in prompts]
        )
        openings = [await _opening(serving, model, fields, each) for each in requests]
        asked = requests if fields.room else []
        return submit(serving, lease, limit, asked, fields.candidates), openings
    except BaseException as error:
        lease.release()
        if isinstance(error, Qwen3VLError):
            raise as_api_error(error, CompletionFields.model_fields) from error
        raise


def _laid_out(
    model: Qwen3VL,
    prompt: str | Sequence[int],
    fields: CompletionFields,
    options: ServerOptions,
    limit: TimeLimit,
) -> EngineRequest:
    params = asked_params(model.default_params, None, fields.sampling())
    request = model.asking.request(
        model.processor.layout(_token_ids(model, prompt, fields, options), ()),
        params,
        tools=False,
        grammar=parse_grammar(fields.response_format, fields.grammar),
        timeout=limit.left,
        started=limit.started,
    )
    return replace(request, thinking=False)  # no template has opened a thought


def _token_ids(
    model: Qwen3VL, prompt: str | Sequence[int], fields: CompletionFields, options: ServerOptions
) -> Sequence[int]:
    """A prompt's tokens: checked, and cut at the beginning where that is wanted."""
    config, context = model.processor.config, model.context_length
    truncate = options.truncate if fields.truncate_sequence is None else fields.truncate_sequence
    if isinstance(prompt, str) and least_tokens(prompt) >= context:
        most = CHARACTERS_PER_TOKEN * context
        if not truncate:
            raise _too_long(f"over {most:,} characters", context)
        prompt = prompt[-most:]
    ids = (
        model.processor.tokenizer.encode(prompt or _NEW_DOCUMENT)
        if isinstance(prompt, str)
        else prompt
    )
    check_token_ids("prompt", ids, model.asking.vocab_size)
    if not {config.image_token_id, config.video_token_id}.isdisjoint(ids):
        raise _refused("prompt has a picture's placeholder; /v1/chat/completions takes pictures")
    if truncate:
        ids = ids[-(context - min(fields.room, context // 4)) :]
    if len(ids) >= context:
        raise _too_long(f"{len(ids)} tokens", context)
    return ids


def _too_long(size: str, context: int) -> ApiError:
    return _refused(
        f"prompt is too long: {size}, and the model's context holds {context} tokens, answer "
        "included; shorten it, or let truncate_sequence drop its beginning",
        "context_length_exceeded",
    )


def _refused(message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param="prompt", code=code)


async def _opening(
    serving: Serving, model: Qwen3VL, fields: CompletionFields, request: EngineRequest
) -> Opening:
    """What readers see of a prompt, with its log-probabilities where it is echoed with them."""
    tokenizer, ids = model.processor.tokenizer, request.prompt.token_ids.tolist()
    text = await serving.layouts.run(partial(tokenizer.decode, ids, skip_special_tokens=False))
    if not fields.echo or fields.logprobs is None:
        return Opening(text, len(ids))
    scores = await _scores(serving, model, request.prompt, fields.logprobs)
    return Opening(text, len(ids), prompt_lists(tokenizer, ids[0], scores, fields.logprobs))


async def _scores(serving: Serving, model: Qwen3VL, prompt: Prompt, top: int) -> list[TokenLogprob]:
    """Log-probabilities of all tokens but the first."""
    scores: list[TokenLogprob] = []
    async with serving.scoring:  # its keys and values are beside those that admission counts
        parts = prompt_logprobs(model.engine, model.model, prompt, model.processor.tokenizer, top)
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            scores += part
    return scores
