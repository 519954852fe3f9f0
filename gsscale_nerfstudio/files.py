"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """A file to be written under another name, which gets its own when it is on the disk.

    Until then it is locked, and the lock ends with this process: :func:`remove_abandoned`.

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
        with open(unfinished, "ab") as lock:
            with suppress(OSError):  # no lock on this file system, so nobody can take it for left
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield unfinished
            _wait_for_disk(unfinished)
            unfinished.replace(path)
            _keep_names(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_abandoned(unfinished: Path) -> int:
    """Remove a file that a process was writing by :func:`whole_file` when it was killed.

    One that is locked is being written. On a file system without locks nothing is removed; one
    whose locks hold for one machine only would give away what another machine is writing.

    Returns:
        Its bytes; 0 if there is no such file, or it is in use or not ours to remove.
    """
    try:
        with open(unfinished, "r+b") as file:  # NFS locks files that may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unfinished.unlink()
            return os.fstat(file.fileno()).st_size
    except OSError:
        return 0


def _keep_names(folder: Path) -> None:
    """Let a rename survive a power cut, too, if the file system knows how."""
    try:
        _wait_for_disk(folder)
    except OSError as error:
        # Some network and FUSE file systems cannot; the file itself is whole and in place.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _wait_for_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
