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
    the pixel's own contribution. ``radii`` are [n] or [n, 2].
    """
    sides = radii.view(len(radii), -1).expand(-1, 2).tolist()
    drawn = [i for i, (x, y) in enumerate(sides) if x > 0 and y > 0]
    nearest_first = sorted(drawn, key=lambda i: depths[i])
    pixels = []
    for py in range(height):
        for px in range(width):
            means = means2d[py, px] if means2d.dim() == 4 else means2d
            alphas = []
            chosen = []
            transmittance = 1.0
            for i in nearest_first:
                if not in_tile(means[i].tolist(), sides[i], px // 16, py // 16):
                    continue
                alpha = alpha_at(means[i], conics[i], opacities[i], px + 0.5, py + 0.5)
                if alpha is None:
                    continue
                if transmittance * (1 - float(alpha.detach())) <= 1e-4:
                    break
                transmittance *= 1 - float(alpha.detach())
                chosen.append(i)
                alphas.append(alpha)
            color = torch.zeros(colors.shape[1], dtype=means.dtype)
            remaining = torch.ones((), dtype=means.dtype)
            for i, alpha in zip(chosen, alphas, strict=True):
                color = color + colors[i] * alpha * remaining
                remaining = remaining * (1 - alpha)
            pixels.append(torch.cat([color, 1 - remaining[None]]))
    image = torch.stack(pixels).view(height, width, -1)
    return image[..., :-1], image[..., -1:]


def alpha_at(mean: Tensor, conic: Tensor, opacity: Tensor, x: float, y: float) -> Tensor | None:
    """Opacity of a Gaussian at a point, None where it is skipped; constant where clamped."""
    # Most pairs are skipped. To know that, plain numbers do.
    (mx, my), (a, b, c) = mean.tolist(), conic.tolist()
    dx, dy = mx - x, my - y
    sigma = a * dx * dx / 2 + c * dy * dy / 2 + b * dx * dy
    if sigma < 0 or float(opacity.detach()) * math.exp(-sigma) < 1 / 255:
        return None
    offset = mean - torch.tensor([x, y], dtype=mean.dtype)
    matrix = torch.stack([conic[0], conic[1], conic[1], conic[2]]).view(2, 2)
    alpha = opacity * torch.exp(-0.5 * offset @ matrix @ offset)
    return alpha if alpha <= 0.999 else torch.tensor(0.999, dtype=mean.dtype)


def in_tile(mean: list[float], radii: list[int], tile_x: int, tile_y: int) -> bool:
    """Whether a Gaussian is drawn into a 16 x 16 tile."""
    return all(
        math.floor(m / 16 - radius / 16) <= tile < math.ceil(m / 16 + radius / 16)
        for m, radius, tile in zip(mean, radii, (tile_x, tile_y), strict=True)
    )
