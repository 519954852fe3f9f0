"""The resident engine: rows live in GPU memory as long as the budget lets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.budget import Budget
from gsscale_nerfstudio.engines.colors import Viewpoint
from gsscale_nerfstudio.engines.editing import summary_bytes
from gsscale_nerfstudio.engines.fitted_cache import FittedCache
from gsscale_nerfstudio.engines.host import HostEngine
from gsscale_nerfstudio.engines.lookahead import Outlook, PreparedView
from gsscale_nerfstudio.engines.packing import kernels_run_on
from gsscale_nerfstudio.engines.parts import ViewInParts
from gsscale_nerfstudio.engines.returns import SphereReturns
from gsscale_nerfstudio.engines.sizing import CacheSizing
from gsscale_nerfstudio.engines.streams import Mark, mark_current, wait_in_stream
from gsscale_nerfstudio.engines.threads import uninterrupted
from gsscale_nerfstudio.engines.working_set import WorkingSet, working_set
from gsscale_nerfstudio.errors import GSScaleError, warn
from gsscale_nerfstudio.optim.device_tables import DeviceTables
from gsscale_nerfstudio.store import HostStore, RowLayout
from gsscale_nerfstudio.store.edit import Placement, RowEdit
from gsscale_nerfstudio.store.memory import with_spare

LOOK_AHEAD = 16
"""Views after the next one that the cache is told of. On a tiled aerial scene, with a cache of 30 %
of the rows, 67 % of a view's rows miss when the least recently used ones leave; with 8 views known
it is 45 %, with 16 it is 44 %."""

_RARELY = 100
"""Steps within which memory may run out once before the cache is made smaller."""

_SHORT_PAUSE, _LONG_PAUSE = 8, 1024
"""Steps without a cache after a view that no cache could hold. Emptying and filling a cache costs
about as much as two steps, so it has to serve for some."""

if TYPE_CHECKING:  # see FittedCache
    from gsscale_nerfstudio.engines.cache import Admission, RowCache


@dataclass(frozen=True)
class _Prepared:
    """A view's rows, and where they are in the cache; ``admission`` is None if they had no room."""

    view: View
    ids: Tensor
    number: int
    admission: Admission | None


