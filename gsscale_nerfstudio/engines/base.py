"""The interface between the model and what moves rows and runs Adam on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from gsscale_nerfstudio.cull import Culler, View
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.optim import AdamHistory, DeferredAdam
from gsscale_nerfstudio.optim.row_group import RowGroup
from gsscale_nerfstudio.store import GROUPS, HostStore

ScreenStatistics = tuple[Tensor, Tensor, Tensor]
"""Per row of a working set: norm of the screen-space gradient, times seen (0 or 1), largest
radius as a share of the image's longer side; each [n] float32."""


@dataclass
class WorkingSet:
    """The rows of one view on the device, settled.

    Attributes:
        ids: [n] int32 on the CPU, ascending: the rows' places in the store.
        leaves: one tensor [n, *shape] per group; Parameters when made for training.
        statistics: called after the backward pass, gives what densification wants to know.
    """

    ids: Tensor
    leaves: dict[str, Tensor]
    statistics: Callable[[], ScreenStatistics] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ids)


class Engine(ABC):
    """Moves rows between the store and the device and applies deferred Adam to them.

    One training step is: :meth:`begin` (working set in), backward, one ``step()`` of each group's
    optimizer; the last of them makes the engine take the gradients and step the rows.

    Args:
        store: the rows.
        device: where the rasterizer runs.
    """

    def __init__(self, store: HostStore, device: torch.device) -> None:
        self.store = store
        self.device = device
        self.culler = Culler(store.spheres, store.blocks)
        self.optimizers: dict[str, DeferredAdam] = {}
        self.history = AdamHistory(
            store.layout, dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 1.0)
        )
        self.current: WorkingSet | None = None
        self._stepped: dict[str, float] = {}
        self._settled = True
        # The present leaves, and the lists handed out by parameters(): Nerfstudio clips the
        # gradients of what these lists hold.
        self.leaves = {name: self._placeholder(name) for name in GROUPS}
        self._published = {name: [leaf] for name, leaf in self.leaves.items()}
        self.rows_changed()

    # -- optimizers ------------------------------------------------------------------------------

    def _placeholder(self, name: str) -> Parameter:
        """An empty leaf: what the optimizers hold while no view is being trained."""
        leaf = Parameter(torch.empty(0, *self.store.layout.shapes[name], device=self.device))
        leaf.row_group = RowGroup(name, self)  # type: ignore[attr-defined]
        return leaf

    def parameters(self) -> dict[str, list[Parameter]]:
        """The parameter list of each group; its element changes with the working set."""
        return dict(self._published)

    def move_to(self, device: torch.device) -> None:
        """Rasterize on ``device`` from now on; called when the model moves."""
        self.device = device
        self._publish({name: self._placeholder(name) for name in GROUPS})

    def attach(self, name: str, optimizer: DeferredAdam) -> None:
        """Register a group's optimizer; with the last one the Adam history begins.

        Raises:
            GSScaleError: the groups' betas differ.
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
        )
        if self.device.type == "cuda":
            self.store.pin()  # moments, too: not before there is training to do
        self.rows_changed()

    def _publish(self, leaves: dict[str, Parameter]) -> None:
        for name, leaf in leaves.items():
            self.leaves[name] = self._published[name][0] = leaf
            if name in self.optimizers:
                self.optimizers[name].publish(leaf)

    @property
    def step_count(self) -> int:
        """Optimizer steps done so far: t."""
        return self.history.step

    def group_stepped(self, name: str, lr: float) -> None:
        """Called by a group's optimizer; the last group of a step sets the rows in motion."""
        self._stepped[name] = lr
        if len(self._stepped) < len(GROUPS):
            return
        lrs = np.array([self._stepped[name] for name in GROUPS])
        self._stepped.clear()
        if self.current is None:
            raise RuntimeError("optimizers stepped without a working set; call begin() first")
        self._step_rows(self.current, lrs)
        self._settled = False
        if self.history.advance(lrs):
            self.refresh_bounds()

    def restart(self, step: int) -> None:
        """Take over a checkpoint: all rows are current for ``step``."""
        self.history.restart(step)
        self.store.bookkeeping("stamp").fill_(step)
        self._settled = True
        self.rows_changed()

    # -- rows ------------------------------------------------------------------------------------

    def begin(self, view: View) -> WorkingSet:
        """Cull ``view`` and bring its settled rows to the device as leaves to differentiate."""
        if self._stepped:
            missing = sorted(set(GROUPS) - set(self._stepped))
            raise RuntimeError(f"the optimizers of {missing} were not stepped for the last view")
        # The last view's leaves and gradients go first, or both would be on the device at once.
        self.current = None
        self._publish({name: self._placeholder(name) for name in GROUPS})
        self.current = self._fetch(view, training=True)
        self._publish({n: p for n, p in self.current.leaves.items() if isinstance(p, Parameter)})
        return self.current

    def fetch(self, view: View) -> WorkingSet:
        """Cull ``view`` and bring its settled rows to the device, to render without gradients.

        Leaves the store, and a training step under way, as they are.
        """
        return self._fetch(view, training=False)

    @abstractmethod
    def _fetch(self, view: View, training: bool) -> WorkingSet: ...

    @abstractmethod
    def _step_rows(self, working: WorkingSet, lrs: np.ndarray) -> None:
        """Step the working set's rows with their gradients; ``lrs`` is [len(GROUPS)]."""

    @abstractmethod
    def settle(self) -> None:
        """Make every row in the store current, parameters and moments."""

    @abstractmethod
    def refresh_bounds(self) -> None:
        """Settle all rows and recompute the culler's bounds of them."""

    def rows_changed(self) -> None:
        """Recompute what is derived from rows, after they were added, removed or rewritten.

        All bounds are new then, so it is also the time to fit them to the present learning rates.
        """
        self.settle()
        if len(self.optimizers) == len(GROUPS):
            self.history.rebound(
                np.array([self.optimizers[name].param_groups[0]["lr"] for name in GROUPS])
            )
        self.refresh_bounds()
