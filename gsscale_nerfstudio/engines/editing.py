"""Densification's side of an engine: rows are summed up, rewritten, added, removed and sorted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.engines.base import Engine
from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.out_of_memory import tried_again
from gsscale_nerfstudio.store.edit import Placement, RowEdit, RowSummary
from gsscale_nerfstudio.store.host import PASSING_BYTES
from gsscale_nerfstudio.store.layout import GROUPS
from gsscale_nerfstudio.store.memory import with_spare

T = TypeVar("T")


def summary_bytes(rows: int) -> int:
    """Host memory that the summary of all rows takes, the culler's list of ids, and decisions."""
    return rows * (with_spare(4 * 4 + 4) + PASSING_BYTES)


class EditableEngine(Engine):
    """An engine whose rows can be edited between two steps.

    Rows that an edit does not name stay as they are: neither settled nor, in a cache, moved. Their
    bounding spheres stay, too: a sphere holds for all steps that its row skips, as long as learning
    rates do not outgrow the bound it was computed with.
    """

    _summary: Staging

    @abstractmethod
    def give_back(self) -> None:
        """Let the device have the memory that torch keeps for later. Called between steps."""

    def on_device(self, work: Callable[[], T]) -> T:
        """The result of ``work()``, done once more if GPU memory runs out in it.

        Args:
            work: densification's on the device; has changed nothing when memory runs out in it.
        """
        return tried_again(work, self.give_back)

    def summarize(self) -> RowSummary:
        """What densification decides by. The statistics start again from zero.

        Valid until the next call.
        """
        self.rest()
        n = len(self.store)
        out = self._summary.rows(4 * n).view(4, n)
        self._summarize(out)
        return RowSummary(*out)

    def settled_rows(self, ids: Tensor) -> Tensor:
        """Copies [n, width] of the settled parameters of rows ``ids``, int64, on the CPU."""
        self.rest()
        self._bring_home(ids)
        rows = torch.empty(len(ids), self.store.layout.width)
        _C.gather_settled(
            self.store.kernel_rows, self.history.tables, ids.int().numpy(), rows.numpy()
        )
        return rows

    def apply(self, edits: Iterable[RowEdit]) -> None:
        """Rewrite, add and remove rows.

        Args:
            edits: at least one. Each is done before the next is asked for, so that what it was made
                of need not be in memory any longer.
        """
        self.rest()
        if len(self.optimizers) == len(GROUPS):
            self.history.rebound(self.learning_rates)
        for edit in edits:
            placement = self.store.apply(edit, stamp=self.step_count)
            self._edited(edit, placement)
            written = torch.cat([placement.now(edit.rewritten), placement.added]).int()
            _C.refresh_spheres_of(self.store.kernel_rows, self.history.tables, written.numpy())
        self.culler.refresh(len(self.store))

    def sort(self) -> None:
        """Put the rows into Morton order."""
        self.rest()
        self._sorted(self.store.sort())
        self.culler.refresh(len(self.store))

    def limit_opacities(self, most: float) -> None:
        """Clamp opacity logits and forget their moments."""
        self.rest()
        self._limit_opacities(most)

    def rest(self) -> None:
        """Wait until nobody but the caller touches rows, spheres or the cache."""
        self._forget_announced()
        self._finish_step()

    # -- what a cache adds -----------------------------------------------------------------------

    def _summarize(self, out: Tensor) -> None:
        """Fill ``out`` [4, n]."""
        _C.summarize(self.store.kernel_rows, self.history.tables, out.numpy())

    def _limit_opacities(self, most: float) -> None:
        _C.limit_opacities(self.store.kernel_rows, self.history.tables, len(self.store), most)

    @abstractmethod
    def _bring_home(self, ids: Tensor) -> None:
        """Make sure that the store has the present state of rows ``ids``."""

    @abstractmethod
    def _edited(self, edit: RowEdit, placement: Placement) -> None:
        """The store has taken over an edit."""

    @abstractmethod
    def _sorted(self, order: Tensor) -> None:
        """Row ``order[i]`` is now row ``i``."""
