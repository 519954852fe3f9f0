"""gsplat's default densification, on rows of the host store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gsplat.strategy import DefaultStrategy
from gsplat.utils import normalized_quat_to_rotmat
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from gsscale_nerfstudio.engines import Engine
from gsscale_nerfstudio.store import HostStore

_CHUNK = 1 << 20
"""Rows looked at together: bounds the temporaries of a decision to some 20 MB."""

_SORT_FROM = 0.25
"""Share of rows out of Morton order from which sorting pays."""


def _chunks(n: int) -> Iterator[slice]:
    for start in range(0, n, _CHUNK):
        yield slice(start, min(start + _CHUNK, n))


@dataclass
class RowStrategy(DefaultStrategy):
    """``gsplat.DefaultStrategy`` whose Gaussians are rows: same fields, same decisions.

    The statistics are columns of the rows (the engine adds a view's share when it steps them), so
    growing and pruning move whole rows. New rows are appended and rows from the end fill the holes
    of removed ones; nothing of the store's size is allocated but masks of one byte per row.
    """

    _warned_full: bool = False

    @torch.no_grad()
    def refine(self, engine: Engine, step: int) -> None:
        """What ``step_post_backward`` does after its statistics: grow, prune, reset opacities.

        Args:
            engine: whose store is refined; must not be inside a step.
            step: Nerfstudio's step counter.
        """
        refines, resets = self._refines(step), self._resets(step)
        if not (refines or resets):
            return
        store = engine.store
        engine.settle()
        if refines:
            duplicated, split = self.grow(store, step)
            if self.verbose:
                print(
                    f"Step {step}: {duplicated} GSs duplicated, {split} GSs split. "
                    f"Now having {len(store)} GSs."
                )
            pruned = self.prune(store, step)
            if self.verbose:
                print(f"Step {step}: {pruned} GSs pruned. Now having {len(store)} GSs.")
            for name in ("grad2d", "count", "max_radius"):
                store.bookkeeping(name).zero_()
            if store.unsorted_share > _SORT_FROM:
                store.sort()
        if resets:
            reset_opacities(store, self.prune_opa * 2.0)
        engine.rows_changed()

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

    def grow(self, store: HostStore, step: int) -> tuple[int, int]:
        """Duplicate small and split large rows with a high screen-space gradient.

        Returns:
            Numbers of rows duplicated and split.
        """
        duplicates, splits = self.grow_masks(store, step)
        self._fit(store, duplicates, splits)
        sources, parents = (torch.nonzero(mask).flatten() for mask in (duplicates, splits))
        if len(sources):
            store.append_copies(sources)
        if len(parents):
            split_rows(store, parents)
        return len(sources), len(parents)

    def grow_masks(self, store: HostStore, step: int) -> tuple[Tensor, Tensor]:
        """Which rows to duplicate and which to split: two [n] bool masks."""
        n = len(store)
        duplicates, splits = torch.empty(n, dtype=torch.bool), torch.empty(n, dtype=torch.bool)
        scales = store.column("scales")
        for rows in _chunks(n):
            high = self._mean_gradient(store, rows) > self.grow_grad2d
            small = torch.exp(scales[rows]).amax(dim=-1) <= self.grow_scale3d
            duplicates[rows] = high & small
            splits[rows] = high & ~small
            if step < self.refine_scale2d_stop_iter:
                splits[rows] |= store.bookkeeping("max_radius")[rows] > self.grow_scale2d
        return duplicates, splits

    def prune(self, store: HostStore, step: int) -> int:
        """Remove rows that are too transparent or too large; returns how many."""
        mask = self.prune_mask(store, step)
        removed = int(mask.sum())
        if removed:
            store.remove(mask)
        return removed

    def prune_mask(self, store: HostStore, step: int) -> Tensor:
        """Which rows to remove: [n] bool."""
        mask = torch.empty(len(store), dtype=torch.bool)
        scales, opacities = store.column("scales"), store.column("opacities")
        for rows in _chunks(len(store)):
            mask[rows] = torch.sigmoid(opacities[rows].flatten()) < self.prune_opa
            if step > self.reset_every:
                too_big = torch.exp(scales[rows]).amax(dim=-1) > self.prune_scale3d
                if step < self.refine_scale2d_stop_iter:
                    too_big |= store.bookkeeping("max_radius")[rows] > self.prune_scale2d
                mask[rows] |= too_big
        return mask

    @staticmethod
    def _mean_gradient(store: HostStore, rows: slice | Tensor) -> Tensor:
        return store.bookkeeping("grad2d")[rows] / store.bookkeeping("count")[rows].clamp_min(1)

    def _fit(self, store: HostStore, duplicates: Tensor, splits: Tensor) -> None:
        """Where not all new rows have room, keep those with the highest gradient."""
        wanted = int(duplicates.sum()) + int(splits.sum())
        room = store.room()
        if wanted <= room:
            return
        if not self._warned_full:
            self._warned_full = True
            CONSOLE.print(
                f"[bold yellow]gsscale:[/bold yellow] the host store is full at {len(store):,} "
                "Gaussians; from here on only the most needed ones are added, as pruning makes "
                "room. Raise --pipeline.model.max-gaussians or free host memory to grow further."
            )
        candidates = torch.nonzero(duplicates | splits).flatten()
        weakest = self._mean_gradient(store, candidates).argsort()[: wanted - room]
        duplicates[candidates[weakest]] = False
        splits[candidates[weakest]] = False


def split_rows(store: HostStore, parents: Tensor) -> None:
    """Replace each parent by two children sampled from it, 1.6 times smaller, without moments."""
    children = store.append_copies(parents)
    store.zero_moments(parents)
    means, scales, quats = (store.column(name) for name in ("means", "scales", "quats"))
    noise = torch.randn(2, len(parents), 3)
    for part in _chunks(len(parents)):
        first, second = parents[part], children[part]
        size = torch.exp(scales[first])
        rotations = normalized_quat_to_rotmat(F.normalize(quats[first], dim=-1))
        offsets = torch.einsum("nij,nj,bnj->bni", rotations, size, noise[:, part])
        centre = means[first]
        means[first], means[second] = centre + offsets[0], centre + offsets[1]
        scales[first] = scales[second] = torch.log(size / 1.6)


def reset_opacities(store: HostStore, value: float) -> None:
    """Clamp opacities to ``value`` and forget their moments, so that all must prove themselves."""
    store.column("opacities").clamp_(max=torch.logit(torch.tensor(value)).item())
    for array in (store.exp_avg, store.exp_avg_sq):
        store.column("opacities", array).zero_()


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
    CONSOLE.print(
        f"[bold yellow]gsscale:[/bold yellow] {num_images} images would pause densification for "
        f"{pause} of every {reset_every} steps; pausing for {longest} instead. A higher "
        "--pipeline.model.reset-alpha-every gives the opacities more time."
    )
    return longest
