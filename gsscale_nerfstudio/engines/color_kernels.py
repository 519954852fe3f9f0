"""Spherical harmonics inside of Triton kernels: what colours rows have, and what moves them.

A kernel has a tile of rows by columns; the columns of SH coefficients are, one after another, the
three channels of each basis Y_lm. As a function of a unit vector (x, y, z) such a basis is

    Y_lm = Re (x + iy)^m P_lm(z),  m >= 0,    Im (x + iy)^|m| P_lm(z),  m < 0,

P_lm being a polynomial of degree l - |m|: the same few operations for every column, with constants
from a table.
"""

# Triton wants its block sizes and column numbers in capitals, as constants of the compilation.

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.polynomial import Legendre, Polynomial
from torch import Tensor

from gsscale_nerfstudio.store import RowLayout

_ENTRIES = tl.constexpr(8)
"""Of the table, per column: channel, m, and P_lm's coefficients, lowest power first."""


@functools.lru_cache(maxsize=8)
def color_table(layout: RowLayout, device: torch.device) -> Tensor:
    """The constants of each column: [columns, 8] float32, columns being a power of two.

    The bases are those of :func:`.sh_bases`. At SH degree 0 the one basis is 1: splatfacto's
    coefficients are the logits of colours then.
    """
    table = np.zeros((triton.next_power_of_2(layout.width), _ENTRIES.value))
    first = layout.columns["features_dc"].start
    for degree in range(layout.sh_degree + 1):
        for m in range(-degree, degree + 1):
            band = degree * degree + degree + m
            for channel in range(3):
                row = table[first + 3 * band + channel]
                row[:2] = channel, m
                row[2 : 3 + degree - abs(m)] = _polynomial(degree, m)
    if layout.sh_degree == 0:
        table[first : first + 3, 2] = 1
    return torch.from_numpy(table).float().to(device)


def _polynomial(degree: int, m: int) -> np.ndarray:
    """Coefficients of P_lm, with the Condon-Shortley sign."""
    order = abs(m)
    scale = (2 * degree + 1) / (4 * math.pi)
    scale *= math.factorial(degree - order) / math.factorial(degree + order)
    scale = (-1) ** order * math.sqrt(scale * (2 if order else 1))
    return scale * Legendre.basis(degree).deriv(order).convert(kind=Polynomial).coef


@triton.jit
def direction_of(means, position, i, live):
    """Unit vectors from the camera's position to the rows' means [n, 3], and 1 / distance."""
    at = 3 * i.to(tl.int64)
    x = tl.load(means + at, mask=live, other=0.0) - tl.load(position)
    y = tl.load(means + at + 1, mask=live, other=0.0) - tl.load(position + 1)
    z = tl.load(means + at + 2, mask=live, other=0.0) - tl.load(position + 2)
    return unit(x, y, z)


@triton.jit
def unit(x, y, z):
    """A vector's direction, and the inverse of its length; 0 for a vector of zeros."""
    square = x * x + y * y + z * z
    inverse = tl.where(square > 0.0, tl.div_rn(1.0, tl.sqrt_rn(square)), 0.0)
    return x * inverse, y * inverse, z * inverse, inverse


@triton.jit
def bases(table, column, x, y, z, DEGREE: tl.constexpr, SLOPES: tl.constexpr):
    """Each column's basis at unit vectors, 0 for other columns, and its derivatives, if asked for.

    ``column`` is [1, COLUMNS]; ``x``, ``y``, ``z`` are [ROWS]; [ROWS, COLUMNS] come back. Of the
    derivatives only what is tangential to the sphere means something.
    """
    x = x[:, None]
    y = y[:, None]
    z = z[:, None]
    m = tl.load(table + _ENTRIES * column + 1)
    p = tl.load(table + _ENTRIES * column + 2 + DEGREE)
    p_z = tl.zeros_like(p) + 0.0 * z
    p += 0.0 * z
    for power in tl.static_range(DEGREE):
        p_z = p_z * z + p
        p = p * z + tl.load(table + _ENTRIES * column + (1 + DEGREE - power))
    # (x + iy)^k, and of it the part that a column wants.
    re = tl.full(x.shape, 1.0, tl.float32)
    im = tl.full(x.shape, 0.0, tl.float32)
    part = tl.zeros_like(p) + 1.0
    part_x = tl.zeros_like(p)
    part_y = tl.zeros_like(p)
    for k in tl.static_range(1, DEGREE + 1):
        if SLOPES:
            part_x = tl.where(m == k, k * re, tl.where(m == -k, k * im, part_x))
            part_y = tl.where(m == k, -k * im, tl.where(m == -k, k * re, part_y))
        re, im = re * x - im * y, re * y + im * x
        part = tl.where(m == k, re, tl.where(m == -k, im, part))
    return part * p, part_x * p, part_y * p, part * p_z


@triton.jit
def store_colors(
    w,
    column,
    out,
    live,
    n,
    table,
    position,
    bands_end,
    colors,
    slopes,
    SLOPES: tl.constexpr,
    DEGREE: tl.constexpr,
    SH: tl.constexpr,
):
    """Write the colours that settled rows ``w`` [ROWS, COLUMNS] have from a position.

    To places ``out`` of ``colors`` [n, 3], not clamped, and, if SLOPES, of ``slopes`` [3, n, 3]:
    the derivative of each channel with respect to the mean. Means are a row's first columns.
    """
    x = tl.sum(tl.where(column == 0, w, 0.0), 1) - tl.load(position)
    y = tl.sum(tl.where(column == 1, w, 0.0), 1) - tl.load(position + 1)
    z = tl.sum(tl.where(column == 2, w, 0.0), 1) - tl.load(position + 2)
    x, y, z, inverse = unit(x, y, z)
    basis, basis_x, basis_y, basis_z = bases(table, column, x, y, z, DEGREE, SLOPES)
    channel_of = tl.load(table + _ENTRIES * column)
    w = tl.where((column >= SH) & (column < bands_end), w, 0.0)
    out = out.to(tl.int64)
    for channel in tl.static_range(3):
        c = tl.where(channel_of == channel, w, 0.0)
        color = tl.sum(c * basis, 1)
        if DEGREE > 0:
            color += 0.5
        tl.store(colors + 3 * out + channel, color, mask=live)
        if SLOPES:
            t_x = tl.sum(c * basis_x, 1)
            t_y = tl.sum(c * basis_y, 1)
            t_z = tl.sum(c * basis_z, 1)
            radial = t_x * x + t_y * y + t_z * z
            at = slopes + 3 * (channel * n.to(tl.int64) + out)
            tl.store(at, (t_x - radial * x) * inverse, mask=live)
            tl.store(at + 1, (t_y - radial * y) * inverse, mask=live)
            tl.store(at + 2, (t_z - radial * z) * inverse, mask=live)


@triton.jit
def coefficient_gradients(
    column,
    i,
    live,
    means,
    position,
    table,
    bands_end,
    color_gradients,
    DEGREE: tl.constexpr,
    SH: tl.constexpr,
):
    """Gradients of the SH coefficients of rows [ROWS, COLUMNS], 0 in other columns.

    From those of their colours before clamping, [n, 3].
    """
    x, y, z, _ = direction_of(means, position, i, live)
    basis, _, _, _ = bases(table, column, x, y, z, DEGREE, False)
    channel = tl.load(table + _ENTRIES * column).to(tl.int32)
    inside = live[:, None] & (column >= SH) & (column < bands_end)
    at = 3 * i[:, None].to(tl.int64) + channel
    return basis * tl.load(color_gradients + at, mask=inside, other=0.0)
