"""Splitting a Gaussian into two smaller ones (3D Gaussian Splatting, section 5.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gsplat.utils import normalized_quat_to_rotmat
from torch import Tensor

from gsscale_nerfstudio.store import RowLayout

SHRINK = 1.6
"""A child's scales are its parent's, divided by this."""

_CHUNK = 1 << 20
"""Rows split together: bounds the temporaries."""


def split(parents: Tensor, noise: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Two children of each parent, placed at random inside of it.

    Args:
        parents: [n, width] settled parameters.
        noise: [2, n, 3] standard normal: each child's place, in the parent's standard deviations.
        layout: of the rows.

    Returns:
        Their parameters, [n, width] each; ``parents`` becomes the first.
    """
    first, second = parents, parents.clone()
    means, scales, quats = (layout.columns[name] for name in ("means", "scales", "quats"))
    for start in range(0, len(parents), _CHUNK):
        part = slice(start, start + _CHUNK)
        size = torch.exp(parents[part, scales])
        rotations = normalized_quat_to_rotmat(F.normalize(parents[part, quats], dim=-1))
        offsets = torch.einsum("nij,nj,bnj->bni", rotations, size, noise[:, part])
        second[part, means] += offsets[1]
        first[part, means] += offsets[0]
        first[part, scales] = second[part, scales] = torch.log(size / SHRINK)
    return first, second
