"""Rows in GPU memory: a software-managed cache of the host store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.colors import Viewpoint
from gsscale_nerfstudio.engines.kernels import (
    GATHER,
    LAUNCH,
    LINK_PROGRAMS,
    LINK_TILE,
    STEP,
    color_arguments,
    exchange_rows,
    gather_leaves,
    settle_and_step_rows,
    tile_of,
)
from gsscale_nerfstudio.engines.noise_kernels import draw_noise, step_noise
from gsscale_nerfstudio.engines.slot_kernels import limit_slots, summarize_slots
from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.engines.streams import Mark, SideStream, mark_current, wait
from gsscale_nerfstudio.engines.working_set import WorkingSet, empty_attributes, leaf_gradients
from gsscale_nerfstudio.optim.device_tables import DeviceTables
from gsscale_nerfstudio.store import HostStore
from gsscale_nerfstudio.store.edit import Placement, RowEdit
from gsscale_nerfstudio.store.memory import bits_of

_RING = 3
"""Views whose lists may be on their way to the device at the same time."""

_PIECE = 1 << 20
"""Rows that are written back, or summed up, at a time: lists of 12 MB."""


@dataclass(frozen=True)
class Admission:
    """The rows of a view, in the cache or on their way into it.

    Attributes:
        slots: [n] int32 on the device: where each row is.
        ready: reached when all of them are there.
        missed: number of rows that were not in the cache.
        written: number of rows that had to leave it.
    """

    slots: Tensor
    ready: Mark
    missed: int
    written: int


class RowCache:
    """Slots for whole rows (parameters, moments, bookkeeping) on the device.

    A resident row is valid here only, and goes back to the host store when it leaves. Which row is
    in which slot is kept on the host, in C++ (least recently used first out).

    Args:
        store: the rows; page-locked.
        device: where the slots are.
        slots: how many.
    """

    def __init__(self, store: HostStore, device: torch.device, slots: int) -> None:
        self.store = store
        self.device = device
        width, moments = store.layout.width, store.layout.moments
        self.params, self.exp_avg, self.exp_avg_sq = (
            torch.empty(slots, width, dtype=dtype, device=device)
            for dtype in (torch.float32, moments, moments)
        )
        self.table = _C.SlotTable(slots, len(store))
        self.expected: dict[int, View] = {}
        """Views that :meth:`expect` was told of, by number; the caller's notes."""
        self._free_slots = slots
        self._link = SideStream(device)
        self._make_lists(slots)

    def _make_lists(self, slots: int) -> None:
        def staging(width: int) -> Staging:
            return Staging(slots, width, self.device, torch.int32)

        self._lists = [(staging(0), staging(3)) for _ in range(_RING)]

    def __len__(self) -> int:
        return self.table.n_slots

    def admit(self, ids: Tensor, view: int, keep_from: int, stepped: Mark) -> Admission | None:
        """Make the rows ``ids`` resident; may be called by another thread than the one that steps.

        Args:
            ids: [n] int32 on the CPU, ascending.
            view: number of the view they are for, higher at each call.
            keep_from: rows of this view and later ones stay: they will still be stepped.
            stepped: reached when all rows of earlier views have been stepped.

        Returns:
            None if they do not fit beside the rows that must stay; nothing has changed then.
        """
        n = len(ids)
        if n > len(self):
            return None
        lists = self._lists[view % _RING]
        slots, moves = (staging.rows(n) for staging in lists)
        # Before the table changes: it must not know of rows that nobody brings, for lack of memory.
        with self._link.active():
            on_device = torch.empty(n, dtype=torch.int32, device=self.device)
            moves_there = torch.empty(n, 3, dtype=torch.int32, device=self.device)
        plan = self.table.plan(ids.numpy(), view, keep_from, slots.numpy(), moves.numpy())
        if plan is None:
            return None
        missed, newest = plan
        # A row that leaves must have been stepped, and its slot must not be overwritten before.
        with self._link.active(after=stepped if newest >= 0 else None):
            on_device.copy_(slots, non_blocking=True)
            moves_there = moves_there[:missed]
            self._exchange(moves_there.copy_(moves[:missed], non_blocking=True))
            ready = self._link.mark()
        for staging in lists:
            staging.used_until(ready)
        if self.device.type == "cuda":
            # The allocator must not give the memory to the link's stream while kernels of the
            # current stream still read it.
            on_device.record_stream(torch.cuda.default_stream(self.device))
        # Empty slots are filled before any row leaves.
        written = missed - max(0, min(missed, self._free_slots)) if newest >= 0 else 0
        self._free_slots = len(self) - self.table.in_use
        return Admission(on_device, ready, missed, written)

    def expect(self, ids: Tensor, view: int) -> None:
        """Let the rows ``ids`` (as for :meth:`admit`) stay for view number ``view``, if they can.

        Views up to 30 after the last admitted one can be told.
        """
        self.table.expect(ids.numpy(), view)

    def lookup(self, ids: Tensor) -> Tensor:
        """Slots [n] int32 of the rows ``ids`` on the device, -1 for those that are not resident."""
        slots = torch.empty(len(ids), dtype=torch.int32)
        self.table.lookup(ids.numpy(), slots.numpy())
        return slots.to(self.device)

    def write_back(self, stepped: Mark, ids: Tensor | None = None) -> None:
        """Bring the host store up to date with resident rows, which stay resident.

        Takes no memory on the device, of which there may be none when a cache has to go.

        Args:
            stepped: reached when the rows have been stepped.
            ids: [n] int64, of rows that may be resident; None for all rows.
        """
        if ids is None:
            rows, slots = self.residents()
        else:
            rows = torch.unique(ids).int()
            slots = torch.empty_like(rows)
            self.table.lookup(rows.numpy(), slots.numpy())
            rows, slots = rows[slots >= 0], slots[slots >= 0]
        pieces = zip(rows.split(_PIECE), slots.split(_PIECE), strict=True)
        for i, (leaving, places) in enumerate(pieces):
            _, staging = self._lists[i % _RING]
            moves = staging.rows(len(leaving))
            moves[:, 0], moves[:, 1], moves[:, 2] = -1, places, leaving
            with self._link.active(after=stepped):
                self._exchange(moves)  # read by the kernel where it is
                staging.used_until(self._link.mark())
        wait(self._link.mark())

    def forget(self) -> None:
        """Drop all rows, without writing them back: the host's are the valid ones now."""
        wait(self._link.mark())
        self.table.clear(len(self.store))
        self.expected.clear()
        self._free_slots = len(self)

    def residents(self) -> tuple[Tensor, Tensor]:
        """All resident rows, ascending, and their slots: int32 on the CPU."""
        rows = torch.empty(self.table.in_use, dtype=torch.int32)
        slots = torch.empty_like(rows)
        self.table.residents(rows.numpy(), slots.numpy())
        return rows, slots

    # -- rows that change; nothing is on its way ---------------------------------------------------

    def follow(self, edit: RowEdit, placement: Placement) -> None:
        """Let slots keep the rows of the store that an edit has moved; it wrote others anew."""
        table = self.table
        table.drop(torch.cat([edit.rewritten, edit.removed]).sort().values.int().numpy())
        sources, targets = placement.sources.int(), placement.targets.int()
        table.rename(sources.numpy(), targets.numpy())
        table.resize(len(self), placement.n)
        parents = placement.now(edit.parents).int()
        table.expect_like(parents.numpy(), placement.added.int().numpy())
        self._free_slots = len(self) - table.in_use

    def grow(self, slots: int) -> None:
        """Add slots, so that there are ``slots``; rows stay resident, also if memory runs out.

        Takes the present parameters' memory in addition while it copies.
        """
        for name in ("params", "exp_avg", "exp_avg_sq"):  # one at a time, for the sake of memory
            present = getattr(self, name)
            width = self.store.layout.width
            grown = torch.empty(slots, width, dtype=present.dtype, device=self.device)
            grown[: len(self)] = present[: len(self)]  # longer, if this failed before
            setattr(self, name, grown)
            del grown, present
        self.table.resize(slots, len(self.store))
        self._free_slots = slots - self.table.in_use
        self._make_lists(slots)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All resident rows, ascending, and their slots, piece by piece: [n] int32 each.

        For kernels of the current stream, which read them where they are, in page-locked memory:
        like :meth:`write_back`, densification takes no memory on the device.
        """
        pieces = (ids.split(_PIECE) for ids in self.residents())
        for i, (rows, slots) in enumerate(zip(*pieces, strict=True)):
            lists = self._lists[i % _RING]
            slots_there, rows_there = (staging.rows(len(rows)) for staging in lists)
            rows_there = rows_there.flatten()[: len(rows)]
            yield rows_there.copy_(rows), slots_there.copy_(slots)
            # The kernels that were queued for this piece may not have read it yet.
            read = mark_current(self.device)
            for staging in lists:
                staging.used_until(read)

    def summarize(self, rows: Tensor, slots: Tensor, out: Tensor, tables: DeviceTables) -> None:
        """:meth:`.EditableEngine.summarize` for one of the :meth:`pieces`.

        Args:
            rows, slots: the piece.
            out: [4, rows] float32, page-locked; entries of other rows stay.
            tables: the Adam history.
        """
        summarize_slots(self._arrays, rows, slots, out, self.store.layout, tables)

    def limit_opacities(self, slots: Tensor, most: float, tables: DeviceTables) -> None:
        """:meth:`.EditableEngine.limit_opacities` for one of the :meth:`pieces`."""
        limit_slots(self._arrays, slots, most, self.store.layout, tables)

    def gather(
        self,
        slots: Tensor,
        tables: DeviceTables,
        viewpoint: Viewpoint,
        training: bool,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Settled attributes (:func:`.empty_attributes`) of rows; the rows stay as they are.

        Args:
            slots: [n] int32 on the device; where it is -1 the row is read from the host store.
            tables: the Adam history.
            viewpoint: from where colours are seen.
            training: whether there will be a backward pass.
            rows: [n] int32 on the device; None if all rows have slots.
        """
        layout, n = self.store.layout, len(slots)
        attributes = empty_attributes(layout, n, viewpoint, training)
        if n > 0:
            offsets = None
            if tables.history.noise is not None:
                arrays, host = self._arrays, self._host_arrays
                offsets, _ = draw_noise(arrays, host, slots, rows, layout, tables, own=False)
            with LAUNCH:
                gather_leaves[(triton.cdiv(n, GATHER.rows),)](
                    *self._arrays,
                    *self._host_arrays,
                    slots,
                    slots if rows is None else rows,
                    **attributes,
                    **color_arguments(layout, viewpoint),
                    offsets=slots if offsets is None else offsets,
                    n=n,
                    FROM_HOST=rows is not None,
                    NOISE=offsets is not None,
                    SLOPES=attributes["slopes"].numel() > 0,
                    STAMP=layout.bookkeeping["stamp"],
                    **tables.pull(slots),
                    **tables.skipped_steps(),
                    **tile_of(layout, GATHER),
                )
        return attributes

    def step(
        self, slots: Tensor, working: WorkingSet, tables: DeviceTables, lrs: np.ndarray
    ) -> Tensor:
        """Settle resident rows and apply one step of Adam with the gradients of their leaves.

        Args:
            slots: [n] int32 on the device, all >= 0.
            working: the rows' working set, after its backward pass.
            tables: the Adam history up to the step before.
            lrs: [len(GROUPS)] learning rates.

        Returns:
            [n, 4] the rows' new bounding spheres.
        """
        layout, n = self.store.layout, len(slots)
        spheres = torch.empty(n, 4, device=self.device)
        if n == 0:
            return spheres
        grads, colors = leaf_gradients(working), working.colors
        columns = layout.bookkeeping
        statistics = working.statistics() if working.statistics is not None else None
        norms, seen, radii = statistics if statistics is not None else (spheres,) * 3
        offsets = normals = None
        if tables.history.noise is not None:
            arrays, host = self._arrays, self._host_arrays
            offsets, normals = draw_noise(arrays, host, slots, None, layout, tables, own=True)
        # The launch is the last thing to be done: if there is no memory for what it needs, no row
        # has been changed.
        with LAUNCH:
            settle_and_step_rows[(triton.cdiv(n, STEP.rows),)](
                *self._arrays,
                slots,
                spheres,
                spheres if offsets is None else offsets,
                *grads.values(),
                colors.gradients(),
                working.leaves["means"].detach(),
                norms,
                seen,
                radii,
                **color_arguments(layout, colors.viewpoint),
                reach_of=tables.reach,
                n=n,
                HAS_STATISTICS=statistics is not None,
                NOISE=offsets is not None,
                STAMP=columns["stamp"],
                GRAD2D=columns["grad2d"],
                COUNT=columns["count"],
                MAX_RADIUS=columns["max_radius"],
                KEY=columns["key"],
                **tables.pull(slots),
                **tables.skipped_steps(),
                **tables.adam_step(lrs),
                **tile_of(layout, STEP),
            )
        if normals is not None:
            step_noise(self._arrays, slots, normals, spheres, layout, tables, lrs)
        return spheres

    @property
    def _arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.params, bits_of(self.exp_avg), bits_of(self.exp_avg_sq)

    @property
    def _host_arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        store = self.store
        return store.params, bits_of(store.exp_avg), bits_of(store.exp_avg_sq)

    def _exchange(self, moves: Tensor) -> None:
        """Queue ``moves`` (see :func:`.kernels.exchange_rows`) on the current stream.

        They are on the device or in page-locked memory; nothing is allocated.
        """
        n, width = len(moves), self.store.layout.width
        if n == 0:
            return
        with LAUNCH:
            exchange_rows[(min(LINK_PROGRAMS, triton.cdiv(n, LINK_TILE)),)](
                *self._host_arrays,
                *self._arrays,
                moves,
                n,
                WIDTH=width,
                COLUMNS=triton.next_power_of_2(width),
                ROWS=LINK_TILE,
            )
