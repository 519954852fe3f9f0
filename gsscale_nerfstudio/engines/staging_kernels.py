"""Triton kernels between leaves and rows in page-locked memory, which they read and write directly.

A tile is a few rows by all columns: a row is one contiguous piece of memory on the link's side.
"""

# Triton wants its block sizes and column numbers in capitals, as constants of the compilation.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def unpack_rows(
    rows,
    positions,
    means,
    scales,
    quats,
    opacities,
    sh,
    n,
    SCATTER: tl.constexpr,
    SH: tl.constexpr,
    OPTIMIZED: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Row i of ``[n, WIDTH]`` to place positions[i] (or i) of each attribute, all contiguous."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    column = tl.arange(0, COLUMNS)[None, :]
    at = live[:, None]
    # Bookkeeping, too: whole rows are read in pieces of 16 bytes.
    w = tl.load(rows + i[:, None].to(tl.int64) * WIDTH + column, mask=at & (column < WIDTH))
    place = tl.load(positions + i, mask=live, other=0) if SCATTER else i
    out = place[:, None].to(tl.int64)
    tl.store(means + out * 3 + column, w, mask=at & (column < 3))
    tl.store(scales + out * 3 + (column - 3), w, mask=at & (column >= 3) & (column < 6))
    tl.store(quats + out * 4 + (column - 6), w, mask=at & (column >= 6) & (column < 10))
    tl.store(opacities + out + (column - 10), w, mask=at & (column == 10))
    bands = at & (column >= SH) & (column < OPTIMIZED)
    tl.store(sh + out * (OPTIMIZED - SH) + (column - SH), w, mask=bands)


@triton.jit(
    do_not_specialize=[
        "means_stride",
        "scales_stride",
        "quats_stride",
        "opacities_stride",
        "dc_stride",
        "rest_stride",
        "n",
    ]
)
def pack_gradients(
    rows,
    g_means,
    g_scales,
    g_quats,
    g_opacities,
    g_dc,
    g_rest,
    means_stride,
    scales_stride,
    quats_stride,
    opacities_stride,
    dc_stride,
    rest_stride,
    norms,
    seen,
    radii,
    n,
    HAS_STATISTICS: tl.constexpr,
    GRAD2D: tl.constexpr,
    COUNT: tl.constexpr,
    MAX_RADIUS: tl.constexpr,
    SH: tl.constexpr,
    OPTIMIZED: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient rows ``[n, WIDTH]``, statistics in their bookkeeping columns, zeros elsewhere.

    The strides are those from row to row; within a row gradients are contiguous.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    column = tl.arange(0, COLUMNS)[None, :]
    at = live[:, None]
    row = i[:, None].to(tl.int64)
    # Each load reads the columns of one attribute only; together they are the gradient row.
    g = tl.load(g_means + row * means_stride + column, mask=at & (column < 3), other=0.0)
    g += tl.load(
        g_scales + row * scales_stride + (column - 3),
        mask=at & (column >= 3) & (column < 6),
        other=0.0,
    )
    g += tl.load(
        g_quats + row * quats_stride + (column - 6),
        mask=at & (column >= 6) & (column < 10),
        other=0.0,
    )
    g += tl.load(
        g_opacities + row * opacities_stride + (column - 10), mask=at & (column == 10), other=0.0
    )
    g += tl.load(
        g_dc + row * dc_stride + (column - SH),
        mask=at & (column >= SH) & (column < SH + 3),
        other=0.0,
    )
    g += tl.load(
        g_rest + row * rest_stride + (column - SH - 3),
        mask=at & (column >= SH + 3) & (column < OPTIMIZED),
        other=0.0,
    )
    if HAS_STATISTICS:
        g = tl.where(column == GRAD2D, tl.load(norms + i, mask=live, other=0.0)[:, None], g)
        g = tl.where(column == COUNT, tl.load(seen + i, mask=live, other=0.0)[:, None], g)
        g = tl.where(column == MAX_RADIUS, tl.load(radii + i, mask=live, other=0.0)[:, None], g)
    tl.store(rows + row * WIDTH + column, g, mask=at & (column < WIDTH))
