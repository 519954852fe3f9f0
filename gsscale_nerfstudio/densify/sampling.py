"""Drawing rows at random by their weight, however many rows there are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gsscale_nerfstudio.store.chunks import chunks


def draw_rows(weights: Callable[[slice], Tensor], n: int, count: int) -> Tensor:
    """Draw ``count`` of ``n`` rows, with replacement, in proportion to their weights.

    ``torch.multinomial`` ends at 2^24 rows. This one needs no more memory than twice the result and
    a chunk of weights.

    Args:
        weights: gives those of a range of rows, [m] float32, not negative; NaN counts as 0.
        n: rows there are.
        count: rows to draw.

    Returns:
        [count] int64, ascending; [0] if all weights are 0.
    """
    sums = [_running_sum(weights(rows))[-1] for rows in chunks(n)]
    if not sums:
        return torch.empty(0, dtype=torch.int64)
    ends = torch.stack(sums).cumsum(0)
    if not ends[-1] > 0:
        return torch.empty(0, dtype=torch.int64)
    draws = torch.rand(count, dtype=torch.float64).mul_(ends[-1])
    draws.numpy().sort()  # in place
    found, start = torch.empty(count, dtype=torch.int64), torch.zeros((), dtype=torch.float64)
    first = 0
    for rows, end in zip(chunks(n), ends, strict=True):
        last = count if end == ends[-1] else int(torch.searchsorted(draws, end))
        if last > first:
            sums_of = _running_sum(weights(rows))
            # Rounding must not lead beyond the last row that has a weight.
            most = sums_of[-1].nextafter(torch.zeros_like(start))
            within = (draws[first:last] - start).clamp(max=most)
            found[first:last] = torch.searchsorted(sums_of, within, right=True) + rows.start
        first, start = last, end
    return found


def _running_sum(weights: Tensor) -> Tensor:
    return weights.double().nan_to_num_(nan=0.0).cumsum(0)
