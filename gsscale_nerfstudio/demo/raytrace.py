"""Rays against a world of shapes: what they hit and which colour that has in the sun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsscale_nerfstudio.demo.shapes import Shape, turn
from gsscale_nerfstudio.demo.textures import Array, Texture

_SUN = np.array([0.48, -0.36, 0.80])
_SUNLIGHT = np.array([0.78, 0.74, 0.66])
_SKYLIGHT = np.array([0.42, 0.45, 0.52])
# Shadow rays start this far above a surface, or rounding would let it shadow itself.
_LIFT = 1e-4


@dataclass(frozen=True)
class World:
    """Shapes on the level ground z = 0, under a sky of one colour."""

    shapes: Sequence[Shape]
    ground: Texture
    sky: Array


@dataclass(frozen=True)
class Hits:
    """What n rays meet first: something at a ``distance`` [n], or the sky at inf.

    ``normal`` [n, 3] is the surface's, in the world; ``shape`` [n] its index, or -1 for the ground.
    """

    distance: Array
    normal: Array
    shape: NDArray[np.int64]


def _toward(world: World, origin: Array, directions: Array) -> list[NDArray[np.int64]]:
    """For each shape, which rays of one ``origin`` [3] meet its bounding sphere."""
    offsets = np.stack([shape.center - origin for shape in world.shapes])
    bounds = np.array([shape.bound for shape in world.shapes])
    along = offsets @ directions.T
    tangent = np.sqrt((offsets**2).sum(axis=1) - bounds**2)
    return [np.flatnonzero(row) for row in along > tangent[:, None]]


def _in_line(world: World, origins: Array, direction: Array) -> list[NDArray[np.int64]]:
    """For each shape, which rays of one ``direction`` [3] meet its bounding sphere."""
    centers = np.stack([shape.center for shape in world.shapes])
    bounds = np.array([shape.bound for shape in world.shapes])
    # In the plane across the rays, a sphere is a disk and a ray is a point.
    side = np.cross(direction, [1.0, 0.0, 0.0])
    side /= np.linalg.norm(side)
    across = np.stack([side, np.cross(direction, side)], axis=1)
    points, disks = origins @ across, centers @ across
    square = (points**2).sum(axis=1) - 2 * disks @ points.T
    limit = bounds**2 - (disks**2).sum(axis=1)
    return [np.flatnonzero(row) for row in square < limit[:, None]]


def trace(world: World, origin: Array, directions: Array) -> Hits:
    """First hits of the rays from ``origin`` [3], outside all shapes, along unit ``directions``."""
    falling = directions[:, 2] < 0.0
    distance = np.where(falling, -origin[2] / np.where(falling, directions[:, 2], 1.0), np.inf)
    normal = np.tile([0.0, 0.0, 1.0], (len(directions), 1))
    index = np.full(len(directions), -1)
    candidates = _toward(world, origin, directions)
    for number, (shape, rays) in enumerate(zip(world.shapes, candidates, strict=True)):
        reached, facing = shape.intersect(origin[None], directions[rays])
        closer = reached < distance[rays]
        rays = rays[closer]
        distance[rays], normal[rays], index[rays] = reached[closer], facing[closer], number
    return Hits(distance, normal, index)


def _light(world: World, points: Array, normals: Array) -> Array:
    """Light [n, 3] that falls on points: that of the sky, and that of the sun outside shadows."""
    sun = _SUN / np.linalg.norm(_SUN)
    cosine = np.maximum(normals @ sun, 0.0)
    starts = points + _LIFT * normals
    for shape, rays in zip(world.shapes, _in_line(world, starts, sun), strict=True):
        rays = rays[cosine[rays] > 0.0]
        reached, _ = shape.intersect(starts[rays], sun[None])
        cosine[rays[np.isfinite(reached)]] = 0.0
    openness = 0.65 + 0.35 * normals[:, 2:]
    return openness * _SKYLIGHT + cosine[:, None] * _SUNLIGHT


def radiance(world: World, origin: Array, directions: Array) -> tuple[Array, Array]:
    """Colours RGB [n, 3] in 0..1 that rays see, and how far away they see them, [n] (inf: sky).

    Surfaces are matte: a point looks the same from everywhere, so a scene can be checked by
    projecting its points into its images.
    """
    hits = trace(world, origin, directions)
    solid = np.isfinite(hits.distance)
    points = origin + np.where(solid, hits.distance, 0.0)[:, None] * directions
    albedo = np.empty_like(points)
    floor = np.flatnonzero(solid & (hits.shape < 0))
    albedo[floor] = world.ground(points[floor], hits.normal[floor])
    for number, shape in enumerate(world.shapes):
        rays = np.flatnonzero(hits.shape == number)
        frame = turn(shape.heading)
        local = (points[rays] - shape.position) @ frame
        albedo[rays] = shape.texture(local, hits.normal[rays] @ frame)
    color = np.broadcast_to(world.sky, points.shape).copy()
    color[solid] = albedo[solid] * _light(world, points[solid], hits.normal[solid])
    return np.clip(color, 0.0, 1.0), hits.distance
