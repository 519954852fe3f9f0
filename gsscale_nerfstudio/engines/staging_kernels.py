"""Triton kernels between leaves and rows in page-locked memory, which they read and write directly.

A tile is a few rows by all columns: a row is one contiguous piece of memory on the link's side.
"""

# Triton wants its block sizes and column numbers in capitals, as constants of the compilation.

from __future__ import annotations

import triton
import triton.language as tl

from gsscale_nerfstudio.engines.color_kernels import coefficient_gradients, store_colors
from gsscale_nerfstudio.engines.leaf_kernels import load_leaves, store_leaves


@triton.jit(do_not_specialize=["n", "total", "bands_end"])
def unpack_rows(
    rows,
    positions,
    means,
    scales,
    quats,
    opacities,
    colors,
    slopes,
    table,
    position,
    bands_end,
    n,
    total,
    SCATTER: tl.constexpr,
    SLOPES: tl.constexpr,
    DEGREE: tl.constexpr,
    SH: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Row i of ``[n, WIDTH]`` to place positions[i] (or i) of each attribute, all contiguous.

    Attributes are of ``total`` rows; of colours and slopes, see ``store_colors``.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    column = tl.arange(0, COLUMNS)[None, :]
    at = live[:, None]
    # Bookkeeping, too: whole rows are read in pieces of 16 bytes.
    w = tl.load(rows + i[:, None].to(tl.int64) * WIDTH + column, mask=at & (column < WIDTH))
    place = tl.load(positions + i, mask=live, other=0) if SCATTER else i
    store_leaves(w, column, place, live, means, scales, quats, opacities)
    store_colors(
        w,
        column,
        place,
        live,
        total,
        table,
        position,
        bands_end,
        colors,
        slopes,
        SLOPES,
        DEGREE,
        SH,
    )


@triton.jit(do_not_specialize=["n", "bands_end"])
def pack_gradients(
    rows,
    g_means,
    g_scales,
    g_quats,
    g_opacities,
    g_colors,
    means,
    norms,
    seen,
    radii,
    table,
    position,
    bands_end,
    add_at,
    n,
    ADD: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    GRAD2D: tl.constexpr,
    COUNT: tl.constexpr,
    MAX_RADIUS: tl.constexpr,
    DEGREE: tl.constexpr,
    SH: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient rows ``[n, WIDTH]``, statistics in their bookkeeping columns, zeros elsewhere.

    If ADD, row i is added to row add_at[i].
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    column = tl.arange(0, COLUMNS)[None, :]
    at = live[:, None]
    row = i[:, None].to(tl.int64)
    g = load_leaves(column, i, live, g_means, g_scales, g_quats, g_opacities)
    g += coefficient_gradients(
        column, i, live, means, position, table, bands_end, g_colors, DEGREE, SH
    )
    if HAS_STATISTICS:
        g = tl.where(column == GRAD2D, tl.load(norms + i, mask=live, other=0.0)[:, None], g)
        g = tl.where(column == COUNT, tl.load(seen + i, mask=live, other=0.0)[:, None], g)
        g = tl.where(column == MAX_RADIUS, tl.load(radii + i, mask=live, other=0.0)[:, None], g)
    inside = at & (column < WIDTH)
    if ADD:
        row = tl.load(add_at + i, mask=live, other=0)[:, None].to(tl.int64)
        g += tl.load(rows + row * WIDTH + column, mask=inside, other=0.0)
    tl.store(rows + row * WIDTH + column, g, mask=inside)
