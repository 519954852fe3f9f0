"""How far a run is, told through a small file: the run writes it, ``compare.py`` reads it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

INTERVAL_S = 0.5


class ProgressFile:
    """The writing side. ``path`` may be None: then nobody is told.

    Args:
        path: the file; it is replaced, never rewritten in place.
        total: steps of the training.
    """

    def __init__(self, path: Path | None, total: int) -> None:
        self.path = path
        self.total = total
        self._next = 0.0

    def step(self, done: int) -> None:
        """Tell that ``done`` steps are done, at most twice a second."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + INTERVAL_S
            self.phase("training", done)

    def phase(self, name: str, done: int) -> None:
        """Tell what the run is doing, at once."""
        if self.path is not None:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps([name, done, self.total]), encoding="utf-8")
            os.replace(temporary, self.path)


def read(path: Path) -> tuple[str, int]:
    """The reading side: what the run is doing, and the number of steps done."""
    try:
        name, done, _ = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "starting", 0
    return str(name), int(done)
