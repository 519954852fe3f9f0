"""The village of the demo: a paved square, a ring of houses, trees, a pond and a quilt of fields.

Lengths are in units of about one house. Details are a tenth of a unit or larger, so that an image
160 pixels wide still resolves them.
"""

from __future__ import annotations

import numpy as np

from gsscale_nerfstudio.demo.raytrace import World
from gsscale_nerfstudio.demo.shapes import Shape, Sphere, box, column, gable, spire
from gsscale_nerfstudio.demo.textures import (
    Array,
    Texture,
    ValueNoise,
    bands,
    bricks,
    checker,
    mix,
    mottled,
    rgb,
    rows,
    windows,
)

_SQUARE_RADIUS = 1.35
_HOUSE_RING = 2.35
_RING_ROAD = 3.45
_ROAD_HALF_WIDTH = 0.19
_POND = np.array([4.55, 1.35])
_POND_RADIUS = 0.75
_FIELD = 2.3


def _ground(noise: ValueNoise) -> Texture:
    """Fields outside, lawn between the houses, a checkered square, roads and a pond."""
    crops = np.stack([rgb(c) for c in ("d8b964", "8cab48", "5d8a3c", "c4a352", "a5bd5c", "8a6a44")])

    def fields(x: Array, y: Array) -> Array:
        u, v = 0.94 * x + 0.34 * y, -0.34 * x + 0.94 * y
        pick = noise.cell(u / _FIELD, v / _FIELD)
        crop = crops[(pick * len(crops)).astype(np.int64)]
        along = np.where((pick * 97) % 1.0 < 0.5, u, v)
        furrow = 0.86 + 0.20 * (np.floor(along / 0.36) % 2)
        to_edge = np.maximum(np.abs((u / _FIELD) % 1.0 - 0.5), np.abs((v / _FIELD) % 1.0 - 0.5))
        hedge = to_edge > 0.46
        return np.where(hedge[:, None], rgb("35552b"), crop * furrow[:, None])

    def color(points: Array, normals: Array) -> Array:
        x, y = points[:, 0], points[:, 1]
        radius = np.hypot(x, y)
        lawn = mix(rgb("4d7a34"), rgb("93b552"), noise(x / 0.45, y / 0.45))
        result = np.where((radius < _RING_ROAD)[:, None], lawn, fields(x, y))
        radial = np.minimum(np.abs(x), np.abs(y)) < _ROAD_HALF_WIDTH
        road = radial | (np.abs(radius - _RING_ROAD) < _ROAD_HALF_WIDTH)
        gravel = mix(rgb("d9c7a0"), rgb("f0e3c4"), noise(x / 0.25, y / 0.25))
        result = np.where(road[:, None], gravel, result)
        odd = (np.floor(x / 0.3) + np.floor(y / 0.3)) % 2
        paving = mix(rgb("efe6d2"), rgb("b4583c"), odd)
        result = np.where((radius < _SQUARE_RADIUS)[:, None], paving, result)
        shore = np.hypot(x - _POND[0], y - _POND[1]) / _POND_RADIUS
        water = mix(rgb("17486b"), rgb("4fa3b8"), np.clip(shore, 0.0, 1.0) ** 3)
        result = np.where((shore < 1.18)[:, None], rgb("e8d8a8"), result)
        return np.where((shore < 1.0)[:, None], water, result)

    return color


