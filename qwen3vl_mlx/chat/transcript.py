"""What was said, apart from any model: what is saved, and what another model goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_mlx.chat.pictures import Picture


@dataclass(frozen=True)
class Turn:
    """A question with its pictures, and what was answered."""

    question: str
    pictures: tuple[Picture, ...]
    answer: str
    reasoning: str = ""


@dataclass(frozen=True)
class Transcript:
    """A conversation. model: as `load` takes it; changes: settings other than the defaults."""

    model: str
    system: str | None = None
    turns: tuple[Turn, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)

    def messages(self) -> list[Mapping[str, Any]]:
        """OpenAI chat messages, pictures as bytes."""
        found: list[Mapping[str, Any]] = []
        if self.system is not None:
            found.append({"role": "system", "content": self.system})
        for turn in self.turns:
            parts = [{"type": "image", "image": picture.data} for picture in turn.pictures]
            content = [*parts, {"type": "text", "text": turn.question}]
            found.append({"role": "user", "content": content})
            answer = {"role": "assistant", "content": turn.answer}
            if turn.reasoning:
                answer["reasoning_content"] = turn.reasoning
            found.append(answer)
        return found
