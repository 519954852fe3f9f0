"""Adam's moments in Triton kernels: float32, or bfloat16 with stochastic rounding.

What ``csrc/kernels/moments.h`` does, which says why. A pointer to int16 is one to bfloat16; see
:func:`.store.memory.bits_of`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_moment(pointers, mask):
    """Elements as float32, 0 where masked."""
    x = tl.load(pointers, mask=mask, other=0)
    if pointers.dtype.element_ty == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _rounded(x, random):
    """The bfloat16 below or above in size, by ``random`` < 2^16."""
    upper = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    # What is not a number could become one by a carry.
    return tl.where(x == x, upper.to(tl.float32, bitcast=True), x)


@triton.jit
def round_moments(array, m, v, keys, live, column, step):
    """Both moments as ``array`` can hold them after ``step``.

    ``keys`` [ROWS] points to the rows' keys, which decide how: it does not matter where rows are.
    """
    if array.dtype.element_ty == tl.int16:
        key = tl.load(keys, mask=live, other=0.0).to(tl.uint32, bitcast=True)[:, None]
        x = key + column.to(tl.uint32) * 0x85EBCA6B + step.to(tl.uint32) * 0x9E3779B9
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        m = _rounded(m, x & 0xFFFF)
        v = _rounded(v, x >> 16)
    return m, v


@triton.jit
def store_moment(pointers, x, mask):
    """Elements that :func:`round_moments` has rounded."""
    if pointers.dtype.element_ty == tl.int16:
        tl.store(pointers, (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(pointers, x, mask=mask)
