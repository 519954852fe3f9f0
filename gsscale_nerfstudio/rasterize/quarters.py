"""Four lists of each square's: a list's entries say which quarters of the square they are for.

The order stays, so nothing needs to be sorted once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 128
"""Entries at a time: four for each thread of a warp."""

_MARKS = tl.constexpr(28)
"""An entry is a Gaussian's index and, from this bit on, four bits: upper left and right, lower left
and right."""

_INDEX = tl.constexpr((1 << _MARKS.value) - 1)


def lists_of_quarters(
    offsets: Tensor, marked: Tensor, rows: int, columns: int, total: int
) -> tuple[Tensor, Tensor]:
    """The lists of tiles, by those of squares.

    Args:
        offsets: Where each square's list begins. [square rows, square columns] int32
        marked: Entries, see above. [I] int32
        rows: Tiles from top to bottom: twice those of squares, or one less.
        columns: Tiles from left to right, likewise.
        total: Bits set in all entries, none for a tile outside.

    Returns:
        Where each tile's list begins [1, rows, columns], and the lists' indices [total], int32.
    """
    squares = offsets.numel()
    inputs = (offsets, marked, len(marked), squares, offsets.shape[1], rows, columns)
    counts = torch.empty(rows * columns, dtype=torch.int32, device=marked.device)
    gaussians = torch.empty(total, dtype=torch.int32, device=marked.device)
    with torch.cuda.device_of(marked):
        _count[(squares,)](*inputs, counts, CHUNK=_CHUNK, num_warps=1)
        begins = counts.cumsum(0, dtype=torch.int32) - counts
        _split[(squares,)](*inputs, begins, gaussians, CHUNK=_CHUNK, num_warps=1)
    return begins.view(1, rows, columns), gaussians


@triton.jit
def marked_entry(index, upper_left, upper_right, lower_left, lower_right):
    """The entry of a Gaussian for those quarters of a square that are true."""
    upper = upper_left.to(tl.int32) | (upper_right.to(tl.int32) << 1)
    lower = (lower_left.to(tl.int32) << 2) | (lower_right.to(tl.int32) << 3)
    return index | ((upper | lower) << _MARKS)


@triton.jit
def _list_of(square, offsets, n, squares):
    at = tl.load(offsets + square)
    return at, tl.load(offsets + square + 1, mask=square + 1 < squares, other=n)


@triton.jit
def _tiles_of(square, square_columns, rows, columns):
    """Numbers of a square's four tiles, and whether they are in the image."""
    quarter = tl.arange(0, 4)
    row = 2 * (square // square_columns) + quarter // 2
    column = 2 * (square % square_columns) + quarter % 2
    return row * columns + column, (row < rows) & (column < columns)


@triton.jit
def _bits(marked, place, end):
    """Of a chunk, which entries are for which quarter. [CHUNK, 4]"""
    mark = tl.load(marked + place, mask=place < end, other=0)
    return mark, (mark[:, None] >> (tl.arange(0, 4) + _MARKS)[None, :]) & 1


@triton.jit(do_not_specialize=["n", "squares", "square_columns", "rows", "columns"])
def _count(
    offsets,
    marked,
    n,
    squares,
    square_columns,
    rows,
    columns,
    counts,
    CHUNK: tl.constexpr,
):
    """How many entries each of a square's tiles gets."""
    square = tl.program_id(0)
    at, end = _list_of(square, offsets, n, squares)
    total = tl.zeros([4], tl.int32)
    while at < end:
        _mark, bits = _bits(marked, at + tl.arange(0, CHUNK), end)
        total += tl.sum(bits, axis=0)
        at += CHUNK
    tile, inside = _tiles_of(square, square_columns, rows, columns)
    tl.store(counts + tile, total, mask=inside)


@triton.jit(do_not_specialize=["n", "squares", "square_columns", "rows", "columns"])
def _split(
    offsets,
    marked,
    n,
    squares,
    square_columns,
    rows,
    columns,
    begins,
    gaussians,
    CHUNK: tl.constexpr,
):
    """Hand a square's entries to its tiles."""
    square = tl.program_id(0)
    at, end = _list_of(square, offsets, n, squares)
    tile, inside = _tiles_of(square, square_columns, rows, columns)
    to = tl.load(begins + tile, mask=inside, other=0)
    while at < end:
        mark, bits = _bits(marked, at + tl.arange(0, CHUNK), end)
        place = to[None, :] + tl.cumsum(bits, axis=0) - bits
        index = tl.broadcast_to((mark & _INDEX)[:, None], bits.shape)
        tl.store(gaussians + place, index, mask=bits == 1)
        to += tl.sum(bits, axis=0)
        at += CHUNK
