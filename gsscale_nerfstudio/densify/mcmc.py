"""gsplat's MCMC strategy, on rows of the host store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from gsplat.strategy import MCMCStrategy
from torch import Tensor

from gsscale_nerfstudio.densify.relocation import share_out
from gsscale_nerfstudio.densify.room import RowRoom
from gsscale_nerfstudio.densify.sampling import draw_rows
from gsscale_nerfstudio.densify.strategy import EDIT_ROWS, SORT_FROM
from gsscale_nerfstudio.engines.editing import EditableEngine
from gsscale_nerfstudio.optim import MeanNoise, Pull
from gsscale_nerfstudio.store.chunks import chunks
from gsscale_nerfstudio.store.edit import RowEdit, with_removed

_GROWTH = 1.05
"""By so much a refinement grows the scene."""


@dataclass
class RowMCMCStrategy(MCMCStrategy):
    """``gsplat.MCMCStrategy`` whose Gaussians are rows: same fields, same decisions.

    Noise is the engine's, see :attr:`noise`, as are the penalties of rows that no view shows, see
    :attr:`pull`. Noise leads rows out of their bounding spheres, which have room for a refinement's
    interval: so all rows are settled and bounded anew at each of them, and as often after the last
    one.

    Unlike gsplat's, rows that were dead begin at their new place without moments, as their sources
    do, and do not go on by those of the place that they left.
    """

    opacity_reg: float = 0.0
    """Weight of the mean opacity in the loss, which acts on rows that no view shows, too."""
    scale_reg: float = 0.0
    """Weight of the mean scale, likewise."""
    absgrad: ClassVar[bool] = False
    _room: RowRoom = field(default_factory=RowRoom)

    @property
    def noise(self) -> MeanNoise | None:
        """What an engine has to add to means at every step."""
        if self.noise_lr == 0:
            return None
        return MeanNoise(self.noise_lr, horizon=self.refine_every + 1)

    @property
    def pull(self) -> Pull | None:
        """The penalties that every step has."""
        if self.opacity_reg == 0 and self.scale_reg == 0:
            return None
        return Pull(self.opacity_reg, self.scale_reg, horizon=self.refine_every + 1)

    def wants_statistics(self, step: int) -> bool:
        """Whether decisions need to know where rows were seen at ``step``: never."""
        return False

    def changes_rows(self, step: int) -> bool:
        """Whether :meth:`refine` will do anything at ``step``."""
        moved = self.noise is not None or self.pull is not None
        return self._refines(step) or (moved and step % self.refine_every == 0)

    def _refines(self, step: int) -> bool:
        return (
            self.refine_start_iter < step < self.refine_stop_iter and step % self.refine_every == 0
        )

    @torch.no_grad()
    def refine(self, engine: EditableEngine, step: int) -> None:
        """What ``step_post_backward`` does but for the noise: relocate dead rows, add new ones.

        Args:
            engine: whose rows are refined; must not be inside a step.
            step: Nerfstudio's step counter.
        """
        if not self.changes_rows(step):
            return
        engine.rows_changed()
        if not self._refines(step):
            return
        logits = engine.summarize().opacity
        relocated = self._relocate(engine, logits)
        added = self._grow(engine, logits)
        if self.verbose:
            print(f"Step {step}: Relocated {relocated} GSs.")
            print(f"Step {step}: Added {added} GSs. Now having {len(engine.store)} GSs.")
        if engine.store.unsorted_share > SORT_FROM:
            engine.sort()

    def _relocate(self, engine: EditableEngine, logits: Tensor) -> int:
        """Let dead rows become copies of others; ``logits`` [n] follows. Returns how many."""

        def is_dead(rows: slice) -> Tensor:
            return torch.sigmoid(logits[rows]) <= self.min_opacity

        def weights(rows: slice) -> Tensor:
            return torch.sigmoid(logits[rows]).masked_fill_(is_dead(rows), 0)

        n = len(logits)
        dead = torch.cat([torch.nonzero(is_dead(rows))[:, 0] + rows.start for rows in chunks(n)])
        sampled = draw_rows(weights, n, len(dead))
        if len(sampled) > 0:  # there are rows alive
            # New rows fill the holes of removed ones, in order.
            copies = self._copy(engine, logits, sampled, removed=dead, keeps_moments=False)
            logits[dead] = copies
        return len(sampled)

    def _grow(self, engine: EditableEngine, logits: Tensor) -> int:
        """Add copies of rows; ``logits`` [n] of their sources follow. Returns how many."""
        store, n = engine.store, len(logits)
        wanted = min(self.cap_max, store.capacity, int(_GROWTH * n)) - n
        count = self._room.grant(store, max(0, wanted))
        sampled = draw_rows(lambda rows: torch.sigmoid(logits[rows]), n, count)
        if len(sampled) > 0:
            none = torch.empty(0, dtype=torch.int64)
            self._copy(engine, logits, sampled, removed=none, keeps_moments=True)
        return len(sampled)

    def _copy(
        self,
        engine: EditableEngine,
        logits: Tensor,
        sampled: Tensor,
        removed: Tensor,
        keeps_moments: bool,
    ) -> Tensor:
        """Add a copy of each of the rows ``sampled`` [k], ascending, and remove others.

        A row and its copies share its opacity and size. Returns the opacity logits [k] of copies.
        """
        layout = engine.store.layout
        sources, times = torch.unique_consecutive(sampled, return_counts=True)
        nobody, opacities = torch.empty(0, dtype=torch.int64), [torch.empty(0)]

        def edits() -> Iterator[RowEdit]:
            for part in chunks(len(sources), EDIT_ROWS):
                rows = engine.settled_rows(sources[part])
                share_out(rows, times[part] + 1, layout, self.min_opacity)
                copies = rows.repeat_interleave(times[part], dim=0)
                opacities.append(copies[:, layout.columns["opacities"]][:, 0].clone())
                logits[sources[part]] = rows[:, layout.columns["opacities"]][:, 0]
                parents = sources[part].repeat_interleave(times[part])
                yield RowEdit(sources[part], rows, copies, parents, nobody, keeps_moments)

        engine.apply(with_removed(edits(), removed, layout.width))
        return torch.cat(opacities)
