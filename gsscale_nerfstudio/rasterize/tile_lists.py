"""Which Gaussians each tile of an image draws, front to back: what gsplat's rasterizer asks for.

gsplat lists a Gaussian in every tile of a square around its mean, of three standard deviations of
its longer axis to each side. The rasterizer then passes over the pixels where

    min(0.999, opacity exp(-sigma)) < 1/255,  sigma = (a dx^2 + c dy^2) / 2 + b dx dy,

(a, b, c) being the conic. Here a tile of that square is listed only if it touches the ellipse of
the other pixels, sigma <= ln(255 opacity). The ellipse is drawn large enough for all rounding, the
rasterizer's and ours, so that the image stays the same bit by bit. It does so with smaller tiles,
too: they are those within the tiles of gsplat's square.

The host waits for the device once, through torch, and other Python threads run meanwhile.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SQUARE = 16
"""Pixels along the side of the tiles that gsplat rounds its squares to."""

TILE = 16
"""Pixels along the side of the tiles that have a list each: :data:`SQUARE`, or half of it."""

_BLOCK = 1024 if os.environ.get("TRITON_INTERPRET") == "1" else 32
"""Gaussians of a program. One warp: then it goes through as many tiles as its largest Gaussian has,
not its neighbours', and finding that number is a shuffle."""

_SQUARE = tl.constexpr(SQUARE)
_PER_SQUARE = tl.constexpr(1 / SQUARE)  # a float times it is exact; Triton's division is not
_FAINT = tl.constexpr(0.99995 / 255)  # below, even exp(-0), rounded up, does not reach 1/255
_LOG_SLACK = tl.constexpr(1e-4)  # of sigma's limit: __expf, our logarithm and the 1/255 round
_SIGMA_ROUNDING = tl.constexpr(5e-7)  # of sigma's terms: 6 roundings of 2^-24 each, and some more
_GROWTH = tl.constexpr(1 + 1e-5)  # of sigma's limit: an edge of the ellipse's tip rounds
_PLACE_SLACK = tl.constexpr(2e-6)  # of coordinates: as many roundings again
_PIXEL_SLACK = tl.constexpr(1e-3)
_HUGE = tl.constexpr(1e15)  # beyond it, float32 may overflow, and nothing is promised
_INFINITY = tl.constexpr(float("inf"))


class TileLists(NamedTuple):
    """Gaussians by tile: tile ``t``, row by row, has ``gaussians[offsets[t]:offsets[t + 1]]``.

    Attributes:
        offsets: Where each tile's list begins. [1, rows, columns] int32
        gaussians: Indices, front to back within a tile, equal depths by index. [I] int32
    """

    offsets: Tensor
    gaussians: Tensor


@torch.no_grad()
def tile_lists(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    conics: Tensor,
    opacities: Tensor,
    width: int,
    height: int,
    tile: int,
) -> TileLists:
    """The lists of one view of ``n`` projected Gaussians, n > 0.

    Beside the inputs it takes at most 32 bytes per Gaussian, and 34 per listed pair of a Gaussian
    and a tile while torch sorts the pairs (40 with more than 65,536 tiles); 4 of these remain.

    Args:
        means2d: Centres in pixels. [n, 2] float32
        radii: Half the side of gsplat's square, or halves of both sides, in pixels; 0 if the
            Gaussian is not drawn, and then its other values may be anything. [n] or [n, 2] int32
        depths: Positive if drawn. [n] float32
        conics: Inverse covariances xx, xy, yy. [n, 3] float32
        opacities: As the rasterizer is to see them, antialiasing included. [n] float32
        width: Image width in pixels.
        height: Image height in pixels.
        tile: Pixels along the side of a tile: a divisor of :data:`SQUARE`.
    """
    n, device = len(means2d), means2d.device
    columns, rows = triton.cdiv(width, tile), triton.cdiv(height, tile)
    # Sorted before they are listed, n instead of I, so that the lists are sorted by tile alone.
    order = torch.sort(depths, stable=True).indices
    tensors = (means2d, radii, conics, opacities)
    inputs = (order, *(tensor.contiguous() for tensor in tensors), n, columns, rows)
    # Both kernels must find the same tiles, so the compiler may not round differently in one: no
    # fused multiply-add at its discretion.
    options = {
        "RADII": radii.numel() // n,
        "TILE": tile,
        "BLOCK": _BLOCK,
        "num_warps": 1,
        "enable_fp_fusion": False,
    }
    grid = (triton.cdiv(n, _BLOCK),)
    counts = torch.empty(n, dtype=torch.int32, device=device)
    with torch.cuda.device_of(means2d):
        _count_tiles[grid](*inputs, counts, **options)
        ends = counts.cumsum(0)
        total = int(ends[-1].item())
        # 16 bits take half the passes of the sort; they count from -32768.
        small = columns * rows <= 1 << 16
        first = -(1 << 15) if small else 0
        tiles = torch.empty(total, dtype=torch.int16 if small else torch.int32, device=device)
        gaussians = torch.empty(total, dtype=torch.int32, device=device)
        _list_tiles[grid](*inputs, ends, tiles, gaussians, first, **options)
    tiles, permutation = torch.sort(tiles, stable=True)
    every_tile = torch.arange(first, first + columns * rows, dtype=tiles.dtype, device=device)
    offsets = torch.searchsorted(tiles, every_tile, out_int32=True)
    del tiles
    return TileLists(offsets.view(1, rows, columns), gaussians[permutation])


