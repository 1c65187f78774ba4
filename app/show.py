"""Turns and numbers to what the page shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.session import Turn
    from qwen3vl_mlx import Usage

LATEX: tuple[dict[str, str | bool], ...] = (
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
)

_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`|\$\$.*?\$\$)", re.DOTALL)
# A formula's dollars touch it, and no digit follows: $5 and $10 is money.
_DOLLARS = re.compile(r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?![\d$\w])")


def messages_of(turns: Sequence[Turn], *, waiting: bool = False) -> list[dict[str, Any]]:
    """The conversation as the chat shows it. waiting: the last answer is still under way."""
    shown: list[dict[str, Any]] = []
    for turn in turns:
        shown += _shown(turn, under_way=waiting and turn is turns[-1])
    return shown


def turn_of(turns: Sequence[Turn], place: int) -> int | None:
    """Which turn the message at `place` of `messages_of` belongs to."""
    for number, turn in enumerate(turns):
        place -= len(_shown(turn, under_way=False))
        if place < 0:
            return number
    return None


def _shown(turn: Turn, *, under_way: bool) -> list[dict[str, Any]]:
    pictures = [{"path": p.shown, "alt_text": p.name} for p in turn.pictures]
    shown: list[dict[str, Any]] = [
        {"role": "user", "content": [*pictures, {"type": "text", "text": turn.text}]}
    ]
    if turn.reasoning:
        thinks = under_way and turn.thinking_sec is None
        about: dict[str, Any] = {"title": "Thinking", "status": "pending" if thinks else "done"}
        if turn.thinking_sec is not None:
            about["duration"] = round(turn.thinking_sec, 1)
        shown.append({"role": "assistant", "content": _text(turn.reasoning), "metadata": about})
    answer = with_formulas(turn.answer)
    if turn.note:
        answer = f"{answer}\n\n*{_plain(turn.note)}*".strip()
    if answer or not (under_way or turn.reasoning):
        shown.append({"role": "assistant", "content": _text(answer or "*No answer.*")})
    return shown


def _text(text: str) -> list[dict[str, str]]:
    """As it is: a plain string would lose the indentation that its lines share."""
    return [{"type": "text", "text": text}]


def _plain(text: str) -> str:
    """Without what Markdown reads into it."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~$])", r"\\\1", " ".join(text.split()))


def with_formulas(text: str) -> str:
    """`$x$` as `\\(x\\)`, outside code, where it is a formula and not money."""
    parts = _CODE.split(text)
    parts[::2] = [_DOLLARS.sub(r"\\(\1\\)", part) for part in parts[::2]]
    return "".join(parts)


def statistics(usage: Usage, image_tokens: int) -> str:
    """One line of numbers on an answer."""
    told = [
        f"{usage.avg_compl_tok_per_sec:.1f} tokens/s" if usage.completion_tokens > 1 else "",
        f"first token {usage.time_to_first_token_sec:.2f} s",
        f"{image_tokens:,} image tokens" if image_tokens else "",
        f"{usage.prompt_tokens:,} prompt"
        + (f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""),
        f"{usage.completion_tokens:,} answer",
        f"{usage.peak_memory_bytes / 1e9:.2f} GB at peak",
    ]
    return " · ".join(filter(None, told))
