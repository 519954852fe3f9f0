"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def whole_file(path: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """A file to be written under another name, which gets its own when it is on the disk.

    Until then it is locked, and the lock ends with this process: :func:`remove_abandoned`.

    Args:
        path: its own name; whatever is there stays until then, or for ever if anything is raised.
        unfinished: the other name, on the same file system; None for one beside ``path``, of this
            process, where those of killed processes are removed.

    Yields:
        The name to write to.

    Raises:
        OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if unfinished is None:
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        _remove_those_of_the_dead(path)
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


def _remove_those_of_the_dead(path: Path) -> None:
    """Remove what killed processes were writing beside ``path``.

    A number may be that of a process here, and of another one in another container or machine: it
    is dead if there is none here, and nobody holds the lock.
    """
    # Linux gives processes numbers of up to 2^22: a longer one is a date, say.
    name = re.compile(re.escape(f".{path.name}.") + "([1-9][0-9]{0,6})")
    for file in path.parent.glob(".*"):
        match = name.fullmatch(file.name)
        if match and not psutil.pid_exists(int(match[1])):
            remove_abandoned(file)


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
