"""Which Gaussians each tile of an image draws, front to back: what gsplat's rasterizer asks for.

gsplat lists a Gaussian in every tile of a square around its mean, of three standard deviations of
its longer axis to each side (1.5: of a rectangle, see :func:`.projection.project`). The rasterizer
then passes over the pixels where

    min(0.999, opacity exp(-sigma)) < 1/255,  sigma = (a dx^2 + c dy^2) / 2 + b dx dy,

(a, b, c) being the conic. Here a tile of that square is listed
only if it touches the ellipse of the other pixels, sigma <= ln(255 opacity). The ellipse is drawn
large enough for all rounding, the rasterizer's and ours, so that the image stays the same bit by
bit.

Tiles have half the side of gsplat's, a quarter of the pixels: a small Gaussian touches more of
those that look at it. Pairs of a Gaussian and a tile would then take most of a view's memory while
they are sorted, so it is pairs with gsplat's tiles, here squares, that are, each with four bits for
its quarters; :mod:`.quarters` makes four lists of each square's.

The host waits for the device once, and other threads run and reach the device meanwhile.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsscale_nerfstudio.errors import GSScaleError

from .quarters import lists_of_quarters, marked_entry

SQUARE = 16
"""Pixels along the side of the tiles that gsplat rounds its squares to."""

TILE = SQUARE // 2
"""Pixels along the side of the tiles that have a list each."""

_SHORT = 1 << 16
"""Squares that 16 bits can number."""

_BLOCK = 1024 if os.environ.get("TRITON_INTERPRET") == "1" else 32
"""Gaussians of a program. One warp: then it goes through as many tiles as its largest Gaussian has,
not its neighbours', and finding that number is a shuffle."""

_SQUARE = tl.constexpr(SQUARE)
_TILE = tl.constexpr(TILE)
_PER_TILE = tl.constexpr(1 / TILE)
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
) -> TileLists:
    """The lists of one view of ``n`` projected Gaussians, 0 < n < 2^28.

    Beside the inputs it takes at most 32 bytes per Gaussian, and 34 per pair of a Gaussian and a
    square while torch sorts the pairs (40 with more than 65,536 squares). What remains are 4 per
    pair of a Gaussian and a tile.

    Args:
        means2d: Centres in pixels. [n, 2] float32
        radii: Half the side of gsplat's square, or halves of both sides, in pixels; 0 if the
            Gaussian is not drawn, and then its other values may be anything. [n] or [n, 2] int32
        depths: Positive if drawn. [n] float32
        conics: Inverse covariances xx, xy, yy. [n, 3] float32
        opacities: As the rasterizer is to see them, antialiasing included. [n] float32
        width: Image width in pixels.
        height: Image height in pixels.

    Raises:
        GSScaleError: 2^31 pairs of a Gaussian and a tile, or more.
    """
    n, device = len(means2d), means2d.device
    columns, rows = triton.cdiv(width, TILE), triton.cdiv(height, TILE)
    square_columns, square_rows = triton.cdiv(width, SQUARE), triton.cdiv(height, SQUARE)
    # Sorted before they are listed, n instead of I, so that the lists are sorted by square alone.
    order = torch.sort(depths, stable=True).indices
    tensors = (means2d, radii, conics, opacities)
    inputs = (order, *(tensor.contiguous() for tensor in tensors), n, columns, rows)
    # Both kernels must find the same tiles, so the compiler may not round differently in one: no
    # fused multiply-add at its discretion.
    options = {
        "RADII": radii.numel() // n,
        "BLOCK": _BLOCK,
        "num_warps": 1,
        "enable_fp_fusion": False,
    }
    grid = (triton.cdiv(n, _BLOCK),)
    in_squares = torch.empty(n, dtype=torch.int32, device=device)
    in_tiles = torch.empty(n, dtype=torch.int32, device=device)
    with torch.cuda.device_of(means2d):
        _count_tiles[grid](*inputs, in_squares, in_tiles, **options)
        ends = in_squares.cumsum(0)
        total, total_in_tiles = _read(torch.stack([ends[-1], in_tiles.sum()]))
        if total_in_tiles >= 1 << 31:
            raise GSScaleError(
                f"a view draws {n:,} Gaussians in {total_in_tiles:,} places, more than 32 bits can "
                "number; make images smaller with --pipeline.datamanager.camera-res-scale-factor"
            )
        # 16 bits take half the passes of the sort; they count from -32768.
        n_squares = square_columns * square_rows
        small = n_squares <= _SHORT
        first = -(1 << 15) if small else 0
        squares = torch.empty(total, dtype=torch.int16 if small else torch.int32, device=device)
        marked = torch.empty(total, dtype=torch.int32, device=device)
        _list_squares[grid](*inputs, ends, squares, marked, first, square_columns, **options)
    squares, permutation = torch.sort(squares, stable=True)
    every_square = torch.arange(first, first + n_squares, dtype=squares.dtype, device=device)
    offsets = torch.searchsorted(squares, every_square, out_int32=True)
    marked = marked[permutation]
    del squares, permutation
    return TileLists(
        *lists_of_quarters(
            offsets.view(square_rows, square_columns), marked, rows, columns, total_in_tiles
        )
    )