class ResidentEngine(HostEngine):
    """Settles and steps rows on the GPU, in a cache that is as large as the budget allows.

    A row crosses the link when it enters the cache, while the view before it is rendered, and when
    it has to leave; rows of consecutive views stay. Without a cache (before training, on a CPU, or
    when the budget cannot hold a view, and for some steps after that) it is the host engine.

    Args:
        store: the rows.
        device: where the rasterizer runs.
        budget: how much GPU memory may be used.
        auto: be the host engine on a machine without a GPU, and where that turns out to be faster.
    """

    def __init__(
        self, store: HostStore, device: torch.device, budget: Budget, auto: bool = False
    ) -> None:
        self.auto = auto
        self._fitted: FittedCache | None = None  # it is the host engine
        self._blocked = False  # an announced view was not admitted
        self._gave_up = False  # the cache, for want of memory
        self._back_at: int | None = None  # the step from which on there is to be one again
        super().__init__(store, device, budget)

    def _start_training(self) -> None:
        on_gpu = self.device.type == "cuda"
        if not (on_gpu or (kernels_run_on(self.device) and not self.auto)):
            if not self.auto:
                raise GSScaleError(
                    "the resident engine keeps Gaussians in GPU memory and there is no GPU; use "
                    "--pipeline.model.engine host (or auto)"
                )
            return
        self._sizing: CacheSizing = CacheSizing(
            self.budget, self.device, self.store.layout, self.auto
        )
        self._pause = _SHORT_PAUSE
        self._paused = False  # it was, and the user knows
        self._warned = False
        self._ran_out_at = -_RARELY  # the step before which memory ran out, the last time
        self._start_caching()

    def _start_caching(self) -> None:
        """Be the resident engine from the next view on."""
        self._drop_announced()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels may still be reading staging
        # That of the host engine, which may have run since the last cache, takes ten times what a
        # cache needs, and is page-locked.
        self._set_up_staging_of_views(self.store, self.device)
        self._returns = SphereReturns(self.store.capacity, self.device)
        self._tables = DeviceTables(self.history, self.device)
        self._prepared_views = 0
        self._current: _Prepared | None = None
        self._rows_done: Mark = None
        self._gave_up, self._back_at, self._caching_since = False, None, self.step_count
        self._fitted = FittedCache(self.store, self.device, self._sizing, self._paused)

    @property
    def _cache(self) -> RowCache | None:
        return None if self._fitted is None else self._fitted.cache

    @classmethod
    def staging_bytes(cls, layout: RowLayout, rows: int, view_rows: int) -> int:
        # With a cache: spheres of three steps, slots and moves of three views, and the slot table,
        # eight bytes for each row and twelve for each block of 64.
        return view_rows * with_spare(3 * 16 + 3 * 16) + rows * 9 + summary_bytes(rows)

    # -- before the step -------------------------------------------------------------------------

    def begin(self, view: View, viewpoint: Viewpoint | None = None) -> WorkingSet | ViewInParts:
        if self._back_at is not None and self.step_count >= self._back_at:
            with uninterrupted():
                self._let_go()
                self.rest()  # rows may still be stepped on the CPU
                self._sizing.forget_views()
                self._start_caching()
        return super().begin(view, viewpoint)

    def _forget_limits(self) -> None:
        super()._forget_limits()
        if self._fitted is not None:
            self._fitted.outdated = True
        elif self._gave_up and self._back_at is None:  # for want of memory, not for a large view
            self._back_at = self.step_count

    def _look_ahead(self) -> Outlook | None:
        return super()._look_ahead() if self._fitted is None else None

    def _prepare(self, view: View, step: int, ahead: bool) -> Any:
        if self._fitted is None:
            return super()._prepare(view, step, ahead)
        if self._fitted.outdated and not ahead:
            self._fitted.fit(self._rows_done)
            if self._sizing.host_is_faster(self.counters) and self._fitted.partial:
                self._stop_caching(
                    "the link is too slow for the Gaussians that have to cross it; from here on"
                )
                self._gave_up = False
                return super()._prepare(view, step, ahead)
        ids = self._rows_of(view, step, ahead)
        self._prepared_views += 1
        self._sizing.saw(len(ids), view.width * view.height)
        prepared = _Prepared(view, ids, self._prepared_views, None)
        # A cache of another size is not made while rows of this one are being stepped, and views
        # are admitted in their order, or an earlier one's rows would not be kept for it.
        room = self._sizing.has_room_for(len(ids), view.width * view.height)
        fits = self._cache is not None and room
        if fits and not (ahead and self._blocked):
            # Read in this order: rows that have become free to leave are done by that mark.
            keep_from = self._current.number if ahead and self._current else prepared.number
            done = self._rows_done
            assert self._cache is not None
            try:
                with self._timed("admit_s"):
                    admission = self._cache.admit(ids, prepared.number, keep_from, done)
            except RuntimeError:
                self._blocked |= ahead
                raise
            prepared = replace(prepared, admission=admission)
        self._blocked |= ahead and prepared.admission is None
        return prepared

    def _before_culling(self, ahead: bool) -> None:
        if self._fitted is not None:
            with self._timed("spheres_s"):
                self._take_spheres(wait_for_all=not ahead)

    def announce(self, views: Sequence[View]) -> None:
        known = len(self._announced)
        super().announce(views)
        caching = self._fitted is not None and self._fitted.views_ahead == 1
        if caching and len(self._announced) > known and len(views) > 1:
            # So that the next view can be admitted as soon as this one has begun.
            step = self.step_count + 2
            self._worker.submit(self._cull_ahead, views[1], step)

    def _cull_ahead(self, view: View, step: int) -> None:
        self._rows_of(view, step, ahead=True)

    def _drop_announced(self) -> None:
        super()._drop_announced()
        self._blocked = False

    @property
    def prepared_ahead(self) -> int:
        return super().prepared_ahead if self._fitted is None else self._fitted.views_ahead

    @property
    def look_ahead(self) -> int:
        return self.prepared_ahead + LOOK_AHEAD

    def _prepare_ahead(self, views: Sequence[View], step: int) -> Any:
        prepared = super()._prepare_ahead(views, step)
        if self._cache is not None and prepared.admission is not None:
            with self._timed("expect_s"):
                self._expect(self._cache, prepared.number, views[1 : 1 + LOOK_AHEAD], step)
        return prepared

    def _expect(self, cache: RowCache, number: int, views: Sequence[View], step: int) -> None:
        """Tell the cache of views that follow view ``number``, each of them once."""
        if len(cache) >= len(self.store):
            return  # no row ever has to leave
        for later, view in enumerate(views, number + 1):
            if cache.expected.get(later) is not view:
                cache.expected[later] = view
                cache.expect(self._cull(view, step, keep=False), later)
        cache.expected.pop(number, None)

    def _bring(self, prepared: Any, viewpoint: Viewpoint) -> WorkingSet | ViewInParts:
        if self._fitted is None:
            return super()._bring(prepared, viewpoint)
        if prepared.admission is None:
            prepared = self._admit_late(prepared, self._fitted)
            if prepared.admission is None:
                self._pause_caching(len(prepared.ids))
                return super()._bring(PreparedView(prepared.view, prepared.ids), viewpoint)
        self._current = prepared
        admission = prepared.admission
        moved = (admission.missed + admission.written) * self._sizing.row_bytes
        self._count(len(prepared.ids), admission.missed, moved)
        # The rows must have arrived before they are read.
        self._link_waits.wait(admission.ready, self.device)
        assert self._cache is not None
        attributes = self._cache.gather(admission.slots, self._tables, viewpoint, training=True)
        return working_set(prepared.ids, attributes, self.store.layout, viewpoint, training=True)

    @property
    def cached(self) -> tuple[int, int] | None:
        cache = self._cache
        return None if cache is None else (cache.table.in_use, len(cache))

    def _can_show(self, rows: int, view: View, small: bool = False) -> bool:
        if self._fitted is None:
            return super()._can_show(rows, view, small)
        return rows <= self._sizing.most_shown  # where there is a cache there is room for a view

    def _admit_late(self, prepared: _Prepared, fitted: FittedCache) -> _Prepared:
        """Admit a view that had no room while the last one was being trained."""
        self._drop_announced()  # none of the views after this one was admitted
        size = len(prepared.ids), prepared.view.width * prepared.view.height
        if fitted.cache is not None and self._sizing.has_room_for(*size):
            if fitted.views_ahead > 1:
                fitted.views_ahead -= 1
            else:
                self._warn_once(
                    "two consecutive views do not fit into the GPU memory budget together; rows "
                    "are brought in between steps, which is slower. Raise "
                    "--pipeline.model.vram-budget-gb if the GPU has more memory."
                )
        else:
            self._sizing.leave_room_for(*size)  # which may cost a new cache
            fitted.fit(self._rows_done)
        if fitted.cache is None:
            return prepared
        number = prepared.number  # the cache has not seen it: nothing was admitted
        admission = fitted.cache.admit(prepared.ids, number, number, self._rows_done)
        return replace(prepared, admission=admission)

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warn(message)

    def _pause_caching(self, rows: int) -> None:
        """Go on as the host engine for some steps, because a view has so many rows.

        The longer, the more often there are such views.
        """
        often = self.step_count < self._caching_since + 2 * self._pause
        self._pause = min(2 * self._pause, _LONG_PAUSE) if often else _SHORT_PAUSE
        told, self._paused = self._paused, True
        self._stop_caching(
            ""
            if told
            else f"the GPU memory budget cannot hold a view of {rows:,} Gaussians and their "
            "optimizer state; for such views, and for some steps after each,"
        )
        self._back_at = self.step_count + self._pause

    def _stop_caching(self, reason: str) -> None:
        """Go on as the host engine, and say why, if there is a reason."""
        assert self._fitted is not None
        self._take_spheres(wait_for_all=True)
        self._fitted.remove(self._rows_done)
        # Its buffers go, too: the host engine needs room for its own.
        self._returns = SphereReturns(self.store.capacity, self.device)
        self._fitted, self._gave_up = None, True
        if reason:
            warn(
                f"{reason} Adam runs on the CPU (engine host). Raise "
                "--pipeline.model.vram-budget-gb if the GPU has more memory."
            )

    # -- when memory runs out --------------------------------------------------------------------

    def abandon(self) -> None:
        super().abandon()
        self._current = None

    def make_room(self, said: str, tries: int) -> bool:
        if self._fitted is None:
            return super().make_room(said, tries)
        # Chance may break up the memory once; what happens all the time has another reason.
        chance = tries == 0 and self.step_count >= self._ran_out_at + _RARELY
        self._ran_out_at = self.step_count
        # The cache stays, too, while a step is under way, which holds its slots.
        if chance or self._cache is None or self._under_way:
            return super().make_room(said, tries)
        with uninterrupted():
            self._drop_announced()
            had = len(self._cache)
            slots = min(self._sizing.too_many(had), self._sizing.limit(had))
            self._fitted.replace(slots, self._rows_done)
            if self._cache is None:
                self._stop_caching(
                    f"GPU memory ran out after step {self.step_count} ({said}) beside a "
                    f"cache of {had:,} Gaussians, which is as small as the views allow; from here "
                    "on"
                )
            else:
                self._tell(
                    said,
                    f"from here on {len(self._cache):,} Gaussians with their Adam state stay on "
                    f"the GPU, not {had:,}",
                )
        return True

    # -- another budget --------------------------------------------------------------------------

    @property
    def bounded(self) -> bool:
        return self._fitted is not None or super().bounded

    def _go_by(self, budget: Budget) -> None:
        if self._fitted is not None:
            have = len(self._cache) if self._cache is not None else 0
            if self._cache is not None:
                self._sizing.observe(have)
            self._sizing.refuse_small(budget, have)
            self._fitted.outdated = True
        elif self._gave_up:
            # It may be enough now. If it is not, the next view says so, as before.
            self.rest()  # rows may still be stepped on the CPU
            self._start_training()
        super()._go_by(budget)

    # -- rendering and stepping ------------------------------------------------------------------

    def _fetch(self, view: View, viewpoint: Viewpoint) -> WorkingSet:
        if self._fitted is None:
            return super()._fetch(view, viewpoint)
        self._take_spheres(wait_for_all=True)
        ids = self._cull(view, self.step_count)
        if self._cache is None:
            return self._send(ids, viewpoint, training=False)
        for announced in self._announced:
            # Rows may still be on their way, in either direction.
            if announced.prepared.exception() is not None:
                continue  # no memory for it, which begin() will find out
            prepared = announced.prepared.result()
            if prepared.admission is not None:
                wait_in_stream(prepared.admission.ready, self.device)
        rows, slots = ids.to(self.device), self._cache.lookup(ids)
        attributes = self._cache.gather(slots, self._tables, viewpoint, training=False, rows=rows)
        # What is admitted from now on may take the slots that this reads.
        self._rows_done = mark_current(self.device)
        return working_set(ids, attributes, self.store.layout, viewpoint, training=False)

    @torch.no_grad()
    def _step_rows(self, working: WorkingSet | ViewInParts, lrs: np.ndarray) -> None:
        if self._fitted is None or isinstance(working, ViewInParts):
            return super()._step_rows(working, lrs)
        assert self._cache is not None and self._current is not None
        assert self._current.admission is not None
        slots = self._current.admission.slots
        staging = self._returns.reserve(len(slots))
        self._tables.foresee(lrs)
        spheres = self._cache.step(slots, working, self._tables, lrs)
        self.half_stepped = True  # the history does not know yet
        self._rows_done = mark_current(self.device)
        self._returns.send(self.step_count + 1, working.ids, spheres, self._rows_done, staging)

    def _step_recorded(self) -> None:
        super()._step_recorded()
        if self._fitted is not None:
            self._tables.record()
            self.half_stepped = False

    def _take_spheres(self, wait_for_all: bool) -> None:
        """Let the culler know of the steps whose spheres have arrived."""
        step = self._returns.take(self.culler, len(self.store), wait_for_all)
        if step is not None:
            self._visible.known_step = step

    # -- the host store --------------------------------------------------------------------------

    def resume_state(self) -> dict[str, Any]:
        if self._back_at is not None:  # a resumed run begins with a cache, too
            self._back_at, self._pause = self.step_count, _SHORT_PAUSE
        return super().resume_state()

    def _settle(self) -> None:
        if self._cache is not None:
            self._cache.write_back(self._rows_done)
            self._take_spheres(wait_for_all=True)
        super()._settle()

    def _refresh_spheres(self) -> None:
        if self._fitted is not None:
            self._tables.rebound()
        super()._refresh_spheres()

    def restart(self, step: int) -> None:
        if self._fitted is not None:
            self._returns.drop()
        super().restart(step)
        if self._fitted is not None:
            self._tables.restart()

    def rows_changed(self) -> None:
        super().rows_changed()
        if self._fitted is not None and self._fitted.cache is not None:
            self._fitted.synchronize()  # a render may still read the slots
            self._fitted.cache.forget()
            self._fitted.outdated = True

    # -- densification ---------------------------------------------------------------------------

    def rest(self) -> None:
        super().rest()
        if self._fitted is not None:
            self._take_spheres(wait_for_all=True)
            self._fitted.synchronize()

    def _summarize(self, out: Tensor) -> None:
        super()._summarize(out)
        if self._cache is not None:
            for piece in self._cache.pieces():
                # Done again by itself: those before it have no statistics any more.
                self.on_device(partial(self._cache.summarize, *piece, out, self._tables))

    def _limit_opacities(self, most: float) -> None:
        super()._limit_opacities(most)
        if self._cache is not None:
            for _, slots in self._cache.pieces():
                self.on_device(partial(self._cache.limit_opacities, slots, most, self._tables))
            self._rows_done = mark_current(self.device)

    def _bring_home(self, ids: Tensor) -> None:
        if self._cache is not None:
            self._cache.write_back(self._rows_done, ids)

    def _edited(self, edit: RowEdit, placement: Placement) -> None:
        if self._fitted is None:
            return
        self._tables.rebound()
        if self._fitted.cache is not None:
            self._fitted.cache.follow(edit, placement)
            # Not at once, but before the next view, when the present one's tensors are gone.
            self._fitted.outdated = True

    def _sorted(self, order: Tensor) -> None:
        if self._cache is not None:
            self._cache.table.permute(order.numpy())

    def move_to(self, device: torch.device) -> None:
        self.settle()
        self._fitted = self._back_at = None
        super().move_to(device)
