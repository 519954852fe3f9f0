"""The culler: which rows may a view see?"""

from __future__ import annotations

import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.cull.view import EXACT, Slack, View

SIGMAS = 3.33
"""Standard deviations out to which a row is drawn: gsplat 1.4 draws 3, gsplat 1.5 up to 3.33."""

POSITION_SLACK = 1e-6
"""Float32 rounding of a row's position, as a share of its distance to the origin."""


class Culler:
    """Finds the rows that a view may see: a superset, by a few percent, of those that gsplat draws.

    Each row is bounded by a sphere, each block of 256 consecutive rows by a box around its spheres'
    centres and radii. A view is six planes (:meth:`View.planes`). Blocks beyond one of them are
    skipped, blocks that none of them cuts are taken whole, and only the spheres of the others are
    read: with rows in Morton order, few.

    The caller owns both arrays and fills ``spheres``; they may have room for more rows than are in
    use. Rows with NaN in their sphere, or an infinite radius, are always kept. Several threads may
    cull at once, but not while one refreshes.

    Args:
        spheres: [capacity, 4] float32, contiguous, on the CPU: centre, and radius
            ``3.33 * largest scale + motion still to come + 1e-6 * distance to the origin``.
        blocks: [ceil(capacity / 256), 8] float32, contiguous, on the CPU; ours to write.
        threads: OpenMP threads to use; 0 for as many as the work is worth.

    Raises:
        TypeError, ValueError: (from the methods) the arrays are of another type or too small.
    """

    BLOCK_ROWS: int = _C.BLOCK_ROWS

    def __init__(self, spheres: Tensor, blocks: Tensor, threads: int = 0) -> None:
        self.spheres = spheres
        self.blocks = blocks
        self.threads = threads

    def refresh(self, n_rows: int, ids: Tensor | None = None) -> None:
        """Recompute the blocks' bounds, after ``spheres`` has changed.

        Args:
            n_rows: rows in use.
            ids: [n] int32, ascending: the rows whose spheres have changed; None for all. Rows added
                at the end count as changed.
        """
        row_ids = None if ids is None else ids.numpy()
        _C.update_blocks(self.spheres.numpy(), self.blocks.numpy(), n_rows, row_ids, self.threads)

    def replace(self, n_rows: int, ids: Tensor, spheres: Tensor) -> None:
        """Take over new spheres of some rows, and recompute their blocks' bounds.

        Args:
            n_rows: rows in use.
            ids: [n] int32, ascending.
            spheres: [n, 4] float32, contiguous, on the CPU.
        """
        _C.replace_spheres(self.spheres.numpy(), n_rows, ids.numpy(), spheres.numpy(), self.threads)
        self.refresh(n_rows, ids)

    def cull(
        self, view: View, n_rows: int, out: Tensor | None = None, slack: Slack = EXACT
    ) -> Tensor:
        """Ids of the rows that ``view`` may see.

        Args:
            view: the camera.
            n_rows: rows in use.
            out: [>= n] int32, contiguous, on the CPU (page-locked, say): where to write the ids.
            slack: how much rows may have outgrown their spheres.

        Returns:
            [n] int32, ascending, without repetition: a view of ``out``, or, without it, of a new
            tensor that nothing else refers to. That one has room for all rows, but only the memory
            that the ids take is ever touched (``clone`` it before you save it to a file).

        Raises:
            ValueError: ``out`` is too small.
        """
        ids = torch.empty(n_rows, dtype=torch.int32) if out is None else out
        n = _C.cull(
            self.spheres.numpy(),
            self.blocks.numpy(),
            n_rows,
            view.planes(slack),
            ids.numpy(),
            self.threads,
        )
        if n > len(ids):
            raise ValueError(f"out has room for {len(ids)} ids, the view may see {n} rows")
        return ids[:n]

    @staticmethod
    def spheres_of(means: Tensor, scales: Tensor, reach: Tensor | float = 0.0) -> Tensor:
        """Bounding spheres [n, 4]; the row kernels write the same ones as they step rows.

        Args:
            means: [n, 3] float32.
            scales: [n, 3] float32, standard deviations (not their logarithms).
            reach: [n] or a number: how far the centres may still move.
        """
        radii = SIGMAS * scales.amax(dim=1) + reach + POSITION_SLACK * means.norm(dim=1)
        return torch.cat([means, radii[:, None]], dim=1)
