"""Metal's memory limits, where there is Metal."""

from __future__ import annotations

import mlx.core as mx


def wire_memory() -> int | None:
    """Keep the model's buffers resident on a Mac's GPU; returns the limit in bytes.

    None, and nothing done, where MLX has no Metal device or does not say its working set.
    """
    if not mx.metal.is_available():
        return None
    limit = mx.device_info().get("max_recommended_working_set_size")
    if not limit:
        return None
    mx.set_wired_limit(int(limit))
    return int(limit)
