"""The rows of one view on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from gsscale_nerfstudio.store import GROUPS, RowLayout

ScreenStatistics = tuple[Tensor, Tensor, Tensor]
"""Per row of a working set: norm of the screen-space gradient, times seen (0 or 1), largest
radius as a share of the image's longer side; each [n] float32."""


@dataclass
class WorkingSet:
    """The rows of one view on the device, settled.

    Attributes:
        ids: [n] int32 on the CPU, ascending: the rows' places in the store.
        leaves: one tensor [n, *shape] per group; Parameters when made for training.
        sh: [n, 1 + rest, 3], all SH coefficients in one piece, of which ``leaves`` has views.
            Gradients that reach it are those of ``features_dc`` and ``features_rest``.
        statistics: called after the backward pass, gives what densification wants to know.
    """

    ids: Tensor
    leaves: dict[str, Tensor]
    sh: Tensor
    statistics: Callable[[], ScreenStatistics] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ids)


def empty_attributes(layout: RowLayout, n: int, device: torch.device) -> dict[str, Tensor]:
    """Uninitialized contiguous attributes of ``n`` rows; "sh" holds both SH groups."""
    shapes = {name: layout.shapes[name] for name in ("means", "scales", "quats", "opacities")}
    shapes["sh"] = (1 + layout.rest_bases, 3)
    return {name: torch.empty(n, *shape, device=device) for name, shape in shapes.items()}


def working_set(ids: Tensor, attributes: dict[str, Tensor], training: bool) -> WorkingSet:
    """Leaves over ``attributes`` (see :func:`empty_attributes`), without copies."""
    leaves = dict(attributes)
    sh = leaves.pop("sh")
    leaves["features_dc"], leaves["features_rest"] = sh[:, 0], sh[:, 1:]
    if training:
        leaves = {name: Parameter(leaf) for name, leaf in leaves.items()}
        sh.requires_grad_()
        dc, rest = leaves["features_dc"], leaves["features_rest"]

        def hand_on(joint: Tensor) -> None:
            assert joint.grad is not None
            dc.grad, rest.grad = joint.grad[:, 0], joint.grad[:, 1:]

        sh.register_post_accumulate_grad_hook(hand_on)
    return WorkingSet(ids, leaves, sh)


def row_gradients(working: WorkingSet) -> dict[str, Tensor]:
    """The leaves' gradients by group, in the order of columns; contiguous within each row.

    Rows themselves may lie apart: those of the SH groups are views of one joint gradient. Zeros
    where there is no gradient.
    """
    return {name: _rows_of(working.leaves[name]) for name in GROUPS}


def _rows_of(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        return torch.zeros_like(leaf, memory_format=torch.contiguous_format)
    return leaf.grad if leaf.grad[:1].is_contiguous() else leaf.grad.contiguous()
