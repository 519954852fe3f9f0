"""The rows of one view on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from gsscale_nerfstudio.engines.colors import Colors, Viewpoint, clamped, connect
from gsscale_nerfstudio.store import RowLayout

ScreenStatistics = tuple[Tensor, Tensor, Tensor]
"""Per row of a working set: norm of the screen-space gradient, times seen (0 or 1), largest
radius as a share of the image's longer side; each [n] float32."""

LEAVES = ("means", "scales", "quats", "opacities")
"""The groups that have a leaf; the SH coefficients stay in rows, see :class:`.Colors`."""


@dataclass
class WorkingSet:
    """The rows of one view on the device, settled.

    Attributes:
        ids: [n] int32 on the CPU, ascending: the rows' places in the store.
        leaves: one tensor [n, *shape] per group of :data:`LEAVES`; Parameters when made for
            training.
        colors: what the rows look like from the view's camera.
        statistics: called after the backward pass, gives what densification wants to know.
    """

    ids: Tensor
    leaves: dict[str, Tensor]
    colors: Colors
    statistics: Callable[[], ScreenStatistics] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ids)


def empty_attributes(
    layout: RowLayout, n: int, viewpoint: Viewpoint, training: bool
) -> dict[str, Tensor]:
    """Uninitialized contiguous attributes of ``n`` rows: the leaves, "colors" [n, 3] and "slopes".

    Colours are those before clamping.
    The slopes, [3, n, 3], are the derivatives of each channel with respect to the mean. They are
    [0] where they are not needed: outside of training, and for colours that do not depend on it.
    """
    device = viewpoint.position.device
    shapes: dict[str, tuple[int, ...]] = {name: (n, *layout.shapes[name]) for name in LEAVES}
    shapes["colors"] = (n, 3)
    shapes["slopes"] = (3, n, 3) if training and viewpoint.degree > 0 else (0,)
    return {name: torch.empty(shape, device=device) for name, shape in shapes.items()}


def working_set(
    ids: Tensor,
    attributes: dict[str, Tensor],
    layout: RowLayout,
    viewpoint: Viewpoint,
    training: bool,
) -> WorkingSet:
    """Leaves over ``attributes`` (see :func:`empty_attributes`), without copies."""
    leaves = {name: attributes[name] for name in LEAVES}
    values, slopes = attributes["colors"], attributes["slopes"]
    if not training:
        return WorkingSet(ids, leaves, Colors(clamped(values, layout), viewpoint))
    leaves = {name: Parameter(leaf) for name, leaf in leaves.items()}
    colors = connect(values, slopes if slopes.numel() else None, leaves["means"], viewpoint, layout)
    return WorkingSet(ids, leaves, colors)


def leaf_gradients(working: WorkingSet) -> dict[str, Tensor]:
    """The leaves' gradients by group, contiguous; zeros where there is no gradient."""
    return {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.contiguous()
        for name, leaf in working.leaves.items()
    }
