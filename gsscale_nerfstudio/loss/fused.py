"""The photometric loss as two Triton kernels, forward and backward.

Both walk down a strip of the image, a thread per column. At each row a thread sums the window's 11
columns and hands the sum to 11 running sums, one for each window that the row is part of. So a
pixel costs 22 taps instead of 121, nothing is shared between threads, and no blurred image is
written to memory.

An image [H, W, 3] is addressed as [H, 3 W] "values", whose neighbours of the same channel are 3
values apart. Reading along a row is then coalesced, and channels need no loop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import K1, K2, WINDOW_SIGMA, WINDOW_SIZE


def _gaussian_window() -> tuple[float, ...]:
    """Weights of the window along one axis, which sum to 1. [WINDOW_SIZE]"""
    offsets = range(-(WINDOW_SIZE // 2), WINDOW_SIZE // 2 + 1)
    weights = [math.exp(-(offset**2) / (2 * WINDOW_SIGMA**2)) for offset in offsets]
    return tuple(weight / sum(weights) for weight in weights)


_WINDOW = tl.constexpr(_gaussian_window())
_TAPS = tl.constexpr(WINDOW_SIZE)
_MARGIN = tl.constexpr(WINDOW_SIZE - 1)  # rows, and columns, that have no window of their own
_CHANNELS = tl.constexpr(3)
_C1 = tl.constexpr(K1**2)
_C2 = tl.constexpr(K2**2)

TILE = (64, 128)
"""Rows and columns (values) of a program. More rows repeat less work above each strip, fewer give
small images enough programs; 128 columns are four warps of a thread per column."""


def fused_photometric_loss(
    render: Tensor, truth: Tensor, ssim_lambda: float, tile: tuple[int, int] = TILE
) -> Tensor:
    """The loss of :func:`.api.photometric_loss`, for images that hold at least one window.

    For the backward pass it keeps the images and three maps of [H - 10, W - 10, 3] float32.

    Args:
        render: Differentiable once. [H, W, 3] float32
        truth: [H, W, 3] float32
        ssim_lambda: Weight of the SSIM term, in [0, 1].
        tile: Rows and columns per program; columns are a power of two, at most 1024.

    Raises:
        ValueError: images that the kernels cannot read.
    """
    height, width, channels = render.shape
    if truth.shape != render.shape or channels != 3 or min(height, width) < WINDOW_SIZE:
        raise ValueError(f"cannot compare images of {[*render.shape]} and {[*truth.shape]}")
    if render.dtype != torch.float32 or truth.dtype != torch.float32:
        raise ValueError(f"images must be float32, not {render.dtype} and {truth.dtype}")
    if render.numel() >= 2**31:
        raise ValueError(f"{[*render.shape]} has more values than 32-bit offsets reach")
    # Asked here, because within a Function gradients are always off.
    differentiate = torch.is_grad_enabled() and render.requires_grad
    return _PhotometricLoss.apply(
        render.contiguous(), truth.contiguous(), ssim_lambda, differentiate, tile
    )


class _PhotometricLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        render: Tensor,
        truth: Tensor,
        ssim_lambda: float,
        differentiate: bool,
        tile: tuple[int, int],
    ) -> Tensor:
        height, width, _ = render.shape
        windows = (height - WINDOW_SIZE + 1, width - WINDOW_SIZE + 1, 3)
        maps = render.new_empty(3, *windows) if differentiate else None
        ctx.l1_weight = (1 - ssim_lambda) / render.numel()
        ctx.ssim_weight = ssim_lambda / math.prod(windows)
        ctx.tile = tile
        grid = _grid(render, tile)
        # Added up by torch, because atomics would round differently in every run.
        partials = render.new_empty(math.prod(grid))
        with torch.cuda.device_of(render):
            _forward_kernel[grid](
                render,
                truth,
                partials,
                maps,
                height,
                width * 3,
                ctx.l1_weight,
                ctx.ssim_weight,
                ROWS=tile[0],
                COLUMNS=tile[1],
                STORE_MAPS=differentiate,
                num_warps=_num_warps(tile),
            )
        if maps is not None:
            ctx.save_for_backward(render, truth, maps)
        return partials.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        render, truth, maps = ctx.saved_tensors
        height, width, _ = render.shape
        grad_render = torch.empty_like(render)
        with torch.cuda.device_of(render):
            _backward_kernel[_grid(render, ctx.tile)](
                render,
                truth,
                maps,
                grad_loss,
                grad_render,
                height,
                width * 3,
                ctx.l1_weight,
                ctx.ssim_weight,
                ROWS=ctx.tile[0],
                COLUMNS=ctx.tile[1],
                num_warps=_num_warps(ctx.tile),
            )
        return grad_render, None, None, None, None


def _grid(image: Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    """Programs across and down; neighbours across share what they read."""
    height, width, _ = image.shape
    rows, columns = tile
    return triton.cdiv(width * 3, columns), triton.cdiv(height, rows)


def _num_warps(tile: tuple[int, int]) -> int:
    return max(1, tile[1] // 32)


@triton.jit
def _no_rows(zero):
    """The running sums of a column before its first row: tuple of 11."""
    sums = (zero,)
    for _ in tl.static_range(_TAPS - 1):
        # Triton knows no star.
        sums = sums + (zero,)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def _next_row(sums, row):
    """Move the windows of a column down by a row.

    Args:
        sums: tuple of 11; ``sums[k]`` is that of the window which ``k`` more rows will complete.
        row: the next row's sum over the window's columns.
    """
    moved = sums[:0]
    for k in tl.static_range(_TAPS - 1):
        moved = moved + (sums[k + 1] + _WINDOW[k] * row,)  # noqa: RUF005
    return moved + (_WINDOW[_TAPS - 1] * row,)  # noqa: RUF005


@triton.jit(do_not_specialize=["height", "width"])
def _forward_kernel(
    render,
    truth,
    partials,  # [programs]
    maps,  # [3, windows] derivatives of SSIM by E[x], E[x x], E[x y] if STORE_MAPS, x being render
    height,
    width,  # in values, three per pixel
    l1_weight,
    ssim_weight,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STORE_MAPS: tl.constexpr,
):
    """This tile's part of the loss: its pixels, and the windows that begin (top left) in it."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.program_id(1) * ROWS
    bottom = tl.minimum(top + ROWS, height)
    window_columns = width - _MARGIN * _CHANNELS
    window_rows = height - _MARGIN
    # Beyond the image its last row and the last window are read again: so no tap needs a mask.
    first_tap = tl.minimum(columns, window_columns - 1)

    zero = tl.zeros([COLUMNS], tl.float32)
    l1 = zero
    dissimilarity = zero
    sums_x = _no_rows(zero)
    sums_y = _no_rows(zero)
    sums_squares = _no_rows(zero)  # of both images, as SSIM has no use for either alone
    sums_xy = _no_rows(zero)
    for step in range(ROWS + _MARGIN):
        row = top + step
        own = row * width + columns
        mine = (columns < width) & (row < bottom)
        x = tl.load(render + own, mask=mine, other=0.0)
        y = tl.load(truth + own, mask=mine, other=0.0)
        l1 += tl.abs(x - y)

        tap_row = tl.minimum(row, height - 1) * width
        row_x = zero
        row_y = zero
        row_squares = zero
        row_xy = zero
        for k in tl.static_range(_TAPS):
            tap = tap_row + first_tap + k * _CHANNELS
            x = tl.load(render + tap)
            y = tl.load(truth + tap)
            weighted_x = _WINDOW[k] * x
            weighted_y = _WINDOW[k] * y
            row_x += weighted_x
            row_y += weighted_y
            row_squares += weighted_x * x + weighted_y * y
            row_xy += weighted_x * y
        sums_x = _next_row(sums_x, row_x)
        sums_y = _next_row(sums_y, row_y)
        sums_squares = _next_row(sums_squares, row_squares)
        sums_xy = _next_row(sums_xy, row_xy)

        mean_x = sums_x[0]
        mean_y = sums_y[0]
        means_xy = mean_x * mean_y
        means_squares = mean_x * mean_x + mean_y * mean_y
        luminance = 2 * means_xy + _C1
        structure = 2 * (sums_xy[0] - means_xy) + _C2
        over_means = 1 / (means_squares + _C1)
        over_variances = 1 / (sums_squares[0] - means_squares + _C2)
        ssim = luminance * structure * over_means * over_variances
        window_row = row - _MARGIN
        complete = (columns < window_columns) & (window_row >= top) & (row < height)
        dissimilarity += tl.where(complete, 1 - ssim, 0.0)
        if STORE_MAPS:
            by_xy = 2 * luminance * over_means * over_variances
            by_xx = -ssim * over_variances
            by_x = 2 * mean_y * (structure - luminance) * over_means * over_variances
            by_x += 2 * mean_x * ssim * (over_variances - over_means)
            at = maps + window_row * window_columns + columns
            plane = window_rows * window_columns
            # Added one at a time: 2 * plane may be beyond 32 bits.
            tl.store(at, by_x, mask=complete)
            tl.store(at + plane, by_xx, mask=complete)
            tl.store(at + plane + plane, by_xy, mask=complete)

    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    part = tl.sum(l1_weight * l1 + ssim_weight * dissimilarity)
    tl.store(partials + program, part)


