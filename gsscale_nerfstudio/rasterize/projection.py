"""From Gaussians in the world to ellipses on the screen (EWA splatting), for one camera."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLUR = 0.3
"""Variance, in squared pixels, added to every ellipse: none falls between the pixels."""

FRUSTUM_MARGIN = 0.3
"""How far beyond the image, in half images, a mean still moves the Jacobian's expansion point."""

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
        radii: Radius in pixels of each of the ``n`` Gaussians, 0 where not drawn. [n] int32
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
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    *,
    near: float,
    far: float,
) -> Projection:
    """Project Gaussians, cull those that do not reach the screen, keep the graph of the others.

    A Gaussian is drawn if near <= z <= far and the square of side 2 r around its projected mean
    overlaps the image, where r = ceil(3 sqrt(l)) pixels and l estimates the larger eigenvalue of
    the blurred covariance: l = b + sqrt(max(0.01, b^2 - det)), b = trace / 2.

    Args:
        means: World positions. [n, 3]
        quats: Rotations, wxyz, of any length but zero. [n, 4]
        scales: Standard deviations along the rotated axes. [n, 3]
        viewmat: World to camera, OpenCV axes. [4, 4]
        K: Intrinsics in pixels; not differentiated, skew ignored. [3, 3]
        width: Image width in pixels.
        height: Image height in pixels.
        near: Smallest z that is drawn.
        far: Largest z that is drawn.
    """
    camera = (viewmat, K, width, height)
    # Culling first and without a graph: a row behind the camera projects to inf or nan, and a zero
    # gradient times inf would poison that row's parameters.
    with torch.no_grad():
        splats, covs = _splat(means, quats, scales, *camera)
        xx, xy, yy = covs.unbind(-1)
        largest = (xx + yy) / 2 + ((xx - yy).square() / 4 + xy.square()).clamp_min(0.01).sqrt()
        radii = (3 * largest.sqrt()).ceil().clamp_max(_MAX_RADIUS)
        x, y = splats.means2d.unbind(-1)
        z = splats.depths
        # Stated as what must hold, so that a nan is culled.
        drawn = (z >= near) & (z <= far)
        drawn &= (x + radii > 0) & (x - radii < width) & (y + radii > 0) & (y - radii < height)
        radii = torch.where(drawn, radii, 0).to(torch.int32)
        visible = drawn.nonzero().squeeze(1)
    splats, _ = _splat(means[visible], quats[visible], scales[visible], *camera)
    return Projection(radii, visible, splats)


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
