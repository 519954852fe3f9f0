"""Spherical harmonics against gsplat's torch implementation and against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gsplat.cuda._torch_impl import _spherical_harmonics

from gsscale_nerfstudio.rasterize.spherical_harmonics import sh_bases, sh_colors


@pytest.mark.parametrize("degree", range(5))
def test_colors_match_gsplat(degree: int) -> None:
    coeffs = torch.randn(200, 25, 3, dtype=torch.float64)
    dirs = 3 * torch.randn(200, 3, dtype=torch.float64)
    expected = (_spherical_harmonics(degree, dirs, coeffs) + 0.5).clamp_min(0)
    assert (expected == 0).any()
    torch.testing.assert_close(sh_colors(coeffs, dirs, degree), expected, rtol=1e-7, atol=1e-7)


def test_bases_are_orthonormal_on_the_sphere() -> None:
    """Gauss-Legendre in z, equidistant in azimuth: exact for products of degree-4 polynomials."""
    z, weight = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(5))
    azimuth = torch.arange(16).double() * (2 * math.pi / 16)
    radius = (1 - z * z).sqrt()[:, None]
    x, y = radius * azimuth.cos(), radius * azimuth.sin()
    dirs = torch.stack([x, y, z[:, None].expand_as(x)], -1).view(-1, 3)
    weights = (weight[:, None] * (2 * math.pi / 16)).expand_as(x).reshape(-1, 1)
    bases = sh_bases(dirs, 4)
    torch.testing.assert_close(
        bases.T @ (weights * bases), torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("degree", range(5))
def test_gradients(degree: int) -> None:
    coeffs = (0.2 * torch.randn(4, 25, 3, dtype=torch.float64)).requires_grad_()
    dirs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, d: sh_colors(c, d, degree), (coeffs, dirs))


def test_a_degree_beyond_four_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 4"):
        sh_bases(torch.randn(2, 3), 5)
