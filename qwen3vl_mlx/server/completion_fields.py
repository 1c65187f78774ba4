"""The body of /v1/completions: OpenAI's legacy fields over a prompt that no template changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from qwen3vl_mlx.server.chat_fields import MOST_ANSWERS, SamplingFields, StreamOptions
from qwen3vl_mlx.server.errors import ApiError
from qwen3vl_mlx.server.fields import Long, Many
from qwen3vl_mlx.server.known_keys import GRAMMAR, RESPONSE_FORMAT, Shape

_DEFAULT_MAX_TOKENS = 16  # OpenAI's: a raw prompt rarely ends by itself


class CompletionFields(SamplingFields):
    """A prompt to be continued as it stands."""

    prompt: str | Many[str] | Long[int] | Many[Long[int]] | None = Field(
        None,
        description="One prompt or several, as text or token ids. No chat template is applied, and "
        "literals such as <|im_start|> are control tokens. Unset: a new document",
    )
    model: str | None = Field(None, description='"default", or a name of /v1/models')
    max_tokens: int | None = Field(
        None, ge=0, description="Tokens of the answer; 0 only with echo. Unset: 16, as with OpenAI"
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Likeliest tokens to name; with echo of the prompt's too"
    )
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    best_of: int | None = Field(
        None,
        ge=1,
        le=MOST_ANSWERS,
        description="Make so many answers, and return the `n` of the highest mean log-probability",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    grammar: dict[str, Any] | None = Field(
        None, description='{"type": "regex" | "json_schema" | "lark" | "llguidance", "value": ...}'
    )
    truncate_sequence: bool | None = Field(
        None, description="Drop the beginning of a prompt that is too long"
    )
    user: str | None = None  # the client's own label, without influence on the answer

    impossible: ClassVar[Mapping[str, str]] = {
        "suffix": "the models do not fill in the middle; put all context into prompt",
        "adapter": "LoRA adapters are not loaded; merge them into the checkpoint",
    }
    inner: ClassVar[Mapping[str, Shape]] = {
        "response_format": RESPONSE_FORMAT,
        "grammar": GRAMMAR,
    }

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def answers(self) -> int:
        """Answers to return for each prompt."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """Answers to make for each prompt."""
        return self.best_of or self.answers

    @property
    def room(self) -> int:
        """Tokens of an answer."""
        return _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def sampling(self) -> dict[str, Any]:
        """By the names of SamplingParams."""
        ranked = self.candidates > self.answers
        return {
            **super().sampling(),
            "max_tokens": self.room or 1,
            "logprobs": self.logprobs is not None or ranked,
            "top_logprobs": self.logprobs,
        }

    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Every prompt, as text or ids. Raises ApiError for fields that contradict each other."""
        self._check()
        prompt = self.prompt
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""]
        single = bool(prompt) and isinstance(prompt[0], int)
        prompts: Sequence[Any] = [prompt] if single else prompt
        if not prompts or [] in prompts:
            raise _refused("prompt", "prompt is an empty list; give it a text or token ids")
        if len(prompts) * self.candidates > MOST_ANSWERS:
            raise _refused(
                "prompt",
                f"{len(prompts)} prompts with {self.candidates} answers each are more than the "
                f"{MOST_ANSWERS} of one request; send several",
            )
        return prompts

    def _check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise _refused("stream_options", "stream_options is for stream true; leave it out")
        if self.candidates < self.answers:
            raise _refused("best_of", f"best_of ({self.best_of}) must be at least n ({self.n})")
        if self.stream and self.candidates > self.answers:
            raise _refused("best_of", "best_of chooses among whole answers; it cannot be streamed")
        if self.max_tokens == 0 and (self.stream or not self.echo):
            raise _refused("max_tokens", "max_tokens 0 is for echo without stream; ask for 1 more")


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
