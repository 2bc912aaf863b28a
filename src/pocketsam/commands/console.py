"""What every command shares: the two consoles, tables, progress lines, and lists on the command line."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape as escape
from rich.table import Table

# A pipe has no width: leave tables whole there instead of cutting them at 80 columns.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)
STARTED = time.perf_counter()

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON instead of a table.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the engine's default when left out.")]


def table(*columns: str) -> Table:
    """A table whose cells wrap instead of being cut off."""
    columns_table = Table()
    for column in columns:
        columns_table.add_column(column, overflow="fold")
    return columns_table


def progress(text: str, quiet: bool) -> None:
    """One line for a step of long work, with the seconds since the command began."""
    if not quiet:
        err.print(f"[dim]{time.perf_counter() - STARTED:6.1f} s[/]  {escape(text)}", highlight=False)


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def names(text: str) -> list[str]:
    return [t.strip() for t in text.split(",") if t.strip()]


def formats(text: str) -> list[str]:
    from pocketsam.registry import FORMATS

    return list(FORMATS) if text == "all" else names(text)
