"""CUDA streams and events, which are nothing where work is done when a call returns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

Mark = torch.cuda.Event | None
"""A point in a stream, up to which its work can be waited for; None on the CPU."""


class Stress:
    """Random delays in front of everything that runs on a thread or stream of its own.

    For tests: results must not depend on who is late. Off unless ``longest`` is set.
    """

    longest = 0.0
    """Seconds."""

    @classmethod
    def delay(cls) -> None:
        """Hold up the calling thread, and the device's current stream, for a moment."""
        if cls.longest == 0:
            return
        time.sleep(random.uniform(0, cls.longest))
        if torch.cuda.is_initialized():
            torch.cuda._sleep(int(random.uniform(0, cls.longest) * 1.5e9))


class SideStream:
    """A stream that runs beside the device's current one."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def active(self, after: Mark = None) -> Iterator[None]:
        """Work queued inside goes to this stream, behind ``after``."""
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            Stress.delay()
            if self.stream is not None and after is not None:
                self.stream.wait_event(after)
            yield

    def mark(self) -> Mark:
        """The point behind everything queued on this stream so far."""
        return self.stream.record_event() if self.stream is not None else None


def mark_current(device: torch.device) -> Mark:
    """The point behind everything queued on the device's current stream so far."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def wait_in_stream(mark: Mark, device: torch.device) -> None:
    """Let the device's current stream go no further before ``mark``."""
    if mark is not None:
        torch.cuda.current_stream(device).wait_event(mark)


def wait(mark: Mark) -> None:
    """Block the calling thread until ``mark`` is reached."""
    if mark is not None:
        mark.synchronize()


def reached(mark: Mark) -> bool:
    """Whether ``mark`` has been reached."""
    return mark is None or mark.query()