@triton.jit
def _clamp(x, low, high):
    """``x`` within [low, high]; ``low`` for what is not a number, as CUDA rounds it to 0."""
    x = tl.where(x > low, x, low)
    return tl.where(x < high, x, high)


@triton.jit
def _load(
    order,
    means2d,
    pixel_radii,
    conics,
    opacities,
    n,
    columns,
    rows,
    RADII: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's Gaussians: ranks, indices, rows [top, bottom) of the square, and a shape.

    The shape is the nine values that :func:`_row_run` needs, see there. Each has a name of its own
    in every kernel: Triton before 3.3 (PyTorch 2.7) passes no tuples on.
    """
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rank < n
    i = tl.load(order + rank, mask=live, other=0)
    x = tl.load(means2d + 2 * i, mask=live, other=0.0)
    y = tl.load(means2d + 2 * i + 1, mask=live, other=0.0)
    radius_x = tl.load(pixel_radii + RADII * i, mask=live, other=0).to(tl.float32)
    radius_y = tl.load(pixel_radii + RADII * i + (RADII - 1), mask=live, other=0).to(tl.float32)
    a = tl.load(conics + 3 * i, mask=live, other=0.0)
    b = tl.load(conics + 3 * i + 1, mask=live, other=0.0)
    c = tl.load(conics + 3 * i + 2, mask=live, other=0.0)
    opacity = tl.load(opacities + i, mask=live, other=0.0)

    # gsplat's square, with its rounding, in our tiles.
    tile_x = x * _PER_SQUARE
    tile_y = y * _PER_SQUARE
    parts: tl.constexpr = _SQUARE // TILE
    first = tl.floor(tile_x - radius_x * _PER_SQUARE) * parts
    end = tl.ceil(tile_x + radius_x * _PER_SQUARE) * parts
    top = tl.floor(tile_y - radius_y * _PER_SQUARE) * parts
    bottom = tl.ceil(tile_y + radius_y * _PER_SQUARE) * parts
    first = _clamp(first, 0.0, columns.to(tl.float32))
    end = _clamp(end, 0.0, columns.to(tl.float32))
    top = _clamp(top, 0.0, rows.to(tl.float32)).to(tl.int32)
    bottom = _clamp(bottom, 0.0, rows.to(tl.float32)).to(tl.int32)

    # A product of float32s is exact in float64: the determinant of a needle would cancel.
    a64 = a.to(tl.float64)
    det = a64 * c.to(tl.float64) - b.to(tl.float64) * b.to(tl.float64)
    c_by_det = (c.to(tl.float64) / det).to(tl.float32)

    # sigma rounds by a part of its terms' size. That is at most so much at any pixel of the square,
    # and in proportion to sigma 4 ac / det: the former is far less for needles askew, the latter
    # for all others.
    dx = radius_x + _SQUARE
    dy = radius_y + _SQUARE
    terms = 0.5 * (a * dx * dx + c * dy * dy) + tl.abs(b) * dx * dy
    proportion = _SIGMA_ROUNDING * 4.0 * (a * c_by_det)
    limit = tl.log(255.0 * opacity) + _LOG_SLACK
    in_square = limit + _SIGMA_ROUNDING * terms
    in_proportion = limit / (1.0 - proportion)
    limit = tl.where((proportion < 0.5) & (in_proportion < in_square), in_proportion, in_square)
    limit = 2.0 * _GROWTH * limit

    # Relative to the centre, row y of the ellipse is -slope y -+ sqrt(spread - narrowing y^2). It
    # reaches farthest, `reach`, to the left at y = tip and to the right at y = -tip.
    slope = b / a
    spread = limit / a
    narrowing = (det / (a64 * a64)).to(tl.float32)
    reach = tl.sqrt(limit * c_by_det)
    tip = b * (reach / c)
    slack = _PIXEL_SLACK + _PLACE_SLACK * (tl.abs(x) + reach)

    # Comparisons with what is not a number are false. What has no ellipse keeps its square.
    regular = (tl.abs(a) < _HUGE) & (tl.abs(b) < _HUGE) & (tl.abs(c) < _HUGE)
    finite = tl.abs(slope) + spread + narrowing + reach + tl.abs(tip) < _HUGE
    ellipse = regular & finite & (det > 0.0) & (a > 0.0)
    slope = tl.where(ellipse, slope, 0.0)
    spread = tl.where(ellipse, spread, _INFINITY)
    narrowing = tl.where(ellipse, narrowing, 0.0)
    tip = tl.where(ellipse, tip, 0.0)
    slack = tl.where(ellipse, slack, 0.0)

    hidden = (radius_x <= 0.0) | (radius_y <= 0.0) | (regular & (opacity < _FAINT))
    bottom = tl.where(hidden, top, bottom)
    left = x - slack
    right = x + slack
    return rank, i, top, bottom, left, right, y, slope, spread, narrowing, tip, first, end


@triton.jit
def _row_run(row, left, right, y, slope, spread, narrowing, tip, first, end, TILE: tl.constexpr):
    """First column, and number, of the tiles of a row that a Gaussian's shape touches.

    The ellipse, convex, reaches farthest left or right within a band of rows where it does so at
    all, if that is in the band, else at the nearer edge of the band.
    """
    per_tile: tl.constexpr = 1 / TILE
    last_centre: tl.constexpr = TILE - 0.5
    upper = row.to(tl.float32) * TILE + 0.5 - y
    lower = row.to(tl.float32) * TILE + last_centre - y
    y_left = _clamp(tip, upper, lower)
    y_right = _clamp(-tip, upper, lower)
    square_left = spread - narrowing * y_left * y_left
    square_right = spread - narrowing * y_right * y_right
    missed = (square_left < 0.0) & (square_right < 0.0)
    left += -slope * y_left - tl.sqrt(tl.maximum(square_left, 0.0))
    right += -slope * y_right + tl.sqrt(tl.maximum(square_right, 0.0))
    # Tiles t of 16 pixels, say, have pixel centres from 16 t + 0.5 to 16 t + 15.5.
    start = _clamp(tl.ceil((left - last_centre) * per_tile), first, end)
    stop = _clamp(tl.floor((right - 0.5) * per_tile) + 1.0, start, end)
    return start.to(tl.int32), tl.where(missed, 0.0, stop - start).to(tl.int32)


@triton.jit(do_not_specialize=["n", "columns", "rows"])
def _count_tiles(
    order,  # [n] int64, front to back
    means2d,
    pixel_radii,
    conics,
    opacities,
    n,
    columns,
    rows,
    counts,  # [n] int32, in that order
    RADII: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many tiles each Gaussian touches."""
    rank, _i, top, bottom, left, right, y, slope, spread, narrowing, tip, first, end = _load(
        order, means2d, pixel_radii, conics, opacities, n, columns, rows, RADII, TILE, BLOCK
    )
    count = tl.zeros([BLOCK], tl.int32)
    step = 0
    steps = tl.max(bottom - top)
    while step < steps:
        row = top + step
        _start, length = _row_run(
            row, left, right, y, slope, spread, narrowing, tip, first, end, TILE
        )
        count += tl.where(row < bottom, length, 0)
        step += 1
    tl.store(counts + rank, count, mask=rank < n)


@triton.jit(do_not_specialize=["n", "columns", "rows", "first_tile"])
def _list_tiles(
    order,  # [n] int64, front to back
    means2d,
    pixel_radii,
    conics,
    opacities,
    n,
    columns,
    rows,
    ends,  # [n] int64, sums of the counts
    tiles,  # [I] int16 or int32
    gaussians,  # [I] int32
    first_tile,  # number of the first tile
    RADII: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile and a Gaussian for each pair of the two, the Gaussians front to back."""
    rank, i, top, bottom, left, right, y, slope, spread, narrowing, tip, first, end = _load(
        order, means2d, pixel_radii, conics, opacities, n, columns, rows, RADII, TILE, BLOCK
    )
    at = tl.load(ends + rank - 1, mask=(rank > 0) & (rank < n), other=0)
    step = 0
    steps = tl.max(bottom - top)
    while step < steps:
        row = top + step
        start, length = _row_run(
            row, left, right, y, slope, spread, narrowing, tip, first, end, TILE
        )
        length = tl.where(row < bottom, length, 0)
        column = 0
        longest = tl.max(length)
        while column < longest:
            inside = column < length
            tile = first_tile + row * columns + start + column
            tl.store(tiles + at + column, tile, mask=inside)
            tl.store(gaussians + at + column, i, mask=inside)
            column += 1
        at += length
        step += 1
