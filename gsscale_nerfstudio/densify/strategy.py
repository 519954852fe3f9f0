"""gsplat's default densification, on rows of the host store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from gsplat.strategy import DefaultStrategy
from torch import Tensor

from gsscale_nerfstudio.densify.room import RowRoom
from gsscale_nerfstudio.densify.split import SHRINK
from gsscale_nerfstudio.densify.split import split as split_rows
from gsscale_nerfstudio.engines.editing import EditableEngine
from gsscale_nerfstudio.errors import warn
from gsscale_nerfstudio.store import HostStore
from gsscale_nerfstudio.store.chunks import chunks
from gsscale_nerfstudio.store.edit import RowEdit, RowSummary, with_removed

SORT_FROM = 0.25
"""Share of rows out of Morton order from which sorting pays."""

EDIT_ROWS = 1 << 16
"""Rows that are changed together: up to five times that many are in memory, 80 MB."""


@dataclass
class RowStrategy(DefaultStrategy):
    """``gsplat.DefaultStrategy`` whose Gaussians are rows: same fields, same decisions.

    The statistics are columns of the rows; the engine adds a view's share when it steps them.
    Decisions are made from four numbers a row, and only rows that change are touched: new ones fill
    the holes of removed ones. Beside those numbers it takes masks of one byte a row, eight bytes
    for each row that changes (:data:`.PASSING_BYTES` have room for both), and some rows at a time.
    """

    _room: RowRoom = field(default_factory=RowRoom)

    @torch.no_grad()
    def refine(self, engine: EditableEngine, step: int) -> None:
        """What ``step_post_backward`` does after its statistics: grow, prune, reset opacities.

        Args:
            engine: whose rows are refined; must not be inside a step.
            step: Nerfstudio's step counter.
        """
        if self._refines(step):
            self._densify(engine, step)
        if self._resets(step):
            engine.limit_opacities(torch.logit(torch.tensor(self.prune_opa * 2.0)).item())

    def _densify(self, engine: EditableEngine, step: int) -> None:
        # What led to the decision is gone before rows are edited, and all of it before the sort.
        changes = self._decide(engine, step)
        grown = len(engine.store) + changes.duplicated + changes.split
        edits = _edits(engine, changes)
        engine.apply(with_removed(edits, changes.removed, engine.store.layout.width))
        del changes, edits
        self._tell(step, f"{grown - len(engine.store)} GSs pruned.", len(engine.store))
        if len(engine.store) == 0 and grown > 0:
            warn(
                f"no Gaussian is left after step {step}: all were too transparent or too large; "
                "lower --pipeline.model.cull-alpha-thresh, or raise cull-scale-thresh"
            )
        if engine.store.unsorted_share > SORT_FROM:
            engine.sort()

    def _decide(self, engine: EditableEngine, step: int) -> _Changes:
        store = engine.store
        summary = engine.summarize()
        duplicates, splits = self.grow_masks(summary, step)
        self._fit(store, summary, duplicates, splits)
        gone, children_gone = self.prune_masks(summary, step)
        duplicated, split = int(duplicates.sum()), int(splits.sum())
        grown = len(store) + duplicated + split
        self._tell(step, f"{duplicated} GSs duplicated, {split} GSs split.", grown)
        # gsplat adds rows, then prunes them; what would be pruned at once is not added here.
        survives = ~children_gone[splits]
        removed = torch.where(splits, children_gone, gone)
        return _Changes(
            duplicated,
            split,
            copied=_places(duplicates & ~gone),
            parents=_places(splits & ~children_gone),
            survives=survives,
            removed=_places(removed),
        )

    def _tell(self, step: int, what: str, n: int) -> None:
        if self.verbose:
            print(f"Step {step}: {what} Now having {n} GSs.")

    def wants_statistics(self, step: int) -> bool:
        """Whether decisions need to know where rows were seen at ``step``."""
        return step < self.refine_stop_iter

    def changes_rows(self, step: int) -> bool:
        """Whether :meth:`refine` will do anything at ``step``."""
        return self._refines(step) or self._resets(step)

    def _refines(self, step: int) -> bool:
        return (
            self.refine_start_iter < step < self.refine_stop_iter
            and step % self.refine_every == 0
            and step % self.reset_every >= self.pause_refine_after_reset
        )

    def _resets(self, step: int) -> bool:
        return step < self.refine_stop_iter and step % self.reset_every == 0

    def grow_masks(self, summary: RowSummary, step: int) -> tuple[Tensor, Tensor]:
        """Which rows to duplicate (small ones) and which to split (large ones): two [n] masks."""
        n = len(summary)
        duplicates, splits = torch.empty(n, dtype=torch.bool), torch.empty(n, dtype=torch.bool)
        for rows in chunks(n):
            high = summary.gradient[rows] > self.grow_grad2d
            small = torch.exp(summary.scale[rows]) <= self.grow_scale3d
            duplicates[rows] = high & small
            splits[rows] = high & ~small
            if step < self.refine_scale2d_stop_iter:
                splits[rows] |= summary.radius[rows] > self.grow_scale2d
        return duplicates, splits

    def prune_masks(self, summary: RowSummary, step: int) -> tuple[Tensor, Tensor]:
        """Which rows are too transparent or too large, and whose children would be, were they
        split: two [n] masks."""
        n = len(summary)
        gone, children_gone = torch.empty(n, dtype=torch.bool), torch.empty(n, dtype=torch.bool)
        for rows in chunks(n):
            faint = torch.sigmoid(summary.opacity[rows]) < self.prune_opa
            gone[rows] = children_gone[rows] = faint
            if step > self.reset_every:
                size = torch.exp(summary.scale[rows])
                gone[rows] |= size > self.prune_scale3d
                children_gone[rows] |= torch.exp(torch.log(size / SHRINK)) > self.prune_scale3d
                if step < self.refine_scale2d_stop_iter:
                    wide = summary.radius[rows] > self.prune_scale2d
                    gone[rows] |= wide
                    children_gone[rows] |= wide
        return gone, children_gone

    def _fit(
        self, store: HostStore, summary: RowSummary, duplicates: Tensor, splits: Tensor
    ) -> None:
        """Where not all new rows have room at present, keep those with the highest gradient."""
        wanted = int(duplicates.sum()) + int(splits.sum())
        room = self._room.grant(store, wanted)
        if room == wanted:
            return
        candidates = duplicates | splits
        # Found where they are: an order of all candidates would take 20 bytes for each.
        gradients = summary.gradient.numpy()[candidates.numpy()]
        gradients.partition(wanted - room - 1)
        limit = float(gradients[wanted - room - 1])
        weakest = candidates & (summary.gradient < limit)
        alike = torch.nonzero(candidates & (summary.gradient == limit)).flatten()
        weakest[alike[: wanted - room - int(weakest.sum())]] = True
        duplicates &= ~weakest
        splits &= ~weakest


@dataclass(frozen=True)
class _Changes:
    """What a refinement does to the rows.

    Attributes:
        duplicated, split: how many rows gsplat would duplicate and split, before it prunes.
        copied: [c] int64, ascending: rows that get a copy.
        parents: [p] int64, ascending: rows in whose place come two.
        survives: [split] bool: which of the rows to be split are parents; others are removed.
        removed: [d] int64, ascending.
    """

    duplicated: int
    split: int
    copied: Tensor
    parents: Tensor
    survives: Tensor
    removed: Tensor


def _places(mask: Tensor) -> Tensor:
    return torch.nonzero(mask).flatten()


def _edits(engine: EditableEngine, changes: _Changes) -> Iterator[RowEdit]:
    """New rows, copies first and then second children, in pieces that memory hardly notices."""
    layout = engine.store.layout
    nobody, no_rows = torch.empty(0, dtype=torch.int64), torch.empty(0, layout.width)
    for part in chunks(len(changes.copied), EDIT_ROWS):
        sources = changes.copied[part]
        yield RowEdit(nobody, no_rows, engine.settled_rows(sources), sources, nobody)
    parents = changes.parents
    for noise in _split_noise(changes.survives, engine):
        for part in chunks(noise.shape[1], EDIT_ROWS):
            sources = parents[part]
            rows = engine.settled_rows(sources)
            first, second = split_rows(rows, noise[:, part], layout)
            yield RowEdit(sources, first, second, sources, nobody)
        parents = parents[noise.shape[1] :]


def _split_noise(survives: Tensor, engine: EditableEngine) -> Iterator[Tensor]:
    """Standard normal numbers [2, k, 3] for parents, on the CPU, from the device's generator.

    splatfacto draws from that one, too: later backgrounds then depend on how many rows were split,
    and trainings with one seed are as far apart as splatfacto's are. Like splatfacto it draws for
    all rows that are split, also for those whose children will not be.
    """
    for rows in chunks(len(survives)):  # the GPU has no room to spare for all of them
        size = 2, rows.stop - rows.start, 3
        # Memory comes before numbers: where there is none, none has been drawn.
        drawn = engine.on_device(partial(torch.randn, size, device=engine.device))
        yield drawn.cpu()[:, survives[rows]]


def pause_after_reset(num_images: int, refine_every: int, reset_every: int) -> int:
    """Steps without refinement after an opacity reset: splatfacto's rule, kept from going silent.

    splatfacto pauses for ``num_images + refine_every`` steps, so that each image is seen once with
    the reset opacities. From about ``reset_every`` images on that covers the whole cycle and
    densification never runs; half a cycle is the longest pause we take.
    """
    pause = num_images + refine_every
    longest = reset_every // 2
    if pause <= longest:
        return pause
    warn(
        f"{num_images} images would pause densification for {pause} of every {reset_every} steps; "
        f"pausing for {longest} instead. A higher --pipeline.model.reset-alpha-every gives the "
        "opacities more time."
    )
    return longest
