"""Drawing a view part by part, with the gradients of the whole.

The image is put together from parts that are drawn without gradients, one after another. The loss,
whatever it is, is of the whole image. Backward then draws each part once more, with gradients, and
sends the loss's derivative with respect to its pixels through it. Parts need no overlap for that,
not even for SSIM, and what comes out is what the view would have given in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.densify.statistics import screen_statistics
from gsscale_nerfstudio.engines import Part, ViewInParts, WorkingSet
from gsscale_nerfstudio.rasterize import Rendering


@dataclass(frozen=True)
class Picture:
    """A drawn view, see :class:`.Rendering`; ``penalties`` [k] are sums over its rows."""

    rgb: Tensor
    alpha: Tensor
    depth: Tensor | None
    penalties: Tensor


class Drawer(Protocol):
    """What draws a part, and knows what becomes of its gradients."""

    def draw_part(
        self, part: Part, viewmat: Tensor, training: bool
    ) -> tuple[WorkingSet, Rendering]:
        """Bring a part's rows and draw its window."""

    def penalties(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Terms [k] of the loss that are sums over rows, of these leaves."""


def draw_windows(
    views: list[View], size: tuple[int, int], draw: Callable[[View], Rendering]
) -> Picture:
    """A picture of several windows, to look at only.

    Args:
        views: through windows that make up the image.
        size: width and height of the image.
        draw: draws one of them.
    """
    canvas: _Canvas | None = None
    for view in views:
        rendering = draw(view)
        canvas = canvas or _Canvas(rendering, size)
        canvas.paint(rendering, view)
    assert canvas is not None
    return Picture(canvas.rgb, canvas.alpha, canvas.depth, canvas.rgb.new_zeros(0))


def draw_in_parts(
    whole: ViewInParts, view: View, viewmat: Tensor, drawer: Drawer, with_statistics: bool
) -> Picture:
    """Draw a view that is trained in parts.

    Args:
        whole: the view's rows.
        view: the camera.
        viewmat: [4, 4], which may require a gradient.
        drawer: of its parts.
        with_statistics: whether densification wants to know of the view.
    """
    anchor = viewmat.new_zeros((), requires_grad=True)  # viewmat seldom requires a gradient
    seen = _Seen(len(whole), viewmat.device) if with_statistics else None
    outputs = _InParts.apply(anchor, viewmat, whole, view, drawer, seen)
    rgb, alpha, penalties, depth = (*outputs, None) if len(outputs) == 3 else outputs
    if seen is not None:
        whole.statistics = lambda: screen_statistics(seen.gradients, seen.radii, view)
    return Picture(rgb, alpha, depth, penalties)


class _Canvas:
    """An image that is put together from windows."""

    def __init__(self, rendering: Rendering, size: tuple[int, int]) -> None:
        width, height = size
        self.rgb = rendering.rgb.new_empty(height, width, 3)
        self.alpha = rendering.alpha.new_empty(height, width, 1)
        self.depth = None if rendering.depth is None else torch.empty_like(self.alpha)

    def paint(self, rendering: Rendering, view: View) -> None:
        pixels = view.whole_window.pixels
        self.rgb[pixels], self.alpha[pixels] = rendering.rgb, rendering.alpha
        if self.depth is not None and rendering.depth is not None:
            self.depth[pixels] = rendering.depth


def _penalties(drawer: Drawer, working: WorkingSet, first: Tensor) -> Tensor:
    """[k], of the rows that no earlier part has had."""
    leaves = {name: leaf[first] for name, leaf in working.leaves.items()}
    return drawer.penalties(leaves)


class _Seen:
    """Of each row of a view, sums and maxima over the parts, for densification."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.gradients = torch.zeros(n, 2, device=device)
        self.radii = torch.zeros(n, dtype=torch.int32, device=device)

    def add(self, positions: Tensor, rendering: Rendering) -> None:
        self.gradients.index_add_(0, positions, rendering.means2d_grad())
        self.radii[positions.long()] = rendering.radii  # in each part the same


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        viewmat: Tensor,
        whole: ViewInParts,
        view: View,
        drawer: Drawer,
        seen: _Seen | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(viewmat)
        ctx.whole, ctx.drawer, ctx.seen = whole, drawer, seen
        canvas, penalties = None, viewmat.new_zeros(())
        for part in whole.parts:
            working, rendering = drawer.draw_part(part, viewmat.detach(), training=False)
            canvas = canvas or _Canvas(rendering, (view.width, view.height))
            canvas.paint(rendering, part.view)
            penalties = penalties + _penalties(drawer, working, part.first.to(viewmat.device))
        assert canvas is not None
        outputs = (canvas.rgb, canvas.alpha, penalties)
        return outputs if canvas.depth is None else (*outputs, canvas.depth)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (viewmat,) = ctx.saved_tensors
        pose = viewmat.detach().requires_grad_(ctx.needs_input_grad[1])
        for part in ctx.whole.parts:
            pixels = part.view.whole_window.pixels
            with torch.enable_grad():
                working, rendering = ctx.drawer.draw_part(part, pose, training=True)
                first = part.first.to(viewmat.device)
                penalties = _penalties(ctx.drawer, working, first)
            drawn = [rendering.rgb, rendering.alpha, rendering.depth, penalties]
            of_rgb, of_alpha, of_penalties, *of_depth = gradients
            theirs = [of_rgb[pixels], of_alpha[pixels], None, of_penalties]
            if of_depth:
                theirs[2] = of_depth[0][pixels]
            pairs = [
                (tensor, gradient)
                for tensor, gradient in zip(drawn, theirs, strict=True)
                if tensor is not None and gradient is not None and tensor.requires_grad
            ]
            tensors, derivatives = zip(*pairs, strict=True)
            torch.autograd.backward(tensors, derivatives)
            if ctx.seen is not None:
                ctx.seen.add(part.positions.to(viewmat.device), rendering)
            ctx.whole.take(part, working)
        return None, pose.grad, None, None, None, None
