"""How large the row cache should be, how far ahead it is filled, and when to do without it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gsscale_nerfstudio.engines.budget import Budget, view_bytes
from gsscale_nerfstudio.engines.rates import Rates
from gsscale_nerfstudio.store import RowLayout

_ROOMY = 8
"""Views' worth of slots from which two views are admitted ahead."""


class CacheSizing:
    """What the budget leaves for the cache, by the views that were seen.

    Args:
        budget: how much GPU memory may be used.
        device: whose.
        layout: of the rows.
        auto: whether the host engine may take over where it is faster; rates are measured then.

    Attributes:
        largest: rows of the largest view so far.
        view_rows: rows of a view that room is left for; views differ.
    """

    def __init__(
        self, budget: Budget, device: torch.device, layout: RowLayout, auto: bool = False
    ) -> None:
        self.largest = self.view_rows = 0
        self.rates = Rates.measure(device) if auto else None
        self._budget, self._device, self._layout = budget, device, layout
        self._pixels = 0
        self._observed = 0  # bytes in use beside the cache and what the largest view should need
        self._counted = (0.0, 0.0)  # rows, and of these missed, when the rates were last asked

    @property
    def row_bytes(self) -> int:
        """Of a row in the cache, and on the link."""
        return 3 * self._layout.width * 4

    def saw(self, rows: int, pixels: int) -> None:
        """A view has so many rows."""
        if rows > self.largest:
            self.largest, self._pixels = rows, pixels

    def leave_room_for(self, rows: int) -> None:
        """A view turned out to be larger than there is room for."""
        self.view_rows = max(self.view_rows, rows + rows // 8)

    def limit(self, cached_rows: int) -> int:
        """Largest number of rows that a cache may hold, if there is one of ``cached_rows``."""
        return self._budget.cache_rows(
            self._device,
            self.row_bytes,
            self.view_rows,
            self._pixels,
            self._observed,
            cached_rows,
        )

    def observe(self, cached_rows: int) -> None:
        """Learn from what is in use: what a row needs depends on how many tiles it covers."""
        if self._device.type == "cuda":
            # Memory that was needed once stays reserved, until it is given back for another cache.
            reserved = torch.cuda.memory_reserved(self._device)
            expected = view_bytes(self.largest, self._pixels)
            self._observed = max(0, reserved - cached_rows * self.row_bytes - expected)

    def views_ahead(self, slots: int, rows: int) -> int:
        """How many views to admit ahead, with so many slots for all rows.

        With two, the link goes on with the second one's rows when it has done the first's. But rows
        of the present view and of all that are admitted cannot leave, and in a small cache what
        could have stayed goes for them.
        """
        return 2 if slots >= min(rows, _ROOMY * self.largest) else 1

    def host_is_faster(self, counters: Mapping[str, float]) -> bool:
        """Whether the host engine should take over, by the views since the last time."""
        rows, missed = counters["rows"], counters["rows_missed"]
        since, self._counted = self._counted, (rows, missed)
        if self.rates is None:
            return False
        host = self.rates.host_seconds(rows - since[0], self._layout)
        # Clearly: it is a guess, and there is no way back.
        return host < 0.7 * self.rates.resident_seconds(missed - since[1], self._layout)

    def why(self) -> str:
        """The reason for a cache, to be told; empty if there was no choice."""
        if self.rates is None:
            return ""
        link, memory = self.rates.link / 1e9, self.rates.memory / 1e9
        return (
            f", chosen by auto: rows that miss the cache cross the link at {link:.0f} GB/s, while "
            f"Adam on the CPU would take all of a view's through host memory at {memory:.0f} GB/s"
        )
