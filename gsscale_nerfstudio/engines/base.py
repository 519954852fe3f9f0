"""The interface between the model and what moves rows and runs Adam on them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from gsscale_nerfstudio.cull import Culler, View
from gsscale_nerfstudio.engines.colors import Viewpoint
from gsscale_nerfstudio.engines.leaves import Leaves
from gsscale_nerfstudio.engines.parts import ViewInParts
from gsscale_nerfstudio.engines.threads import Worker, hand_over_quickly, uninterrupted
from gsscale_nerfstudio.engines.visible import VisibleRows
from gsscale_nerfstudio.engines.waits import LinkWaits
from gsscale_nerfstudio.engines.working_set import WorkingSet
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.optim import AdamHistory, DeferredAdam, MeanNoise, Pull
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout


@dataclass(frozen=True)
class _Announced:
    """A view that is being prepared by the worker."""

    view: View
    prepared: Future[Any]


class Engine(ABC):
    """Moves rows between the store and the device and applies deferred Adam to them.

    One training step is: :meth:`begin` (working set in), :meth:`announce` (the next view, if it is
    known), backward, one ``step()`` of each group's optimizer; the last of them makes the engine
    take the gradients and step the rows. If an error comes up on the way, say that there is no more
    GPU memory, :meth:`abandon` goes back to where it was before :meth:`begin`: what a step needs is
    allocated before the first row is changed.

    What announced views need is prepared by one worker thread while the device works. Whoever
    touches the store or the culler on the main thread waits for the worker first.

    Args:
        store: the rows.
        device: where the rasterizer runs.
    """

    def __init__(self, store: HostStore, device: torch.device) -> None:
        self.store = store
        self.device = device
        self.history = AdamHistory(
            store.layout, dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 1.0)
        )
        self.noise: MeanNoise | None = None
        """Added to means at every step; to be set before the optimizers are made."""
        self.pull: Pull | None = None
        """Penalties that every step has for every row, likewise."""
        self.current: WorkingSet | ViewInParts | None = None
        self.counters: defaultdict[str, float] = defaultdict(float)
        """Sums since the start: views, rows, seconds; see the engines."""
        self._leaves = Leaves(store.layout, self, device)
        self._visible = VisibleRows(store)
        self._worker = Worker()
        self._announced: deque[_Announced] = deque()
        self._to_fetch: _Announced | None = None
        self._link_waits = LinkWaits(self.counters)
        self._stepped: dict[str, float] = {}
        self._settled = True
        self._under_way = False  # a view was begun whose rows are not stepped
        self.half_stepped = False
        """Rows are being stepped. With the worker at rest: an error has struck in the middle."""
        self.rows_changed()

    @contextmanager
    def _timed(self, counter: str) -> Iterator[None]:
        """Add the time spent inside to a counter, in seconds."""
        start = time.perf_counter()
        yield
        self.counters[counter] += time.perf_counter() - start

    # -- optimizers ------------------------------------------------------------------------------

    def parameters(self) -> dict[str, list[Parameter]]:
        """The parameter list of each group; its element changes with the working set."""
        return dict(self._leaves.lists)

    @property
    def leaves(self) -> dict[str, Parameter]:
        """The parameter of each group, in a dictionary that is kept up to date."""
        return self._leaves.present

    @property
    def optimizers(self) -> dict[str, DeferredAdam]:
        """Those attached so far, by group."""
        return self._leaves.optimizers

    @property
    def culler(self) -> Culler:
        """Of the store's rows."""
        return self._visible.culler

    def move_to(self, device: torch.device) -> None:
        """Rasterize on ``device`` from now on; called when the model moves."""
        self._forget_announced()
        self.device = device
        self._leaves.clear(device)

    def attach(self, name: str, optimizer: DeferredAdam) -> None:
        """Register a group's optimizer; with the last one the Adam history begins.

        Raises:
            GSScaleError: the groups' betas differ, or rows cannot be page-locked.
        """
        self.optimizers[name] = optimizer
        if len(self.optimizers) < len(GROUPS):
            return
        groups = {name: opt.param_groups[0] for name, opt in self.optimizers.items()}
        betas = {tuple(group["betas"]) for group in groups.values()}
        if len(betas) > 1:
            raise GSScaleError(
                f"gsscale steps all attributes of a Gaussian in one pass, so they share one pair "
                f"of betas; the optimizers have {sorted(betas)}"
            )
        self.history = AdamHistory(
            self.store.layout,
            lr={name: group["lr"] for name, group in groups.items()},
            eps={name: group["eps"] for name, group in groups.items()},
            betas=betas.pop(),
            noise=self.noise,
            pull=self.pull,
            count=self.store.__len__,
        )
        hand_over_quickly()
        if self.device.type == "cuda":
            self.store.pin()  # moments, too: not before there is training to do
        self._start_training()
        self.rows_changed()

    def _start_training(self) -> None:  # noqa: B027
        """Set up what only training needs; the history is new."""

    @property
    def step_count(self) -> int:
        """Optimizer steps done so far: t."""
        return self.history.step

    @property
    def learning_rates(self) -> np.ndarray:
        """[len(GROUPS)] float64: those that the optimizers have at present."""
        return np.array([self.optimizers[name].param_groups[0]["lr"] for name in GROUPS])

    def group_stepped(self, name: str, lr: float) -> None:
        """Called by a group's optimizer; the last group of a step sets the rows in motion."""
        self._stepped[name] = lr
        if len(self._stepped) < len(GROUPS):
            return
        lrs = np.array([self._stepped[name] for name in GROUPS])
        self._stepped.clear()
        if self.current is None:
            raise RuntimeError("optimizers stepped without a working set; call begin() first")
        # All or nothing: what needs memory on the device comes before the first row is changed.
        self._step_rows(self.current, lrs)
        self._under_way = False
        self._leaves.stepped(self.current)
        self._settled = False
        outgrown = self.history.advance(lrs)
        self._visible.forget(self.step_count - 1)
        self._step_recorded()
        if outgrown:
            self.refresh_bounds()

    def _step_recorded(self) -> None:  # noqa: B027
        """The history has grown by the step whose rows were just set in motion."""

    def restart(self, step: int) -> None:
        """Take over a checkpoint: all rows are current for ``step``."""
        self._forget_announced()
        self.history.restart(step)
        self.store.bookkeeping("stamp").fill_(step)
        self._settled = True
        self.rows_changed()

    def resume_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside parameters, moments and learning rates.

        Afterwards this engine is where :meth:`resume` takes another one: all rows are settled, all
        bounds are new, nothing is prepared or cached. A row that is brought in and has no gradient
        ends a rounding away from one that is not, so both have to bring in the same rows.

        Returns:
            ``adam_step``: optimizer steps done; ``store``: see :meth:`HostStore.resume_state`.
        """
        self.rows_changed()
        return {"adam_step": self.step_count, "store": self.store.resume_state()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`resume_state`; parameters and optimizers are loaded already.

        Raises:
            GSScaleError: the state is of other rows than the parameters.
        """
        self.store.resume(state["store"])
        self.restart(state["adam_step"])

    # -- rows ------------------------------------------------------------------------------------

    def begin(self, view: View, viewpoint: Viewpoint | None = None) -> WorkingSet | ViewInParts:
        """Bring the settled rows that ``view`` may see to the device, to be differentiated.

        A view that does not fit there comes in parts: none of its rows is there yet.

        Args:
            view: decides which rows.
            viewpoint: decides their colours; None for the view's, with all SH bands.
        """
        if self._stepped:
            missing = sorted(set(GROUPS) - set(self._stepped))
            raise RuntimeError(f"the optimizers of {missing} were not stepped for the last view")
        # The last view's leaves and gradients go first, or both would be on the device at once.
        self._let_go()
        self._under_way = True
        announced = self._announced[0] if self._announced else None
        if announced is not None and announced.view.same_as(view):
            with self._timed("host_wait_s"):
                prepared = announced.prepared.result()
            self._announced.popleft()
        else:
            self._drop_announced()
            self._finish_step()
            prepared = self._prepare(view, self.step_count, ahead=False)
        self.current = self._bring(prepared, viewpoint or self._viewpoint(view))
        self._leaves.show(self.current)
        return self.current

    def _let_go(self) -> None:
        """Nobody holds the tensors of the last view any more."""
        self.current = None
        self._leaves.clear(self.device)

    def abandon(self) -> None:
        """Go back to where it was before :meth:`begin`, which may itself have failed half-way.

        The rows of the view are not stepped yet. Beginning the same view again brings in the same
        rows.
        """
        with uninterrupted():
            self._stepped.clear()
            self._let_go()
            self._drop_announced()
            self._under_way = False

    @abstractmethod
    def make_room(self, said: str, tries: int) -> bool:
        """Give up something, and say what, because GPU memory has run out.

        Called when nothing of the work that failed is held any more: an abandoned step, or a
        render.

        Args:
            said: the error, for the message.
            tries: how often room was made for this work already.

        Returns:
            False if there is nothing left to give up.
        """

    def _viewpoint(self, view: View) -> Viewpoint:
        return Viewpoint.of(view, self.store.layout, self.device)

    def announce(self, views: Sequence[View]) -> None:
        """Say which views :meth:`begin` will be called with next, once this one is stepped.

        A hint: :meth:`begin` may be called with another view, at the cost of the work done ahead.

        Args:
            views: in order, at least one; more than :attr:`look_ahead` are no use.
        """
        for i in range(len(self._announced), min(self.prepared_ahead, len(views))):
            step = self.step_count + 1 + i
            job = self._worker.submit(self._prepare_ahead, views[i:], step)
            self._announced.append(_Announced(views[i], job))

    @property
    def prepared_ahead(self) -> int:
        """How many of the coming views are prepared at a time."""
        return 1

    @property
    def look_ahead(self) -> int:
        """How many of the coming views it pays to know."""
        return 1

    def _prepare_ahead(self, views: Sequence[View], step: int) -> Any:
        return self._prepare(views[0], step, ahead=True)

    def _wait_for_worker(self) -> None:
        """Make sure that the worker is at rest; what it has prepared stays."""
        with self._timed("host_wait_s"):
            self._worker.wait()

    @property
    def cached(self) -> tuple[int, int] | None:
        """Rows in the device's cache and places for them; None without a cache. For any thread."""
        return None

    def row_centres(self, most: int) -> np.ndarray:
        """Means of at most ``most`` rows, evenly spaced in the store, settled or not.

        Returns:
            [n, 3] float32.
        """
        self._wait_for_worker()  # or it would be chance which of them it has stepped
        means = self.store.column("means")
        return means[:: max(1, -(-len(means) // most))].numpy().copy()

    def _finish_step(self) -> None:  # noqa: B027
        """Bring the store up to date with the last step, if some of it was put off.

        The worker is at rest, and what it has prepared stays.
        """

    def _drop_announced(self) -> None:
        """Wait for the worker and drop what it has prepared, but for which rows views see."""
        self._wait_for_worker()
        self._announced.clear()
        self._to_fetch = None

    def _forget_announced(self) -> None:
        """Wait for the worker and drop what it has prepared, because rows are about to change."""
        self._drop_announced()
        self._visible.forget()

    def fetch(self, view: View, viewpoint: Viewpoint | None = None) -> WorkingSet:
        """Bring the settled rows that ``view`` may see to the device, to render them only.

        Leaves the rows, a training step under way and an announced view as they are. Arguments are
        those of :meth:`begin`.
        """
        with uninterrupted():
            self._wait_for_worker()
            self._finish_step()
            return self._fetch(view, viewpoint or self._viewpoint(view))

    def announce_fetch(self, view: View) -> None:
        """Say which view :meth:`fetch` will be called with next, after the last one.

        A hint, as :meth:`announce`. It has no effect once there are optimizers: rows may change
        between two renders then.
        """
        if not self.optimizers:
            self._to_fetch = _Announced(view, self._worker.submit(self._prepare_fetch, view))

    def visible_rows(self, view: View) -> int:
        """How many rows ``view`` may see; to be asked between steps."""
        self._wait_for_worker()
        return len(self._cull(view, self.step_count, keep=False))

    @classmethod
    @abstractmethod
    def staging_bytes(cls, layout: RowLayout, rows: int, view_rows: int) -> int:
        """Host memory, beside the store, that training takes; proportional to the rows.

        Args:
            layout: of the rows.
            rows: in the store.
            view_rows: of the largest view.
        """

    def _rows_of(self, view: View, step: int, ahead: bool) -> Tensor:
        """Ids of the rows that are brought in for ``view`` when ``step`` steps have been done.

        However often it is prepared, they are the same: a row that is brought in and has no
        gradient ends a rounding away from one that is not.
        """
        ids = self._visible.recall(view, step)
        if ids is None:
            self._before_culling(ahead)
            with self._timed("cull_s"):
                ids = self._visible.remember(view, step, self._cull(view, step))
        return ids

    def _before_culling(self, ahead: bool) -> None:  # noqa: B027
        """Let the culler know what is new."""

    def _cull(self, view: View, step: int, keep: bool = True) -> Tensor:
        """See :meth:`.VisibleRows.cull`."""
        return self._visible.cull(view, step, self.history, keep)

    @abstractmethod
    def _prepare(self, view: View, step: int, ahead: bool) -> Any:
        """Whatever can be done for ``view`` before all of ``step`` steps are done.

        Called by the worker while a step is under way (``ahead``), or by :meth:`begin`.
        """

    @abstractmethod
    def _bring(self, prepared: Any, viewpoint: Viewpoint) -> WorkingSet | ViewInParts:
        """The working set of a prepared view, for training."""

    @abstractmethod
    def _fetch(self, view: View, viewpoint: Viewpoint) -> WorkingSet:
        """The working set of a view, without gradients."""

    @abstractmethod
    def _prepare_fetch(self, view: View) -> Any:
        """Whatever can be done for a view that will be fetched; called by the worker."""

    @abstractmethod
    def _step_rows(self, working: WorkingSet | ViewInParts, lrs: np.ndarray) -> None:
        """Step the working set's rows with their gradients; ``lrs`` is [len(GROUPS)]."""

    def settle(self) -> None:
        """Make every row in the store current, parameters and moments."""
        with uninterrupted():
            self._wait_for_worker()
            self._finish_step()
            if not self._settled:
                self._settle()
                self._settled = True

    @abstractmethod
    def _settle(self) -> None:
        """Make every row in the store current; the worker is at rest."""

    def refresh_bounds(self) -> None:
        """Settle all rows and recompute the culler's bounds of them."""
        # Spheres bound a row's motion from its stamp on, by the learning rates of today; steps that
        # a row skipped under a higher learning rate must be behind it.
        self.settle()
        self._forget_announced()
        self._refresh_spheres()
        self._visible.known_step = self.step_count

    @abstractmethod
    def _refresh_spheres(self) -> None:
        """Recompute all spheres, from rows that are settled."""

    def rows_changed(self) -> None:
        """Recompute what is derived from rows, after they were added, removed or rewritten.

        All bounds are new then, so it is also the time to fit them to the present learning rates.
        Call :meth:`settle` before rows are changed.
        """
        self._forget_announced()
        self.settle()
        # From here on sums and what keys decide, noise and rounding, are what they will be in a run
        # that is resumed here.
        if self.history.moves_all:
            self.history.all_settled()
        if self.noise is not None or self.store.layout.narrow:
            self.store.renew_keys()
        if len(self.optimizers) == len(GROUPS):
            self.history.rebound(self.learning_rates)
        self.refresh_bounds()
