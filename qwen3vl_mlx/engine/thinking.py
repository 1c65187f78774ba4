"""A thought as the tokens come in: where it ends, and how it is closed when its budget is spent."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen3vl_mlx.engine.output import THINK_END
from qwen3vl_mlx.processing.tokenizer import Tokenizer


def spelled(literal: bytes, progress: int, text: bytes) -> tuple[int, bytes | None]:
    """Follow `literal` through `text`, `progress` bytes of it being spelled already.

    Returns the new progress and None, or, once the literal is complete, the bytes after it. For
    literals whose first byte does not come back in them, as in tags.
    """
    for at, byte in enumerate(text):
        progress = progress + 1 if byte == literal[progress] else int(byte == literal[0])
        if progress == len(literal):
            return progress, text[at + 1 :]
    return progress, None


@dataclass(frozen=True)
class Thought:
    """What is known of a thought that is still open. The prompt ends with `<think>` and a newline.

    `forced` holds the tokens that close it, once `budget` tokens were thought: a newline unless
    the thought ends with one, `</think>` and a blank line.
    """

    closing: tuple[int, ...]  # "\n</think>\n\n"
    closing_line: tuple[int, ...]  # "</think>\n\n"
    budget: int | None
    tokens: int = 0
    progress: int = 0  # bytes of </think> spelled so far
    forced: tuple[int, ...] = ()

    @classmethod
    def begin(cls, tokenizer: Tokenizer, budget: int | None) -> Thought:
        ending = tokenizer.encode(THINK_END) + tokenizer.encode("\n\n")
        closing = tokenizer.encode("\n") + ending
        return cls(tuple(closing), tuple(ending), budget, forced=tuple(ending) * (budget == 0))

    def push(self, token: int, text: bytes) -> tuple[Thought, bytes | None]:
        """The thought with one more token, and the bytes after `</think>` if that closed it."""
        if self.forced:
            rest = replace(self, forced=self.forced[1:])
            return rest, None if rest.forced else b""
        progress, after = spelled(THINK_END.encode(), self.progress, text)
        grown = replace(self, tokens=self.tokens + 1, progress=progress)
        if after is None and grown.tokens == self.budget:
            return replace(
                grown, forced=self.closing_line if text.endswith(b"\n") else self.closing
            ), None
        return grown, after
