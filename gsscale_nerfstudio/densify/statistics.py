"""What densification wants to know of a rendered view."""

from __future__ import annotations

import torch
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.working_set import ScreenStatistics


@torch.no_grad()
def screen_statistics(gradients: Tensor, radii: Tensor, view: View) -> ScreenStatistics:
    """gsplat's densification statistics of one view, after its backward pass.

    Args:
        gradients: [n, 2], see :meth:`.Rendering.means2d_grad`.
        radii: [n] int32, in pixels; 0 for rows that were not drawn.
        view: the view.
    """
    # From the view, which has it on the device: sending it there now would wait for backward.
    half = view.on(radii.device).half_size
    drawn = radii > 0
    norms = (gradients * half).norm(dim=-1) * drawn
    return norms, drawn.float(), radii.float() / max(view.width, view.height)
