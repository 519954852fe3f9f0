"""How many rows of a view have room, how large the row cache should be, and how far ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.budget import Budget
from gsscale_nerfstudio.engines.rates import Rates
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.loss import FUSED
from gsscale_nerfstudio.store import RowLayout

_FUSED_PIXEL_BYTES = 130
_PIXEL_BYTES = _FUSED_PIXEL_BYTES if FUSED else 330
"""Per pixel of a view: the rendered and the true image, the loss and its derivatives."""

_VIEW_ROW_BYTES = 700
"""Per row of a view, beside its place in the cache, until it is measured: leaves, colours and their
gradients (150 bytes), projection, sorting, their gradients."""

LEAST_VIEW_ROW_BYTES = 300
"""Per row of a view: less was never measured."""

_FEWEST = 1024
"""Rows: where so few do not fit, it is not for their number."""

_QUIET = 1000
"""Steps without a lack of memory after which limits that one has set are forgotten. What took the
memory may be gone, another program or a phase of the schedule. If it is not, the limit is found
anew, which costs some steps that are done again; so each time it is waited for twice as long."""

_NO_LIMIT = 2**31 - 1
"""Rows are numbered by 32 bits."""

_ROOMY = 8
"""Views' worth of slots from which two views are admitted ahead."""


def view_bytes(rows: int, pixels: int, per_row: float = _VIEW_ROW_BYTES) -> int:
    """Device memory that training a view takes, beside its rows' places in a cache."""
    return int(rows * per_row + pixels * _PIXEL_BYTES)


def unfused_bytes(pixels: int) -> int:
    """The part of :func:`view_bytes` that a fused loss would not take; 0 where it is fused."""
    return pixels * (_PIXEL_BYTES - _FUSED_PIXEL_BYTES)


def with_margin(rows: int) -> int:
    """Rows to leave room for when the largest view so far has ``rows``: views differ."""
    return rows + rows // 8


