"""The analytic intersections, and the culling that decides which of them are computed."""

from __future__ import annotations

import numpy as np
import pytest

from gsscale_nerfstudio.demo import raytrace
from gsscale_nerfstudio.demo.cameras import Pinhole, orbit
from gsscale_nerfstudio.demo.raytrace import World, radiance, trace
from gsscale_nerfstudio.demo.shapes import Polyhedron, Sphere, box, column, gable, spire, turn
from gsscale_nerfstudio.demo.textures import face_coordinates
from gsscale_nerfstudio.demo.village import build_village


def grey(points, normals):
    return np.full((len(points), 3), 0.5)


PLACE = np.array([0.4, -0.3, 0.2])
SOLIDS = {
    "box": box(PLACE, np.array([1.0, 0.6, 0.8]), 0.5, grey),
    "gable": gable(PLACE, np.array([1.0, 0.6, 0.8]), 0.5, grey),
    "spire": spire(PLACE, 0.5, 0.9, 7, 0.5, grey),
    "column": column(PLACE, 0.5, 0.9, 7, 0.5, grey),
    "sphere": Sphere(PLACE, 0.6, grey),
}


def inside(solid, points):
    """How far outside of the solid points [n, 3] are; negative inside."""
    if isinstance(solid, Sphere):
        return np.linalg.norm(points - solid.position, axis=1) - solid.radius
    local = (points - solid.position) @ turn(solid.heading)
    return (local @ solid.normals.T - solid.offsets).max(axis=1)


def rays_at(solid, count=4000):
    rng = np.random.default_rng(0)
    origins = rng.normal(size=(count, 3))
    origins = solid.center + 3.0 * origins / np.linalg.norm(origins, axis=1, keepdims=True)
    aims = solid.center + rng.normal(scale=0.5, size=(count, 3))
    directions = aims - origins
    return origins, directions / np.linalg.norm(directions, axis=1, keepdims=True)


@pytest.mark.parametrize("name", SOLIDS)
def test_intersections_agree_with_walking_along_the_ray(name):
    solid = SOLIDS[name]
    origins, directions = rays_at(solid)
    distance, normal = solid.intersect(origins, directions)
    hit = np.isfinite(distance)
    assert 0.2 < hit.mean() < 0.95

    steps = np.linspace(1.0, 5.0, 800)
    walk = np.stack([inside(solid, origins + step * directions) < -1e-9 for step in steps])
    entered = walk.any(axis=0)
    # A ray that only grazes a corner can pass between two steps.
    assert (entered & ~hit).sum() == 0
    assert (hit & ~entered).mean() < 0.01
    both = hit & entered
    first = steps[walk.argmax(axis=0)]
    assert np.all(np.abs(first - distance)[both] < 2 * (steps[1] - steps[0]))

    points = origins[hit] + distance[hit, None] * directions[hit]
    np.testing.assert_allclose(inside(solid, points), 0.0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(normal[hit], axis=1), 1.0)
    assert np.all((normal[hit] * directions[hit]).sum(axis=1) < 1e-9)
    assert np.all(inside(solid, points + 1e-3 * normal[hit]) > 0.0)


@pytest.mark.parametrize("name", SOLIDS)
def test_the_bounding_sphere_holds_the_whole_shape(name):
    solid = SOLIDS[name]
    origins, directions = rays_at(solid)
    distance, _ = solid.intersect(origins, directions)
    hit = np.isfinite(distance)
    points = origins[hit] + distance[hit, None] * directions[hit]
    reach = np.linalg.norm(points - solid.center, axis=1).max()
    assert 0.75 * solid.bound < reach <= solid.bound * (1 + 1e-9)


def test_culling_changes_no_pixel(monkeypatch):
    world = build_village(3)
    lens, pose = Pinhole(48, 36), orbit(5)[1]
    positions = np.random.default_rng(1).random((1500, 2)) * [48, 36]
    directions = lens.directions(pose, positions)
    culled = radiance(world, pose[:3, 3], directions)

    def everything(world, first, second):
        return [np.arange(len(directions))] * len(world.shapes)

    monkeypatch.setattr(raytrace, "_toward", everything)
    assert np.array_equal(trace(world, pose[:3, 3], directions).distance, culled[1])
    monkeypatch.setattr(raytrace, "_in_line", everything)
    whole = radiance(world, pose[:3, 3], directions)
    assert np.array_equal(whole[0], culled[0])
    assert np.array_equal(whole[1], culled[1])


def test_a_block_shades_the_ground_on_the_far_side_of_the_sun():
    block = box(np.zeros(3), np.array([1.0, 1.0, 1.0]), 0.0, grey)
    world = World([block], grey, np.zeros(3))
    sun = raytrace._SUN / np.linalg.norm(raytrace._SUN)
    beside = 0.85 * np.array([sun[0], sun[1], 0.0]) / np.hypot(sun[0], sun[1])
    spots = np.stack([beside, -beside])
    origin = np.array([0.0, 0.0, 6.0])
    aims = spots - origin
    color, _ = radiance(world, origin, aims / np.linalg.norm(aims, axis=1, keepdims=True))
    assert color[0].mean() > 1.8 * color[1].mean()


def test_face_coordinates_are_level_and_upward():
    rng = np.random.default_rng(2)
    normals = rng.normal(size=(50, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = rng.normal(size=(50, 3))
    u, v = face_coordinates(points, normals)
    higher = np.array([0.0, 0.0, 1e-3])
    raised = higher - normals * (normals @ higher)[:, None]
    u_raised, v_raised = face_coordinates(points + raised, normals)
    np.testing.assert_allclose(u_raised, u, atol=1e-12)
    assert np.all(v_raised > v)
    # The two coordinates and the height over the face are a rotation of the point.
    off_face = (points * normals).sum(axis=1)
    np.testing.assert_allclose(u**2 + v**2 + off_face**2, (points**2).sum(axis=1))


def test_every_shape_of_the_village_stands_clear_of_the_cameras():
    for shape in build_village(0).shapes:
        assert isinstance(shape, (Sphere, Polyhedron))
        for pose in orbit(40):
            assert np.linalg.norm(pose[:3, 3] - shape.center) > shape.bound + 0.5
