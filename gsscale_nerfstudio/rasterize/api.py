"""One call that draws a view: gsplat's kernels on CUDA, the reference elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

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
    sh_degree: int | None,
    depth: bool,
    absgrad: bool,
    antialiased: bool,
    near: float = 0.01,
    far: float = 1e10,
) -> Rendering:
    """Draw ``n`` Gaussians, n >= 0, as one pinhole camera sees them.

    Differentiable with respect to every tensor but ``K``. All tensors are on one device, which
    decides who draws: gsplat on CUDA, where they must be float32, else the reference.

    Args:
        means: World positions. [n, 3]
        quats: Rotations, wxyz, not necessarily normalized. [n, 4]
        scales: Standard deviations along the rotated axes, in world units. [n, 3]
        opacities: In [0, 1]. [n]
        colors: SH coefficients, [n, K, 3], if ``sh_degree`` is given, else the colours. [n, 3]
        viewmat: World to camera, OpenCV axes (x right, y down, z forward). [4, 4]
        K: Intrinsics in pixels, no skew. [3, 3]
        width: Image width in pixels.
        height: Image height in pixels.
        sh_degree: Highest SH band to use, 0 to 4, or None.
        depth: Whether to render the expected depth too.
        absgrad: Whether :meth:`.Rendering.means2d_grad` is to sum absolute values.
        antialiased: Lower the opacity of a Gaussian by as much as the screen-space blur widens it
            (Mip-Splatting, arXiv 2311.16493).
        near: Gaussians whose centre is nearer, in z, are not drawn.
        far: Gaussians whose centre is farther, in z, are not drawn.
    """
    inputs = (means, quats, scales, opacities, colors, viewmat)
    if len(means) == 0:
        return empty_rendering(inputs, width, height, depth=depth, absgrad=absgrad)
    draw = _rasterize_gsplat if means.is_cuda else rasterize_reference
    return draw(
        *inputs,
        K,
        width,
        height,
        sh_degree=sh_degree,
        depth=depth,
        absgrad=absgrad,
        antialiased=antialiased,
        near=near,
        far=far,
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
    sh_degree: int | None,
    depth: bool,
    absgrad: bool,
    antialiased: bool,
    near: float,
    far: float,
) -> Rendering:
    # Imported here: a machine without CUDA can do without gsplat's kernels, not even build them.
    from gsplat.rendering import rasterization

    image, alpha, meta = rasterization(
        means=means,
        quats=quats,
        scales=scales,
        opacities=opacities,
        colors=colors,
        viewmats=viewmat[None],
        Ks=K[None],
        width=width,
        height=height,
        near_plane=near,
        far_plane=far,
        sh_degree=sh_degree,
        packed=False,
        render_mode="RGB+ED" if depth else "RGB",
        absgrad=absgrad,
        rasterize_mode="antialiased" if antialiased else "classic",
    )
    radii = meta["radii"][0]
    if radii.dim() == 2:  # gsplat >= 1.5 has one radius per axis
        radii = radii.amax(-1)
    return Rendering(
        rgb=image[0, ..., :3],
        alpha=alpha[0],
        depth=image[0, ..., 3:] if depth else None,
        radii=radii.to(torch.int32),
        means2d_node=meta["means2d"],
        absgrad=absgrad,
    )
