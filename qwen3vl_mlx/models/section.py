"""One mapping of config.json, read key by key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qwen3vl_mlx.errors import ConfigError


class Section:
    """A mapping, its path in the file, and errors that name the key."""

    def __init__(self, values: Any, path: str):
        if not isinstance(values, Mapping):
            raise ConfigError(f"config.json: {path or 'the top level'} must be an object")
        self.values, self.path = values, path

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"config.json: {self.name(key)} {problem}")

    def section(self, key: str) -> Section:
        if key not in self.values:
            raise self.error(key, "is missing: this is not a Qwen3-VL checkpoint's config")
        return Section(self.values[key], self.name(key))

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"must be an integer of at least {least}, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not (0 < value < math.inf)
        ):
            raise self.error(key, f"must be a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (list, tuple)) or not all(type(i) is int for i in value):
            raise self.error(key, f"must be a list of integers, got {value!r}")
        return tuple(value)

    def one_of(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = self.values.get(key, default)
        if value not in allowed:
            raise self.error(key, f"is {value!r}, expected one of {', '.join(allowed)}")
        return str(value)
