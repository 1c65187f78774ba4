"""Full attention that stays within a memory bound where MLX has no fused kernel."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

# Scores that may be held at once where they must be materialised.
SCORE_BYTES = 64 * 2**20


def has_fused_kernel(head_dim: int, dtype: mx.Dtype) -> bool:
    """Whether this device's attention kernel takes `head_dim` without materialising scores.

    Asked of MLX itself, which says so when the operation is built, without running it: the
    widths that are fused differ between its versions and backends.
    """
    x = mx.zeros((1, 1, 32, head_dim), dtype)
    try:
        mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, force_fused=True)
    except (ValueError, RuntimeError):
        return False
    return True


def full_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, score_bytes: int = SCORE_BYTES
) -> mx.array:
    """softmax(q k^T * scale) v over segments of one length, nothing masked.

    q, k, v: (segments, heads, length, head_dim); returns the same shape. Without a fused kernel,
    segments and then query rows are taken in chunks so that scores stay under `score_bytes`.
    """
    segments, heads, length, head_dim = q.shape
    row = heads * length * 4  # bytes of fp32 scores per query row
    if segments * length * row <= score_bytes or has_fused_kernel(head_dim, q.dtype):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    if segments > 1:
        size = max(1, score_bytes // (length * row))
        spans = [slice(i, i + size) for i in range(0, segments, size)]
        return _joined((full_attention(q[s], k[s], v[s], scale, score_bytes) for s in spans), 0)
    # Transposed in memory: backends without the kernel multiply plain matrices fastest.
    k = mx.contiguous(k.swapaxes(2, 3)).swapaxes(2, 3)
    size = max(1, score_bytes // row)
    chunks = (q[:, :, i : i + size] for i in range(0, length, size))
    attend = mx.fast.scaled_dot_product_attention
    return _joined((attend(chunk, k, v, scale=scale) for chunk in chunks), 2)


def _joined(parts: Iterable[mx.array], axis: int) -> mx.array:
    """The parts, each evaluated before the next: left lazy, all would hold their scores at once."""
    done: list[mx.array] = []
    for part in parts:
        mx.eval(part)
        done.append(part)
    return mx.concatenate(done, axis=axis)
