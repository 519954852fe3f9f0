"""Morton order: rows that are near in space are near in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gsscale_nerfstudio import _C


def morton_order(rows: Tensor, column: int, n: int) -> Tensor:
    """Permutation that sorts the first ``n`` rows along a Morton curve of three columns.

    The curve's box spans the 1st to the 99th percentile of the coordinates, so that a few far
    outliers do not coarsen it; rows outside are clamped to its faces. Extra memory: the result, and
    less than 2 MB a thread, but 16 bytes for each of the rows that are in one and the same cell.

    Args:
        rows: [capacity, width] float32.
        column: first of the three coordinate columns.
        n: number of rows in use.

    Returns:
        [n] int32, ``order[i]`` is the present place of the row that belongs at ``i``.
    """
    sample = rows[: n : max(1, n // 100_000), column : column + 3]
    sample = sample[torch.isfinite(sample).all(dim=1)].double()
    if len(sample) == 0:
        return torch.arange(n, dtype=torch.int32)
    box = torch.quantile(sample, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    # The middle 98 % fill the middle half of the curve; the rest has the outer half to spread in.
    half = (box[1] - box[0]).clamp_min(1e-12)
    box = torch.stack([box[0] - 0.5 * half, box[1] + 0.5 * half])
    order = torch.empty(n, dtype=torch.int32)
    _C.morton_order(rows.numpy(), column, box.float().numpy(), order.numpy())
    return order
