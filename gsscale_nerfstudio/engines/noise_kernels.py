"""Noise on means inside of Triton kernels: what ``csrc/kernels/noise.h`` does on the host.

Random numbers are the same ones, Philox of the row as it is stored; what makes normal ones of them
rounds differently here and there.
"""

# Triton wants its block sizes and column numbers in capitals, as constants of the compilation.

from __future__ import annotations

import triton
import triton.language as tl

SKIPPED = tl.constexpr(0)
OWN = tl.constexpr(1)
"""Two independent draws of a stored row: for steps that it skips, and for its own next step."""


@triton.jit
def column_of(w, column, WHICH: tl.constexpr):
    """One column [rows] of a tile."""
    return tl.sum(tl.where(column == WHICH, w, 0.0), 1)


@triton.jit
def _uniform(x):
    """In (0, 1), never an end of it."""
    return ((x >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def normals(x, y, z, stamp, key, WHICH: tl.constexpr):
    """Three standard normal numbers of each row, given its mean, stamp and key as stored."""
    seed = key.to(tl.uint32, bitcast=True).to(tl.uint64) + (tl.full([], WHICH, tl.uint64) << 32)
    a, b, c, d = tl.philox(
        seed,
        x.to(tl.uint32, bitcast=True),
        y.to(tl.uint32, bitcast=True),
        z.to(tl.uint32, bitcast=True),
        stamp.to(tl.uint32, bitcast=True),
    )
    far, turn = tl.sqrt(-2.0 * tl.log(_uniform(a))), 6.28318531 * _uniform(b)
    third = tl.sqrt(-2.0 * tl.log(_uniform(c))) * tl.cos(6.28318531 * _uniform(d))
    return far * tl.cos(turn), far * tl.sin(turn), third


@triton.jit
def faintness(logit):
    """gsplat's share of the noise by opacity; none from 0.3 on, where it would be below 2e-13."""
    opacity = 1.0 / (1.0 + tl.exp(-logit))
    share = 1.0 / (1.0 + tl.exp(tl.minimum(100.0 * (opacity - 0.005), 80.0)))
    return tl.where(logit > -0.85, 0.0, share)


@triton.jit
def deviation_since(noise, stamp, step):
    """Standard deviation of what steps stamp + 1 .. step have added up to."""
    return tl.sqrt((tl.load(noise + step) - tl.load(noise + stamp)).to(tl.float32))


@triton.jit
def disturbed(w, column, live, z0, z1, z2, deviation):
    """The tile ``w`` with each row's mean moved by R S S z g, times its deviation."""
    amount = deviation * faintness(column_of(w, column, 10))
    a = z0 * amount * tl.exp(2.0 * column_of(w, column, 3))
    b = z1 * amount * tl.exp(2.0 * column_of(w, column, 4))
    c = z2 * amount * tl.exp(2.0 * column_of(w, column, 5))
    quat = (column >= 6) & (column < 10)
    square = tl.sum(tl.where(quat, w * w, 0.0), 1)
    unit = 1.0 / tl.sqrt(tl.where(live, square, 1.0))
    r, x = column_of(w, column, 6) * unit, column_of(w, column, 7) * unit
    y, t = column_of(w, column, 8) * unit, column_of(w, column, 9) * unit
    d0 = (1 - 2 * (y * y + t * t)) * a + 2 * (x * y - r * t) * b + 2 * (x * t + r * y) * c
    d1 = 2 * (x * y + r * t) * a + (1 - 2 * (x * x + t * t)) * b + 2 * (y * t - r * x) * c
    d2 = 2 * (x * t - r * y) * a + 2 * (y * t + r * x) * b + (1 - 2 * (x * x + y * y)) * c
    w += tl.where(column == 0, d0[:, None], 0.0)
    w += tl.where(column == 1, d1[:, None], 0.0)
    return w + tl.where(column == 2, d2[:, None], 0.0)


@triton.jit
def distance_to_come(w, column, stamp, largest, lowest, room, KEY: tl.constexpr):
    """How far skipped steps may take the means of stored rows ``w``.

    ``largest`` log-scale and ``lowest`` opacity logit are those that the rows will have, at most.
    """
    x, y, z = column_of(w, column, 0), column_of(w, column, 1), column_of(w, column, 2)
    z0, z1, z2 = normals(x, y, z, stamp, column_of(w, column, KEY), SKIPPED)
    length = tl.sqrt(z0 * z0 + z1 * z1 + z2 * z2)
    return room * faintness(lowest) * tl.exp(2.0 * largest) * length
