"""Numbers for people: the line under an answer, and `/stats`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3vl_mlx.cli import size

if TYPE_CHECKING:
    from qwen3vl_mlx.chat.session import Session
    from qwen3vl_mlx.engine.output import Usage


def turn_line(usage: Usage, visual_tokens: int) -> str:
    """One line about one answer."""
    count = usage.completion_tokens
    parts = [f"{count} token{'s' * (count != 1)}"]
    if count > 1:
        parts.append(f"{usage.avg_compl_tok_per_sec:.1f} tokens/s")
    parts.append(f"first after {usage.time_to_first_token_sec:.2f} s")
    parts.append(f"prompt {usage.prompt_tokens}")
    if usage.cached_tokens:
        parts.append(f"{usage.cached_tokens} cached")
    if visual_tokens:
        parts.append(f"{visual_tokens} visual")
    return " · ".join(parts)


def statistics(session: Session) -> str:
    """Last answer, totals, caches and memory."""
    import mlx.core as mx

    lines = ["no answer yet"]
    if session.usage is not None:
        lines = [f"last answer   {turn_line(session.usage, session.visual_tokens)}"]
    totals = session.totals
    computed = totals.prompt_tokens - totals.cached_tokens
    hits = totals.cached_tokens / totals.prompt_tokens if totals.prompt_tokens else 0.0
    stopped = f", {totals.stopped} stopped" if totals.stopped else ""
    lines += [
        f"answers       {totals.answers}{stopped}, {totals.completion_tokens} tokens, "
        f"{_rate(totals.completion_tokens - totals.answers, totals.completion_sec)} tokens/s",
        f"prompts       {totals.prompt_tokens} tokens, {totals.cached_tokens} of them cached "
        f"({hits:.0%}), the others at {_rate(computed, totals.prompt_sec)} tokens/s",
    ]
    stats = session.model.engine.stats
    if stats.prefix is not None:
        lines.append(
            f"prefix cache  {stats.prefix.tokens} tokens in {size(stats.prefix.bytes)}, "
            f"{stats.prefix.hits} hits, {stats.prefix.misses} misses"
        )
    seen = stats.features
    lines.append(f"pictures      {seen.entries} in {size(seen.bytes)}, {seen.hits} reused")
    active, peak = mx.get_active_memory(), mx.get_peak_memory()
    lines.append(f"memory        {size(active)}, {size(peak)} at peak")
    return "\n".join(lines)


def _rate(tokens: int, seconds: float) -> str:
    return f"{max(tokens, 0) / seconds:.1f}" if seconds > 0 else "0"
