"""Errors meant for the user: one sentence with the cause and the remedy, no stack trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape


class GSScaleError(RuntimeError):
    """Something the user can mend; the message names the cause and the remedy."""


def warn(message: str) -> None:
    """Tell the user of something that goes on all the same."""
    # Escaped: a path like [old] in the message is no markup.
    CONSOLE.print(
        f"[bold yellow]gsscale:[/bold yellow] {escape(message)}", highlight=False, soft_wrap=True
    )


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a :class:`GSScaleError` into a message on the console and exit status 1.

    Wrapped around the entry points that Nerfstudio's commands call, so that ``ns-train`` and its
    siblings end with the sentence instead of a traceback. Library users get the exception.
    """
    try:
        yield
    except GSScaleError as error:
        # Escaped: a path like [old] in the message is no markup.
        CONSOLE.print(
            f"[bold red]gsscale:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)
