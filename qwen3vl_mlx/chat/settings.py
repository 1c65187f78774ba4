"""`/set name value`: which settings there are, how values are written, and their bounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx.errors import InputError

if TYPE_CHECKING:
    from qwen3vl_mlx.engine.sampling import SamplingParams


@dataclass(frozen=True)
class Setting:
    """One setting. read: its value from text; raises ValueError."""

    name: str
    read: Callable[[str], Any]
    hint: str


def _switch(text: str) -> bool:
    value = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
    if text.lower() not in value:
        raise ValueError
    return value[text.lower()]


def _strings(text: str) -> list[str]:
    """A JSON string or list of strings, else the text as it stands."""
    if text[:1] not in ('"', "["):
        return [text]
    value = json.loads(text)
    return value if isinstance(value, list) else [value]


def _biases(text: str) -> dict[int, float]:
    pairs = [pair.split("=") for pair in text.replace(",", " ").split()]
    return {int(token): float(value) for token, value in pairs}


def _pixels(text: str) -> int:
    return int(text.replace(",", "").replace("_", ""))


def _most_pixels(text: str) -> int | str:
    return "full" if text.lower() == "full" else _pixels(text)


_ALL = (
    Setting("max_tokens", int, "end the answer after so many tokens"),
    Setting("temperature", float, "0 is greedy: the same answer each time"),
    Setting("top_p", float, "draw from the likeliest tokens with this sum"),
    Setting("top_k", int, "draw from so many likeliest; 0 is off"),
    Setting("min_p", float, "drop what is below this part of the likeliest"),
    Setting("repetition_penalty", float, "over prompt and answer; 1 is off"),
    Setting("frequency_penalty", float, "over the answer, by count; 0 is off"),
    Setting("presence_penalty", float, "over the answer, once each; 0 is off"),
    Setting("dry_multiplier", float, "DRY: against repeated phrases (0.8); 0 is off"),
    Setting("dry_base", float, "DRY: how fast its penalty grows"),
    Setting("dry_allowed_length", int, "DRY: tokens that may repeat"),
    Setting("dry_sequence_breakers", _strings, "DRY: texts no repeat runs across"),
    Setting("logit_bias", _biases, "add to tokens' logits: 17=-5 20=1.5"),
    Setting("stop", _strings, 'end before a text: ###, or ["\\n\\n", "###"]'),
    Setting("seed", int, "the same seed, the same answer"),
    Setting("ignore_eos", _switch, "on: go on to max_tokens"),
    Setting("thinking_budget", int, "close the thought after so many tokens"),
    Setting("loop_guard", _switch, "on: end an answer that repeats itself"),
    Setting("min_pixels", _pixels, "enlarge pictures to at least this, from now on"),
    Setting("max_pixels", _most_pixels, 'shrink pictures to at most this, or "full"'),
    Setting("number_images", _switch, 'on: "Picture N:" before each picture'),
)
SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in _ALL}
PIXELS = ("min_pixels", "max_pixels")
LOOK = (*PIXELS, "number_images")  # what SamplingParams does not know
_DEFAULT_LOOK = {"min_pixels": None, "max_pixels": None, "number_images": False}
_SHORT = {"temp": "temperature", "topk": "top_k", "topp": "top_p", "minp": "min_p"}


def setting(name: str) -> Setting:
    """The setting of a name, however it is spelled. Raises InputError naming the nearest."""
    plain = name.lower().replace("-", "_")
    plain = _SHORT.get(plain, plain)
    if plain in SETTINGS:
        return SETTINGS[plain]
    near = get_close_matches(plain, SETTINGS, n=1)
    hint = f"did you mean {near[0]}?" if near else "/set lists them"
    raise InputError(f"there is no setting {name!r}; {hint}")


def read_value(chosen: Setting, text: str) -> Any:
    """A setting's value from text, its form alone checked. Raises InputError."""
    try:
        return chosen.read(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{chosen.name} cannot be {text!r}: {chosen.hint}") from error


def check(changes: Mapping[str, Any]) -> None:
    """Raise InputError for values out of their range."""
    from qwen3vl_mlx.engine.sampling import SamplingParams
    from qwen3vl_mlx.processing.image import MOST_PIXELS, PixelBudget

    SamplingParams().updated(sampling_of(changes))
    least, most = (changes.get(name) for name in PIXELS)
    PixelBudget(1, MOST_PIXELS).limited(least, None if most == "full" else most)


def sampling_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Those changes that `SamplingParams` knows."""
    return {name: value for name, value in changes.items() if name not in LOOK}


def pixels_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    """min_pixels and max_pixels; None is the default."""
    return {name: changes.get(name) for name in PIXELS}


def shown(value: Any) -> str:
    """A value as `/set` shows it, and takes it again."""
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return " ".join(f"{token}={bias:g}" for token, bias in value.items())
    if isinstance(value, (tuple, list)):
        return json.dumps(list(value), ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def listing(
    now: SamplingParams, defaults: SamplingParams, changes: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
    """(name, value, default, hint) of every setting."""
    known = {field.name for field in fields(now)}
    rows = []
    for name, each in SETTINGS.items():
        value = getattr(now, name) if name in known else changes.get(name, _DEFAULT_LOOK[name])
        default = getattr(defaults, name) if name in known else _DEFAULT_LOOK[name]
        rows.append((name, shown(value), shown(default), each.hint))
    return rows
