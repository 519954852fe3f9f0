"""A view whose rows do not fit on the device at a time: drawn in parts, stepped as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.packing import pack
from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.engines.streams import mark_current, wait
from gsscale_nerfstudio.engines.working_set import ScreenStatistics, WorkingSet
from gsscale_nerfstudio.store.layout import STATISTICS, RowLayout

_MULTIPLE = 16
"""Pixels: windows begin at borders of the rasterizer's tiles, so that none is drawn twice."""

_MOST_PARTS = 16
"""A window is not divided for want of host memory if it has this fraction of its view's rows ..."""

_MOST_WINDOWS = 256
"""... or this fraction of its pixels: where Gaussians are large, all windows see many of them."""


@dataclass(frozen=True, eq=False)
class Part:
    """A window of a view, and the rows that it may see.

    Attributes:
        view: the view through that window.
        positions: [m] int32 on the CPU, ascending: which of the whole view's rows they are.
        first: [m] bool on the CPU: those that no part before this one has.
    """

    view: View
    positions: Tensor
    first: Tensor


class ViewInParts:
    """The rows of a view that is trained part by part; the counterpart of a working set.

    Args:
        ids: [n] int32 on the CPU, ascending: the rows' places in the store.
        parts: together, all of the image.
        layout: of the rows.
        staging: page-locked memory for their gradients, see :meth:`gradients`.

    Attributes:
        statistics: as those of a working set.
    """

    def __init__(self, ids: Tensor, parts: list[Part], layout: RowLayout, staging: Staging) -> None:
        self.ids, self.parts = ids, parts
        self.statistics: Callable[[], ScreenStatistics] | None = None
        self._layout, self._staging = layout, staging
        self._sums = staging.rows(len(ids)).zero_()

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, part: Part, working: WorkingSet) -> None:
        """Add the gradients of a part's working set, after its backward pass."""
        device = working.colors.values.device
        pack(working, self._layout, self._sums, add_at=part.positions.to(device))
        # The device reads and writes page-locked memory, and the next part adds to the same rows.
        self._staging.used_until(mark_current(device))

    def gradients(self, device: torch.device) -> Tensor:
        """[n, width] float32: sums over all parts' gradients, with the statistics of the view."""
        wait(mark_current(device))
        columns = self._layout.bookkeeping
        statistics = self.statistics() if self.statistics is not None else ()
        for name, values in zip(STATISTICS, statistics, strict=False):
            self._sums[:, columns[name]] = values.cpu()
        return self._sums


def windows_of(
    view: View,
    ids: Tensor,
    rows_of: Callable[[View], Tensor],
    fits: Callable[[int, View, bool], bool],
) -> list[tuple[View, Tensor]]:
    """The view through windows whose rows fit, and the ids [m] of these rows.

    Windows are halved until they fit, or until they are tiles of the rasterizer: what does not fit
    then is tried.

    Args:
        view: of a whole image, or of a window.
        ids: [n] of the rows that it may see.
        rows_of: gives the ids of the rows that a window of it may see.
        fits: whether so many rows, of a window, can be on the device at a time; and whether it is
            so small that there has to be room in host memory: windows without end would not help.
    """

    def divided(window: View, seen: Tensor) -> list[tuple[View, Tensor]]:
        pixels, of = (math.prod(part.whole_window.size) for part in (window, view))
        small = len(seen) * _MOST_PARTS <= len(ids) or pixels * _MOST_WINDOWS <= of
        fit = fits(len(seen), window, small)
        halves = None if fit else window.whole_window.halves(_MULTIPLE)
        if halves is None:
            return [(window, seen)]
        parts = (window.through(half) for half in halves)
        return [each for part in parts for each in divided(part, rows_of(part))]

    return divided(view, ids)


def parts_of(ids: Tensor, windows: list[tuple[View, Tensor]]) -> list[Part]:
    """Parts of a view that may see the rows ``ids`` [n]."""
    parts, known = [], torch.zeros(len(ids), dtype=torch.bool)
    for view, seen in windows:
        positions = _positions(ids, seen)
        places = positions.long()
        parts.append(Part(view, positions, ~known[places]))
        known[places] = True
    return parts


def _positions(ids: Tensor, seen: Tensor) -> Tensor:
    """Where the rows ``seen`` are in ``ids``; both [*] int32, ascending.

    Rows that are not, the whole view does not draw: they are left out.
    """
    n, m = len(ids), len(seen)
    where, rest = (torch.empty(n, dtype=torch.int32) for _ in range(2))
    in_seen, other = (torch.empty(m, dtype=torch.int32) for _ in range(2))
    common = _C.split_common(
        ids.numpy(), seen.numpy(), where.numpy(), in_seen.numpy(), rest.numpy(), other.numpy()
    )
    return where[:common].clone()