@triton.jit(do_not_specialize=["height", "width"])
def _backward_kernel(
    render,
    truth,
    maps,  # [3, windows], see _forward_kernel
    grad_loss,  # []
    grad_render,
    height,
    width,  # in values, three per pixel
    l1_weight,
    ssim_weight,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of this tile's pixels x, each summed over the windows that it is part of.

    d loss / d x = l1_weight sign(x - y) - ssim_weight sum_w g_w (S_w,x + 2 x S_w,xx + y S_w,xy)
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.program_id(1) * ROWS
    window_columns = width - _MARGIN * _CHANNELS
    window_rows = height - _MARGIN
    plane = window_rows * window_columns
    scale = tl.load(grad_loss)

    zero = tl.zeros([COLUMNS], tl.float32)
    sums_x = _no_rows(zero)
    sums_xx = _no_rows(zero)
    sums_xy = _no_rows(zero)
    for step in range(ROWS + _MARGIN):
        row = top - _MARGIN + step
        row_exists = (row >= 0) & (row < window_rows)
        row_x = zero
        row_xx = zero
        row_xy = zero
        for k in tl.static_range(_TAPS):
            window = columns - k * _CHANNELS
            exists = (window >= 0) & (window < window_columns) & row_exists
            at = maps + row * window_columns + window
            row_x += _WINDOW[k] * tl.load(at, mask=exists, other=0.0)
            row_xx += _WINDOW[k] * tl.load(at + plane, mask=exists, other=0.0)
            row_xy += _WINDOW[k] * tl.load(at + plane + plane, mask=exists, other=0.0)
        sums_x = _next_row(sums_x, row_x)
        sums_xx = _next_row(sums_xx, row_xx)
        sums_xy = _next_row(sums_xy, row_xy)

        own = row * width + columns
        mine = (columns < width) & (row >= top) & (row < height)
        x = tl.load(render + own, mask=mine, other=0.0)
        y = tl.load(truth + own, mask=mine, other=0.0)
        sign = tl.where(x > y, 1.0, 0.0) - tl.where(x < y, 1.0, 0.0)  # 0 at 0, as torch's
        by_ssim = sums_x[0] + 2 * x * sums_xx[0] + y * sums_xy[0]
        gradient = scale * (l1_weight * sign - ssim_weight * by_ssim)
        tl.store(grad_render + own, gradient, mask=mine)