def _read(values: Tensor) -> list[int]:
    """The values, once the device has them."""
    if not values.is_cuda:
        return values.tolist()
    # Through page-locked memory. A copy to ordinary memory waits inside of the driver, which keeps
    # out other threads' calls for as long: an engine's worker took twice its time for a view.
    on_host = torch.empty_like(values, device="cpu", pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).record_event().synchronize()
    return on_host.tolist()


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
    BLOCK: tl.constexpr,
):
    """This program's Gaussians: ranks, indices, their rows [top, bottom) of squares, and a shape.

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

    # What gsplat lists, with its rounding: rows of squares, columns of tiles.
    square_x = x * _PER_SQUARE
    square_y = y * _PER_SQUARE
    first = 2.0 * tl.floor(square_x - radius_x * _PER_SQUARE)
    end = 2.0 * tl.ceil(square_x + radius_x * _PER_SQUARE)
    top = tl.floor(square_y - radius_y * _PER_SQUARE)
    bottom = tl.ceil(square_y + radius_y * _PER_SQUARE)
    first = _clamp(first, 0.0, columns.to(tl.float32))
    end = _clamp(end, 0.0, columns.to(tl.float32))
    square_rows = ((rows + 1) // 2).to(tl.float32)
    top = _clamp(top, 0.0, square_rows).to(tl.int32)
    bottom = _clamp(bottom, 0.0, square_rows).to(tl.int32)

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
def _row_run(row, left, right, y, slope, spread, narrowing, tip, first, end):
    """First column, and the one after the last, of the tiles of a row that a shape touches.

    The ellipse, convex, reaches farthest left or right within a band of rows where it does so at
    all, if that is in the band, else at the nearer edge of the band.
    """
    last_centre: tl.constexpr = _TILE - 0.5
    upper = row.to(tl.float32) * _TILE + 0.5 - y
    lower = row.to(tl.float32) * _TILE + last_centre - y
    y_left = _clamp(tip, upper, lower)
    y_right = _clamp(-tip, upper, lower)
    square_left = spread - narrowing * y_left * y_left
    square_right = spread - narrowing * y_right * y_right
    missed = (square_left < 0.0) & (square_right < 0.0)
    left += -slope * y_left - tl.sqrt(tl.maximum(square_left, 0.0))
    right += -slope * y_right + tl.sqrt(tl.maximum(square_right, 0.0))
    # Tiles t of 8 pixels have pixel centres from 8 t + 0.5 to 8 t + 7.5.
    start = _clamp(tl.ceil((left - last_centre) * _PER_TILE), first, end)
    stop = _clamp(tl.floor((right - 0.5) * _PER_TILE) + 1.0, start, end)
    return start.to(tl.int32), tl.where(missed, start, stop).to(tl.int32)


@triton.jit
def _square_run(row, bottom, rows, left, right, y, slope, spread, narrowing, tip, first, end):
    """Of a row of squares that a shape touches: first column and number, then its tiles' runs.

    A square between others may have no tile that the shape, a needle, touches.
    """
    above, above_end = _row_run(2 * row, left, right, y, slope, spread, narrowing, tip, first, end)
    below, below_end = _row_run(
        2 * row + 1, left, right, y, slope, spread, narrowing, tip, first, end
    )
    above_end = tl.where(row < bottom, above_end, above)
    below_end = tl.where((row < bottom) & (2 * row + 1 < rows), below_end, below)
    start = tl.where(above_end > above, above, below)
    start = tl.where(below_end > below, tl.minimum(start, below), start) // 2
    stop = tl.where(above_end > above, above_end, 0)
    stop = tl.where(below_end > below, tl.maximum(stop, below_end), stop)
    length = tl.where(stop > 0, (stop + 1) // 2 - start, 0)
    return start, length, above, above_end, below, below_end


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
    in_squares,  # [n] int32, in that order
    in_tiles,  # likewise
    RADII: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many squares, and tiles, each Gaussian touches."""
    rank, _i, top, bottom, left, right, y, slope, spread, narrowing, tip, first, end = _load(
        order, means2d, pixel_radii, conics, opacities, n, columns, rows, RADII, BLOCK
    )
    squares = tl.zeros([BLOCK], tl.int32)
    tiles = tl.zeros([BLOCK], tl.int32)
    step = 0
    steps = tl.max(bottom - top)
    while step < steps:
        _start, length, above, above_end, below, below_end = _square_run(
            top + step, bottom, rows, left, right, y, slope, spread, narrowing, tip, first, end
        )
        squares += length
        tiles += above_end - above + below_end - below
        step += 1
    tl.store(in_squares + rank, squares, mask=rank < n)
    tl.store(in_tiles + rank, tiles, mask=rank < n)


