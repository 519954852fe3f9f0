"""The numbers that tell rows apart, for who draws random ones."""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT = 1 << 24
"""Up to here float32 has every whole number; beyond, ids as numbers would not all differ."""


def keys_of(ids: Tensor) -> Tensor:
    """Keys of rows, to be read as bits: ids as numbers, and beyond 2^24 the floats that follow.

    All are ordinary floats: whoever moves a row through registers of floats keeps every bit.

    Args:
        ids: [n] int64 or int32, from 0 to 2^28.

    Returns:
        [n] float32, all different.
    """
    bits = ids.clamp(max=_EXACT).float().view(torch.int32)
    return bits.add_((ids - _EXACT).clamp_(min=0).int()).view(torch.float32)
