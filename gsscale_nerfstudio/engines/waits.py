"""How long the device waits for transfers, measured without anybody waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping

import torch

from gsscale_nerfstudio.engines.streams import Mark, wait_in_stream

COUNTER = "link_wait_s"


class LinkWaits:
    """Lets the device's current stream wait for transfers, and counts for how long it did.

    A wait is counted at a later one, when the device is past it.

    Args:
        counters: of the engine; :data:`COUNTER` is added to, in seconds. It is only there once the
            device has waited.
    """

    def __init__(self, counters: MutableMapping[str, float]) -> None:
        self._counters = counters
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def wait(self, mark: Mark, device: torch.device) -> None:
        """Let the device's current stream go no further before ``mark``."""
        if mark is None:
            return
        stream = torch.cuda.current_stream(device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream.record_event(before)
        wait_in_stream(mark, device)
        stream.record_event(after)
        self._open.append((before, after))
        while self._open and self._open[0][1].query():
            before, after = self._open.popleft()
            seconds = before.elapsed_time(after) / 1e3
            self._counters[COUNTER] = self._counters.get(COUNTER, 0.0) + seconds