class ViewSizing:
    """How many rows a view may have that is on the device at a time.

    Args:
        budget: how much GPU memory may be used.
        device: whose.
        layout: of the rows.

    Attributes:
        most: whatever the budget says; less than without end once memory has run out.
        most_shown: the same of renders while there is training, which give up nothing else.
        brought: rows of the last view, or part of one, that was brought to the device.
    """

    def __init__(self, budget: Budget, device: torch.device, layout: RowLayout) -> None:
        self._budget, self._device, self._layout = budget, device, layout
        self._per_row = float(_VIEW_ROW_BYTES)  # device memory that a row of a view needs
        self._within_budget = 0
        self.most = self.most_shown = _NO_LIMIT
        self.brought = 0
        self._quiet_steps = 0
        self._patience = _QUIET
        self._tries_again = False  # limits were forgotten, and memory has sufficed since

    def fits(self, rows: int, view: View) -> bool:
        """Whether so many rows of a view can be on the device at a time, with the host engine.

        Called between views.
        """
        if rows > self.most:
            return False
        # What is free is asked for again where it becomes scarce.
        if self._device.type == "cuda" and 2 * rows > self._within_budget:
            width, height = view.whole_window.size
            # Beside what a view needs, its cold rows have a buffer, with a quarter to spare.
            per_row = int(self._per_row + 1.25 * 4 * self._layout.width)
            needed = width * height * _PIXEL_BYTES
            self._within_budget = self._budget.cache_rows(self._device, per_row, needed)
            return rows <= self._within_budget
        return True

    def halve(self) -> bool:
        """Let half as many rows be on the device at a time as were brought last.

        Returns:
            False if that would not help: so few do not fit for another reason than their number, or
            they were more than asked for already, in parts that are as small as they can be.
        """
        if self.brought < _FEWEST or self.brought > self.most:
            return False
        self.most = self.brought // 2
        return True

    def show_less(self, rows: int) -> bool:
        """Let renders have a quarter of ``rows``, or of what they may have, at a time.

        Returns:
            False if that would not help, see :meth:`halve`.
        """
        fewer = min(rows, self.most_shown) // 4
        if fewer < _FEWEST:
            return False
        self.most_shown = fewer
        self.ran_out()  # or it would be forgotten in the next step
        return True

    @property
    def limited(self) -> bool:
        """Whether memory has run out, and less may be on the device since."""
        return min(self.most, self.most_shown) < _NO_LIMIT

    def forget_limits(self) -> None:
        """Go by the budget alone again."""
        self.most = self.most_shown = _NO_LIMIT
        self._tries_again = self.quiet

    def ran_out(self) -> None:
        """Memory has run out."""
        if self._tries_again and self._quiet_steps < 2 * self._patience:
            self._patience *= 2
        self._quiet_steps, self._tries_again = 0, False

    def stepped(self) -> None:
        """A step was done, and memory has sufficed."""
        self._quiet_steps += 1

    @property
    def quiet(self) -> bool:
        """Whether memory has sufficed for long enough to try with more."""
        return self._quiet_steps >= self._patience

    def give_back(self) -> None:
        """Let the device have the memory that torch keeps for later."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def keep_to(self, budget: Budget) -> None:
        """Go by another budget from the next view on."""
        if budget.is_more_than(self._budget):
            self.forget_limits()  # or what was too much within the old one would be for ever
        self._budget = budget
        self._within_budget = 0  # to be asked for again


class CacheSizing(ViewSizing):
    """What the budget leaves for the cache, by the views that were seen.

    Args:
        budget: how much GPU memory may be used.
        device: whose.
        layout: of the rows.
        auto: whether the host engine may take over where it is faster; rates are measured then.

    Attributes:
        largest: rows of the largest view so far.
        view_rows, view_pixels: of a view that room is left for; views differ, and a schedule makes
            images larger.
    """

    def __init__(
        self, budget: Budget, device: torch.device, layout: RowLayout, auto: bool = False
    ) -> None:
        super().__init__(budget, device, layout)
        self.largest = self.view_rows = self.view_pixels = 0
        self.rates = Rates.measure(device) if auto else None
        # Rows and pixels of the view that needed most since memory was given back.
        self._largest_since = (0, 0)
        self._taken = 0  # bytes in use between views, beside the cache
        self._most_slots = _NO_LIMIT  # because more turned out to be too many
        self._counted = (0.0, 0.0)  # rows, and of these missed, when the rates were last asked

    @property
    def row_bytes(self) -> int:
        """Of a row in the cache, and on the link."""
        return self._layout.cached_bytes

    def saw(self, rows: int, pixels: int) -> None:
        """A view has so many rows."""
        self.largest = max(self.largest, rows)

        def needs(view: tuple[int, int]) -> int:
            return view_bytes(*view, self._per_row)

        self._largest_since = max(self._largest_since, (rows, pixels), key=needs)

    def forget_views(self) -> None:
        """Go by the views from now on: an earlier one was too large for any cache."""
        self.largest = self.view_rows = self.view_pixels = 0
        self._largest_since = (0, 0)

    def has_room_for(self, rows: int, pixels: int) -> bool:
        """Whether a view is no larger than the cache was made to leave room for."""
        return rows <= self.view_rows and pixels <= self.view_pixels

    def leave_room_for(self, rows: int, pixels: int) -> None:
        """A view turned out to be larger than there is room for."""
        if rows > self.view_rows:
            self.view_rows = with_margin(rows)
        self.view_pixels = max(self.view_pixels, pixels)

    def limit(self, cached_rows: int) -> int:
        """Largest number of rows that a cache may hold, if there is one of ``cached_rows``.

        Called between views, when none of their tensors is left.
        """
        if self._device.type == "cuda":
            allocated = torch.cuda.memory_allocated(self._device)
            self._taken = allocated - cached_rows * self.row_bytes
        needed = view_bytes(self.view_rows, self.view_pixels, self._per_row)
        rows = self._budget.cache_rows(self._device, self.row_bytes, needed, cached_rows)
        return min(rows, self._most_slots)

    def refuse_small(self, budget: Budget, cached_rows: int) -> None:
        """See that a cache within a budget would hold a view.

        Called between views, when none of their tensors is left.

        Args:
            budget: another one than that of now.
            cached_rows: of the cache that there is.

        Raises:
            GSScaleError: it would not.
        """
        rows = with_margin(self.largest)
        needed = view_bytes(rows, self.view_pixels, self._per_row)
        least = budget.least(self._device, self.row_bytes, needed, rows, cached_rows)
        if budget.gigabytes is not None and budget.gigabytes < least:
            raise GSScaleError(
                f"{budget.gigabytes:.4g} GB of GPU memory do not hold the largest view so far, "
                f"{self.largest:,} Gaussians with their Adam state; it takes at least "
                f"{math.ceil(100 * least) / 100:.2f} GB"
            )

    def too_many(self, slots: int, enough: int = 0) -> int:
        """A cache of ``slots`` rows left too little memory for the rest, whatever the reason.

        Args:
            slots: how many.
            enough: rows of a cache that has left enough.

        Returns:
            Rows that the next one may have, and later ones until :meth:`forget_limits`: a quarter
            less, but not less than enough, or than a view needs if there were more.
        """
        if slots > self.view_rows:
            enough = max(enough, self.view_rows)
        self._most_slots = max(slots - slots // 4, enough)
        self.ran_out()
        return self._most_slots

    @property
    def limited(self) -> bool:
        return super().limited or self._most_slots < _NO_LIMIT

    def forget_limits(self) -> None:
        super().forget_limits()
        self._most_slots = _NO_LIMIT

    def observe(self, cached_rows: int) -> None:
        """Learn what a row of a view needs: it depends on how many tiles of the image it covers.

        Called between views, when none of their tensors is left.
        """
        rows, pixels = self._largest_since
        if self._device.type == "cuda" and rows > 0:
            # Memory that was needed once stays reserved, until it is given back.
            beside = torch.cuda.memory_reserved(self._device) - cached_rows * self.row_bytes
            per_row = (beside - self._taken - pixels * _PIXEL_BYTES) / rows
            self._per_row = max(LEAST_VIEW_ROW_BYTES, per_row)

    def give_back(self) -> None:
        super().give_back()
        self._largest_since = (0, 0)  # torch has let go of what views needed so far

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
