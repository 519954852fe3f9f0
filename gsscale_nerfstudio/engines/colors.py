"""Colours of a working set, whose SH coefficients stay in rows.

Coefficients are three quarters of a row, and so would be their gradients; but of all of them a view
needs three channels per row, and they are linear in the coefficients. So colours are evaluated
where rows are unpacked, and the coefficients' gradients formed where rows are stepped, from the
gradient of each colour: basis x gradient. In between only colours exist, and their derivatives with
respect to the mean, through which the direction of view depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.rasterize.spherical_harmonics import sh_bases, unclamped_sh_colors
from gsscale_nerfstudio.store import RowLayout


@dataclass(frozen=True, eq=False)
class Viewpoint:
    """What colours depend on beside their rows.

    Attributes:
        position: [3] float32, the camera's, on the device; may require a gradient.
        degree: highest SH band that is used, at most that of the rows. Rows of SH degree 0 have the
            logits of colours instead, as in splatfacto, and colours are these logits.
    """

    position: Tensor
    degree: int

    def __post_init__(self) -> None:
        # Kernels want it so. Not a copy before each of them: some run when rows have been stepped,
        # and must not need memory.
        object.__setattr__(self, "position", self.position.contiguous())

    @classmethod
    def of(cls, view: View, layout: RowLayout, device: torch.device) -> Viewpoint:
        """That of a view, with all bands."""
        return cls(view.on(device).camera_position, layout.sh_degree)

    def bands_end(self, layout: RowLayout) -> int:
        """The column behind the coefficients that are used."""
        return layout.columns["features_dc"].start + 3 * (self.degree + 1) ** 2


@dataclass(eq=False)
class Arrived:
    """What the backward pass leaves behind.

    Attributes:
        gradient: [n, 3], of colours before they are clamped.
    """

    gradient: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Colors:
    """A view's colours, and where their gradients end up.

    Attributes:
        values: [n, 3], part of the graph of the means and the camera's position.
        viewpoint: what they were evaluated for.
        arrived: their gradients. Not the graph's node, nor does the graph know of these colours:
            Python would let go of a ring of the two, and of all the view's tensors, at some time
            later on.
    """

    values: Tensor
    viewpoint: Viewpoint
    arrived: Arrived = field(default_factory=Arrived)

    def gradients(self) -> Tensor:
        """After the backward pass; zeros if no gradient has reached the colours. [n, 3]"""
        gradient = self.arrived.gradient
        return torch.zeros_like(self.values) if gradient is None else gradient


def connect(
    values: Tensor, slopes: Tensor | None, means: Tensor, viewpoint: Viewpoint, layout: RowLayout
) -> Colors:
    """Make evaluated colours part of the graph.

    Args:
        values: [n, 3], not clamped.
        slopes: [3, n, 3], derivative of each channel with respect to the mean; None where colours
            do not depend on it.
        means: [n, 3], the leaf.
        viewpoint: of the colours.
        layout: of the rows.
    """
    arrived = Arrived()
    values = _Connect.apply(means, viewpoint.position, values, slopes, arrived)
    return Colors(clamped(values, layout), viewpoint, arrived)


def clamped(values: Tensor, layout: RowLayout) -> Tensor:
    """Colours as they are drawn: none is negative, unless they are logits.

    By torch, as in gsplat: its gradient passes where a colour is 0 by itself. The Gaussians of a
    black point begin so, and must not stay black for good.
    """
    return values.clamp_min(0.0) if layout.sh_degree > 0 else values


class _Connect(torch.autograd.Function):
    """Gives colours a backward pass; the values are there already."""

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        position: Tensor,
        values: Tensor,
        slopes: Tensor | None,
        arrived: Arrived,
    ) -> Tensor:
        ctx.save_for_backward(slopes)
        ctx.arrived = arrived
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        (gradient,) = gradients
        # Kept for the kernel that steps the rows; a second backward pass adds to it.
        old = ctx.arrived.gradient
        ctx.arrived.gradient = gradient.contiguous() if old is None else old + gradient
        of_means = of_position = None
        if slopes is not None:
            # In place: a [n, 3, 3] of products would be the largest tensor of the backward pass.
            of_means = slopes[0] * gradient[:, 0:1]
            of_means.addcmul_(slopes[1], gradient[:, 1:2])
            of_means.addcmul_(slopes[2], gradient[:, 2:3])
            if ctx.needs_input_grad[1]:
                of_position = -of_means.sum(dim=0)
        return of_means, of_position, None, None, None


# -- without kernels -----------------------------------------------------------------------------


def evaluate(
    rows: Tensor, layout: RowLayout, viewpoint: Viewpoint, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Colours [n, 3] of rows [n, width], not clamped; their derivatives [3, n, 3] if asked for."""
    coefficients = rows[:, _columns(layout)].unflatten(1, (-1, 3))
    if layout.sh_degree == 0:
        return coefficients[:, 0].clone(), None
    with torch.enable_grad():
        directions = rows[:, layout.columns["means"]] - viewpoint.position.detach()
        directions.requires_grad_(slopes)
        colors = unclamped_sh_colors(coefficients, directions, viewpoint.degree)
        if not slopes or viewpoint.degree == 0:
            return colors.detach(), None
        channels = [
            torch.autograd.grad(colors[:, channel].sum(), directions, retain_graph=True)[0]
            for channel in range(3)
        ]
    return colors.detach(), torch.stack(channels)


def coefficient_gradients(
    means: Tensor, layout: RowLayout, viewpoint: Viewpoint, color_gradients: Tensor
) -> Tensor:
    """Gradients of all SH coefficients, [n, 3 * bases], from those of the colours [n, 3]."""
    n, columns = len(means), _columns(layout)
    out = color_gradients.new_zeros(n, (columns.stop - columns.start) // 3, 3)
    if layout.sh_degree == 0:
        out[:, 0] = color_gradients
    else:
        directions = torch.nn.functional.normalize(means - viewpoint.position.detach(), dim=1)
        basis = sh_bases(directions, viewpoint.degree)
        out[:, : basis.shape[1]] = basis[:, :, None] * color_gradients[:, None]
    return out.flatten(1)


def _columns(layout: RowLayout) -> slice:
    return slice(layout.columns["features_dc"].start, layout.optimized)
