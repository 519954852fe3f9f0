"""One call that draws a view: on CUDA gsplat's kernels and ours do, elsewhere the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .projection import PER_AXIS
from .reference import rasterize_reference
from .rendering import Rendering, empty_rendering


def rasterize(
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
    near: float = 0.01,
    far: float = 1e10,
    window: tuple[int, int, int, int] | None = None,
) -> Rendering:
    """Draw ``n`` Gaussians, n >= 0, as one pinhole camera sees them.

    Differentiable with respect to every tensor but ``K``. All tensors are on one device, which
    decides who draws: gsplat on CUDA, where they must be float32, else the reference.

    Args:
        means: World positions. [n, 3]
        quats: Rotations, wxyz, not necessarily normalized. [n, 4]
        scales: Standard deviations along the rotated axes, in world units. [n, 3]
        opacities: In [0, 1]. [n]
        colors: As seen from the camera. [n, 3]
        viewmat: World to camera, OpenCV axes (x right, y down, z forward). [4, 4]
        K: Intrinsics in pixels, no skew. [3, 3]
        width: Image width in pixels.
        height: Image height in pixels.
        depth: Whether to render the expected depth too.
        absgrad: Whether :meth:`.Rendering.means2d_grad` is to sum absolute values.
        antialiased: Lower the opacity of a Gaussian by as much as the screen-space blur widens it
            (Mip-Splatting, arXiv 2311.16493).
        near: Gaussians whose centre is nearer, in z, are not drawn.
        far: Gaussians whose centre is farther, in z, are not drawn.
        window: (left, top, right, bottom) in pixels: draw this part of the image only. Its pixels
            are those of the whole image, to rounding, and positions of means count from its corner.
            Radii are those in the whole image, also of Gaussians that do not reach the window.
    """
    inputs = (means, quats, scales, opacities, colors, viewmat)
    if len(means) == 0:
        left, top, right, bottom = window or (0, 0, width, height)
        size = (right - left, bottom - top)
        return empty_rendering(inputs, *size, depth=depth, absgrad=absgrad)
    draw = _rasterize_gsplat if means.is_cuda else rasterize_reference
    return draw(
        *inputs,
        K,
        width,
        height,
        depth=depth,
        absgrad=absgrad,
        antialiased=antialiased,
        near=near,
        far=far,
        window=window or (0, 0, width, height),
    )


def _rasterize_gsplat(
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
    # Imported here: a machine without CUDA can do without gsplat's kernels, not even build them,
    # and without Triton.
    from gsplat.cuda._wrapper import fully_fused_projection

    from .gradients import rasterize_pixels
    from .tile_lists import tile_lists

    # What gsplat.rasterization does for one camera, without its waiting for the device to invert
    # the pose, without a copy of what it does not change, and with fewer tiles per Gaussian.
    radii, means2d, depths, conics, compensations = fully_fused_projection(
        means,
        None,
        quats,
        scales,
        viewmat[None],
        K[None],
        width,
        height,
        near_plane=near,
        far_plane=far,
        calc_compensations=antialiased,
        **({"opacities": opacities} if PER_AXIS else {}),
    )
    largest_radii = radii.amax(-1) if PER_AXIS else radii
    opacities = opacities[None]
    if antialiased:
        opacities = opacities * compensations
    channels = colors[None]
    if depth:
        channels = torch.cat([channels, depths[..., None]], dim=-1)
    left, top, right, bottom = window
    if left or top:
        means2d = means2d - means2d.new_tensor((left, top))
    width, height = right - left, bottom - top
    # In gsplat's own function for them the host waits for the device without letting other Python
    # threads run.
    splats = (means2d[0], radii[0], depths[0], conics[0], opacities[0])
    lists = tile_lists(*splats, width, height)
    image, alpha = rasterize_pixels(
        means2d, conics, channels, opacities, lists, width, height, absgrad=absgrad
    )
    return Rendering(
        rgb=image[0, ..., :3],
        alpha=alpha[0],
        depth=image[0, ..., 3:] / alpha[0].clamp_min(1e-10) if depth else None,
        radii=largest_radii[0].to(torch.int32),
        means2d_node=means2d,
        absgrad=absgrad,
    )
