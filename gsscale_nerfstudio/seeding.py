"""The first Gaussians: one per point of the sparse cloud, or random ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nerfstudio.models.splatfacto import RGB2SH, SplatfactoModelConfig, random_quat_tensor
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import Progress
from scipy.spatial import cKDTree
from torch import Tensor

from gsscale_nerfstudio.errors import warn
from gsscale_nerfstudio.store import HostStore
from gsscale_nerfstudio.store.order import morton_order

_NEIGHBOURS = 3
_CLOSEST = 1e-7  # duplicate points would have a size of zero, and its logarithm

_PIECE = 1 << 17
"""Points at a time: beside some arrays of one number per point, temporaries take 50 MB."""

_WORTH_A_BAR = 1 << 20
"""Points that take a second."""


def seed_rows(
    store: HostStore, config: SplatfactoModelConfig, points: tuple[Tensor, Tensor] | None
) -> None:
    """Fill an empty store by splatfacto's rules, with its order of random draws, in Morton order.

    Extra memory: at most 100 bytes per point, in turn for the order, the random numbers and the
    tree that finds neighbours. All cores work, but for the tree's construction.

    Args:
        store: no row was ever in use.
        config: ``random_init``, ``num_random``, ``random_scale`` and ``sh_degree`` are used.
        points: xyz [n, 3] and rgb [n, 3] (0 to 255; may be empty) of the sparse cloud, if any.

    Raises:
        GSScaleError: more points than the store has room for.
    """
    place_rows(store, config, points)
    size_rows(store)


def place_rows(
    store: HostStore, config: SplatfactoModelConfig, points: tuple[Tensor, Tensor] | None
) -> None:
    """All of :func:`seed_rows` but the scales, which follow from the means."""
    colors = None
    if points is not None and not config.random_init:
        points = _usable(*points)
    if points is not None and not config.random_init:
        means, colors = points[0].float().contiguous(), points[1]
    else:
        means = (torch.rand((config.num_random, 3)) - 0.5) * config.random_scale
    n = len(means)
    store.resize(n)
    quats = random_quat_tensor(n)
    first = colors if colors is not None and len(colors) > 0 else torch.rand(n, 3)
    opacity = torch.logit(0.1 * torch.ones(1))
    # Points in Morton order now: sorting rows later would touch the moments' pages, too.
    order = morton_order(means, 0, n)
    for piece in _pieces(n):
        ids = order[piece]
        store.column("means")[piece] = means[ids]
        store.column("quats")[piece] = quats[ids]
        store.column("features_dc")[piece] = (
            _first_band(first[ids], config.sh_degree) if first is colors else first[ids]
        )
        store.column("opacities")[piece] = opacity


def size_rows(store: HostStore) -> None:
    """Set each row's scales to the mean distance of its three nearest neighbours.

    Neighbours in space are neighbours in memory here: a tree is built twice as fast and asked four
    times as fast as with points in any order.
    """
    n = len(store)
    k = min(_NEIGHBOURS, n - 1)
    if k < 1:
        store.column("scales")[:] = torch.log(torch.full((n, 3), 0.1))
        return
    means = store.column("means")
    with Progress(console=CONSOLE, transient=True, disable=n < _WORTH_A_BAR) as progress:
        bar = progress.add_task(f"neighbours of {n:,} points", total=None)
        tree = neighbour_tree(means)
        progress.update(bar, total=n)
        for piece in _pieces(n):
            distances, _ = tree.query(means[piece].numpy(), k=k + 1, workers=-1)
            mean = torch.from_numpy(distances[:, 1:]).float().mean(dim=-1, keepdim=True)
            store.column("scales")[piece] = torch.log(mean.clamp_min(_CLOSEST))
            progress.advance(bar, piece.stop - piece.start)


def neighbour_tree(means: Tensor) -> cKDTree:
    """A tree of points [n, 3]; with other settings it takes longer and finds the same."""
    return cKDTree(means.numpy(), balanced_tree=False, compact_nodes=False)


def _first_band(rgb: Tensor, sh_degree: int) -> Tensor:
    rgb = rgb.float() / 255
    return RGB2SH(rgb) if sh_degree > 0 else torch.logit(rgb, eps=1e-10)


def _pieces(n: int) -> Iterator[slice]:
    for start in range(0, n, _PIECE):
        yield slice(start, min(start + _PIECE, n))


def _usable(xyz: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor] | None:
    """The finite points; None if too few are left to measure distances between neighbours."""
    finite = torch.isfinite(xyz).all(dim=1)
    if not finite.all():
        warn(
            f"{int((~finite).sum())} of {len(xyz)} points of the point cloud are not finite and "
            "were left out"
        )
        rgb = rgb[finite] if len(rgb) == len(xyz) else rgb
        xyz = xyz[finite]
    if len(xyz) <= _NEIGHBOURS:
        warn(
            f"the point cloud has {len(xyz)} usable points, and at least {_NEIGHBOURS + 1} are "
            "needed; starting from random Gaussians instead (--pipeline.model.num-random, "
            "--pipeline.model.random-scale)"
        )
        return None
    return xyz, rgb
