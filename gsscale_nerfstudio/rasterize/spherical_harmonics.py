"""View-dependent colour: real spherical harmonics up to degree 4."""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor

MAX_DEGREE = 4


def sh_colors(coeffs: Tensor, dirs: Tensor, degree: int) -> Tensor:
    """Colours seen along ``dirs``: max(0, 1/2 + sum_k Y_k(d/|d|) c_k).

    Arguments and result are those of :func:`unclamped_sh_colors`.
    """
    return unclamped_sh_colors(coeffs, dirs, degree).clamp_min(0.0)


def unclamped_sh_colors(coeffs: Tensor, dirs: Tensor, degree: int) -> Tensor:
    """1/2 + sum_k Y_k(d/|d|) c_k.

    Args:
        coeffs: SH coefficients; bands above ``degree`` are ignored. [m, K, 3]
        dirs: Viewing directions, camera to Gaussian, of any length but zero. [m, 3]
        degree: Highest band to evaluate, 0 to 4; (degree + 1)^2 <= K.

    Returns:
        Linear colours, one per row. [m, 3]
    """
    bases = sh_bases(dirs / torch.linalg.vector_norm(dirs, dim=-1, keepdim=True), degree)
    colors = (bases[:, None, :] @ coeffs[:, : bases.shape[-1]]).squeeze(1)
    return colors + 0.5


def sh_bases(dirs: Tensor, degree: int) -> Tensor:
    """Orthonormal real spherical harmonics Y_l^m at unit vectors, ordered by l, then m = -l .. l.

    They carry the Condon-Shortley sign (-1)^m, which is how 3DGS stores its coefficients.

    Args:
        dirs: Unit vectors. [m, 3]
        degree: Highest l, 0 to 4.

    Returns:
        [m, (degree + 1)^2]
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"SH degree must be 0 to {MAX_DEGREE}, got {degree}")
    x, y, z = dirs.unbind(-1)
    bases = [torch.full_like(x, sqrt(1 / (4 * pi)))]
    if degree >= 1:
        c = sqrt(3 / (4 * pi))
        bases += [-c * y, c * z, -c * x]
    if degree >= 2:
        xx, yy, zz, xy = x * x, y * y, z * z, x * y
        c0, c1, c2 = sqrt(5 / (16 * pi)), sqrt(15 / (4 * pi)), sqrt(15 / (16 * pi))
        bases += [c1 * xy, -c1 * y * z, c0 * (3 * zz - 1), -c1 * x * z, c2 * (xx - yy)]
    if degree >= 3:
        c0, c1 = sqrt(7 / (16 * pi)), sqrt(21 / (32 * pi))
        c2, c3 = sqrt(105 / (16 * pi)), sqrt(35 / (32 * pi))
        bases += [
            -c3 * y * (3 * xx - yy),
            2 * c2 * xy * z,
            -c1 * y * (5 * zz - 1),
            c0 * z * (5 * zz - 3),
            -c1 * x * (5 * zz - 1),
            c2 * z * (xx - yy),
            -c3 * x * (xx - 3 * yy),
        ]
    if degree >= 4:
        c0, c1, c2 = 3 / 16 / sqrt(pi), 3 / 4 * sqrt(5 / (2 * pi)), 3 / 8 * sqrt(5 / pi)
        c3, c4 = 3 / 4 * sqrt(35 / (2 * pi)), 3 / 16 * sqrt(35 / pi)
        bases += [
            4 * c4 * xy * (xx - yy),
            -c3 * y * z * (3 * xx - yy),
            2 * c2 * xy * (7 * zz - 1),
            -c1 * y * z * (7 * zz - 3),
            c0 * ((35 * zz - 30) * zz + 3),
            -c1 * x * z * (7 * zz - 3),
            c2 * (xx - yy) * (7 * zz - 1),
            -c3 * x * z * (xx - 3 * yy),
            c4 * (xx * (xx - 3 * yy) - yy * (3 * xx - yy)),
        ]
    return torch.stack(bases, -1)
