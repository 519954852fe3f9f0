"""A differentiable rasterizer in plain torch, for machines without CUDA and for tests.

It draws what the installed gsplat's kernels draw, to rounding: fast enough to train small scenes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compositing import composite
from .projection import project
from .rendering import Rendering


def rasterize_reference(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    *,
    depth: bool,
    absgrad: bool,
    antialiased: bool,
    near: float,
    far: float,
    window: tuple[int, int, int, int],
) -> Rendering:
    """Draw one view; arguments and result are those of :func:`.api.rasterize`, n > 0."""
    radii, visible, splats = project(
        means,
        quats,
        scales,
        opacities,
        viewmat,
        K,
        width,
        height,
        antialiased=antialiased,
        near=near,
        far=far,
    )
    channels = colors[visible]
    if depth:
        channels = torch.cat([channels, splats.depths[:, None]], 1)
    opacities = opacities[visible]
    if antialiased:
        opacities = opacities * splats.compensations

    # Callers index radii and the gradient of means2d by row, culled rows included.
    def of_all_rows(values: Tensor) -> Tensor:
        return values.new_zeros(len(means), *values.shape[1:]).index_copy(0, visible, values)

    left, top, right, bottom = window
    means2d = of_all_rows(splats.means2d - splats.means2d.new_tensor((left, top)))
    image, alpha = composite(
        means2d,
        of_all_rows(splats.conics),
        of_all_rows(channels),
        of_all_rows(opacities),
        of_all_rows(splats.depths.detach()),
        radii,
        right - left,
        bottom - top,
        absgrad=absgrad,
    )
    return Rendering(
        rgb=image[..., :3],
        alpha=alpha,
        depth=image[..., 3:] / alpha.clamp_min(1e-10) if depth else None,
        radii=radii.amax(1),
        means2d_node=means2d,
        absgrad=absgrad,
    )
