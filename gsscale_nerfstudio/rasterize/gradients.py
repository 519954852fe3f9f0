"""The backward pass of gsplat's rasterizer, by tiles instead of by pixels.

gsplat gives a pixel to each thread, walks through a tile's list, and at each Gaussian adds up nine
numbers over the threads of a warp: most of its time goes into these sums, of which a small Gaussian
leaves most terms zero. Here one program does half a tile, some Gaussians with all of its pixels at
a time, as a matrix: products and sums along the list are scans, and each Gaussian's gradients are
added up once for each half.

With alpha_i, the transmittance T_i before Gaussian i, its colour c_i, and a loss whose derivatives
by a pixel's colour and opacity are v and u:

    d loss / d alpha_i = T_i (c_i v) - (sum_{j > i} alpha_j T_j (c_j v) - T_end u) / (1 - alpha_i)

The list is read front to back, as when the image was drawn: what is behind a Gaussian is what the
image has, less what is in front of it. Of the image's drawing nothing else needs to be kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tile_lists import TILE, TileLists

CHUNK = 32
"""Gaussians at a time, one for each thread of a warp."""

WIDE, PIXELS = 8, 32
"""Of the part of a tile that a program does: pixels across, and all of them."""

_FAINTEST = tl.constexpr(1 / 255)
_MOST = tl.constexpr(0.999)  # alpha of a Gaussian, whatever its opacity
_OPAQUE = tl.constexpr(1e-4)  # a pixel is done before what would leave less than that


def rasterize_pixels(
    means2d: Tensor,
    conics: Tensor,
    channels: Tensor,
    opacities: Tensor,
    lists: TileLists,
    width: int,
    height: int,
    *,
    absgrad: bool,
) -> tuple[Tensor, Tensor]:
    """gsplat's ``rasterize_to_pixels`` of one view, with the backward pass of this file.

    Args:
        means2d: Centres in pixels. After backward, ``means2d.absgrad`` has the sums of absolute
            values, if wanted. [1, n, 2]
        conics: Inverse covariances xx, xy, yy. [1, n, 3]
        channels: Colours, and what else is to be drawn. [1, n, C]
        opacities: [1, n]
        lists: Gaussians by tile.
        width: Image width in pixels.
        height: Image height in pixels.
        absgrad: Whether sums of absolute values are wanted.

    Returns:
        The channels [1, height, width, C] and the opacity [1, height, width, 1] of each pixel.

    Raises:
        ValueError: more than four channels.
    """
    if channels.shape[-1] > 4:
        raise ValueError(f"at most 4 channels can be drawn, not {channels.shape[-1]}")
    image, alpha = _Rasterized.apply(
        means2d, conics, channels, opacities, *lists, width, height, absgrad
    )
    return image, alpha


class _Rasterized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        conics: Tensor,
        channels: Tensor,
        opacities: Tensor,
        offsets: Tensor,
        gaussians: Tensor,
        width: int,
        height: int,
        absgrad: bool,
    ) -> tuple[Tensor, Tensor]:
        from gsplat.cuda._wrapper import rasterize_to_pixels

        image, alpha = rasterize_to_pixels(
            means2d, conics, channels, opacities, width, height, TILE, offsets, gaussians
        )
        ctx.save_for_backward(
            means2d, conics, channels, opacities, offsets, gaussians, image, alpha
        )
        ctx.absgrad = absgrad
        return image, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *derivatives: Tensor) -> tuple[Tensor | None, ...]:
        drawn: Any = ctx.saved_tensors
        *grads, absolute = pixel_gradients(*drawn, *derivatives, absgrad=ctx.absgrad)
        if ctx.absgrad:
            drawn[0].absgrad = absolute.contiguous()  # where gsplat has it, and nothing more
        return (*grads, *[None] * 5)


def pixel_gradients(
    means2d: Tensor,
    conics: Tensor,
    channels: Tensor,
    opacities: Tensor,
    offsets: Tensor,
    gaussians: Tensor,
    image: Tensor,
    alpha: Tensor,
    v_image: Tensor,
    v_alpha: Tensor,
    *,
    absgrad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of a loss by what an image was drawn from.

    Args:
        means2d, conics, channels, opacities, offsets, gaussians: see :func:`rasterize_pixels`, and
            :class:`.TileLists` for the last two.
        image: What was drawn from them. [1, height, width, C]
        alpha: Likewise. [1, height, width, 1]
        v_image: The loss's derivatives by these. [1, height, width, C]
        v_alpha: Likewise. [1, height, width, 1]
        absgrad: Whether the last of the results is wanted; it is empty else.

    Returns:
        Derivatives by ``means2d``, ``conics``, ``channels`` and ``opacities``, in their shapes, and
        of those by ``means2d`` the sum over pixels of absolute values.
    """
    _, height, width, n_channels = image.shape
    _, rows, columns = offsets.shape
    # Side by side, so that what a program needs of a Gaussian comes and goes in three pieces.
    zeros = opacities.new_zeros(1)
    unused = zeros.expand(*opacities.shape, 2), zeros.expand(*opacities.shape, 4 - n_channels)
    parts = (means2d, conics, opacities[..., None], unused[0], channels, unused[1])
    splats = torch.cat(parts, dim=-1)
    v_splats = torch.zeros_like(splats)
    inputs = (splats, offsets, gaussians, image, alpha, v_image, v_alpha)
    with torch.cuda.device_of(splats):
        _gradients[(rows * columns * (TILE * TILE // PIXELS),)](
            *(tensor.contiguous() for tensor in inputs),
            v_splats,
            len(gaussians),
            width,
            height,
            columns,
            rows * columns,
            TILE=TILE,
            WIDE=WIDE,
            PIXELS=PIXELS,
            CHUNK=CHUNK,
            CHANNELS=n_channels,
            ABSOLUTE=absgrad,
            num_warps=1,
        )
    v_means2d, v_conics, v_opacities, absolute, v_channels, _ = v_splats.split(
        [part.shape[-1] for part in parts], dim=-1
    )
    if not absgrad:
        absolute = absolute[:, :0]
    return v_means2d, v_conics, v_channels, v_opacities[..., 0], absolute


@triton.jit
def _load_quad(pointers, live):
    """Four neighbouring numbers each, in one instruction."""
    four = pointers[:, None] + tl.arange(0, 4)[None, :]
    four = tl.load(four, mask=live[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(four, [pointers.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _add_quad(pointers, first, second, third, fourth, live):
    """Add to four neighbouring numbers each: one instruction from compute capability 9.0 on."""
    four = tl.join(tl.join(first, third), tl.join(second, fourth))
    four = tl.reshape(four, [pointers.shape[0], 4])
    pointers = pointers[:, None] + tl.arange(0, 4)[None, :]
    tl.atomic_add(pointers, four, mask=tl.broadcast_to(live[:, None], four.shape), sem="relaxed")


@triton.jit
def _finite(x):
    """``x``, or 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _last_by_sum(x):
    """The last column of a matrix."""
    column = tl.arange(0, x.shape[1])[None, :]
    return tl.sum(tl.where(column == x.shape[1] - 1, x, 0.0), axis=1)


if hasattr(tl, "gather"):  # since Triton 3.3 (PyTorch 2.7): one shuffle instead of five

    @triton.jit
    def _last(x):
        """The last column of a matrix."""
        column = tl.full([x.shape[0], 1], x.shape[1] - 1, tl.int32)
        return tl.reshape(tl.gather(x, column, axis=1), [x.shape[0]])

else:
    _last = _last_by_sum


@triton.jit(do_not_specialize=["n_pairs", "width", "height", "columns", "n_tiles"])
def _gradients(
    splats,
    offsets,
    gaussians,
    image,
    alphas,
    v_image,
    v_alphas,
    v_splats,
    n_pairs,
    width,
    height,
    columns,
    n_tiles,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """Add the derivatives that come from a part of a tile, WIDE pixels wide.

    Matrices are [PIXELS, CHUNK], front to back: a Gaussian to each thread, so that what is added up
    over pixels stays with its thread, and only the two scans go from thread to thread.
    """
    across: tl.constexpr = TILE // WIDE
    parts: tl.constexpr = TILE * TILE // PIXELS
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    at = tl.load(offsets + tile)
    end = tl.load(offsets + tile + 1, mask=tile + 1 < n_tiles, other=n_pairs)

    pixel = tl.arange(0, PIXELS)
    column = (tile % columns) * TILE + (part % across) * WIDE + pixel % WIDE
    row = (tile // columns) * TILE + (part // across) * (PIXELS // WIDE) + pixel // WIDE
    inside = (column < width) & (row < height)
    # Where nothing is drawn, another one of the tile.
    pixel = tl.minimum(row, height - 1) * width + tl.minimum(column, width - 1)
    px = (column.to(tl.float32) + 0.5)[:, None]
    py = (row.to(tl.float32) + 0.5)[:, None]

    # Of all that is drawn in each pixel; what is in front is taken off on the way.
    v_alpha = tl.load(v_alphas + pixel)
    behind = (tl.load(alphas + pixel) - 1.0) * v_alpha
    for k in tl.static_range(CHANNELS):
        v = tl.load(v_image + pixel * CHANNELS + k)
        behind += v * tl.load(image + pixel * CHANNELS + k)
    light = tl.where(inside, 1.0, 0.0)  # transmittance; nothing is drawn outside

    while (at < end) & (tl.max(light) > _OPAQUE):
        place = at + tl.arange(0, CHUNK)
        live = place < end
        i = tl.load(gaussians + place, mask=live, other=0).to(tl.int64)
        x, y, a, b = _load_quad(splats + 12 * i, live)
        c, opacity, _unused, _unused_either = _load_quad(splats + 12 * i + 4, live)
        channel_0, channel_1, channel_2, channel_3 = _load_quad(splats + 12 * i + 8, live)
        # One that is not finite is no one else's concern where it is not drawn; where it is, the
        # image has it.
        channel_0 = _finite(channel_0)
        channel_1 = _finite(channel_1)
        channel_2 = _finite(channel_2)
        channel_3 = _finite(channel_3)
        dx = x[None, :] - px
        dy = y[None, :] - py

        sigma = 0.5 * (a[None, :] * dx * dx + c[None, :] * dy * dy) + b[None, :] * dx * dy
        alpha = opacity[None, :] * tl.exp(-sigma)
        # As gsplat has it for what is not a number.
        alpha = tl.where(alpha < _MOST, alpha, _MOST)
        alpha = tl.where((sigma < 0.0) | (alpha < _FAINTEST), 0.0, alpha)
        passed = 1.0 - alpha
        after = light[:, None] * tl.cumprod(passed, axis=1)
        over = 1.0 / passed
        before = after * over
        # What is behind a Gaussian that is not drawn any more is not drawn either: light fades.
        alpha = tl.where(after > _OPAQUE, alpha, 0.0)
        weight = alpha * before
        drawn = live & (tl.max(weight, axis=0) > 0.0)

        v = tl.load(v_image + pixel * CHANNELS)
        value = channel_0[None, :] * v[:, None]  # of its channels, to the loss
        by_0 = tl.sum(weight * v[:, None], axis=0)
        by_1 = tl.zeros_like(by_0)
        by_2 = tl.zeros_like(by_0)
        by_3 = tl.zeros_like(by_0)
        if CHANNELS > 1:
            v = tl.load(v_image + pixel * CHANNELS + 1)
            value += channel_1[None, :] * v[:, None]
            by_1 = tl.sum(weight * v[:, None], axis=0)
        if CHANNELS > 2:
            v = tl.load(v_image + pixel * CHANNELS + 2)
            value += channel_2[None, :] * v[:, None]
            by_2 = tl.sum(weight * v[:, None], axis=0)
        if CHANNELS > 3:
            v = tl.load(v_image + pixel * CHANNELS + 3)
            value += channel_3[None, :] * v[:, None]
            by_3 = tl.sum(weight * v[:, None], axis=0)
        _add_quad(v_splats + 12 * i + 8, by_0, by_1, by_2, by_3, drawn)

        rest = behind[:, None] - tl.cumsum(weight * value, axis=1)
        slope = before * value - rest * over  # by alpha
        # sigma enters through exp(-sigma), where alpha is not cut off.
        slope = tl.where(alpha < _MOST, -alpha * slope, 0.0)
        by_dx = tl.sum(slope * dx, axis=0)
        by_dy = tl.sum(slope * dy, axis=0)
        by_xx = 0.5 * tl.sum(slope * dx * dx, axis=0)
        by_xy = tl.sum(slope * dx * dy, axis=0)
        by_yy = 0.5 * tl.sum(slope * dy * dy, axis=0)
        by_opacity = -tl.sum(slope, axis=0) / tl.where(drawn, opacity, 1.0)
        by_x = a * by_dx + b * by_dy
        by_y = b * by_dx + c * by_dy
        _add_quad(v_splats + 12 * i, by_x, by_y, by_xx, by_xy, drawn)
        absolute_x = tl.zeros_like(by_x)
        absolute_y = tl.zeros_like(by_x)
        if ABSOLUTE:
            absolute_x = tl.sum(tl.abs(slope * (a[None, :] * dx + b[None, :] * dy)), axis=0)
            absolute_y = tl.sum(tl.abs(slope * (b[None, :] * dx + c[None, :] * dy)), axis=0)
        _add_quad(v_splats + 12 * i + 4, by_yy, by_opacity, absolute_x, absolute_y, drawn)

        light = _last(after)
        behind = _last(rest)
        at += CHUNK
