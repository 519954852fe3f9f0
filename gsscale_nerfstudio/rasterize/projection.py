"""From Gaussians in the world to ellipses on the screen (EWA splatting), for one camera."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsscale_nerfstudio.versions import installed

from .block_lists import MIN_ALPHA

PER_AXIS = installed("gsplat") >= (1, 5)
"""Whether the installed gsplat draws a Gaussian into a rectangle, by its opacity, not a square."""

BLUR = 0.3
"""Variance, in squared pixels, added to every ellipse: none falls between the pixels."""

FRUSTUM_MARGIN = 0.3
"""How far beyond the image, in half images, a mean still moves the Jacobian's expansion point."""

_MAX_EXTENT = 3.33
"""Standard deviations beyond which gsplat 1.5 draws nothing."""

_MAX_RADIUS = 2.0**30
"""Largest radius kept as an int32, in pixels; far beyond any image."""


class Splats(NamedTuple):
    """What the screen sees of ``m`` Gaussians.

    Attributes:
        means2d: Projected means, in pixels. [m, 2]
        depths: z in camera space. [m]
        conics: Inverse of the blurred 2D covariance, upper triangle (xx, xy, yy). [m, 3]
        compensations: sqrt(det C / det(C + 0.3 I)), the opacity lost to the blur. [m]
    """

    means2d: Tensor
    depths: Tensor
    conics: Tensor
    compensations: Tensor


class Projection(NamedTuple):
    """The Gaussians of a view that reach the screen.

    Attributes:
        radii: Halves of both sides, in pixels, of the rectangle into which each of the ``n``
            Gaussians is drawn, 0 where it is not. [n, 2] int32
        visible: Ascending indices of the ``m`` drawn ones. [m] int64
        splats: Their ellipses.
    """

    radii: Tensor
    visible: Tensor
    splats: Splats


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    *,
    antialiased: bool,
    near: float,
    far: float,
    per_axis: bool = PER_AXIS,
) -> Projection:
    """Project Gaussians, cull those that do not reach the screen, keep the graph of the others.

    A Gaussian is drawn if near <= z <= far and a rectangle around its projected mean overlaps the
    image. It is, with C the blurred covariance,

    - in gsplat 1.4 the square of side 2 r, where r = ceil(3 sqrt(l)) pixels and l estimates the
      larger eigenvalue: l = b + sqrt(max(0.01, b^2 - det C)), b = trace C / 2;
    - since 1.5 that of sides 2 r_x and 2 r_y, r_x = ceil(e sqrt(C_xx)), r_y = ceil(e sqrt(C_yy)),
      where e = min(3.33, sqrt(2 ln(255 opacity))): with opacities up to 1 just what reaches 1/255.

    Args:
        means: World positions. [n, 3]
        quats: Rotations, wxyz, of any length but zero. [n, 4]
        scales: Standard deviations along the rotated axes. [n, 3]
        opacities: In [0, 1]. [n]
        viewmat: World to camera, OpenCV axes. [4, 4]
        K: Intrinsics in pixels; not differentiated, skew ignored. [3, 3]
        width: Image width in pixels.
        height: Image height in pixels.
        antialiased: Whether opacities are to be multiplied by the compensations.
        near: Smallest z that is drawn.
        far: Largest z that is drawn.
        per_axis: Whether to go by the rule of gsplat 1.5.
    """
    camera = (viewmat, K, width, height)
    # Culling first and without a graph: a row behind the camera projects to inf or nan, and a zero
    # gradient times inf would poison that row's parameters.
    with torch.no_grad():
        splats, covs = _splat(means, quats, scales, *camera)
        if per_axis:
            seen = opacities * splats.compensations if antialiased else opacities
            radii = _rectangles(covs, seen)
        else:
            radii = _squares(covs)
        radii = radii.ceil().clamp_max(_MAX_RADIUS)
        low, high = splats.means2d - radii, splats.means2d + radii
        z = splats.depths
        # Stated as what must hold, so that a nan is culled.
        drawn = (z >= near) & (z <= far) & (radii > 0).all(1)
        drawn &= ((high > 0) & (low < low.new_tensor([width, height]))).all(1)
        radii = torch.where(drawn[:, None], radii, 0).to(torch.int32)
        visible = drawn.nonzero().squeeze(1)
    splats, _ = _splat(means[visible], quats[visible], scales[visible], *camera)
    return Projection(radii, visible, splats)


