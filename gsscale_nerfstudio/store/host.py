"""The host store: every row, its Adam moments and its bookkeeping, in host memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.store.chunks import chunks
from gsscale_nerfstudio.store.edit import Placement, RowEdit, place
from gsscale_nerfstudio.store.keys import keys_of
from gsscale_nerfstudio.store.layout import GROUPS, STATISTICS, RowLayout
from gsscale_nerfstudio.store.memory import (
    ReservedArray,
    available_memory,
    bits_of,
    memory_limit,
    pin_chunk,
)
from gsscale_nerfstudio.store.order import morton_order

UNBOUNDED_ROWS = 1 << 28
"""Address space taken when the user names no capacity; physical memory is the limit then."""

PASSING_BYTES = 16
"""For each row, now and then: masks and lists of a refinement, and later the order of the sort."""


def headroom(limit: int | None = None) -> int:
    """Bytes of host memory that rows leave to the rest of the process and the machine.

    Args:
        limit: bytes that the process may use; None for those of this machine.
    """
    return max(1 << 29, (memory_limit() if limit is None else limit) // 50)


def locked_ahead(layout: RowLayout, rows: int) -> int:
    """Bytes that page-locking takes, in chunks, beyond ``rows`` rows; at most."""
    return 3 * pin_chunk(rows * layout.width * 4)


def remedy_for_rows(flags: str, least: int = 0, tried: str = "") -> str:
    """What helps where host memory is too small for the rows.

    Args:
        flags: see :meth:`.RowLayout.smaller`; none if there are no such or they are not enough.
        least: bytes that are taken with the smallest rows; 0 if they cannot be smaller.
        tried: the flags of these.
    """
    others = "free host memory, or begin with fewer points"
    if flags:
        return f"train with {flags}, {others}"
    if least:
        return f"even {tried} is not enough ({least / 1e9:.2f} GB): {others}"
    return others


def _floats_of(array: Tensor) -> np.ndarray:
    """Rows as so many floats, for who moves them without looking at them."""
    return array.view(torch.float32).numpy()


class HostStore:
    """All rows in three arrays of equal row width: ``params``, ``exp_avg``, ``exp_avg_sq``.

    Each is ``[capacity, layout.width]``, float32 or, of moments, what the layout says. The first
    ``len(store)`` rows are in use. Moments of rows that no optimizer has touched are pages never
    written, so a store that is only rendered takes memory for ``params`` alone. ``spheres`` and
    ``blocks`` are the culler's bounds.

    Args:
        layout: the columns of a row.
        max_rows: capacity; None takes as many rows as physical memory will hold.

    Attributes:
        claims: gives bytes of host memory that others are still going to take: :meth:`room` leaves
            them.
        beside_row: bytes of other host memory that comes with each row that is added.

    Raises:
        GSScaleError: ``max_rows`` rows cannot fit into this machine's memory.
    """

    def __init__(self, layout: RowLayout, max_rows: int | None = None) -> None:
        self.layout = layout
        if max_rows is not None:
            needed, limit = max_rows * self.row_bytes, memory_limit()
            if max_rows < 1:
                raise GSScaleError(
                    "--pipeline.model.max-gaussians is the largest number of Gaussians: 1 or more, "
                    f"not {max_rows}"
                )
            if needed > limit:
                raise GSScaleError(
                    f"{max_rows:,} Gaussians need {needed / 2**30:.1f} GiB of host memory and this "
                    f"machine (or its container) has {limit / 2**30:.1f} GiB; lower "
                    "--pipeline.model.max-gaussians, or leave it out: training takes as many as fit"
                )
        self.capacity = max_rows or UNBOUNDED_ROWS
        types = (torch.float32, layout.moments, layout.moments)
        self._arrays = [ReservedArray(self.capacity, layout.width, dtype) for dtype in types]
        self.params, self.exp_avg, self.exp_avg_sq = (a.tensor for a in self._arrays)
        self._bounds = [
            ReservedArray(self.capacity, 4),
            ReservedArray(-(-self.capacity // _C.BLOCK_ROWS), 8),
        ]
        self.spheres, self.blocks = (a.tensor for a in self._bounds)
        self.kernel_rows = _C.Rows(
            self.params.numpy(),
            bits_of(self.exp_avg).numpy(),
            bits_of(self.exp_avg_sq).numpy(),
            self.spheres.numpy(),
            layout.kernel_columns,
        )
        self._n = 0
        self._lent = False
        self._dirty_end = 0  # rows from here on have never been written
        self._unsorted = 0
        self.claims: Callable[[], int] = lambda: 0
        self.beside_row = 0.0

    def __len__(self) -> int:
        return self._n

    @property
    def row_bytes(self) -> int:
        """Bytes of host memory that one Gaussian takes while it is trained."""
        return self.layout.stored_bytes

    # -- columns ---------------------------------------------------------------------------------

    def column(self, name: str, array: Tensor | None = None) -> Tensor:
        """Strided view [n, *shape] of one group's columns; no copy.

        Args:
            name: a group name of :data:`GROUPS`.
            array: ``params`` (the default), ``exp_avg`` or ``exp_avg_sq``.
        """
        array = self.params if array is None else array
        return array[: self._n, self.layout.columns[name]].unflatten(1, self.layout.shapes[name])

    def column_copy(self, name: str, array: Tensor | None = None) -> Tensor:
        """Contiguous copy [n, *shape] of one group's columns, with memory of its own.

        For files: ``torch.save`` of a view, even an empty one, writes the whole store behind it.
        Inside of :meth:`lent` it is a view nevertheless.
        """
        column = self.column(name, array)
        return column if self._lent else column.clone(memory_format=torch.contiguous_format)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """States that are taken inside have views of the store in the place of copies.

        For who writes them before rows change, and can write views.
        """
        self._lent = True
        try:
            yield
        finally:
            self._lent = False

    def bookkeeping(self, name: str) -> Tensor:
        """Strided view [n] of one bookkeeping column."""
        return self.params[: self._n, self.layout.bookkeeping[name]]

    # -- stopping and resuming -------------------------------------------------------------------

    def resume_state(self) -> dict[str, Any]:
        """What a checkpoint needs of the store beside the groups' columns.

        Returns:
            ``statistics``: a tensor [n] float32 for each of :data:`STATISTICS`, in the rows' order.
            ``unsorted``: rows that are out of Morton order.
        """
        columns = {name: self.bookkeeping(name) for name in STATISTICS}
        if not self._lent:
            columns = {name: column.clone() for name, column in columns.items()}
        return {"statistics": columns, "unsorted": self._unsorted}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`resume_state` gave; the groups' columns are loaded already.

        Raises:
            GSScaleError: the statistics are of another number of rows.
        """
        for name in STATISTICS:
            column = state["statistics"][name]
            if len(column) != self._n:
                raise GSScaleError(
                    f"the checkpoint has densification statistics of {len(column):,} Gaussians and "
                    f"parameters of {self._n:,}; it was put together from two runs: load another "
                    "one with --load-step"
                )
            self.bookkeeping(name).copy_(column)
        self._unsorted = state["unsorted"]

    # -- growing and shrinking -------------------------------------------------------------------

    def room(self) -> int:
        """How many rows can be added now: by capacity, and by the memory that is free at present.

        Left alone are memory for a checkpoint's copy of all rows, :data:`PASSING_BYTES` for each of
        them, :attr:`claims`, and :func:`headroom`. Rows that were removed leave their memory to new
        ones.
        """
        snapshot = self.layout.snapshot_bytes
        free = available_memory() - headroom() - self.claims()
        free -= self._n * (snapshot + PASSING_BYTES)
        if self._arrays[0].pinned_rows:
            free -= locked_ahead(self.layout, self._held)
        held, beside = self._held - self._n, snapshot + self.beside_row
        # The first new rows take only what comes beside them.
        within = free / beside if beside > 0 else math.inf
        beyond = (free + held * self.row_bytes) / (self.row_bytes + beside)
        return min(self.capacity - self._n, max(0, int(min(within, beyond))))

    @property
    def _held(self) -> int:
        """Rows whose memory has been taken: they were in use once, or are page-locked."""
        return max(self._n, self._dirty_end, self._arrays[0].pinned_rows)

    @property
    def taken_bytes(self) -> int:
        """Host memory that rows have taken; without the moments, until these are page-locked."""
        return self._held * self._taken_row

    @property
    def _taken_row(self) -> int:
        """Bytes that a row takes at once, before anything is written to its moments."""
        return self.row_bytes if self._arrays[0].pinned_rows else self.layout.width * 4 + 16

    def _require(self, size: int, n: int) -> None:
        """See that ``size`` bytes for ``n`` rows can be taken without the process being killed."""
        available = available_memory()
        if size > available:
            raise GSScaleError(
                f"{n:,} Gaussians need {size / 1e9:.1f} GB more host memory, and "
                f"{available / 1e9:.1f} GB are available (in a container, within its limit); "
                f"{self._remedy(n, available + self.taken_bytes)}"
            )

    def _remedy(self, n: int, memory: int) -> str:
        """Words for what would let ``n`` rows be trained, alone, in so many bytes of memory."""
        # Rows may come from a checkpoint, whose bands they then have.
        least, flags = 0, ""
        for layout, flags in self.layout.smaller(with_bands=True):
            least = n * (layout.stored_bytes + layout.snapshot_bytes + PASSING_BYTES)
            least += locked_ahead(layout, n)
            if least <= memory:
                return remedy_for_rows(f"{flags} (images come on top)")
        return remedy_for_rows("", least, flags)

    def resize(self, n: int) -> None:
        """Set the number of rows in use. Added rows hold zeros.

        Raises:
            GSScaleError: more rows than the capacity, or than host memory holds at present.
        """
        if not 0 <= n <= self.capacity:
            raise GSScaleError(
                f"{n:,} Gaussians are more than there is room for, {self.capacity:,}; raise "
                "--pipeline.model.max-gaussians"
            )
        if n > self._held:
            self._require((n - self._held) * self._taken_row, n)
        if n > self._n:
            # Rows beyond the end are zero unless rows were removed there before.
            for array in (self.params, self.exp_avg, self.exp_avg_sq):
                fresh = array[self._n : min(n, self._dirty_end)]
                if len(fresh):
                    fresh.zero_()
            if self._arrays[0].pinned_rows:
                self.pin(n)
        self._dirty_end = max(self._dirty_end, n, self._n)
        self._n = n

    def append(self, values: Mapping[str, Tensor], stamp: int) -> None:
        """Add rows with zero moments and zero statistics, current for step ``stamp``.

        Args:
            values: one tensor [k, *shape] per group.
            stamp: optimizer step that the rows are current for.
        """
        first, k = self._n, len(values["means"])
        self.resize(first + k)
        for name in GROUPS:
            self.column(name)[first:] = values[name]
        self.bookkeeping("stamp")[first:] = stamp
        self._renew_keys(first)
        self._unsorted += k

    def apply(self, edit: RowEdit, stamp: int) -> Placement:
        """Rewrite, add and remove rows; written ones are current for step ``stamp``.

        Beside the edit it takes lists of ids, of rows that go, are new or move. Bounding spheres
        move with their rows; those of written rows are the caller's to compute.
        """
        for values in (edit.values, edit.added):
            values[:, self.layout.optimized :] = 0
            values[:, self.layout.bookkeeping["stamp"]] = stamp
        placement = place(self._n, edit.removed, len(edit.added))
        if placement.n > self._n:
            self.resize(placement.n)  # first of all: if it fails, nothing has changed
        key = self.layout.bookkeeping["key"]
        edit.values[:, key] = keys_of(edit.rewritten)
        edit.added[:, key] = keys_of(placement.added)
        self._write(edit.rewritten, edit.values, edit.keeps_moments)
        source, target = placement.sources.numpy(), placement.targets.numpy()
        for array in (self.params, self.exp_avg, self.exp_avg_sq, self.spheres):
            _C.copy_rows(_floats_of(array), source, target)
        if placement.n < self._n:
            self.resize(placement.n)
        self._write(placement.added, edit.added)
        self._unsorted += len(target) + len(edit.added)
        return placement

    def _write(self, ids: Tensor, values: Tensor, keeps_moments: bool = False) -> None:
        _C.fill_rows(self.params.numpy(), ids.numpy(), values.numpy())
        for array in () if keeps_moments else (self.exp_avg, self.exp_avg_sq):
            _C.fill_rows(_floats_of(array), ids.numpy())

    def renew_keys(self) -> None:
        """Give all rows the keys that they have after they were loaded."""
        self._renew_keys(0)

    def _renew_keys(self, first: int) -> None:
        """Give rows from ``first`` on the keys of the places where they are."""
        keys = self.bookkeeping("key")[first:]
        for rows in chunks(len(keys)):
            keys[rows] = keys_of(torch.arange(first + rows.start, first + rows.stop))

    # -- order and memory ------------------------------------------------------------------------

    @property
    def unsorted_share(self) -> float:
        """Share of rows that were added or moved since the last :meth:`sort`."""
        return self._unsorted / max(1, self._n)

    def sort(self) -> Tensor:
        """Put the rows in Morton order of their means; extra memory: 6 bytes a row.

        Returns:
            [n] int32, ``order[i]`` is the former place of the row that is now at ``i``.
        """
        order = morton_order(self.params, self.layout.columns["means"].start, self._n)
        for array in (self.params, self.exp_avg, self.exp_avg_sq, self.spheres):
            _C.permute_rows(_floats_of(array), order.numpy())
        self._unsorted = 0
        return order

    def pin(self, n: int | None = None) -> None:
        """Page-lock the rows in use (and those added later) for access by the GPU.

        Raises:
            GSScaleError: host memory does not hold their moments, or CUDA could not lock it.
        """
        if not self._arrays[0].pinned_rows:
            self._require(self._n * (self.row_bytes - self._taken_row), self._n)
        for array in self._arrays:
            array.pin(max(1, self._n if n is None else n))
