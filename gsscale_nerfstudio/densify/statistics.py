"""What densification wants to know of a rendered view."""

from __future__ import annotations

import torch

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.working_set import ScreenStatistics
from gsscale_nerfstudio.rasterize import Rendering


@torch.no_grad()
def screen_statistics(rendering: Rendering, view: View) -> ScreenStatistics:
    """gsplat's densification statistics of one view, after its backward pass."""
    # From the view, which has it on the device: sending it there now would wait for backward.
    half = view.on(rendering.radii.device).half_size
    drawn = rendering.radii > 0
    norms = (rendering.means2d_grad() * half).norm(dim=-1) * drawn
    return norms, drawn.float(), rendering.radii.float() / max(view.width, view.height)