@triton.jit(do_not_specialize=["n", "columns", "rows", "first_square", "square_columns"])
def _list_squares(
    order,  # [n] int64, front to back
    means2d,
    pixel_radii,
    conics,
    opacities,
    n,
    columns,
    rows,
    ends,  # [n] int64, sums of the counts of squares
    squares,  # [I] int16 or int32
    marked,  # [I] int32
    first_square,  # number of the first square
    square_columns,
    RADII: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A square and a Gaussian, with the quarters, for each pair, the Gaussians front to back."""
    rank, i, top, bottom, left, right, y, slope, spread, narrowing, tip, first, end = _load(
        order, means2d, pixel_radii, conics, opacities, n, columns, rows, RADII, BLOCK
    )
    at = tl.load(ends + rank - 1, mask=(rank > 0) & (rank < n), other=0)
    i = i.to(tl.int32)
    step = 0
    steps = tl.max(bottom - top)
    while step < steps:
        row = top + step
        start, length, above, above_end, below, below_end = _square_run(
            row, bottom, rows, left, right, y, slope, spread, narrowing, tip, first, end
        )
        column = 0
        longest = tl.max(length)
        while column < longest:
            inside = column < length
            left_tile = 2 * (start + column)
            right_tile = left_tile + 1
            entry = marked_entry(
                i,
                (left_tile >= above) & (left_tile < above_end),
                (right_tile >= above) & (right_tile < above_end),
                (left_tile >= below) & (left_tile < below_end),
                (right_tile >= below) & (right_tile < below_end),
            )
            square = first_square + row * square_columns + start + column
            tl.store(squares + at + column, square, mask=inside)
            tl.store(marked + at + column, entry, mask=inside)
            column += 1
        at += length
        step += 1
