"""Ctrl-C and SIGTERM while training: the step at hand is completed first, so it can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

_SAME = 1.0
"""Seconds within which signals are one: an impatient user's, or a script's that forwards them."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to end, and ends between two steps."""


class Interruption:
    """Notes the first signal, for training to ask :meth:`check`. A later one ends it at once.

    A context: outside of it, and in other threads than the main one, signals do what they did.

    Args:
        stop: called at the first signal, in the middle of anything.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._handlers: dict[int, Any] = {}
        self._first_at = 0.0
        self.signal: int | None = None
        """The number of the signal that came, if any."""

    def check(self) -> None:
        """To be called where training may end: between two steps.

        Raises:
            Interrupted: there was a signal.
        """
        if self.signal is not None:
            raise Interrupted

    def __enter__(self) -> Interruption:
        self.signal = None
        if threading.current_thread() is threading.main_thread():  # nobody else may ask for signals
            for number in (signal.SIGINT, signal.SIGTERM):
                # Who started us may have seen to it that we do not hear them, as nohup does.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """From here on signals do what they did before."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() < self._first_at + _SAME:
                return
            raise KeyboardInterrupt
        self.signal, self._first_at = number, time.monotonic()
        # Not by print: the signal may have come in the middle of one.
        with suppress(OSError):  # it may have ended who reads it, too, as tee
            os.write(2, b"\ngsscale: ending after this step (at once, if you ask again)\n")
        self._stop()
