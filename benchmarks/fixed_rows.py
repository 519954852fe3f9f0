"""A made-up model of any size over a real scene: the same rows for every method that is measured.

The sparse points of the scene are repeated, jittered, until there are enough rows, and the cloud
and its cameras are laid side by side as tiles of a square until a view sees a small enough share of
them: what a longer flight over such an area would have given. Cameras are repeated with the points,
or most rows would never be seen and a cache of the others would look better than it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras
from scipy.spatial import cKDTree
from torch import Tensor

from benchmarks.plan import PlanError
from gsscale_nerfstudio.cull import Culler, View
from gsscale_nerfstudio.export.parallel import in_order
from gsscale_nerfstudio.store import RowLayout
from gsscale_nerfstudio.store.order import morton_order

CHUNK_ROWS = 1 << 18
"""Rows made at a time (62 MB of values). Each chunk has its own random numbers, so this is part of
what a seed stands for."""

MOST_TILES = 1024
SHARE_TOLERANCE = 1.15
_SAMPLE_ROWS = 200_000
_SAMPLE_VIEWS = 256
_SIZE = 0.7
"""Standard deviation of a row, as a share of the side of the square that it has to itself."""
_KEPT = 0.01, 0.99
"""Quantiles of the points along their main axes; outliers would keep the tiles apart."""
_NEIGHBOUR_DISTANCE = 0.729
"""Mean distance to the three nearest of points scattered in a plane, one per unit of area."""
_C0 = 0.28209479177387814
"""The first spherical harmonic, a constant."""


class RowsError(PlanError):
    """Rows that can't be made from this scene; the message says what to do."""


