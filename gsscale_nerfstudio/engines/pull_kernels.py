"""What Triton kernels need to pull at rows by penalties; ``csrc/kernels/pull.h`` says what and why.

The table of sums is that of :meth:`.AdamHistory.sums`, one row for each step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gsscale_nerfstudio.optim.history import SUMS

_SUMS = tl.constexpr(SUMS)
VARIANCE_SUM = tl.constexpr(0)
SCALE_SUM = tl.constexpr(1)
OPACITY_SUM = tl.constexpr(2)


@triton.jit
def sum_since(sums, since, step, WHICH: tl.constexpr):
    """Over the steps after ``since`` [ROWS], up to ``step``."""
    now = tl.load(sums + _SUMS * step + WHICH)
    return (now - tl.load(sums + _SUMS * since + WHICH)).to(tl.float32)


@triton.jit
def pull_length(sum, s, one_minus_beta1):
    """A, given the sum of a_i and S."""
    return tl.maximum(sum - s, sum * one_minus_beta1)


@triton.jit
def _gradient(w, is_scale, weight):
    """Of the penalty, and by which rate it falls as an element does."""
    e = tl.exp(tl.minimum(tl.where(is_scale, w, -w), 80.0))  # bookkeeping could be anything
    o = 1.0 / (1.0 + e)
    gradient = weight * e * tl.where(is_scale, 1.0, o * o)
    return gradient, tl.where(is_scale, 1.0, tl.maximum(1.0 - 2.0 * o, 1e-3))


@triton.jit
def pulled(w, v, length, is_scale, weight, eps_f, d1, d2, v_decay):
    """Settled elements, pulled at, and what has to be added to their settled moments.

    ``v`` is as it was before the gap. Where ``weight`` or ``length`` is 0 nothing changes.
    """
    g, slope = _gradient(w, is_scale, weight)
    q = tl.sqrt(d2 * v_decay)
    y = tl.where(g > 0, length * g / (tl.sqrt(q * v + (1.0 - q) * g * g) + eps_f), 0.0)
    z = slope * y
    w -= tl.where(z < 0.01, y * (1.0 - 0.5 * z), tl.log(1.0 + z) / slope)
    last, _ = _gradient(w, is_scale, weight)
    return w, (1.0 - d1) * last, (1.0 - d2) * last * tl.maximum(g, last)
