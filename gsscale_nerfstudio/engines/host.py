"""The host engine: Adam runs on the CPU, the device sees working sets (GS-Scale, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.budget import Budget
from gsscale_nerfstudio.engines.colors import Viewpoint
from gsscale_nerfstudio.engines.editing import EditableEngine, summary_bytes
from gsscale_nerfstudio.engines.lookahead import (
    ColdRows,
    GatheredView,
    Outlook,
    PreparedView,
    Split,
)
from gsscale_nerfstudio.engines.packing import pack, unpack
from gsscale_nerfstudio.engines.parts import Part, ViewInParts, parts_of, windows_of
from gsscale_nerfstudio.engines.sizing import ViewSizing
from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.engines.streams import Mark, mark_current, wait
from gsscale_nerfstudio.engines.threads import uninterrupted
from gsscale_nerfstudio.engines.view_staging import ViewStaging
from gsscale_nerfstudio.engines.working_set import WorkingSet, empty_attributes, working_set
from gsscale_nerfstudio.errors import warn
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from gsscale_nerfstudio.store.edit import Placement, RowEdit

_HOT_PART = 1 << 17
"""Hot rows that are stepped before the device reads them: it reads while the next are stepped."""


@dataclass(frozen=True)
class _PendingStep:
    """A recorded step whose rows have not been stepped yet.

    Attributes:
        ids: [n] int32, the rows.
        grads: [n, width] float32 in page-locked memory: gradients and statistics, valid from
            ``arrived`` on.
        step: the step's number, t.
        tables: the Adam history up to step t - 1.
        lr: [width] float32, of each column.
    """

    ids: Tensor
    grads: Tensor
    arrived: Mark
    step: int
    tables: _C.SkipTables
    lr: np.ndarray


class HostEngine(EditableEngine):
    """Steps rows in the store, hot ones first and the others while the device draws the next view.

    Device memory holds one working set, its gradients, the cold rows of the next view and what the
    rasterizer needs. The device writes gradients into page-locked memory itself, and reads hot rows
    there. What happens during training step t, begun with view t::

        main     wait for gradients t-1 | hot rows t-1 -> device | forward, backward queued
        worker                          | other rows t-1, spheres | cull t+1, settle its cold rows
        link                            | hot rows                | cold rows t+1     gradients t
        device   unpack cold rows       | unpack hot rows         | forward and backward of view t

    Who may touch the store and the culler: the worker from the moment that the other rows of step
    t-1 are handed to it until the main thread has waited for it (``_wait_for_worker``), the main
    thread at all other times. The worker takes its jobs in order, so view t+1 is culled when step
    t-1 is complete; of step t, which is pending then, the culler knows by its slack.
    """

    def __init__(
        self, store: HostStore, device: torch.device, budget: Budget | None = None
    ) -> None:
        self.budget = budget or Budget()
        self._sizing = ViewSizing(self.budget, device, store.layout)
        self._pending: _PendingStep | None = None
        self._outlook: Outlook | None = None
        self._last_lrs: np.ndarray | None = None
        self._told_of_parts = False
        self._set_up_staging(store, device)
        super().__init__(store, device)

    def _set_up_staging(self, store: HostStore, device: torch.device) -> None:
        self._summary = Staging(4 * store.capacity, 0, device)
        self._set_up_staging_of_views(store, device)

    def _set_up_staging_of_views(self, store: HostStore, device: torch.device) -> None:
        """Begin with new buffers; nobody uses the present ones any more."""
        self._staging = ViewStaging(store.capacity, store.layout.width, device)

    @classmethod
    def staging_bytes(cls, layout: RowLayout, rows: int, view_rows: int) -> int:
        return ViewStaging.size(layout, view_rows) + summary_bytes(rows)

    def move_to(self, device: torch.device) -> None:
        self._forget_announced()
        self._finish_step()
        if self.device.type == "cuda":
            # Kernels may still be reading the staging that is about to go.
            torch.cuda.synchronize(self.device)
        super().move_to(device)
        self._sizing = ViewSizing(self.budget, device, self.store.layout)
        self._set_up_staging(self.store, device)

    # -- the worker ------------------------------------------------------------------------------

    def announce(self, views: Sequence[View]) -> None:
        if not self._announced:
            self._outlook = self._look_ahead()
        super().announce(views)

    def _look_ahead(self) -> Outlook | None:
        """Read by the main thread, which changes all of it; None if there is no step under way."""
        if self.current is None or self._pending is not None or len(self.optimizers) < len(GROUPS):
            return None
        lrs = self.learning_rates
        return Outlook(self.step_count + 1, self.current.ids, lrs, self.history.ahead(lrs))

    def _prepare(self, view: View, step: int, ahead: bool) -> Any:
        ids = self._rows_of(view, step, ahead)
        if not ahead or self._outlook is None or not self._fits(len(ids), view):
            return PreparedView(view, ids)
        return PreparedView(view, ids, self._send_cold(ids, self._outlook))

    def _send_cold(self, ids: Tensor, outlook: Outlook) -> ColdRows:
        split = self._staging.lists.split(outlook.before, ids)
        rows = self._staging.cold.rows(len(split.cold))
        # Rows that the view before does not see have no gradient in its step: they can be settled
        # beyond it before it is done.
        self._gather(ids, rows, split.cold, outlook.tables)
        on_device, arrived = self._staging.cold.send(rows)
        return ColdRows(outlook, split, on_device, arrived)

    def _step_rest(self, pending: _PendingStep, pick: Tensor) -> None:
        """Step what is left of the rows of a step, in the worker."""
        self._step_picked(pending, pick)
        self._rows_stepped(pending)

    # -- before the step -------------------------------------------------------------------------

    def begin(self, view: View, viewpoint: Viewpoint | None = None) -> WorkingSet | ViewInParts:
        if self._sizing.quiet and self._sizing.limited:
            with uninterrupted():
                self._drop_announced()  # what is prepared was made to the old limits
                self._let_go()
                self._forget_limits()
        return super().begin(view, viewpoint)

    def _forget_limits(self) -> None:
        """Take as much as the budget allows, for memory has not run out for long."""
        self._sizing.forget_limits()

    def _bring(self, prepared: Any, viewpoint: Viewpoint) -> WorkingSet | ViewInParts:
        self._wait_for_worker()  # the other rows of the step before last
        if not self._fits(len(prepared.ids), prepared.view):
            self._finish_step()
            return self._in_parts(prepared.view, prepared.ids)
        cold, row_bytes = prepared.cold, 4 * self.store.layout.width
        # The step may not have come about, or with another learning rate than was expected.
        if cold is None or not cold.outlook.has_come_true(self.step_count, self._last_lrs):
            self._count(len(prepared.ids), len(prepared.ids), len(prepared.ids) * row_bytes)
            self._finish_step()
            return self._send(prepared.ids, viewpoint, training=True)
        self._sizing.brought = len(prepared.ids)
        self._count(len(prepared.ids), len(cold.rows), len(prepared.ids) * row_bytes)
        layout = self.store.layout
        attributes = empty_attributes(layout, len(prepared.ids), viewpoint, training=True)
        # Rows must have arrived before they are read. Queued first, so that the device has
        # something to do while hot rows are stepped.
        self._link_waits.wait(cold.arrived, self.device)
        unpack(cold.rows, layout, attributes, viewpoint, cold.split.cold)
        self._staging.cold.read_until(mark_current(self.device))
        self._bring_hot(prepared.ids, cold.split, attributes, viewpoint)
        self._staging.lists.read_until(mark_current(self.device))
        return working_set(prepared.ids, attributes, layout, viewpoint, training=True)

    def _count(self, n: int, missed: int, moved: int) -> None:
        counters = {"views": 1, "rows": n, "rows_missed": missed, "link_bytes": moved}
        for name, value in counters.items():
            self.counters[name] += value

    def _bring_hot(
        self, ids: Tensor, split: Split, attributes: dict[str, Tensor], viewpoint: Viewpoint
    ) -> None:
        """Step the rows that this view shares with the last one, and let the device read them."""
        # Waits until the device has read the last view's.
        rows = self._staging.outgoing.rows(len(split.hot))
        pending = self._take_pending()
        if pending is None:  # finished in the meantime, for a render say
            self._gather(ids, rows, split.hot, self.history.tables)
            unpack(rows, self.store.layout, attributes, viewpoint, split.hot)
        else:
            # The worker reads these while the next are written to the other buffer.
            self._staging.keep_gradients()
            self._wait_for_gradients(pending)
            for start in range(0, len(rows), _HOT_PART):
                part = slice(start, start + _HOT_PART)
                self._step_picked(pending, split.hot_before[part], rows[part])
                hot = split.hot[part]
                unpack(rows[part], self.store.layout, attributes, viewpoint, hot)
            # From here on the store and the culler are the worker's.
            self._worker.submit(self._step_rest, pending, split.only_before)
        self._staging.outgoing.used_until(mark_current(self.device))

    def _prepare_fetch(self, view: View) -> GatheredView:
        ids = self._cull(view, self.step_count)
        return GatheredView(ids, self._gather_all(ids))

    def _fetch(self, view: View, viewpoint: Viewpoint) -> WorkingSet:
        # Dropped in any case: what is sent goes the same way as what was gathered ahead.
        ahead, self._to_fetch = self._to_fetch, None
        if ahead is None or not ahead.view.same_as(view):
            return self._send(self._cull(view, self.step_count), viewpoint, training=False)
        gathered = ahead.prepared.result()
        self._sizing.brought = len(gathered.ids)
        return self._send_gathered(gathered.ids, gathered.rows, viewpoint, training=False)

    def _send(self, ids: Tensor, viewpoint: Viewpoint, training: bool) -> WorkingSet:
        """The working set of any rows, without anything done ahead; no step is pending."""
        self._sizing.brought = len(ids)
        return self._send_gathered(ids, self._gather_all(ids), viewpoint, training)

    def _gather_all(self, ids: Tensor) -> Tensor:
        """The rows, settled, where the device reads them once it has read the last ones."""
        rows = self._staging.outgoing.rows(len(ids))
        self._gather(ids, rows, None, self.history.tables)
        return rows

    def _send_gathered(
        self, ids: Tensor, rows: Tensor, viewpoint: Viewpoint, training: bool
    ) -> WorkingSet:
        """The working set of what :meth:`_gather_all` has given."""
        layout = self.store.layout
        attributes = empty_attributes(layout, len(ids), viewpoint, training)
        unpack(rows, layout, attributes, viewpoint)
        self._staging.outgoing.used_until(mark_current(self.device))
        return working_set(ids, attributes, layout, viewpoint, training)

    def _gather(
        self, ids: Tensor, rows: Tensor, pick: Tensor | None, tables: _C.SkipTables
    ) -> None:
        """Settled rows ``ids``, or those at positions ``pick``; the store stays as it is."""
        positions = None if pick is None else pick.numpy()
        with self._timed("gather_s"):
            _C.gather_settled(
                self.store.kernel_rows, tables, ids.numpy(), rows.numpy(), pick=positions
            )

    # -- views that do not fit ---------------------------------------------------------------------

    def windows(self, view: View) -> list[View]:
        """The view through windows that :meth:`fetch` can bring, in order: itself if it fits."""
        with uninterrupted():
            if self._can_show(len(self.store), view):
                return [view]
            self._wait_for_worker()
            self._finish_step()
            ids = self._rows_in(view)
            windows = windows_of(view, ids, self._rows_in, self._can_show)
            return [window for window, _ in windows]

    def _can_show(self, rows: int, view: View, small: bool = False) -> bool:
        """Whether so many rows of a view can be on the device at a time, to be rendered.

        Args:
            rows: of the view.
            view: of the whole image, or of a window.
            small: there has to be room in host memory for it.
        """
        return rows <= self._sizing.most_shown and self._have_room(rows, view, small)

    def _have_room(self, rows: int, view: View, small: bool) -> bool:
        """Whether so many rows of a view, or of a window of one, can be brought at a time."""
        here = small or self._staging.can_send(rows)
        return here and self._sizing.fits(rows, view)

    def show_less(self, view: View, tries: int) -> bool:
        """Let GPU memory suffice for renders, at no cost to training, because it has run out.

        Called between steps, when nothing of a render that failed is held any more.

        Args:
            view: that was rendered.
            tries: how often this was called for this render already.

        Returns:
            False if there is nothing more to be done.
        """
        with uninterrupted():
            if tries > 0 and not self._sizing.show_less(self.visible_rows(view)):
                return False
            self._sizing.give_back()
            return True

    def _fits(self, rows: int, view: View) -> bool:
        """Whether a view of so many rows can be trained in one piece: on the device, and here.

        The memory plan does not reckon with this engine's staging while there is a cache, or scenes
        would have to be smaller by an eighth to a quarter for the sake of views that may never
        come. When the host is full they have less: parts take two of the buffers.
        """
        if not self._sizing.fits(rows, view):
            return False
        if self._staging.has_room_for(rows):
            return True
        self._tell_of_parts(rows)
        return False

    def _tell_of_parts(self, rows: int) -> None:
        if not self._told_of_parts:
            self._told_of_parts = True
            warn(
                f"host memory is low: it has no room for what a view of {rows:,} Gaussians sends "
                "to the GPU and back, and such views are drawn in parts, which takes a second "
                "forward pass. Free host memory, or raise --pipeline.model.vram-budget-gb if the "
                "GPU has more memory."
            )

    def _rows_in(self, window: View) -> Tensor:
        """Ids of the rows that a window, or a whole view, may see."""
        ahead = self._to_fetch
        if ahead is not None and ahead.view.same_as(window):
            return ahead.prepared.result().ids
        return self._cull(window, self.step_count)

    def _in_parts(self, view: View, ids: Tensor) -> ViewInParts:
        self._count(len(ids), len(ids), 4 * len(ids) * self.store.layout.width)
        self._staging.gradients.rows(len(ids))  # first: it needs them, and the rest is for windows
        parts = parts_of(ids, windows_of(view, ids, self._rows_in, self._have_room))
        return ViewInParts(ids, parts, self.store.layout, self._staging.gradients)

    def bring_part(
        self, whole: ViewInParts, part: Part, viewpoint: Viewpoint, training: bool
    ) -> WorkingSet:
        """The rows of one part, to be differentiated if ``training``."""
        return self._send(whole.ids[part.positions.long()], viewpoint, training)

    def give_back(self) -> None:
        """Let the device have the memory that torch keeps for later. Called between steps.

        What views need is measured anew: call it where others have taken more than views do.
        """
        self._sizing.give_back()

    def make_room(self, said: str, tries: int) -> bool:
        self._sizing.ran_out()
        smaller = tries > 0
        if smaller and not self._sizing.halve():
            return False
        with uninterrupted():
            self._drop_announced()
            if not smaller:
                self._staging.cold.let_go()
            self._sizing.give_back()
        if smaller:
            most = self._sizing.most
            done = f"from here on views of more than {most:,} Gaussians are drawn in parts"
        else:
            done = "what torch kept for later was given back"
        self._tell(said, done)
        return True

    def _tell(self, said: str, done: str) -> None:
        warn(f"GPU memory ran out after step {self.step_count} ({said}); {done}, and it goes on.")

    # -- another budget --------------------------------------------------------------------------

    @property
    def bounded(self) -> bool:
        """Whether the budget has an effect."""
        return self.device.type == "cuda"

    def set_budget(self, budget: Budget) -> None:
        """Keep to another budget from the next view on. Called between steps.

        Raises:
            GSScaleError: there is a cache, which would not hold a view; the old budget stays.
        """
        with uninterrupted():
            self._drop_announced()
            self._let_go()
            self._go_by(budget)
            self.budget = budget

    def _go_by(self, budget: Budget) -> None:
        """Size views by a budget, when none is on the device."""
        self._sizing.keep_to(budget)

    # -- the step --------------------------------------------------------------------------------

    def _step_rows(self, working: WorkingSet | ViewInParts, lrs: np.ndarray) -> None:
        """Have the gradients written to the host; the rows are stepped when they are there."""
        if self._pending is not None:  # the same view, stepped once more
            self._wait_for_worker()
            self._finish_step()
        layout = self.store.layout
        staging = self._staging.gradients
        if isinstance(working, ViewInParts):
            grads = working.gradients(self.device)
        else:
            grads = staging.rows(len(working))
            pack(working, layout, grads)  # from here on nothing needs memory on the device
        arrived = mark_current(self.device)
        staging.used_until(arrived)
        self.counters["link_bytes"] += grads.nbytes
        per_column = np.append(lrs, 0.0)[layout.group_of_column].astype(np.float32)
        self._pending = _PendingStep(
            working.ids, grads, arrived, self.step_count + 1, self.history.tables, per_column
        )
        self._last_lrs = lrs

    def _take_pending(self) -> _PendingStep | None:
        """The step that is pending, if any; the caller has its rows stepped now, all of them."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.half_stepped = True
        return pending

    def _finish_step(self) -> None:
        pending = self._take_pending()
        if pending is not None:
            self._wait_for_gradients(pending)
            self._step_picked(pending)
            self._rows_stepped(pending)

    def _wait_for_gradients(self, pending: _PendingStep) -> None:
        with self._timed("host_wait_s"):
            wait(pending.arrived)

    def _step_picked(
        self, pending: _PendingStep, pick: Tensor | None = None, forward: Tensor | None = None
    ) -> None:
        """Settle and step rows of a pending step: all of them, or those at positions ``pick``."""
        with self._timed("step_s"):
            _C.settle_and_step(
                self.store.kernel_rows,
                pending.tables,
                pending.ids.numpy(),
                pending.grads.numpy(),
                pending.lr,
                pick=None if pick is None else pick.numpy(),
                forward=None if forward is None else forward.numpy(),
            )

    def _rows_stepped(self, pending: _PendingStep) -> None:
        """Let the culler know of a step, all rows of which have been stepped."""
        self.culler.refresh(len(self.store), pending.ids)
        self._visible.known_step = pending.step
        self.half_stepped = False

    def _step_recorded(self) -> None:
        self._sizing.stepped()

    def restart(self, step: int) -> None:
        self._wait_for_worker()
        self._pending = None  # of rows that are no more
        super().restart(step)

    def _bring_home(self, ids: Tensor) -> None:
        pass  # they are at home

    def _edited(self, edit: RowEdit, placement: Placement) -> None:
        pass  # there is no cache

    def _sorted(self, order: Tensor) -> None:
        pass

    def _settle(self) -> None:
        _C.settle_range(self.store.kernel_rows, self.history.tables, 0, len(self.store))

    def _refresh_spheres(self) -> None:
        _C.refresh_spheres(self.store.kernel_rows, self.history.tables, 0, len(self.store))
        self.culler.refresh(len(self.store))
