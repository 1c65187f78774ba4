"""Answers in the words of OpenAI's legacy completions, whole or piece by piece."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3vl_mlx.engine.output import Completion, Usage
from qwen3vl_mlx.server.chat_reply import finish_fields, usage_fields
from qwen3vl_mlx.server.completion_fields import CompletionFields
from qwen3vl_mlx.server.completion_logprobs import LegacyLogprobs, Lists, joined
from qwen3vl_mlx.server.event_stream import DONE, sse
from qwen3vl_mlx.server.question import Answers

_UNFINISHED: Mapping[str, str | None] = {"finish_reason": None, "stop_reason": None}
_UNANSWERED: Mapping[str, str | None] = {"finish_reason": "length", "stop_reason": None}


@dataclass(frozen=True)
class Opening:
    """A prompt as readers see it."""

    text: str
    num_tokens: int
    logprobs: Lists | None = None  # where it is echoed with them


def completion_body(
    answers: Answers,
    fields: CompletionFields,
    openings: Sequence[Opening],
    done: Sequence[Completion],
) -> dict[str, Any]:
    """A `text_completion` object. done: as many answers as there are candidates of each prompt."""
    choices: list[dict[str, Any]] = []
    for at, opening in enumerate(openings):
        own = done[at * fields.candidates : (at + 1) * fields.candidates]
        if fields.candidates > fields.answers:
            own = sorted(own, key=_mean_logprob, reverse=True)[: fields.answers]
        ends = [_ending(answers, fields, opening, answer) for answer in own]
        for text, logprobs, end in ends or [("", None, _UNANSWERED)] * fields.answers:
            if fields.echo:
                text, logprobs = opening.text + text, joined(opening.logprobs, logprobs)
            choices.append(_choice(len(choices), text, logprobs, end))
    usage = _usage(fields, openings, [answer.usage for answer in done])
    return {**_head(answers), "choices": choices, "usage": usage}


def _ending(
    answers: Answers, fields: CompletionFields, opening: Opening, answer: Completion
) -> tuple[str, Lists | None, Mapping[str, str | None]]:
    listed = _listed(answers, fields, opening)
    return (
        answer.text,
        listed.lists(answer.logprobs) if listed is not None else None,
        finish_fields(answer.finish_reason, answer.stop),
    )


async def completion_events(
    answers: Answers, fields: CompletionFields, openings: Sequence[Opening]
) -> AsyncGenerator[bytes, None]:
    """`text_completion` events up to `[DONE]`, the choices mixed as they come."""
    head = _head(answers)

    def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        told = {"usage": usage} if fields.wants_usage else {}
        return sse({**head, "choices": choices, **told})

    each = [opening for opening in openings for _ in range(fields.candidates)]
    listed = [_listed(answers, fields, opening) for opening in each]
    usages: dict[int, Usage] = {}
    for index, opening in enumerate(each):
        if fields.echo:
            yield event([_choice(index, opening.text, opening.logprobs)])
    async for index, chunk in answers.merged():
        own, end = listed[index], _UNFINISHED
        lists = own.lists(chunk.logprobs) if own is not None and chunk.logprobs else None
        if chunk.finish_reason is not None and chunk.usage is not None:
            usages[index] = chunk.usage
            end = finish_fields(chunk.finish_reason, chunk.stop)
        if chunk.text or lists or end is not _UNFINISHED:
            yield event([_choice(index, chunk.text, lists, end)])
    if fields.wants_usage:
        yield event([], _usage(fields, openings, [usages[index] for index in sorted(usages)]))
    yield DONE


def _head(answers: Answers) -> dict[str, Any]:
    return {
        "id": f"cmpl-{answers.id}",
        "object": "text_completion",
        "created": answers.created,
        "model": answers.model,
        "system_fingerprint": answers.fingerprint,
    }


def _choice(
    index: int,
    text: str,
    logprobs: Lists | None,
    end: Mapping[str, str | None] = _UNFINISHED,
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, **end}


def _listed(answers: Answers, fields: CompletionFields, opening: Opening) -> LegacyLogprobs | None:
    """What lists the log-probabilities of one answer, where they are wanted."""
    if fields.logprobs is None:
        return None
    return LegacyLogprobs(answers.tokenizer, len(opening.text), fields.logprobs)


def _mean_logprob(answer: Completion) -> float:
    """OpenAI's measure of the best answer; an empty one is the worst."""
    scores = [entry.logprob for entry in answer.logprobs]
    return sum(scores) / len(scores) if scores else -math.inf


def _usage(
    fields: CompletionFields, openings: Sequence[Opening], usages: Sequence[Usage]
) -> dict[str, Any]:
    """Each prompt's tokens once, and those of all answers that were made."""
    prompt = sum(opening.num_tokens for opening in openings)
    if not usages:
        return {"prompt_tokens": prompt, "completion_tokens": 0, "total_tokens": prompt}
    usage = usage_fields(usages, 0)
    cached = sum(each.cached_tokens for each in usages[:: fields.candidates])
    return {
        **usage,
        "prompt_tokens": prompt,
        "total_tokens": prompt + usage["completion_tokens"],
        "prompt_tokens_details": {"cached_tokens": cached},
    }
