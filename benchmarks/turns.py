"""Trainings that share a GPU, and have it for themselves in the steps that are timed.

Processes that name the same folder take turns: all of them work at the same time, until one of them
wants to be alone. The others then stop after the step that they are in, and go on when it is done.
"""

from __future__ import annotations

import fcntl
from pathlib import Path


class Turns:
    """One process's place among those of a folder; it begins beside the others.

    Two locked files, which a process lets go of however it ends. Whoever works holds ``room``,
    together with others. Whoever wants to be alone closes ``gate`` first: else the others, each of
    which comes back before the last one has left, would never leave the room empty.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._gate = (folder / "gate").open("ab")
        self._room = (folder / "room").open("ab")
        self.together()

    def together(self) -> None:
        """Work beside others from here on, as soon as nobody is or wants to be alone."""
        self._alone = False
        fcntl.flock(self._room, fcntl.LOCK_UN)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        fcntl.flock(self._gate, fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        fcntl.flock(self._room, fcntl.LOCK_SH)

    def alone(self) -> None:
        """Work while nobody else does, until :meth:`together`."""
        # Leave first: two who want to be alone would wait for each other.
        fcntl.flock(self._room, fcntl.LOCK_UN)
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX)
        self._alone = True

    def step_ended(self) -> None:
        """Let others be alone who want to, if this process is not."""
        if not self._alone:
            self.together()
