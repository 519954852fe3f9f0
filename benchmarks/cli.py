"""The frame of a benchmark's command line, and how it prints."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.errors import BenchmarkError
from benchmarks.tables import TextTable

LOG_WIDTH = 200
"""Columns where the output is no terminal: a log can be as wide as the tables."""

Arguments = TypeVar("Arguments")


def run(
    arguments: type[Arguments],
    description: str | None,
    measure: Callable[[Arguments, Console], Any],
) -> int:
    """Parse the command line and measure.

    Args:
        arguments: a dataclass, as tyro takes it.
        description: of the command.
        measure: measures and prints; an int that it returns is the number of what failed.

    Returns:
        The exit status: 1 when something failed, 2 when nothing was started.
    """
    args = tyro.cli(arguments, description=description)
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    # A time limit ends this process with SIGTERM: leave through the code that ends the children.
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        failed = measure(args, console)
    except BenchmarkError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    return 1 if isinstance(failed, int) and failed else 0


def show(table: TextTable, console: Console) -> None:
    """Print a table, numbers to the right."""
    grid = Table()
    for index, name in enumerate(table.columns):
        grid.add_column(escape(name), justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*[escape(cell) for cell in row])
    console.print(grid)


def say(line: str, console: Console) -> None:
    """Print text as it is."""
    console.print(escape(line), highlight=False, soft_wrap=True)


def _exit_on_sigterm(signum: int, frame: object) -> None:
    sys.exit(128 + signum)