@dataclass(frozen=True)
class FixedRows:
    """``rows`` rows over ``tiles`` copies of a point cloud.

    Attributes:
        points: [m, 3], in Morton order.
        colors: [m, 3], 0 to 1.
        spacing: [m], side of the square that a point has to itself.
        sides: [2, 3], from one tile to its neighbours; the square is filled row by row.
        rows: number of rows; they are numbered tile by tile and, inside, point by point: nearly in
            Morton order, so that methods that don't sort their rows have the benefit, too.
        tiles: number of tiles.
        seed: of the random numbers.
        sh_degree: of the colours.
    """

    points: Tensor
    colors: Tensor
    spacing: Tensor
    sides: Tensor
    rows: int
    tiles: int = 1
    seed: int = 42
    sh_degree: int = 3

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each group's values in a row."""
        return RowLayout(self.sh_degree).shapes

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """All rows in order, up to :data:`CHUNK_ROWS` at a time: one tensor [n, *shape] a group.

        They are made on all cores, a few ahead of the one that is wanted.
        """
        # torch draws random numbers on one core, which is where all the time goes.
        yield from in_order(self._chunk, range(-(-self.rows // CHUNK_ROWS)))

    def _chunk(self, number: int) -> dict[str, Tensor]:
        # 2^20 chunks are more rows than anybody has, so no two seeds share random numbers.
        random = torch.Generator().manual_seed((self.seed << 20) + number)
        first = number * CHUNK_ROWS
        return self._values(torch.arange(first, min(self.rows, first + CHUNK_ROWS)), random)

    def _values(self, index: Tensor, random: torch.Generator) -> dict[str, Tensor]:
        n = len(index)
        means, scales, point = self._geometry(index, random)
        quats = torch.randn(n, 4, generator=random)
        rest = torch.rand(n, *self.shapes["features_rest"], generator=random)
        rest.mul_(0.04).sub_(0.02)  # in place: it is three quarters of all
        return {
            "means": means,
            "scales": scales,
            "quats": quats / quats.norm(dim=1, keepdim=True),
            "opacities": torch.logit(0.3 + 0.4 * torch.rand(n, 1, generator=random)),
            "features_dc": (self.colors[point] - 0.5) / _C0,
            "features_rest": rest,
        }

    def _geometry(self, index: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Means [n, 3], log-scales [n, 3] and base points [n] of the rows ``index``."""
        tile = index * self.tiles // self.rows
        first, end = (((tile + i) * self.rows + self.tiles - 1) // self.tiles for i in (0, 1))
        in_tile = end - first
        point = (index - first) * len(self.points) // in_tile
        spacing = self.spacing[point]
        plane = self.sides / self.sides.norm(dim=1, keepdim=True)
        jitter = torch.randn(len(index), 2, generator=random) @ plane * (0.5 * spacing)[:, None]
        means = self.points[point] + self._offsets(tile) + jitter
        # The rows of a point share its square.
        sigma = _SIZE * spacing * (len(self.points) / in_tile).sqrt()
        shape = 0.2 * torch.randn(len(index), 3, generator=random)
        return means, sigma.log()[:, None] + shape, point

    def _offsets(self, tile: Tensor) -> Tensor:
        """[n, 3], from where the cloud is to where each tile is."""
        across = math.ceil(math.sqrt(self.tiles))
        # Around the origin, where float32 is finest.
        steps = torch.stack([tile // across, tile % across], dim=1) - (across - 1) / 2
        return steps @ self.sides

    def cameras(self, cameras: Cameras) -> Cameras:
        """The cameras over every tile. Lens distortion is left out: images are undistorted."""
        poses = cameras.camera_to_worlds.repeat(self.tiles, 1, 1)
        tile = torch.arange(self.tiles).repeat_interleave(len(cameras))
        poses[:, :, 3] += self._offsets(tile)
        names = ("fx", "fy", "cx", "cy", "width", "height", "camera_type")
        rest: dict[str, Any] = {
            name: getattr(cameras, name).repeat(self.tiles, 1) for name in names
        }
        return Cameras(camera_to_worlds=poses, **rest)

    def visible_share(self, cameras: Cameras) -> float:
        """Mean share of the rows that the culler finds for the (tiled) cameras, from a sample."""
        index = torch.arange(0, self.rows, max(1, self.rows // _SAMPLE_ROWS))
        means, scales, _ = self._geometry(index, torch.Generator().manual_seed(self.seed))
        spheres = Culler.spheres_of(means, scales.exp())
        blocks = torch.empty(-(-len(index) // Culler.BLOCK_ROWS), 8)
        culler = Culler(spheres, blocks)
        culler.refresh(len(index))
        chosen = range(0, len(cameras), max(1, len(cameras) // _SAMPLE_VIEWS))
        views = [View.from_camera(cameras[i : i + 1]) for i in chosen]
        found = sum(len(culler.cull(view, len(index))) for view in views)
        return found / (len(views) * len(index))


@dataclass(frozen=True)
class FixedScene:
    """Rows, and the cameras that look at them."""

    rows: FixedRows
    cameras: Cameras
    visible_share: float
    """Mean over the views; the culler's count in a sample of the rows."""


def train_split(config: Any) -> Any:
    """``DataparserOutputs`` of a trainer config's training images; no image is read."""
    parser = config.pipeline.datamanager.dataparser
    parser.data = config.data
    return parser.setup().get_dataparser_outputs("train")


def fit(split: Any, rows: int, visible: float, seed: int, sh_degree: int = 3) -> FixedScene:
    """The fewest tiles whose views see at most about ``visible`` of ``rows`` rows.

    Args:
        split: ``DataparserOutputs`` with a point cloud.
        rows: number of rows.
        visible: share of the rows; up to 1.15 times as much is accepted.
        seed: of the random numbers.
        sh_degree: of the colours.

    Raises:
        RowsError: no point cloud, or no number of tiles does it.
    """
    base = untiled(split, rows, seed, sh_degree)
    limit, most = SHARE_TOLERANCE * visible, min(rows, MOST_TILES)
    share, tiles = math.inf, 1
    while tiles <= most:
        tiled = dataclasses.replace(base, tiles=tiles)
        cameras = tiled.cameras(split.cameras)
        share = tiled.visible_share(cameras)
        if share <= limit:
            return FixedScene(tiled, cameras, share)
        # A view sees no fewer tiles' worth of rows when there are more of them to see.
        tiles = max(tiles + 1, math.ceil(share * tiles / limit))
    raise RowsError(
        f"a view of this scene sees more than {visible:.2%} of {rows:,} rows however often it "
        f"is tiled, up to {most} times; raise --visible or --rows"
    )


def untiled(split: Any, rows: int, seed: int, sh_degree: int = 3) -> FixedRows:
    """Rows over the scene's own cloud: outliers removed, sorted, measured.

    Args:
        split: ``DataparserOutputs`` with a point cloud.
        rows, seed, sh_degree: see :class:`FixedRows`.

    Raises:
        RowsError: no point cloud.
    """
    xyz = split.metadata.get("points3D_xyz")
    if xyz is None or len(xyz) < 100:
        raise RowsError("rows are made from a sparse point cloud; this scene has none to speak of")
    xyz, rgb = xyz.float(), split.metadata["points3D_rgb"].float() / 255
    middle = xyz.median(dim=0).values
    along = (xyz - middle) @ torch.linalg.svd(xyz - middle, full_matrices=False).Vh.T
    low, high = torch.quantile(along, torch.tensor(_KEPT), dim=0)
    kept = ((along >= low) & (along <= high)).all(dim=1)
    xyz, rgb = xyz[kept].contiguous(), rgb[kept]
    order = morton_order(xyz, 0, len(xyz)).long()
    xyz, rgb = xyz[order], rgb[order]

    distances, _ = cKDTree(xyz.numpy()).query(xyz.numpy(), k=4)
    spacing = torch.from_numpy(distances[:, 1:]).float().mean(dim=1) / _NEIGHBOUR_DISTANCE
    low_spacing, high_spacing = (float(q) for q in torch.quantile(spacing, torch.tensor(_KEPT)))
    spacing = spacing.clamp(max(low_spacing, 1e-7), max(high_spacing, 1e-7))

    # Directions from the scene's outliers must not tilt the plane: measure the kept points again.
    axes = torch.linalg.svd(xyz - xyz.mean(dim=0), full_matrices=False).Vh[:2]
    extent = (xyz @ axes.T).amax(dim=0) - (xyz @ axes.T).amin(dim=0)
    sides = axes * extent[:, None]
    return FixedRows(xyz, rgb, spacing, sides, rows, seed=seed, sh_degree=sh_degree)
