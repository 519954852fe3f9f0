"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """A file to be written under another name, which gets its own when it is on the disk.

    Args:
        path: its own name; whatever is there stays until then, or for ever if anything is raised.
        unfinished: the other name, on the same file system; None for one beside ``path``.

    Yields:
        The name to write to.

    Raises:
        OSError: it could not be written.
    """
    unfinished = unfinished or path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        _wait_for_disk(unfinished)
        unfinished.replace(path)
        _wait_for_disk(path.parent)  # the rename itself must survive a power cut, too
    finally:
        unfinished.unlink(missing_ok=True)


def _wait_for_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
