"""The first Gaussians: one per point of the sparse cloud, or random ones."""

from __future__ import annotations

import torch
from nerfstudio.models.splatfacto import RGB2SH, SplatfactoModelConfig, random_quat_tensor
from nerfstudio.utils.rich_utils import CONSOLE
from scipy.spatial import cKDTree
from torch import Tensor

from gsscale_nerfstudio.store import RowLayout

_NEIGHBOURS = 3
_CLOSEST = 1e-7  # duplicate points would have a size of zero, and its logarithm


def seed_rows(
    config: SplatfactoModelConfig, layout: RowLayout, points: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """Initial values of all groups, by splatfacto's rules and in its order of random draws.

    Args:
        config: ``random_init``, ``num_random``, ``random_scale`` and ``sh_degree`` are used.
        layout: shapes of the groups.
        points: xyz [n, 3] and rgb [n, 3] (0 to 255; may be empty) of the sparse cloud, if any.

    Returns:
        One tensor [n, *shape] per group.
    """
    colors = None
    if points is not None and not config.random_init:
        points = _usable(*points)
    if points is not None and not config.random_init:
        means, colors = points[0].float(), points[1]
    else:
        means = (torch.rand((config.num_random, 3)) - 0.5) * config.random_scale
    n = len(means)
    scales = torch.log(_neighbour_distance(means)).repeat(1, 3)
    quats = random_quat_tensor(n)
    if colors is not None and len(colors) > 0:
        rgb = colors.float() / 255
        features_dc = RGB2SH(rgb) if config.sh_degree > 0 else torch.logit(rgb, eps=1e-10)
    else:
        features_dc = torch.rand(n, 3)
    return {
        "means": means,
        "scales": scales,
        "quats": quats,
        "opacities": torch.logit(0.1 * torch.ones(n, 1)),
        "features_dc": features_dc,
        "features_rest": torch.zeros(n, *layout.shapes["features_rest"]),
    }


def _usable(xyz: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor] | None:
    """The finite points; None if too few are left to measure distances between neighbours."""
    finite = torch.isfinite(xyz).all(dim=1)
    if not finite.all():
        CONSOLE.print(
            f"[bold yellow]gsscale:[/bold yellow] {int((~finite).sum())} of {len(xyz)} points of "
            "the point cloud are not finite and were left out"
        )
        rgb = rgb[finite] if len(rgb) == len(xyz) else rgb
        xyz = xyz[finite]
    if len(xyz) <= _NEIGHBOURS:
        CONSOLE.print(
            f"[bold yellow]gsscale:[/bold yellow] the point cloud has {len(xyz)} usable points, "
            f"and at least {_NEIGHBOURS + 1} are needed; starting from random Gaussians instead "
            "(--pipeline.model.num-random, --pipeline.model.random-scale)"
        )
        return None
    return xyz, rgb


def _neighbour_distance(means: Tensor) -> Tensor:
    """[n, 1]: mean distance to the three nearest neighbours."""
    k = min(_NEIGHBOURS, len(means) - 1)
    if k < 1:
        return torch.full((len(means), 1), 0.1)
    tree = cKDTree(means.numpy())
    distances, _ = tree.query(means.numpy(), k=k + 1, workers=-1)
    mean = torch.from_numpy(distances[:, 1:]).float().mean(dim=-1, keepdim=True)
    return mean.clamp_min(_CLOSEST)
