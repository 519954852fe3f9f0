"""Solids that rays are intersected with in closed form: spheres and convex polyhedra.

A shape has a frame of its own, at ``position`` [3] and turned by ``heading`` (radians) about the
upright z axis; textures see points and normals in that frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gsscale_nerfstudio.demo.textures import Array, Texture


def turn(heading: float) -> Array:
    """Rotation [3, 3] about z by ``heading`` radians: shape frame to world."""
    c, s = np.cos(heading), np.sin(heading)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Sphere:
    """A ball of ``radius`` around ``position``."""

    position: Array
    radius: float
    texture: Texture
    heading: float = 0.0

    @property
    def center(self) -> Array:
        """Centre [3] of the bounding sphere, world."""
        return self.position

    @property
    def bound(self) -> float:
        """Radius of the bounding sphere."""
        return self.radius

    def intersect(self, origins: Array, directions: Array) -> tuple[Array, Array]:
        """Distance [n] to where rays enter (inf: they miss) and the world normal [n, 3] there.

        Args:
            origins: [n, 3] or [1, 3], outside the shape.
            directions: [n, 3] or [1, 3], unit length.
        """
        offset = origins - self.position
        along = (offset * directions).sum(axis=1)
        square = along**2 - (offset**2).sum(axis=1) + self.radius**2
        distance = -along - np.sqrt(np.maximum(square, 0.0))
        distance = np.where((square > 0.0) & (distance > 0.0), distance, np.inf)
        reach = np.where(np.isfinite(distance), distance, 0.0)
        return distance, (offset + reach[:, None] * directions) / self.radius


@dataclass(frozen=True)
class Polyhedron:
    """The convex solid ``normals @ x <= offsets`` in its frame; normals [p, 3], offsets [p].

    ``center`` [3] and ``bound`` are those of a bounding sphere in the world.
    """

    position: Array
    normals: Array
    offsets: Array
    center: Array
    bound: float
    texture: Texture
    heading: float = 0.0

    def intersect(self, origins: Array, directions: Array) -> tuple[Array, Array]:
        """As :meth:`Sphere.intersect`: a ray is inside between its last entry and first exit."""
        normals = self.normals @ turn(self.heading).T
        slope = directions @ normals.T
        gap = self.offsets - (origins - self.position) @ normals.T
        # A ray parallel to a plane divides by zero on purpose: -inf outside of it, +inf inside.
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = gap / slope
        entries = np.where(slope < 0.0, crossing, -np.inf)
        exits = np.where(slope < 0.0, np.inf, crossing)
        face = entries.argmax(axis=1)
        enter = np.take_along_axis(entries, face[:, None], axis=1)[:, 0]
        hit = (enter > 0.0) & (enter <= exits.min(axis=1))
        return np.where(hit, enter, np.inf), normals[face]


Shape = Sphere | Polyhedron


def _polyhedron(
    position: Array, normals: Array, offsets: Array, size: Array, heading: float, texture: Texture
) -> Polyhedron:
    """A polyhedron that stands on z = 0 of its frame and fits ``size`` [3], centred in x and y."""
    length = np.linalg.norm(normals, axis=1)
    center = position + np.array([0.0, 0.0, size[2] / 2])
    bound = float(np.linalg.norm(size)) / 2
    return Polyhedron(
        position=position,
        normals=normals / length[:, None],
        offsets=offsets / length,
        center=center,
        bound=bound,
        texture=texture,
        heading=heading,
    )


def box(position: Array, size: Array, heading: float, texture: Texture) -> Polyhedron:
    """A block of ``size`` [3] (x, y, z) standing on ``position``."""
    normals = np.concatenate([np.eye(3), -np.eye(3)])
    offsets = np.array([size[0] / 2, size[1] / 2, size[2], size[0] / 2, size[1] / 2, 0.0])
    return _polyhedron(position, normals, offsets, size, heading, texture)


def gable(position: Array, size: Array, heading: float, texture: Texture) -> Polyhedron:
    """A saddle roof of ``size`` [3] with its ridge along the frame's x."""
    half, width, height = size[0] / 2, size[1] / 2, size[2]
    normals = np.array([[1, 0, 0], [-1, 0, 0], [0, height, width], [0, -height, width], [0, 0, -1]])
    offsets = np.array([half, half, height * width, height * width, 0.0])
    return _polyhedron(position, normals.astype(np.float64), offsets, size, heading, texture)


def _level_directions(sides: int) -> Array:
    """Unit directions [sides, 3] across the sides of a regular polygon that lies level."""
    angles = np.arange(sides) * 2 * np.pi / sides
    return np.stack([np.cos(angles), np.sin(angles), np.zeros(sides)], axis=1)


def _over_polygon(radius: float, height: float, sides: int) -> Array:
    """Size [3] of a solid of ``height`` over a regular polygon with incircle ``radius``."""
    reach = 2 * radius / np.cos(np.pi / sides)
    return np.array([reach, reach, height])


def spire(
    position: Array, radius: float, height: float, sides: int, heading: float, texture: Texture
) -> Polyhedron:
    """A pyramid over a regular polygon; ``radius`` is that of the polygon's incircle."""
    slopes = height * _level_directions(sides) + [0.0, 0.0, radius]
    normals = np.concatenate([slopes, [[0.0, 0.0, -1.0]]])
    offsets = np.append(np.full(sides, height * radius), 0.0)
    size = _over_polygon(radius, height, sides)
    return _polyhedron(position, normals, offsets, size, heading, texture)


def column(
    position: Array, radius: float, height: float, sides: int, heading: float, texture: Texture
) -> Polyhedron:
    """An upright prism over a regular polygon; ``radius`` is that of the polygon's incircle."""
    normals = np.concatenate([_level_directions(sides), [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]])
    offsets = np.concatenate([np.full(sides, radius), [height, 0.0]])
    size = _over_polygon(radius, height, sides)
    return _polyhedron(position, normals, offsets, size, heading, texture)