def _house(angle: float, number: int, noise: ValueNoise, rng: np.random.Generator) -> list[Shape]:
    """One house of the ring, facing the square: walls and a saddle roof that overhangs them."""
    plaster = [rgb(c) for c in ("f4ead5", "e7b98a", "d8e2e6", "f2d77c")][number % 4]
    walls: list[Texture] = [
        windows(mottled(0.5, plaster, 0.92 * plaster, noise), 0.36, rgb("2c3a4c")),
        bricks(0.13, rgb("a8452f"), rgb("e3d3bd"), noise),
        windows(rows(0.12, 0.75 * rgb("7d4a2a"), rgb("a9693c")), 0.36, rgb("f3e9cf")),
        windows(bricks(0.16, rgb("9a9a92"), rgb("60605c"), noise), 0.36, rgb("2c3a4c")),
    ]
    roofs: list[Texture] = [
        rows(0.11, rgb("8e2f22"), rgb("c2543a")),
        rows(0.11, rgb("34465c"), rgb("58708c")),
        checker(0.16, rgb("6b3a2c"), rgb("b9714f")),
        rows(0.13, rgb("31332f"), rgb("6c6a60")),
    ]
    size = np.array([0.95, 0.75, 0.50]) * rng.uniform(0.92, 1.12, 3)
    heading = angle + np.pi / 2 + rng.uniform(-0.12, 0.12)
    place = _HOUSE_RING * np.array([np.cos(angle), np.sin(angle), 0.0])
    eaves = place + np.array([0.0, 0.0, size[2]])
    roof = np.array([size[0] + 0.14, size[1] + 0.20, 0.45 * rng.uniform(0.9, 1.2)])
    return [
        box(place, size, heading, walls[number % 4]),
        gable(eaves, roof, heading, roofs[(number + number // 4) % 4]),
    ]


def _church(angle: float, noise: ValueNoise) -> list[Shape]:
    """A tower with a pointed roof, taller than everything else."""
    place = _HOUSE_RING * np.array([np.cos(angle), np.sin(angle), 0.0])
    wall = windows(bricks(0.16, rgb("cbbf9f"), rgb("8c8064"), noise), 0.60, rgb("2b2b33"))
    top = place + np.array([0.0, 0.0, 1.35])
    return [
        box(place, np.array([0.62, 0.62, 1.35]), angle, wall),
        spire(top, 0.38, 0.85, 4, angle, rows(0.15, rgb("255a55"), rgb("3f8d80"))),
    ]


def _trees(noise: ValueNoise, rng: np.random.Generator) -> list[Shape]:
    """Round and pointed trees outside the ring road, clear of the roads and the pond."""
    trees: list[Shape] = []
    places: list[Array] = []
    while len(places) < 14:
        radius, angle = rng.uniform(3.95, 5.1), rng.uniform(0, 2 * np.pi)
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        on_road = min(abs(x), abs(y)) < 0.6
        in_pond = np.hypot(x - _POND[0], y - _POND[1]) < 1.3
        crowded = any(np.hypot(x - other[0], y - other[1]) < 0.9 for other in places)
        if on_road or in_pond or crowded:
            continue
        place = np.array([x, y, 0.0])
        places.append(place)
        size = rng.uniform(0.85, 1.25)
        bark = rows(0.1, rgb("5b3d26"), rgb("7d5836"))
        if len(places) % 2:
            leaves = mottled(0.16, rgb("1f4a24"), rgb("76a83c"), noise)
            crown = place + np.array([0.0, 0.0, 0.62 * size])
            trees.append(column(place, 0.06, 0.4 * size, 6, 0.0, bark))
            trees.append(Sphere(crown, 0.40 * size, leaves, angle))
        else:
            needles = rows(0.15, rgb("16402f"), rgb("3c7a4a"))
            foot = place + np.array([0.0, 0.0, 0.16])
            trees.append(column(place, 0.06, 0.16, 6, 0.0, bark))
            trees.append(spire(foot, 0.34 * size, 1.05 * size, 9, angle, needles))
    return trees


def _square() -> list[Shape]:
    """A round plinth with a ball on it, and smaller balls around: the things to look at."""
    stone = rows(0.09, rgb("9d9689"), rgb("cfc8ba"))
    shapes: list[Shape] = [
        column(np.zeros(3), 0.46, 0.20, 10, 0.0, stone),
        Sphere(np.array([0.0, 0.0, 0.58]), 0.38, bands(5, rgb("d8342b"), rgb("f6f1e4")), 0.3),
    ]
    for number, (dark, light) in enumerate(
        [("1f4e9c", "f2c230"), ("f4f4f0", "2a7a4b"), ("5d2a86", "f3a6b8")]
    ):
        angle = 0.75 + number * 2 * np.pi / 3
        place = np.array([0.92 * np.cos(angle), 0.92 * np.sin(angle), 0.20])
        shapes.append(Sphere(place, 0.20, bands(3, rgb(dark), rgb(light)), angle))
    return shapes


def build_village(seed: int) -> World:
    """The village. ``seed`` varies its noise, the houses' proportions and where trees stand."""
    rng = np.random.default_rng(seed)
    noise = ValueNoise(rng)
    shapes = _square()
    for number in range(8):
        angle = (number + 0.5) * np.pi / 4
        shapes += _church(angle, noise) if number == 6 else _house(angle, number, noise, rng)
    shapes += _trees(noise, rng)
    return World(shapes, _ground(noise), rgb("a9c4de"))
