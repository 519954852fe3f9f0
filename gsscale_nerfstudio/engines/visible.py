"""Which rows views may see, while steps that the culler does not know of move them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gsscale_nerfstudio.cull import Culler, Slack, View
from gsscale_nerfstudio.optim import AdamHistory
from gsscale_nerfstudio.store import HostStore


@dataclass(frozen=True)
class _Culled:
    view: View
    ids: Tensor


class VisibleRows:
    """The culler, and what it has said of the view under way and later ones.

    Args:
        store: the rows.

    Attributes:
        culler: of these rows.
        known_step: its spheres know of the optimizer steps up to this one.
    """

    def __init__(self, store: HostStore) -> None:
        self.culler = Culler(store.spheres, store.blocks)
        self.known_step = 0
        self._store = store
        self._ids = torch.empty(0, dtype=torch.int32)
        self._remembered: dict[int, _Culled] = {}  # by the steps that are done when they begin

    def cull(self, view: View, step: int, history: AdamHistory, keep: bool = True) -> Tensor:
        """Rows that ``view`` may see when ``step`` optimizer steps have been done.

        Args:
            view: the camera.
            step: not before :attr:`known_step`.
            history: bounds what the steps in between may have moved.
            keep: without it, the result is valid until the next call.

        Returns:
            Ids [n] int32, ascending.
        """
        n = len(self._store)
        if len(self._ids) < n:
            # Fresh memory for each view, with room for all rows, would cost more than the culling.
            self._ids = torch.empty(n + n // 4, dtype=torch.int32)
        behind = history.stride(step - self.known_step)
        slack = Slack(math.exp(behind["scales"]), math.sqrt(3) * behind["means"])
        ids = self.culler.cull(view, n, self._ids, slack)
        return ids.clone() if keep else ids

    def recall(self, view: View, step: int) -> Tensor | None:
        """What :meth:`remember` was told; None if it was not, or of another view."""
        culled = self._remembered.get(step)
        return culled.ids if culled is not None and culled.view.same_as(view) else None

    def remember(self, view: View, step: int, ids: Tensor) -> Tensor:
        """Let ``ids`` be the rows of a view that begins after ``step`` steps."""
        self._remembered[step] = _Culled(view, ids)
        return ids

    def forget(self, step: int | None = None) -> None:
        """Forget the view that began after ``step`` steps, or all of them."""
        if step is None:
            self._remembered.clear()
        else:
            self._remembered.pop(step, None)
