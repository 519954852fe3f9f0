"""What link and host memory can do here, and what that means for either engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.store import RowLayout

_SAMPLE_BYTES = 64 << 20
"""Copied to measure a rate: a few milliseconds."""

_REPEATS = 3


@dataclass(frozen=True)
class Rates:
    """Measured on this machine, bytes per second.

    Attributes:
        link: page-locked host memory to the GPU, or back; both ways at once is about twice that.
        memory: host memory, read and written by a copy on all threads.
    """

    link: float
    memory: float

    @classmethod
    def measure(cls, device: torch.device) -> Rates:
        """Takes some 50 ms; nothing else should run."""
        n = _SAMPLE_BYTES // 4
        staging = Staging(n, 0, device)
        host, there = staging.rows(n), torch.empty(n, device=device)
        other = torch.empty(n)
        link = min(
            _fastest(lambda: there.copy_(host), device), _fastest(lambda: host.copy_(there), device)
        )
        return cls(link=link, memory=2 * _fastest(lambda: other.copy_(host), torch.device("cpu")))

    def resident_seconds(self, missed: float, layout: RowLayout) -> float:
        """Time of the link for rows that enter the cache, while as many leave it."""
        return missed * layout.cached_bytes / self.link

    def host_seconds(self, rows: float, layout: RowLayout) -> float:
        """Time of the link, or of host memory if that is longer, for a view's rows.

        Their parameters go to the GPU and gradients come back; the host reads and writes parameters
        and moments to step a row, and reads them once more to settle it for the next view.
        """
        floats = 4 * layout.width
        moved = (2 + 1) * layout.cached_bytes + 2 * floats
        return rows * max(floats / self.link, moved / self.memory)


def _fastest(copy: Callable[[], object], device: torch.device) -> float:
    """Bytes per second of the fastest of some copies of :data:`_SAMPLE_BYTES`."""
    seconds = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        copy()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return _SAMPLE_BYTES / min(seconds)
