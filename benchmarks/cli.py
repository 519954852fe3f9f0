"""The frame of a benchmark's command line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape

from benchmarks.errors import BenchmarkError

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


def _exit_on_sigterm(signum: int, frame: object) -> None:
    sys.exit(128 + signum)
