"""A view's densification statistics against gsplat's own bookkeeping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gsplat.strategy import DefaultStrategy

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.model import screen_statistics
from gsscale_nerfstudio.rasterize import Rendering
from gsscale_nerfstudio.rasterize.projection import PER_AXIS


@pytest.mark.parametrize("absgrad", [True, False])
def test_screen_statistics_are_gsplats(absgrad):
    n, width, height = 200, 80, 60
    node = torch.randn(1, n, 2, requires_grad=True)
    radii = torch.randint(0, 30, (n,), dtype=torch.int32) * (torch.rand(n) < 0.7)
    (node * torch.randn(1, n, 2)).sum().backward()
    node.absgrad = torch.rand(1, n, 2)
    rendering = Rendering(
        rgb=torch.zeros(height, width, 3),
        alpha=torch.zeros(height, width, 1),
        depth=None,
        radii=radii.int(),
        means2d_node=node,
        absgrad=absgrad,
    )
    K = np.array([[50.0, 0, 40], [0, 50.0, 30], [0, 0, 1]])
    norms, seen, sizes = screen_statistics(
        rendering.means2d_grad(), rendering.radii, View(np.eye(4), K, width, height)
    )

    strategy = DefaultStrategy(absgrad=absgrad, refine_scale2d_stop_iter=4000)
    state = strategy.initialize_state()
    info = {
        "width": width,
        "height": height,
        "n_cameras": 1,
        # Of two, the larger one counts, whichever axis it is of.
        "radii": torch.stack([radii, (radii + 1) // 2], dim=-1)[None] if PER_AXIS else radii[None],
        "gaussian_ids": None,
        "means2d": node,
    }
    strategy._update_state({"means": torch.zeros(n, 3)}, state, info)
    torch.testing.assert_close(norms, state["grad2d"])
    torch.testing.assert_close(seen, state["count"])
    torch.testing.assert_close(sizes, state["radii"])
