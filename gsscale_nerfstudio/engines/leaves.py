"""What Nerfstudio takes for the Gaussians' parameters: the leaves of the view under way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from gsscale_nerfstudio.engines.parts import ViewInParts
from gsscale_nerfstudio.engines.working_set import LEAVES, WorkingSet
from gsscale_nerfstudio.optim import DeferredAdam
from gsscale_nerfstudio.optim.row_group import RowGroup, StepsRows
from gsscale_nerfstudio.store import GROUPS, RowLayout


class Leaves:
    """One parameter per group, which changes with the working set.

    Args:
        layout: of the rows.
        engine: what the optimizers of these parameters are to be tied to.
        device: where they are.

    Attributes:
        present: by group, those of the view under way; empty ones where there is none, and of the
            SH groups always (see :class:`.Colors`).
        lists: by group, a list of the one parameter. Nerfstudio clips the gradients of what these
            lists hold.
        optimizers: by group, those that are to follow; filled by the engine.
    """

    def __init__(self, layout: RowLayout, engine: StepsRows, device: torch.device) -> None:
        self._layout, self._engine = layout, engine
        self.optimizers: dict[str, DeferredAdam] = {}
        self.present = {name: self._empty(name, device) for name in GROUPS}
        self.lists = {name: [leaf] for name, leaf in self.present.items()}

    def _empty(self, name: str, device: torch.device) -> Parameter:
        leaf = Parameter(torch.empty(0, *self._layout.shapes[name], device=device))
        leaf.row_group = RowGroup(name, self._engine)  # type: ignore[attr-defined]
        return leaf

    def clear(self, device: torch.device) -> None:
        """No view is under way: nothing here holds the tensors of the last one."""
        self._show({name: self._empty(name, device) for name in GROUPS})

    def show(self, working: WorkingSet | ViewInParts) -> None:
        """Let the leaves be those of a view that is about to be trained."""
        if isinstance(working, WorkingSet):
            self._show(working.leaves)
        # Nerfstudio steps a group's optimizer if its parameter has a gradient, empty or not.
        for leaf in self._placeholders(working):
            leaf.grad = torch.empty_like(leaf)

    def stepped(self, working: WorkingSet | ViewInParts) -> None:
        """The view's rows were stepped."""
        for leaf in self._placeholders(working):
            leaf.grad = None  # no zeros in --log-gradients

    def _placeholders(self, working: WorkingSet | ViewInParts) -> list[Parameter]:
        """Leaves that stay empty: of the SH groups, and all of a view in parts."""
        with_leaf = LEAVES if isinstance(working, WorkingSet) else ()
        return [leaf for name, leaf in self.present.items() if name not in with_leaf]

    def _show(self, leaves: Mapping[str, Tensor]) -> None:
        for name, leaf in leaves.items():
            assert isinstance(leaf, Parameter)
            self.present[name] = self.lists[name][0] = leaf
            if name in self.optimizers:
                self.optimizers[name].publish(leaf)
