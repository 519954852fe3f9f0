"""One Gaussian becomes several at the same place that look like it together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsscale_nerfstudio.store import RowLayout

_MOST = 51
"""Gaussians that one can become; gsplat's limit, too."""


def share_out(rows: Tensor, times: Tensor, layout: RowLayout, min_opacity: float) -> None:
    r"""Give rows the opacity and scales of each of ``times`` copies that take their place.

    Equation 9 of "3D Gaussian Splatting as Markov Chain Monte Carlo": N copies of opacity
    :math:`o' = 1 - (1-o)^{1/N}` cover as much as one of opacity o, and their scales shrink by
    :math:`o \big/ \sum_{k=1}^{N} \binom{N}{k} (-1)^{k-1} o'^k / \sqrt{k}`. (The sum is gsplat's
    double one, of which the inner sum of binomial coefficients is done.)

    Args:
        rows: [n, width] float32 parameters, changed in place.
        times: [n] int64, >= 1; counted as 51 beyond that.
        layout: of the rows.
        min_opacity: a copy's opacity is at least that.
    """
    logits, scales = (rows[:, layout.columns[name]] for name in ("opacities", "scales"))
    n = times.clamp(1, _MOST).double()
    opacity = torch.sigmoid(logits[:, 0].double())
    each = 1 - (1 - opacity) ** (1 / n)
    term, total = torch.full_like(each, -1.0), torch.zeros_like(each)
    for k in range(1, int(n.max()) + 1 if len(n) else 1):
        term *= -(n - k + 1) / k * each  # 0 from k = N + 1 on
        total += term / math.sqrt(k)
    scales += torch.log(opacity / total)[:, None]
    most = 1 - torch.finfo(torch.float32).eps
    logits[:, 0] = torch.logit(each.clamp(min_opacity, most))
