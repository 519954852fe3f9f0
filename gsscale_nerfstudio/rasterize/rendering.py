"""What one view's rasterization returns, whichever backend drew it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rendering:
    """One drawn view of ``n`` Gaussians.

    Attributes:
        rgb: Colour, premultiplied: no background composited, not clamped. [H, W, 3]
        alpha: Accumulated opacity, 1 minus the remaining transmittance. [H, W, 1]
        depth: Expected z-depth, sum(w z) / max(alpha, 1e-10), 0 where nothing is drawn; None
            unless asked for. [H, W, 1]
        radii: Half the side, in pixels, of the square that a Gaussian was drawn into, with gsplat
            1.5 half the longer side of the rectangle; 0 where it was not drawn. [n] int32
        means2d_node: The tensor through which the gradients of the projected means flow, [n, 2]
            or [1, n, 2] as the backend has it. Ask :meth:`means2d_grad` instead.
        absgrad: Whether :meth:`means2d_grad` sums absolute values.
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor | None
    radii: Tensor
    means2d_node: Tensor = field(repr=False)
    absgrad: bool

    def __post_init__(self) -> None:
        if self.means2d_node.requires_grad:
            self.means2d_node.retain_grad()

    @property
    def means2d(self) -> Tensor:
        """Projected means, in pixels, detached; meaningful where ``radii > 0``. [n, 2]"""
        return self.means2d_node.detach().reshape(-1, 2)

    def means2d_grad(self) -> Tensor:
        """The gradient that densification watches, in loss per pixel, after ``backward``. [n, 2]

        Rendered with ``absgrad``, it is sum_p |dL_p / d mean2d|, over the pixels p, of each
        component (AbsGS, arXiv 2404.10484); without, the ordinary gradient of the projected mean.
        """
        node = self.means2d_node
        grad = getattr(node, "absgrad", None) if self.absgrad else node.grad
        if grad is None:
            raise RuntimeError(
                "means2d_grad() needs a rendering made with gradients enabled and a backward() "
                "through its rgb, alpha or depth before the call"
            )
        return grad.reshape(-1, 2)


def empty_rendering(
    inputs: tuple[Tensor, ...], width: int, height: int, *, depth: bool, absgrad: bool
) -> Rendering:
    """The rendering of no Gaussian at all: black, and still part of the graph of ``inputs``.

    A view may see nothing. Backward must then give every input a zero gradient of the input's
    shape, as after any other view, instead of none. ``inputs`` starts with the means.
    """
    means = inputs[0]
    means2d = means[:, :2] * 0
    # No backward kernel will run to attach it.
    means2d.absgrad = means2d.detach()  # type: ignore[attr-defined]
    zero = means2d.sum() + sum(0 * tensor.sum() for tensor in inputs)
    image = zero + means.new_zeros(height, width, 1)
    return Rendering(
        rgb=image.repeat(1, 1, 3),
        alpha=image,
        depth=image.clone() if depth else None,
        radii=torch.zeros(0, dtype=torch.int32, device=means.device),
        means2d_node=means2d,
        absgrad=absgrad,
    )
