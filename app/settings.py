"""The controls of the sidebar, and what they ask of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

if TYPE_CHECKING:
    from gradio.components import Component

    from qwen3vl_mlx import Qwen3VL

PIXELS_PER_TOKEN = 32 * 32  # of the Qwen3-VL models, whatever their size

_WHOLE = ("max_tokens", "top_k", "seed", "thinking_budget")


@dataclass(frozen=True)
class Settings:
    """What one question is asked with, by the names that `Qwen3VL.stream` takes."""

    system: str
    sampling: dict[str, Any]
    min_pixels: int | None
    max_pixels: int | None

    @classmethod
    def of(cls, values: Sequence[Any]) -> Settings:
        """From the values of `Controls.all`, in their order. An empty field asks for nothing."""
        given = dict(zip(_NAMES, values, strict=True))
        sampling = {
            name: int(given[name]) if name in _WHOLE else float(given[name])
            for name in _SAMPLING
            if given[name] is not None
        }
        pixels = [
            None if given[name] is None else round(given[name] * PIXELS_PER_TOKEN)
            for name in ("min_visual", "max_visual")
        ]
        return cls(given["system"] or "", sampling, *pixels)


@dataclass(frozen=True)
class Controls:
    """The components, by what they set. `all` is their order."""

    system: Component
    temperature: Component
    top_p: Component
    top_k: Component
    min_p: Component
    repetition_penalty: Component
    presence_penalty: Component
    frequency_penalty: Component
    max_tokens: Component
    thinking_budget: Component
    seed: Component
    min_visual: Component
    max_visual: Component

    @property
    def all(self) -> list[Component]:
        return [getattr(self, name) for name in _NAMES]

    @property
    def of_the_model(self) -> list[Component]:
        """Those that begin with the checkpoint's own values: all but the system prompt."""
        return self.all[1:]


_NAMES = tuple(Controls.__dataclass_fields__)
_SAMPLING = _NAMES[1:-2]


def defaults(model: Qwen3VL) -> list[Any]:
    """Updates of `Controls.of_the_model`: the checkpoint's own values."""
    own = model.default_params
    thinks = model.processor.template.opens_thinking
    budget = model.processor.image_budget()
    updates = [gr.update(value=getattr(own, name)) for name in _SAMPLING]
    updates[_SAMPLING.index("thinking_budget")] = gr.update(
        value=own.thinking_budget, visible=thinks
    )
    pixels = (budget.min_pixels, budget.max_pixels)
    return [*updates, *(gr.update(value=n / PIXELS_PER_TOKEN) for n in pixels)]


def build_controls() -> Controls:
    """Lay the controls out, in the sidebar."""
    system = gr.Textbox(
        label="System prompt",
        placeholder="Answer briefly.",
        lines=2,
        max_lines=8,
        elem_id="system",
    )
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        sampling = {
            "temperature": gr.Slider(0, 2, 0.7, step=0.01, label="Temperature", info="0 is greedy"),
            "top_p": gr.Slider(0.01, 1, 0.8, step=0.01, label="Top p"),
            "top_k": gr.Slider(0, 200, 20, step=1, label="Top k", info="0 is off"),
            "min_p": gr.Slider(0, 1, 0, step=0.01, label="Min p"),
            "repetition_penalty": gr.Slider(0.5, 2, 1, step=0.01, label="Repetition penalty"),
            "presence_penalty": gr.Slider(-2, 2, 0, step=0.05, label="Presence penalty"),
            "frequency_penalty": gr.Slider(-2, 2, 0, step=0.05, label="Frequency penalty"),
            "max_tokens": _whole("Most tokens of an answer", "until it is done"),
            "thinking_budget": _whole("Most tokens of thought", "as many as it likes"),
            "seed": _whole("Seed", "another answer each time", minimum=0),
        }
    with gr.Accordion("Picture detail", open=False, elem_id="detail"):
        pixels = {
            "min_visual": gr.Number(
                label="Least visual tokens",
                minimum=0.001,
                info="A smaller picture is enlarged. A token is 32 by 32 pixels.",
            ),
            "max_visual": gr.Number(
                label="Most visual tokens",
                minimum=0.001,
                info="A larger picture is reduced: quicker, and small things vanish.",
            ),
        }
    return Controls(system, **sampling, **pixels)


def _whole(label: str, placeholder: str, minimum: int = 1) -> gr.Number:
    return gr.Number(label=label, value=None, precision=0, minimum=minimum, placeholder=placeholder)
