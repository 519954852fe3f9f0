"""Procedural colours: functions of a point on a surface and of the surface's normal there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Texture = Callable[[Array, Array], Array]
"""(points [n, 3], unit normals [n, 3]), both in the shape's own frame -> RGB [n, 3] in 0..1."""

_NOISE_CELLS = 64


def rgb(code: str) -> Array:
    """An ``rrggbb`` hexadecimal colour as RGB [3] in 0..1."""
    return np.frombuffer(bytes.fromhex(code), np.uint8) / 255.0


def mix(first: Array, second: Array, weight: Array) -> Array:
    """Blend two colours ([3] or [n, 3]): the first at weight [n] 0, the second at weight 1."""
    return first + (second - first) * weight[:, None]


def face_coordinates(points: Array, normals: Array) -> tuple[Array, Array]:
    """Coordinates (u, v), [n] each, in the plane of a face: u runs level, v up the slope."""
    level = np.stack([-normals[:, 1], normals[:, 0], np.zeros(len(normals))], axis=1)
    length = np.linalg.norm(level, axis=1, keepdims=True)
    flat = length < 1e-6
    level = np.where(flat, [1.0, 0.0, 0.0], level / np.where(flat, 1.0, length))
    upward = np.cross(normals, level)
    return (points * level).sum(axis=1), (points * upward).sum(axis=1)


class ValueNoise:
    """Smooth noise in 0..1 with one random value per unit cell; it repeats after 64 cells."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._values = rng.random((_NOISE_CELLS, _NOISE_CELLS))

    def cell(self, u: Array, v: Array) -> Array:
        """The value of the cell that (u, v) lies in, without interpolation."""
        column = np.floor(u).astype(np.int64) % _NOISE_CELLS
        row = np.floor(v).astype(np.int64) % _NOISE_CELLS
        return self._values[column, row]

    def __call__(self, u: Array, v: Array) -> Array:
        """Interpolated values at (u, v), [n] each."""
        along, across = u % 1.0, v % 1.0
        along = along * along * (3.0 - 2.0 * along)
        across = across * across * (3.0 - 2.0 * across)
        near = self.cell(u, v) * (1 - along) + self.cell(u + 1, v) * along
        far = self.cell(u, v + 1) * (1 - along) + self.cell(u + 1, v + 1) * along
        return near * (1 - across) + far * across


def checker(size: float, first: Array, second: Array) -> Texture:
    """Squares of side ``size`` in two colours."""

    def color(points: Array, normals: Array) -> Array:
        u, v = face_coordinates(points, normals)
        odd = (np.floor(u / size) + np.floor(v / size)) % 2
        return mix(first, second, odd)

    return color


def rows(size: float, first: Array, second: Array) -> Texture:
    """Level stripes, each ``size`` high: planks on a wall, tile courses on a roof."""

    def color(points: Array, normals: Array) -> Array:
        _, v = face_coordinates(points, normals)
        return mix(first, second, np.floor(v / size) % 2)

    return color


def bricks(size: float, brick: Array, mortar: Array, noise: ValueNoise) -> Texture:
    """Bricks ``size`` high and twice as long, each in its own tint, in a running bond."""

    def color(points: Array, normals: Array) -> Array:
        u, v = face_coordinates(points, normals)
        u, v = u / (2 * size), v / size
        u = u + 0.5 * (np.floor(v) % 2)
        joint = (u % 1.0 < 0.10) | (v % 1.0 < 0.20)
        tint = 0.70 + 0.55 * noise.cell(u, v)
        return np.where(joint[:, None], mortar, brick * tint[:, None])

    return color


def windows(wall: Texture, spacing: float, pane: Array) -> Texture:
    """A wall with a grid of dark panes, ``spacing`` apart and centred on each upright face."""

    def color(points: Array, normals: Array) -> Array:
        u, v = face_coordinates(points, normals)
        wide = np.abs((u / spacing + 0.5) % 1.0 - 0.5) < 0.20
        inside = wide & (np.abs((v / spacing) % 1.0 - 0.55) < 0.24)
        upright = np.abs(normals[:, 2]) < 0.5
        return np.where((inside & upright)[:, None], pane, wall(points, normals))

    return color


def mottled(size: float, first: Array, second: Array, noise: ValueNoise) -> Texture:
    """Two colours blended by noise with features of ``size``, on surfaces of any shape."""

    def color(points: Array, normals: Array) -> Array:
        # Two oblique projections instead of one keep a curved surface free of stretched streaks.
        x, y, z = points.T / size
        weight = 0.5 * (noise(x + 0.6 * z, y - 0.5 * z) + noise(z + 0.5 * y + 17.3, x - y + 5.1))
        return mix(first, second, np.clip(2.0 * weight - 0.5, 0.0, 1.0))

    return color


def bands(count: int, first: Array, second: Array) -> Texture:
    """``count`` pairs of meridian stripes around the upright axis: a beach ball."""

    def color(points: Array, normals: Array) -> Array:
        turn = np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi)
        return mix(first, second, np.floor(turn * 2 * count) % 2)

    return color
