"""Points on a device's time line."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch


class Clock:
    """Marks on the device's time line: events of the current stream, or the host's time."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        """A point in time; on a GPU the moment at which all work queued so far is done."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: list[Any]) -> list[float]:
        """Times between consecutive marks; the GPU must have passed the last one."""
        pairs = itertools.pairwise(marks)
        if self.cuda:
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]

    def synchronize(self) -> float:
        """Wait for the GPU. Returns the host's time."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
