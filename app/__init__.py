"""The web page: chat with pictures, and tasks whose answers are drawn, rendered and checked."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, prog: str = "python -m app") -> int:
    """Run the page until it is stopped. Returns the exit status."""
    from app.command import main as command

    return command(argv, prog)
