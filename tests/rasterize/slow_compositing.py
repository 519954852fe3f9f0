"""Compositing one pixel and one Gaussian at a time: what the fast code is held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def composite_slowly(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    depths: Tensor,
    radii: Tensor,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:
    """Colours [H, W, C] and alphas [H, W, 1], with autograd's gradients.

    ``means2d`` may be [H, W, n, 2]: a copy of the means for every pixel, whose gradient is then
    the pixel's own contribution.
    """
    nearest_first = sorted((i for i in range(len(radii)) if radii[i] > 0), key=lambda i: depths[i])
    rows = []
    for py in range(height):
        for px in range(width):
            means = means2d[py, px] if means2d.dim() == 4 else means2d
            transmittance = torch.ones((), dtype=means.dtype)
            color = torch.zeros(colors.shape[1], dtype=means.dtype)
            for i in nearest_first:
                if not in_tile(means[i].tolist(), int(radii[i]), px // 16, py // 16):
                    continue
                dx = means[i, 0] - (px + 0.5)
                dy = means[i, 1] - (py + 0.5)
                a, b, c = conics[i]
                sigma = a * dx * dx / 2 + c * dy * dy / 2 + b * dx * dy
                if sigma < 0:
                    continue
                alpha = opacities[i] * torch.exp(-sigma)
                if alpha < 1 / 255:
                    continue
                if alpha > 0.999:
                    alpha = torch.tensor(0.999, dtype=means.dtype)
                if transmittance * (1 - alpha) <= 1e-4:
                    break
                color = color + colors[i] * alpha * transmittance
                transmittance = transmittance * (1 - alpha)
            rows.append(torch.cat([color, 1 - transmittance[None]]))
    image = torch.stack(rows).view(height, width, -1)
    return image[..., :-1], image[..., -1:]


def in_tile(mean: list[float], radius: int, tile_x: int, tile_y: int) -> bool:
    """Whether a Gaussian is drawn into a 16 x 16 tile."""
    return all(
        math.floor(m / 16 - radius / 16) <= tile < math.ceil(m / 16 + radius / 16)
        for m, tile in zip(mean, (tile_x, tile_y), strict=True)
    )
