"""What Triton kernels share that go between tiles of rows and leaves.

A tile is [ROWS, COLUMNS]: a few rows by all columns. The leaves' columns come first: means, scales,
quats, opacities (:class:`.RowLayout`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_leaves(w, column, i, live, means, scales, quats, opacities):
    """The leaves' columns of a tile to places ``i`` [ROWS] of contiguous leaves, where ``live``."""
    row = i[:, None].to(tl.int64)
    at = live[:, None]
    tl.store(means + row * 3 + column, w, mask=at & (column < 3))
    tl.store(scales + row * 3 + (column - 3), w, mask=at & (column >= 3) & (column < 6))
    tl.store(quats + row * 4 + (column - 6), w, mask=at & (column >= 6) & (column < 10))
    tl.store(opacities + row + (column - 10), w, mask=at & (column == 10))


@triton.jit
def load_leaves(column, i, live, means, scales, quats, opacities):
    """The reverse: a tile of contiguous leaves, 0 in all other columns."""
    row = i[:, None].to(tl.int64)
    at = live[:, None]
    # Each load reads the columns of one leaf only.
    w = tl.load(means + row * 3 + column, mask=at & (column < 3), other=0.0)
    in_scales = at & (column >= 3) & (column < 6)
    w += tl.load(scales + row * 3 + (column - 3), mask=in_scales, other=0.0)
    in_quats = at & (column >= 6) & (column < 10)
    w += tl.load(quats + row * 4 + (column - 6), mask=in_quats, other=0.0)
    w += tl.load(opacities + row + (column - 10), mask=at & (column == 10), other=0.0)
    return w
