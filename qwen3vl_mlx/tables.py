"""Tables, paths and times as commands show them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_table(table: Table) -> None:
    """A table as wide as the terminal, or, in a pipe, as wide as it needs to be."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    table.box, table.padding = None, (0, 2, 0, 0)
    console = Console(highlight=False, width=1000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def short(path: Path) -> str:
    """A path with ~ for the home folder."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):  # elsewhere, or nobody's home
        return str(path)


def age(seconds: float | None) -> str:
    """How long ago a time was, in days, months or years."""
    if seconds is None:
        return "-"
    days = int(max(0.0, time.time() - seconds) // 86_400)
    if days < 1:
        return "today"
    for unit, length in (("year", 365), ("month", 30), ("day", 1)):
        if count := days // length:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    raise AssertionError(days)