def _squares(covs: Tensor) -> Tensor:
    """Three standard deviations along the longer axis, for both axes of the image. [n, 2]"""
    xx, xy, yy = covs.unbind(-1)
    largest = (xx + yy) / 2 + ((xx - yy).square() / 4 + xy.square()).clamp_min(0.01).sqrt()
    return (3 * largest.sqrt())[:, None].expand(-1, 2)


def _rectangles(covs: Tensor, opacities: Tensor) -> Tensor:
    """As far as alpha reaches 1/255, but not beyond 3.33 standard deviations; 0 if nowhere. [n, 2]

    The ellipse opacity exp(-sigma) = 1/255 extends to sqrt(2 ln(255 opacity) C_xx) along x.
    """
    extents = (2 * (opacities / MIN_ALPHA).clamp_min(1).log()).sqrt()
    # As gsplat has it for what is not a number, the one that is.
    extents = extents.fmin(extents.new_tensor(_MAX_EXTENT))
    return extents[:, None] * covs[:, ::2].sqrt()


def _splat(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
) -> tuple[Splats, Tensor]:
    """Ellipses of Gaussians and their blurred covariances (xx, xy, yy) in squared pixels. [m, 3]

    With W the camera's rotation, A = W R(q) diag(s) holds the ellipsoid's axes in camera space.
    The perspective Jacobian at (x, y, z), with u = x/z and v = y/z clamped to the image plus 0.3
    half images, gives the rows of G = J A:

        g_x = f_x/z (A_0 - u A_2),    g_y = f_y/z (A_1 - v A_2)

    and the covariance C = G G^T. Its determinant is |g_x cross g_y|^2 and that of C + e I is
    det C + e tr C + e^2: sums of non-negative terms, exact where xx yy - xy^2 would cancel.
    """
    fx, fy, cx, cy = (float(K[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    x, y, z = (means @ viewmat[:3, :3].T + viewmat[:3, 3]).unbind(-1)
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)

    margin_x = FRUSTUM_MARGIN * 0.5 * width / fx
    margin_y = FRUSTUM_MARGIN * 0.5 * height / fy
    u = (x / z).clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    v = (y / z).clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    axes = viewmat[:3, :3] @ _rotation_matrices(quats) * scales[:, None, :]
    gx = (fx / z)[:, None] * (axes[:, 0] - u[:, None] * axes[:, 2])
    gy = (fy / z)[:, None] * (axes[:, 1] - v[:, None] * axes[:, 2])

    xx, xy, yy = (gx * gx).sum(-1), (gx * gy).sum(-1), (gy * gy).sum(-1)
    det_sharp = torch.linalg.cross(gx, gy).square().sum(-1)
    det = det_sharp + BLUR * (xx + yy) + BLUR**2
    xx, yy = xx + BLUR, yy + BLUR
    conics = torch.stack([yy, -xy, xx], -1) / det[:, None]
    compensations: Tensor = _CompensationRoot.apply(det_sharp / det)
    return Splats(means2d, z, conics, compensations), torch.stack([xx, xy, yy], -1)


def _rotation_matrices(quats: Tensor) -> Tensor:
    """Rotations of wxyz quaternions of any length: I + 2 (w [r]x + [r]x^2) / |q|^2. [m, 3, 3]"""
    w, x, y, z = (quats / torch.linalg.vector_norm(quats, dim=-1, keepdim=True)).unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, -1).view(-1, 3, 3)


class _CompensationRoot(torch.autograd.Function):
    """rho = sqrt(ratio) with the derivative 1 / (2 (rho + 1e-6)), finite at zero as gsplat's is."""

    @staticmethod
    def forward(ctx: Any, ratio: Tensor) -> Tensor:
        root = ratio.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grad * 0.5 / (root + 1e-6)
