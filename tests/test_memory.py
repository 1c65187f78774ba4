"""The wired limit is set where there is Metal, and nothing is touched elsewhere."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qwen3vl_mlx.engine import memory


def test_wired_memory_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = stub_metal(monkeypatch, available=False)
    assert memory.wire_memory() is None
    assert limits == []


@pytest.mark.parametrize(
    ("info", "limit"),
    [({"max_recommended_working_set_size": 2**34}, 2**34), ({}, None), ({"memory_size": 5}, None)],
)
def test_wired_memory_with_metal(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, int], limit: int | None
) -> None:
    limits = stub_metal(monkeypatch, info=info)
    assert memory.wire_memory() == limit
    assert limits == ([limit] if limit else [])


def stub_metal(
    monkeypatch: pytest.MonkeyPatch, available: bool = True, info: dict[str, int] | None = None
) -> list[int]:
    limits: list[int] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: available)
    monkeypatch.setattr(mx, "device_info", lambda: info or {})
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    return limits
